"""Running statistics (of batch normalisation) for parameters that were not trained."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.groups import PyTree
from sdp_jax.valley.curvature import check_data, examples


def reestimate_statistics(
    update_stats: Callable[[PyTree, PyTree, Any], PyTree],
    params: PyTree,
    stats: PyTree,
    data: Iterable[Any],
) -> PyTree:
    """Running statistics as they would be after training long at these parameters.

    The exact mean over all batches of what the moving average of training takes in, at
    any momentum: from two starts, all zeros and all ones, the share that an update
    keeps is known, and with it what it adds.

    Args:
      update_stats: one update of training, ``update_stats(params, stats, batch)``; its
        floating-point leaves are exponential moving averages.
      params: the parameters.
      stats: statistics of the right shapes; of their values only the leaves that are
        not floating-point (counters) are used.
      data: batches that can be gone through again, see
        :func:`sdp_jax.curvature_product`; each counts by its number of examples.

    Returns:
      The statistics.

    Raises:
      ValueError: if ``data`` is empty, or ``update_stats`` is no exponential moving
        average.
      TypeError: if ``data`` can be gone through only once.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> def update(params, mean, batch):
      ...     return 0.99 * mean + 0.01 * batch.mean(0)
      >>> batches = [jnp.array([1., 2.]), jnp.array([3., 4.])]
      >>> mean = sdp_jax.reestimate_statistics(update, {}, jnp.zeros(()), batches)
      >>> print(f"{mean:.3f}")
      2.500
    """
    return make_reestimate(update_stats, stats, data)(params)


def make_reestimate(
    update_stats: Callable[[PyTree, PyTree, Any], PyTree],
    stats: PyTree,
    data: Iterable[Any],
) -> Callable[[PyTree], PyTree]:
    """The same for many parameters, compiled once.

    Args:
      update_stats: as for :func:`reestimate_statistics`.
      stats: likewise.
      data: likewise.

    Returns:
      ``params -> stats``.

    Raises:
      ValueError: as :func:`reestimate_statistics`.
      TypeError: likewise.
    """
    check_data(data)

    def filled(value: float) -> PyTree:
        def leaf(x: jax.Array) -> jax.Array:
            return jnp.full_like(x, value) if _averaged(x) else x

        return jax.tree.map(leaf, stats)

    starts = [filled(value) for value in (0.0, 1.0, 2.0)]
    update = jax.jit(update_stats)

    def reestimate(params: PyTree) -> PyTree:
        total: Any = None
        count, kept = 0, starts[0]
        for batch in data:
            added = update(params, starts[0], batch)
            if total is None:
                kept = _share_kept(
                    added, *(update(params, s, batch) for s in starts[1:])
                )
                total = jax.tree.map(jnp.zeros_like, added)
            size = examples(batch)
            count += size
            total = jax.tree.map(
                lambda t, a, n=size: t + n * a if _averaged(a) else a, total, added
            )
        return jax.tree.map(
            lambda t, m: (t / count / (1 - m)).astype(t.dtype) if _averaged(t) else t,
            total,
            kept,
        )

    return reestimate


def _averaged(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def _share_kept(zero: PyTree, one: PyTree, two: PyTree) -> PyTree:
    """What share of the old statistics an update keeps, by leaf."""

    def leaf(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        if not _averaged(a):
            return a
        share, again = b - a, c - b
        coarse = jnp.finfo(a.dtype).eps * (10 + 10 * jnp.abs(c))
        fits = jnp.abs(share - again) <= 1e-3 + coarse
        if not bool(jnp.all(fits & (share > -1e-3 - coarse) & (share < 1 - 1e-6))):
            raise ValueError(
                "update_stats is not an exponential moving average of statistics of "
                "the batch: what it keeps of the old statistics is not a fixed share "
                "below 1. Does it run the model in training mode?"
            )
        return share

    return jax.tree.map(leaf, zero, one, two)
