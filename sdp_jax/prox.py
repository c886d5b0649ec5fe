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

from sdp_jax.groups import Groups

# Channels that stay, for each dimension in order.
Floors: TypeAlias = Sequence[int | jax.Array]

# A channel that only its dimension's floor keeps stays at this share of its dual
# variable: enough for the layer to go on working, and for the dual to grow if it must.
FLOOR_FACTOR = 0.1
# A channel that belongs to a fixed set of survivors keeps at least this share.
MIN_FACTOR = 1e-3


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


def hold_floor(
    norms: jax.Array, threshold: jax.Array, floor: int | jax.Array
) -> jax.Array:
    """Thresholds that leave at least ``floor`` channels of a dimension.

    The ``floor`` channels of largest norm (all that tie) are protected: their factor
    never falls below :data:`FLOOR_FACTOR`. As long as the plain soft-threshold leaves
    them more, it is not touched; a collapse is stopped smoothly, not undone by a jump.

    Args:
      norms: weighted norms ``(size,)``.
      threshold: a scalar, or one threshold per channel.
      floor: channels to keep; an array is allowed, so that it may be traced.

    Returns:
      Thresholds ``(size,)`` in the dtype of ``norms``.
    """
    threshold = jnp.broadcast_to(jnp.asarray(threshold, norms.dtype), norms.shape)
    if isinstance(floor, int) and floor == 0:
        return threshold
    # A channel that is not a number must not take the place of the others.
    ranked = jnp.where(jnp.isnan(norms), -jnp.inf, norms)
    if isinstance(floor, int):
        # A plain maximum is the cheaper of the two, and floors of 1 are the rule.
        level = jnp.max(ranked) if floor == 1 else jax.lax.top_k(ranked, floor)[0][-1]
    else:
        level = jnp.sort(ranked, descending=True)[jnp.maximum(floor - 1, 0)]
        level = jnp.where(floor > 0, level, jnp.inf)
    held = keep_alive(norms, threshold, FLOOR_FACTOR)
    return jnp.where(norms >= level, held, threshold)


def hold_floors(
    groups: Groups, norms: jax.Array, thresholds: chex.Numeric, floors: Floors
) -> jax.Array:
    """Thresholds that leave so many channels of each dimension.

    :func:`hold_floor`, dimension by dimension.

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
    if not len(groups):
        return thresholds
    parts = groups.split(norms), groups.split(thresholds)
    return groups.join(
        {
            name: hold_floor(parts[0][name], parts[1][name], floor)
            for name, floor in zip(groups.sizes, floors, strict=True)
        }
    )


def largest_each(groups: Groups, values: jax.Array, floors: Floors) -> jax.Array:
    """Marks the largest values of each dimension.

    Args:
      groups: the channel dimensions.
      values: a vector ``(num_channels,)``.
      floors: how many, for each dimension.

    Returns:
      A Boolean vector ``(num_channels,)``.
    """
    parts = groups.split(values)
    return groups.join(
        {
            name: largest(parts[name], floor)
            for name, floor in zip(groups.sizes, floors, strict=True)
        }
    )


def keep_alive(
    norms: jax.Array, thresholds: jax.Array, share: float = MIN_FACTOR
) -> jax.Array:
    """Thresholds just low enough that every channel keeps a share of itself.

    Args:
      norms: weighted norms.
      thresholds: thresholds, broadcastable to ``norms``, in the same units.
      share: what the factor of a channel does not fall below.

    Returns:
      Thresholds in the shape of ``norms``.
    """
    return jnp.minimum(thresholds, (1 - share) * norms)


def largest(norms: jax.Array, count: int | jax.Array) -> jax.Array:
    """Marks the ``count`` largest of a vector; the earlier wins a tie.

    Args:
      norms: a vector ``(size,)``.
      count: how many, at most ``size``; may be traced.

    Returns:
      A Boolean vector ``(size,)`` with exactly ``count`` true entries.
    """
    return ranks(-norms) < count


def ranks(values: jax.Array) -> jax.Array:
    """The place of each entry among all in ascending order; the earlier wins a tie.

    Args:
      values: a vector ``(size,)``.

    Returns:
      An integer vector ``(size,)``, a permutation of ``0 … size − 1``.
    """
    order = jnp.argsort(values, stable=True)
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    return jnp.zeros(values.shape, jnp.int32).at[order].set(places)


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
    for (name, size), value in zip(groups.sizes.items(), given, strict=True):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
            floors.append(value)
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"min_channels of dimension {name!r} is {value!r}; it must be an "
                "integer, the number of channels to keep"
            )
        if not 0 <= value <= size:
            raise ValueError(
                f"min_channels of dimension {name!r} is {value}, but it has {size} "
                "channels; give a number between 0 and its size"
            )
        floors.append(int(value))
    return tuple(floors)
