"""Running statistics (of batch normalisation) for parameters that were not trained."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.tree import PyTree
from sdp_jax.valley.curvature import check_data, examples

# As many updates as leave nothing of where an average began, at any momentum.
MANY = 2**24


def reestimate_statistics(
    update_stats: Callable[[PyTree, PyTree, Any], PyTree],
    params: PyTree,
    stats: PyTree,
    data: Iterable[Any],
) -> PyTree:
    """Running statistics as they would be after training long at these parameters.

    The exact mean over all batches of what the moving average of training takes in, at
    any momentum: from two starts the share that an update keeps is known, and with it
    what it adds.

    Args:
      update_stats: one update of training, ``update_stats(params, stats, batch)``; its
        floating-point leaves are exponential moving averages.
      params: the parameters.
      stats: statistics of the right shapes; their values are not used, except that
        leaves that are not floating-point come back as they are. Signed integers count
        updates, and are taken to have counted many.
      data: batches that can be gone through again, see
        :func:`sdp_jax.valley.curvature_product`; each counts by its number of examples.

    Returns:
      The statistics.

    Raises:
      ValueError: if ``data`` is empty, a leaf is coarser than float32, or
        ``update_stats`` is no exponential moving average.
      TypeError: if ``data`` can be gone through only once.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> def update(params, mean, batch):
      ...     return 0.99 * mean + 0.01 * batch.mean(0)
      >>> data = [jnp.array([1., 2.]), jnp.array([3., 4.])]
      >>> mean = sdp_jax.valley.reestimate_statistics(update, {}, jnp.zeros(()), data)
      >>> print(f"{mean:.3f}")
      2.500
    """
    return make_reestimate(update_stats, stats, data)(params)


def make_reestimate(
    update_stats: Callable[[PyTree, PyTree, Any], PyTree],
    stats: PyTree,
    data: Iterable[Any],
) -> Callable[[PyTree], PyTree]:
    """:func:`reestimate_statistics` for many parameters, compiled once."""
    check_data(data)

    for leaf in jax.tree.leaves(stats):
        dtype = jnp.asarray(leaf).dtype
        if _averaged(leaf) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"stats has a leaf of dtype {dtype}, too coarse to tell what an update "
                "adds; keep running statistics in float32"
            )
    update = jax.jit(update_stats)

    def start(scales: PyTree) -> PyTree:
        """Statistics of these values; counters stand as after many updates."""

        def leaf(x: Any, scale: Any) -> jax.Array:
            x = jnp.asarray(x)
            if _averaged(x):
                return jnp.full_like(x, scale)
            counts = jnp.issubdtype(x.dtype, jnp.signedinteger)
            return jnp.full_like(x, MANY) if counts else x

        return jax.tree.map(leaf, stats, scales)

    zeros = jax.tree.map(lambda x: 0.0, stats)

    def reestimate(params: PyTree) -> PyTree:
        total: Any = None
        count, kept = 0, zeros
        for batch in data:
            added = update(params, start(zeros), batch)
            if total is None:
                total = jax.tree.map(jnp.zeros_like, added)
                # As large as what is added, lest the share is lost in rounding.
                scales = jax.tree.map(_scale, added)
                twice = jax.tree.map(lambda s: 2 * s, scales)
                once, again = (update(params, start(s), batch) for s in (scales, twice))
                kept = jax.tree.map(_share_kept, added, once, again, scales)
            size = examples(batch)
            count += size
            total = jax.tree.map(
                lambda t, a, n=size: t + n * a if _averaged(a) else a, total, added
            )
        return jax.tree.map(
            lambda t, m, x: (
                (t / count / (1 - m)).astype(t.dtype) if _averaged(t) else x
            ),
            total,
            kept,
            stats,
        )

    return reestimate


def _averaged(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def _scale(added: jax.Array) -> float:
    """A value that this leaf is started from."""
    largest = float(jnp.max(jnp.abs(added), initial=0.0)) if _averaged(added) else 0.0
    return 100 * largest if largest > 0 else 1.0


def _share_kept(zero: jax.Array, one: jax.Array, two: jax.Array, scale: float) -> Any:
    """What share of an old leaf an update keeps: from starts 0, ``scale`` and twice."""
    if not _averaged(zero):
        return 0.0
    share, again = (one - zero) / scale, (two - one) / scale
    middle = jnp.median(share)
    off = jnp.maximum(jnp.abs(share - middle), jnp.abs(again - middle))
    if not bool(jnp.all(off <= 1e-3) & (middle > -1e-3) & (middle < 1 - 1e-6)):
        raise ValueError(
            "update_stats is not an exponential moving average of statistics of the "
            "batch: what it keeps of the old statistics is not a fixed share below 1. "
            "Does it run the model in training mode?"
        )
    return middle
