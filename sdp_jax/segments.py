"""Reductions and ranks within the blocks of a vector, a few operations for all blocks.

A vector ``(n,)`` falls into blocks: the channels of one dimension (``groups.owner``),
or those that a ranking compares (``groups.blocks``). A block vector gives for each
entry the number of its block, from 0. However many blocks there are, the number of
operations stays the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def sum_each(values: jax.Array, block: np.ndarray) -> jax.Array:
    """The sum over each block.

    Args:
      values: a vector ``(n,)``; Booleans are counted.
      block: number of the block of each entry, integers ``(n,)``, not empty.

    Returns:
      A vector ``(blocks,)``.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> print(sum_each(jnp.array([1, 2, 4]), np.array([0, 0, 1])))
      [3 4]
    """
    return _each(jax.ops.segment_sum, _counted(values), block)


def sum_over(values: jax.Array, block: np.ndarray) -> jax.Array:
    """The sum over each block, for each entry of it.

    Args:
      values: a vector ``(n,)``; Booleans are counted.
      block: number of the block of each entry, integers ``(n,)``.

    Returns:
      A vector ``(n,)``.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> print(sum_over(jnp.array([1, 2, 4]), np.array([0, 0, 1])))
      [3 3 4]
    """
    return _over(jax.ops.segment_sum, _counted(values), block)


def max_over(values: jax.Array, block: np.ndarray) -> jax.Array:
    """The maximum over each block, for each entry of it; see :func:`sum_over`."""
    return _over(jax.ops.segment_max, values, block)


def min_over(values: jax.Array, block: np.ndarray) -> jax.Array:
    """The minimum over each block, for each entry of it; see :func:`sum_over`."""
    return _over(jax.ops.segment_min, values, block)


def sort_within(values: jax.Array, block: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Sorts within each block, block after block; the earlier wins a tie.

    Args:
      values: a vector ``(n,)``; what is not a number comes last.
      block: number of the block of each entry, integers ``(n,)``.

    Returns:
      The values in order, and where each of them came from, int32.
    """
    places = jnp.arange(len(block), dtype=jnp.int32)
    if not np.any(block):
        values, places = jax.lax.sort((values, places), num_keys=1, is_stable=True)
        return values, places
    keys = (jnp.asarray(block, jnp.int32), values, places)
    _, values, places = jax.lax.sort(keys, num_keys=2, is_stable=True)
    return values, places


def ranks(values: jax.Array, block: np.ndarray) -> jax.Array:
    """The place of each entry within its block, ascending; the earlier wins a tie.

    Args:
      values: a vector ``(n,)``; what is not a number comes last.
      block: number of the block of each entry, integers ``(n,)``.

    Returns:
      An integer vector ``(n,)``, from 0 to one less than the size of the block.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> print(ranks(jnp.array([5., 2., 9., 1.]), np.array([0, 0, 1, 1])))
      [1 0 1 0]
    """
    if not len(block):
        return jnp.zeros((0,), jnp.int32)
    _, places = sort_within(values, block)
    inner = np.arange(len(block), dtype=np.int32)
    inner -= np.repeat(starts(block), np.bincount(block)).astype(np.int32)
    return jnp.zeros((len(block),), jnp.int32).at[places].set(jnp.asarray(inner))


class Lowest(NamedTuple):
    """What :func:`lowest` finds.

    Attributes:
      mask: which entries are among the lowest, Boolean ``(n,)``.
      last: the largest value among the lowest of each block, ``(blocks,)``.
      next: the smallest value beside them, or the largest where there is none.
    """

    mask: jax.Array
    last: jax.Array
    next: jax.Array


def lowest(
    values: jax.Array,
    counts: jax.Array | np.ndarray | Sequence[int],
    block: np.ndarray,
) -> Lowest:
    """Marks the lowest of each block; the earlier wins a tie.

    Args:
      values: a vector ``(n,)``; what is not a number counts as infinite.
      counts: how many of each block, integers ``(blocks,)``, at most its size.
      block: number of the block of each entry, integers ``(n,)``.

    Returns:
      A :class:`Lowest`; its mask has exactly so many true entries.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> block = np.array([0, 0, 1, 1])
      >>> print(lowest(jnp.array([5., 2., 1., 1.]), np.array([1, 1]), block).mask)
      [False  True  True False]
    """
    if not len(block):
        return Lowest(jnp.zeros((0,), bool), values, values)
    counts = jnp.asarray(counts, jnp.int32)
    values = jnp.where(jnp.isnan(values), jnp.inf, values)
    ascending, places = sort_within(values, block)
    first, sizes = starts(block), np.bincount(block)
    last = first + jnp.maximum(counts - 1, 0)
    level, place = ascending[last], places[last]
    tied = (values == level[block]) & (np.arange(len(block)) <= place[block])
    mask = ((values < level[block]) | tied) & (counts > 0)[block]
    beside = ascending[first + jnp.minimum(counts, sizes - 1)]
    return Lowest(mask, level, beside)


def starts(block: np.ndarray) -> np.ndarray:
    """Where each block begins once the vector is sorted by block."""
    sizes = np.bincount(block)
    return np.cumsum(sizes) - sizes


def _counted(values: jax.Array) -> jax.Array:
    return values.astype(jnp.int32) if values.dtype == bool else values


def _each(reduce: Callable, values: jax.Array, block: np.ndarray) -> jax.Array:
    ordered = bool(np.all(np.diff(block) >= 0))
    return reduce(values, block, int(block.max()) + 1, indices_are_sorted=ordered)


def _over(reduce: Callable, values: jax.Array, block: np.ndarray) -> jax.Array:
    return _each(reduce, values, block)[block] if len(block) else values
