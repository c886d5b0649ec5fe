"""Sketches of the directions that a stream of steps uses most, in small memory.

The steps of an optimizer lie mostly in the sharp directions of the loss. Each estimator
keeps ``rank`` directions and how much of the stream runs along each. A step ``x`` (of
unit norm) is written in the basis and the direction of what is left of it,
``x = Qᵀ c + ρ q``; the estimator turns the ``rank + 1`` directions ``[Q; q]`` into the
next ``rank``, by a small matrix that depends on ``c``, ``ρ`` and the energies alone.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sdp_jax.valley.vectors import (
    coefficients,
    combine,
    dot,
    symmetric_power,
    wide,
)

Estimator: TypeAlias = Literal["svd", "frequent_directions", "oja"]
# The next directions in terms of the old ones and the rest, (rank, rank + 1), and the
# next energies, (rank,), from energies, coefficients (rank + 1,) and decay.
Turn: TypeAlias = Callable[[jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]


def incremental_svd(
    energy: jax.Array, column: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """The best ``rank`` directions of the decayed second moment."""
    values, vectors = _moment(energy, column, decay)
    rank = energy.shape[0]
    return vectors[:, :rank].T, values[:rank]


def frequent_directions(
    energy: jax.Array, column: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """The same, less the energy of the direction that is dropped."""
    values, vectors = _moment(energy, column, decay)
    rank = energy.shape[0]
    return vectors[:, :rank].T, values[:rank] - values[rank]


def oja(
    energy: jax.Array, column: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """A step of rate ``1 − decay`` towards ``x``; empty places take what is left."""
    rank = energy.shape[0]
    turn = jnp.eye(rank, rank + 1, dtype=column.dtype)
    turn = turn + (1 - decay) * jnp.outer(column[:rank], column)
    empty = energy <= 0
    first = empty & (jnp.cumsum(empty) == 1) & (column[rank] > 0)
    rest = jnp.zeros(rank + 1, column.dtype).at[rank].set(1)
    turn = jnp.where(first[:, None], rest, jnp.where(empty[:, None], 0, turn))
    turn = dot(symmetric_power(dot(turn, turn.T), -0.5), turn)
    along = dot(turn, column)
    return turn, decay * energy + along**2


ESTIMATORS: dict[Estimator, Turn] = {
    "svd": incremental_svd,
    "frequent_directions": frequent_directions,
    "oja": oja,
}


def track(
    turn: Turn,
    basis: optax.Params,
    gram: jax.Array,
    energy: jax.Array,
    step: optax.Params,
    decay: float,
) -> tuple[optax.Params, jax.Array]:
    """Takes one step of the stream into the sketch: the next directions and energies.

    ``gram`` holds the inner products of the directions: what rounding has done to them
    is undone here. A step that is zero or not finite changes nothing.
    """
    size = optax.tree.norm(jax.tree.map(wide, step))
    good = jnp.isfinite(size) & (size > 0)
    step = jax.tree.map(
        lambda x: jnp.where(good, wide(x) / jnp.where(good, size, 1), 0), step
    )
    whiten = symmetric_power(gram, -0.5)
    # Gram-Schmidt twice: once is not enough in float32 when the rest is small.
    inside = dot(whiten, coefficients(basis, step))
    rest = jax.tree.map(jnp.subtract, step, combine(dot(inside, whiten), basis))
    again = dot(whiten, coefficients(basis, rest))
    rest = jax.tree.map(jnp.subtract, rest, combine(dot(again, whiten), basis))
    inside = inside + again
    length = optax.tree.norm(rest)
    new = length > 1e-4
    column = jnp.append(inside, jnp.where(new, length, 0))
    turned, values = turn(energy.astype(column.dtype), column, decay)
    old, fresh = dot(turned[:, :-1], whiten), turned[:, -1]

    def rotate(u: jax.Array, mixed: jax.Array, r: jax.Array) -> jax.Array:
        r = jnp.where(new, r / jnp.where(new, length, 1), 0)
        out = mixed + fresh.reshape(-1, *(1,) * r.ndim).astype(r.dtype) * r
        return jnp.where(good, out.astype(u.dtype), u)

    next_basis = jax.tree.map(rotate, basis, combine(old, basis), rest)
    values = jnp.maximum(values, 0).astype(energy.dtype)
    return next_basis, jnp.where(good, values, energy)


def _moment(
    energy: jax.Array, column: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, falling, and eigenvectors of the moment with the new step."""
    moment = jnp.diag(jnp.append(decay * energy, 0)) + jnp.outer(column, column)
    values, vectors = jnp.linalg.eigh(moment)
    return values[::-1], vectors[:, ::-1]
