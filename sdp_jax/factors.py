"""Factors: what one number per channel does to the producers of the channel."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.channels import producer_leaves
from sdp_jax.dimension import Member
from sdp_jax.groups import Groups
from sdp_jax.mesh import replicated, zero_like
from sdp_jax.tree import PyTree, leaf_table, replace_leaves


def scale_channels(groups: Groups, tree: PyTree, factors: jax.Array) -> PyTree:
    """Multiplies the producers of each channel by the channel's factor.

    One fused multiplication per leaf; leaves without a producer pass unchanged.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      factors: a vector ``(num_channels,)``.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: if a producer is missing or has another shape, or the factors are not
        a vector of one number for each channel.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 2))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> factors = jnp.array([1., 0.])
      >>> print(sdp_jax.scale_channels(groups, params, factors)["w"])
      [[1. 0.]
       [1. 0.]]
    """
    return _scaled(groups, tree, factors)


def shrink_channels(groups: Groups, tree: PyTree, factors: jax.Array) -> PyTree:
    """Applies the factors of a threshold: 0 takes all, what lies between only some.

    A factor of 0 zeroes all producers of a channel. Another one multiplies those of
    ``groups.shrinking`` and leaves the scale-invariant ones as they are, bit for bit.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      factors: a vector ``(num_channels,)``.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: as :func:`scale_channels`.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 3)), "scale": jnp.ones(3)}
      >>> unit = [sdp_jax.Member("w", 1, scale_invariant=True)]
      >>> unit += [sdp_jax.Member("scale", 0)]
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": unit})
      >>> small = shrink_channels(groups, params, jnp.array([1., 0.5, 0.]))
      >>> print(small["scale"], small["w"][0])
      [1.  0.5 0. ] [1. 1. 0.]
    """
    return _scaled(groups, tree, factors, shrinking=True)


def remove_channels(
    groups: Groups, updates: PyTree, params: PyTree, keep: jax.Array
) -> PyTree:
    """Updates that set channels to zero, and otherwise stay as they are.

    Args:
      groups: the channel dimensions.
      updates: a step from the parameters.
      params: the parameters.
      keep: a vector ``(num_channels,)``, 0 for the channels that go and 1 for others.

    Returns:
      Updates; where they set to zero they are exactly ``-params``, in a dtype that
      holds both.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params, steps = {"w": jnp.array([[3., 4.]])}, {"w": jnp.array([[.5, .5]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(remove_channels(groups, steps, params, jnp.array([1., 0.]))["w"])
      [[ 0.5 -4. ]]
    """
    table, steps = producer_leaves(groups, params), leaf_table(updates)
    keep = replicated(keep, *table.values())
    scales = _leaf_scales(groups, table, keep)
    changed = {}
    for path, scale in scales.items():
        dtype = jnp.promote_types(table[path].dtype, steps[path].dtype)
        p, u = table[path].astype(dtype), steps[path].astype(dtype)
        changed[path] = jnp.where(zero_like(scale, p), -p, u)
    return replace_leaves(updates, changed)


def _leaf_scales(
    groups: Groups,
    table: Mapping[str, Any],
    factors: jax.Array,
    shrinking: bool = False,
) -> dict[str, jax.Array]:
    """By path what each producer is multiplied by, broadcasting to the leaf.

    With ``shrinking`` others than those of ``groups.shrinking`` by 0 or 1.
    """
    parts = split_alike(groups, factors)
    spared = set(groups.producers) - set(groups.shrinking) if shrinking else ()
    scales: dict[str, jax.Array] = {}
    for producer in groups.producers:
        name, member, size = producer
        leaf = table[member.path]
        shape = [1] * leaf.ndim
        shape[member.axis] = length = leaf.shape[member.axis]
        factor = parts[name] != 0 if producer in spared else parts[name]
        factor = factor.astype(jnp.finfo(leaf.dtype).dtype)
        spread = _spread(factor, member, size, length).reshape(shape)
        old = scales.get(member.path)
        scales[member.path] = spread if old is None else old * spread
    return scales


def _scaled(
    groups: Groups, tree: PyTree, factors: jax.Array, *, shrinking: bool = False
) -> PyTree:
    table = producer_leaves(groups, tree)
    scales = _leaf_scales(groups, table, factors, shrinking)
    return replace_leaves(tree, {path: table[path] * x for path, x in scales.items()})


def split_alike(groups: Groups, vector: jax.Array) -> dict[str, jax.Array]:
    """``groups.split`` for hundreds of dimensions.

    XLA compiles equal kernels once. A slice at a fixed place is in each kernel another
    number, and hundreds of equal layers would all be compiled: here the places are
    data. They are told from constants by an index that XLA does not know to be 0.

    Args:
      groups: the channel dimensions.
      vector: a vector ``(num_channels,)``.

    Returns:
      For each dimension name a vector ``(size,)``.
    """
    if len(groups) < 2:
        return groups.split(vector)
    groups.check_vector(vector)
    unknown = (vector[0] < 0).astype(jnp.int32)
    out, start = {}, 0
    for name, size in groups.sizes.items():
        place = jnp.asarray(np.array([start, start, -1], np.int32))
        place = jax.lax.dynamic_index_in_dim(place, unknown, keepdims=False)
        out[name] = jax.lax.dynamic_slice(vector, (place,), (size,))
        start += size
    return out


def _spread(factor: jax.Array, member: Member, size: int, length: int) -> jax.Array:
    """The inverse of reading channels: factors along the axis, 1 where nobody is."""
    block = size * member.inner
    shape = (member.outer, size, member.inner)
    if member.places is not None:
        ones = jnp.ones(length, factor.dtype)
        spread = jnp.broadcast_to(factor[None, :, None], shape)
        return ones.at[member.positions(size)].set(spread)
    line = jnp.broadcast_to(factor[None, :, None], shape).reshape(member.outer, block)
    if member.outer > 1:
        period = member.period or block
        line = jnp.pad(line, ((0, 0), (0, period - block)), constant_values=1)
    line = line.reshape(-1)[: length - member.offset]
    after = length - member.offset - line.shape[0]
    return jnp.pad(line, (member.offset, after), constant_values=1)
