"""Proximal maps on channels: factors by which the channels of a group are multiplied.

All maps work on *weighted norms* ``‖v_c‖ / k_c`` (see
:func:`sdp_jax.channel_weights`) and on thresholds in the same units, so that one
comparison serves every weighting.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax import segments
from sdp_jax.groups import Groups

# Channels that stay, for each dimension in order.
Floors: TypeAlias = Sequence[int | jax.Array]

# A channel that only its dimension's floor keeps stays at this share of its dual
# variable: enough for the layer to go on working, and for the dual to grow if it must.
FLOOR_FACTOR = 0.1


def soft_threshold_factor(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Factor of the group soft-threshold, ``max(0, 1 - threshold / norm)``.

    The proximal map of ``threshold * k * ‖w‖`` at ``v`` is ``factor * v`` (Parikh and
    Boyd 2014, section 6.5.1). A threshold of 0 gives exactly 1, an infinite one exactly
    0, a norm that is not a number stays not a number.

    Args:
      norms: weighted norms, any shape.
      thresholds: thresholds, broadcastable to ``norms``, in the same units.

    Returns:
      Factors in [0, 1], in the shape and dtype of ``norms``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(soft_threshold_factor(jnp.array([1., 2., 4.]), jnp.array(2.)))
      [0.  0.  0.5]
    """
    thresholds = jnp.asarray(thresholds, norms.dtype)
    zero = (thresholds > 0) & (norms <= thresholds)
    free = thresholds == 0
    safe = jnp.where(zero | free, 1, norms)
    shrunk = 1 - jnp.where(free, 0, thresholds) / safe
    return jnp.where(zero, 0, shrunk).astype(norms.dtype)


def hold_floors(
    groups: Groups, norms: jax.Array, thresholds: chex.Numeric, floors: Floors
) -> jax.Array:
    """Thresholds that leave so many channels of each dimension.

    The channels of largest norm (all that tie) are protected: their factor never falls
    below :data:`FLOOR_FACTOR`. As long as the plain soft-threshold leaves them more, it
    is not touched; a collapse is stopped smoothly, not undone by a jump.

    Args:
      groups: the channel dimensions.
      norms: weighted norms ``(num_channels,)``.
      thresholds: a scalar, or one threshold per channel.
      floors: channels that stay, for each dimension.

    Returns:
      Thresholds ``(num_channels,)`` in the dtype of ``norms``.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 3))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(hold_floors(groups, jnp.array([1., 2., 5.]), 8., [1]))
      [8.  8.  4.5]
    """
    thresholds = jnp.broadcast_to(jnp.asarray(thresholds, norms.dtype), norms.shape)
    counts, owner = floor_counts(floors), groups.owner
    known = isinstance(counts, np.ndarray)
    if known and not np.any(counts):
        return thresholds
    # A channel that is not a number must not take the place of the others.
    ranked = jnp.where(jnp.isnan(norms), -jnp.inf, norms)
    if known and np.all(counts <= 1):
        # A plain maximum is cheaper than sorting, and floors of 1 are the rule.
        level = segments.max_over(ranked, owner)
    else:
        ascending, _ = segments.sort_within(ranked, owner)
        ends = np.cumsum([*groups.sizes.values()])
        level = ascending[ends - jnp.maximum(counts, 1)][owner]
    level = jnp.where(jnp.asarray(counts)[owner] > 0, level, jnp.inf)
    held = jnp.minimum(thresholds, (1 - FLOOR_FACTOR) * norms)
    return jnp.where(norms >= level, held, thresholds)


def largest_each(
    groups: Groups, values: jax.Array, counts: jax.Array | np.ndarray | Sequence[int]
) -> jax.Array:
    """Marks the largest values of each dimension; the earlier wins a tie.

    Args:
      groups: the channel dimensions.
      values: a vector ``(num_channels,)``.
      counts: how many, for each dimension, integers ``(dimensions,)``.

    Returns:
      A Boolean vector ``(num_channels,)`` with exactly so many true entries.
    """
    return segments.lowest(-values, counts, groups.owner).mask


def floor_counts(floors: Floors) -> np.ndarray | jax.Array:
    """The floors as one vector.

    Args:
      floors: channels that stay, for each dimension; some may be traced.

    Returns:
      Integers ``(dimensions,)``, a NumPy array where all are known.
    """
    if not any(isinstance(floor, jax.Array) for floor in floors):
        return np.asarray(floors, np.int32)
    first = floors[0]
    if all(floor is first for floor in floors):
        return jnp.broadcast_to(first, (len(floors),))
    return jnp.stack([jnp.asarray(floor, jnp.int32) for floor in floors])


def resolve_floors(
    groups: Groups, min_channels: int | jax.Array | Mapping[str, int]
) -> tuple[int | jax.Array, ...]:
    """One floor for each dimension.

    Args:
      groups: the channel dimensions.
      min_channels: a number for all dimensions, or one for each name (others get 1).

    Returns:
      The number for each dimension, in order.

    Raises:
      ValueError: if a number is negative, above the size of its dimension, or given
        for a dimension that does not exist.
      TypeError: if one is not an integer.
    """
    if isinstance(min_channels, Mapping):
        unknown = sorted(set(min_channels) - set(groups.sizes))
        if unknown:
            raise ValueError(
                f"min_channels names dimensions that do not exist: {unknown}; there "
                f"are {list(groups.sizes)}"
            )
        given = [min_channels.get(name, 1) for name in groups.sizes]
    else:
        given = [min_channels] * len(groups)
    floors: list[int | jax.Array] = []
    for name, value in zip(groups.sizes, given, strict=True):
        size = groups.dense.sizes[name]
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
            floors.append(value)
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"min_channels of dimension {name!r} is {value!r}; it must be an "
                "integer, the number of channels to keep"
            )
        if not value and isinstance(min_channels, Mapping):
            if not groups[name].removable:
                raise ValueError(
                    f"min_channels of dimension {name!r} is 0, but it cannot vanish: "
                    "the outputs would no longer depend on the inputs "
                    "(Dimension.removable says which can)"
                )
        if not 0 <= value <= size:
            raise ValueError(
                f"min_channels of dimension {name!r} is {value}, but it has {size} "
                "channels; give a number between 0 and its size"
            )
        # A cut may have left fewer.
        floors.append(min(int(value), groups.sizes[name]))
    return tuple(floors)
