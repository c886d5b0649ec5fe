"""A few directions in parameter space: bases as trees with one more leading axis.

A *basis* of rank ``r`` has the leaves of the parameters, each with a leading axis of
length ``r``. Products are real (real and imaginary parts are coordinates of their own)
and accumulate in at least float32, at full precision also where the hardware would
round its factors.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.mesh import replicated_sharding
from sdp_jax.tree import PyTree, leaf_table

HIGHEST = jax.lax.Precision.HIGHEST


def wide(x: jax.Array) -> jax.Array:
    """The same in at least float32."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def inner(first: PyTree, second: PyTree) -> jax.Array:
    """Real inner products of a basis of rank r and one of rank s, ``(r, s)``."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.dtype != b.dtype and 1 in (a.shape[0], b.shape[0]):
            # Sums of products as they are read: no wide copy of either is made.
            whole = jnp.sum(wide(a) * wide(b), axis=tuple(range(1, a.ndim)))
            return whole.reshape(len(a), len(b))
        if a.dtype != b.dtype:
            a, b = wide(a), wide(b)
        axes = tuple(range(1, a.ndim))
        return jax.lax.dot_general(
            *(jnp.conj(a), b, ((axes, axes), ((), ()))),
            precision=HIGHEST,
            preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
            out_sharding=replicated_sharding(a, b),
        ).real

    parts = jax.tree.leaves(jax.tree.map(product, first, second))
    return functools.reduce(jnp.add, parts)


def coefficients(basis: PyTree, tree: PyTree) -> jax.Array:
    """``U x``, the real inner products of each direction with a tree, ``(rank,)``."""
    return inner(basis, jax.tree.map(lambda x: x[None], tree))[:, 0]


def combine(weights: jax.Array, basis: PyTree) -> PyTree:
    """``Uᵀ a``: the sum of directions with weights ``(rank,)``, or ``(s, rank)``."""

    def leaf(u: jax.Array) -> jax.Array:
        if u.dtype == wide(u).dtype:
            values = weights.astype(u.dtype)
            return jnp.tensordot(values, u, axes=1, precision=HIGHEST)

        def one(w: jax.Array) -> jax.Array:
            # Read once, in its own precision, and added up in the wide one.
            terms = [w[i] * wide(u[i]) for i in range(len(u))]
            return functools.reduce(jnp.add, terms)

        if weights.ndim == 1:
            return one(weights)
        return jnp.stack([one(w) for w in weights])

    return jax.tree.map(leaf, basis)


def dot(first: jax.Array, second: jax.Array) -> jax.Array:
    """Matrix product at full precision."""
    return jnp.matmul(first, second, precision=HIGHEST)


def symmetric_power(matrix: jax.Array, power: float) -> jax.Array:
    """A power of a positive semidefinite matrix on its range, elsewhere 0."""
    values, vectors = jnp.linalg.eigh(matrix)
    tiny = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
    good = values > 10 * tiny
    powers = jnp.where(good, jnp.where(good, values, 1) ** power, 0)
    return dot(vectors * powers, vectors.T)


def gram_inverse(gram: jax.Array) -> jax.Array:
    """The pseudo-inverse of a Gram matrix, whatever the lengths of its vectors.

    Lengths are taken out first, so that a short vector is a direction like a long one.
    """
    lengths = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    scales = inverse[:, None] * inverse
    return scales * symmetric_power(scales * gram, -1.0)


def orthonormal(basis: PyTree) -> PyTree:
    """The orthonormal basis of the same space that is nearest to this one.

    Directions that depend on others make it smaller: then some of its directions are
    shorter than 1, and projecting with them needs :func:`sharp_part`.
    """

    def row(value: jax.Array, u: jax.Array) -> jax.Array:
        return value.reshape(-1, *(1,) * (u.ndim - 1)).astype(u.real.dtype)

    def unit(basis: PyTree, measure: Any) -> PyTree:
        size = measure(basis)
        inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        return jax.tree.map(lambda u: u * row(inverse, u), basis)

    def largest(basis: PyTree) -> jax.Array:
        parts = [
            jnp.max(jnp.abs(u), axis=tuple(range(1, u.ndim)), initial=0)
            for u in jax.tree.leaves(basis)
        ]
        return functools.reduce(jnp.maximum, parts)

    basis = unit(jax.tree.map(wide, basis), largest)  # Squares must not underflow.
    basis = unit(basis, lambda b: jnp.sqrt(jnp.diagonal(inner(b, b))))
    for _ in range(2):  # Once leaves an error of the square root of the rounding.
        basis = combine(symmetric_power(inner(basis, basis), -0.5), basis)
    return basis


def sharp_part(basis: PyTree, gram: jax.Array, tree: PyTree) -> PyTree:
    """Orthogonal projection on the space of a basis; 0 if ``tree`` is not finite."""
    weights = dot(gram_inverse(gram), coefficients(basis, tree))
    finite = jnp.isfinite(weights).all()
    return combine(jnp.where(finite, weights, 0), basis)


def fit_basis(basis: PyTree, params: optax.Params) -> tuple[PyTree, int]:
    """Checks that a basis fits the parameters; in their structure, with its rank.

    A tree without leaves passes: ``optax.tree.map_params`` initialises with one.
    """
    have, want = leaf_table(basis), leaf_table(params)
    if not want:
        return basis, 1
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
    ((rank,),) = ranks
    if rank == 0:
        raise ValueError("basis has no direction; give at least one")
    leaves = [jnp.asarray(have[path]) for path in want]
    if any(
        not isinstance(u, jax.core.Tracer) and not bool(jnp.isfinite(u).all())
        for u in leaves
    ):
        raise ValueError("basis has entries that are not finite")
    return jax.tree.unflatten(jax.tree.structure(params), leaves), int(rank)


def unravel(vector: Any, like: PyTree) -> PyTree:
    """A tree from a vector ``(n,)``, or a basis from ``(rank, n)``, in wide dtypes."""
    leaves, treedef = jax.tree.flatten(like)
    sizes = [np.size(leaf) for leaf in leaves]
    parts = np.split(np.asarray(vector), np.cumsum(sizes)[:-1], axis=-1)
    return treedef.unflatten(
        jnp.asarray(
            part.reshape((*part.shape[:-1], *np.shape(leaf))),
            jnp.promote_types(leaf.dtype, jnp.float32),
        )
        for part, leaf in zip(parts, leaves, strict=True)
    )


def ravel(tree: PyTree) -> np.ndarray:
    """The entries of a tree as one float64 vector in NumPy."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in leaves])
