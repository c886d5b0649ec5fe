"""A few directions in parameter space: bases as trees with one more leading axis.

A *basis* of rank ``r`` has the leaves of the parameters, each with a leading axis of
length ``r``. Products are real (real and imaginary parts are coordinates of their own)
and accumulate in at least float32, at full precision also where the hardware would
round its factors.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.groups import PyTree, leaf_table

HIGHEST = jax.lax.Precision.HIGHEST


def wide(x: jax.Array) -> jax.Array:
    """The same in at least float32."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def inner(first: PyTree, second: PyTree) -> jax.Array:
    """Real inner products of two bases, of a basis and a tree, or of two trees.

    Args:
      first: a basis of rank ``r``.
      second: a basis of rank ``s``.

    Returns:
      The matrix ``(r, s)``.
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = wide(a), wide(b)
        a, b = (x.reshape(x.shape[0], -1) for x in (a, b))
        value = jnp.matmul(jnp.conj(a), b.T, precision=HIGHEST)
        return value.real

    parts = jax.tree.leaves(jax.tree.map(product, first, second))
    return functools.reduce(jnp.add, parts)


def coefficients(basis: PyTree, tree: PyTree) -> jax.Array:
    """``U x``, the real inner products of each direction with a tree, ``(rank,)``."""
    return inner(basis, jax.tree.map(lambda x: x[None], tree))[:, 0]


def combine(weights: jax.Array, basis: PyTree) -> PyTree:
    """``Uᵀ a``: the sum of the directions with these weights.

    Args:
      weights: ``(rank,)``, or ``(s, rank)`` for ``s`` sums at once.
      basis: a basis.

    Returns:
      A tree like the parameters, or a basis of rank ``s``; at least float32.
    """

    def leaf(u: jax.Array) -> jax.Array:
        u = wide(u)
        return jnp.tensordot(weights.astype(u.dtype), u, axes=1, precision=HIGHEST)

    return jax.tree.map(leaf, basis)


def symmetric_power(matrix: jax.Array, power: float) -> jax.Array:
    """A power of a symmetric positive semidefinite matrix, on its range.

    Args:
      matrix: ``(r, r)``.
      power: the exponent; eigenvalues that vanish beside the largest stay 0 even if it
        is negative.

    Returns:
      ``(r, r)``.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    tiny = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
    good = values > 10 * tiny
    powers = jnp.where(good, jnp.where(good, values, 1) ** power, 0)
    return jnp.matmul(vectors * powers, vectors.T, precision=HIGHEST)


def orthonormal(basis: PyTree) -> PyTree:
    """The orthonormal basis of the same space that is nearest to this one.

    Directions that depend on others make it smaller: then some of its directions are
    shorter than 1, and projecting with them needs :func:`symmetric_power` as well.

    Args:
      basis: a basis.

    Returns:
      A basis, at least float32.
    """
    for _ in range(2):  # Once leaves an error of the square root of the rounding.
        basis = combine(symmetric_power(inner(basis, basis), -0.5), basis)
    return basis


def sharp_part(basis: PyTree, gram: jax.Array, tree: PyTree) -> PyTree:
    """Orthogonal projection of a tree on the space of a basis.

    Args:
      basis: a basis, orthonormal or not; directions may be zero.
      gram: its inner products, ``inner(basis, basis)``.
      tree: a tree like the parameters.

    Returns:
      A tree like the parameters, at least float32.
    """
    weights = symmetric_power(gram, -1.0) @ coefficients(basis, tree)
    return combine(weights, basis)


def check_basis(basis: PyTree, params: optax.Params) -> int:
    """Checks that a basis fits the parameters.

    A tree without leaves passes: ``optax.tree.map_params`` initialises with one.

    Args:
      basis: what was given.
      params: the parameters.

    Returns:
      Its rank.

    Raises:
      ValueError: if leaves are missing, or of another shape.
    """
    have, want = leaf_table(basis), leaf_table(params)
    if not want:
        return 1
    ranks = {np.shape(leaf)[:1] for leaf in have.values()}
    if have.keys() != want.keys() or len(ranks) != 1 or ranks == {()}:
        raise ValueError(
            "basis must have the leaves of the parameters, each with one leading axis "
            f"of the same length: {sorted(want)}; got "
            f"{ {path: np.shape(leaf) for path, leaf in have.items()} }"
        )
    for path, leaf in have.items():
        if np.shape(leaf)[1:] != np.shape(want[path]):
            raise ValueError(
                f"basis leaf {path!r} has shape {np.shape(leaf)}; expected (rank, "
                f"*{np.shape(want[path])})"
            )
    (rank,) = ranks
    return int(rank[0])


def unravel(vector: Any, like: PyTree) -> PyTree:
    """A tree like the parameters from the vector of its entries, in wide dtypes.

    Args:
      vector: NumPy vector, ``(n,)`` or ``(rank, n)``.
      like: the parameters.

    Returns:
      A tree, or a basis.
    """
    leaves, treedef = jax.tree.flatten(like)
    sizes = [np.size(leaf) for leaf in leaves]
    parts = np.split(np.asarray(vector), np.cumsum(sizes)[:-1], axis=-1)
    return treedef.unflatten(
        jnp.asarray(
            part.reshape(*part.shape[:-1], *np.shape(leaf)),
            jnp.promote_types(leaf.dtype, jnp.float32),
        )
        for part, leaf in zip(parts, leaves, strict=True)
    )


def ravel(tree: PyTree) -> np.ndarray:
    """The entries of a tree as one float64 vector in NumPy."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in leaves])
