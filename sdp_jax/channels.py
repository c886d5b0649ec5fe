"""Arithmetic on channels: what every transformation does at each step.

All that is known of channels one by one (norms, thresholds, factors, scores) is one
vector ``(num_channels,)``, dimension after dimension in the order of the groups.
``groups.split`` takes it apart by dimension name and ``groups.join`` puts it together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import Groups, Member, Role
from sdp_jax.tree import PyTree, leaf_table, missing_path_message

Weighting = Literal["plain", "size", "cost"]


class PerChannel(NamedTuple):
    """A pytree node of per-channel numbers, so that a cut can recognise them.

    The attribute's name marks it also where a checkpoint has turned the node into a
    dictionary.

    Attributes:
      per_channel: one vector for all channels, dimension after dimension,
        ``(num_channels,)``.
    """

    per_channel: jax.Array


def channel_weights(
    groups: Groups, weights: Weighting | Mapping[str, float] = "plain"
) -> np.ndarray:
    """The factor ``k`` by which each channel's threshold is multiplied.

    Args:
      groups: the channel dimensions.
      weights: ``"plain"`` for 1; ``"size"`` for the square root of the number of
        producer entries of a channel, as in the group lasso (Yuan and Lin 2006);
        ``"cost"`` for the number of parameters that go with the channel, divided by
        the mean over all channels; or a positive number for each dimension name,
        for example FLOPs per channel.

    Returns:
      Positive numbers ``(num_channels,)``, float64.

    Raises:
      ValueError: if ``weights`` is none of these, lacks a dimension, or is not
        positive.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((9, 2))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(sdp_jax.channel_weights(groups, "size"))  # √9
      [3. 3.]
    """
    if isinstance(weights, Mapping):
        if set(weights) != set(groups.sizes):
            raise ValueError(
                "weights must give a number for each dimension; it lacks "
                f"{sorted(set(groups.sizes) - set(weights))} and has no use for "
                f"{sorted(set(weights) - set(groups.sizes))}"
            )
        for name, value in weights.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"the weight of dimension {name!r} is {value!r}; it must be a "
                    "positive finite number"
                )
        values = [float(weights[name]) for name in groups.sizes]
    elif weights == "plain":
        values = [1.0] * len(groups)
    elif weights == "size":
        values = [groups.entries(d, roles=("producer",)) ** 0.5 for d in groups]
    elif weights == "cost":
        cost = [groups.entries(d, roles=("producer", "consumer")) for d in groups]
        mean = np.dot(cost, list(groups.sizes.values())) / max(groups.num_channels, 1)
        values = [value / mean for value in cost]
    else:
        raise ValueError(
            f"weights is {weights!r}; use one of {get_args(Weighting)} or a number for "
            "each dimension"
        )
    return np.repeat(np.asarray(values, np.float64), list(groups.sizes.values()))


def channel_norms(
    groups: Groups, tree: PyTree, *, weights: Weighting | Mapping[str, float] = "plain"
) -> jax.Array:
    """Euclidean norm of each channel over its producers, divided by its weight.

    Each leaf is reduced in one pass; half-precision leaves are summed in float32.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves (parameters,
        gradients, a dual variable).
      weights: the weighting, see :func:`channel_weights`.

    Returns:
      The norms ``(num_channels,)``, float32 or wider.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(sdp_jax.channel_norms(groups, params))
      [5. 1.]
    """
    norms = jnp.sqrt(reduce_channels(groups, tree, _square, jnp.sum, jnp.add))
    if weights == "plain":
        return norms
    return norms / jnp.asarray(channel_weights(groups, weights), norms.dtype)


def channel_products(groups: Groups, first: PyTree, second: PyTree) -> jax.Array:
    """Real inner product of two trees over the producers of each channel.

    Args:
      groups: the channel dimensions.
      first: a tree that has the producers of ``groups`` as leaves.
      second: another one of the same shapes.

    Returns:
      The products ``(num_channels,)``, float32 or wider.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(sdp_jax.channel_products(groups, params, {"w": jnp.ones((2, 2))}))
      [7. 1.]
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        value = jnp.conj(a.astype(dtype)) * b.astype(dtype)
        return value.real if jnp.iscomplexobj(value) else value

    table, other = producer_leaves(groups, first), producer_leaves(groups, second)
    paths = {member.path for _, member, _ in groups.producers}
    products = {path: product(table[path], other[path]) for path in sorted(paths)}
    return reduce_channels(groups, products, lambda x: x, jnp.sum, jnp.add)


def member_sums(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    *,
    roles: Sequence[Role] = ("producer",),
) -> dict[str, list[tuple[Member, jax.Array]]]:
    """Sums ``entry(leaf)`` over each channel, member by member.

    What a method weighs in its own way (only matrices, only scales, also what reads the
    channel) is told apart by the member; :func:`channel_norms` is the common case.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the members of these roles as leaves.
      entry: a function of one leaf, in the leaf's shape and at least float32.
      roles: which members count.

    Returns:
      For each dimension pairs of a member and its sums ``(size,)``.

    Raises:
      ValueError: if a member is missing or has another shape.
    """
    table = producer_leaves(groups, tree)
    lines: dict[tuple[str, int], jax.Array] = {}
    out: dict[str, list[tuple[Member, jax.Array]]] = {}
    for d in groups:
        out[d.name] = []
        for m in d.members:
            if m.role not in roles:
                continue
            if m.path not in table or np.shape(table[m.path]) != groups.shapes[m.path]:
                raise ValueError(
                    f"dimension {d.name!r}: the tree has no leaf {m.path!r} of shape "
                    f"{groups.shapes[m.path]}, a {m.role} that is counted here; give "
                    "groups and parameters of the same model (and hide no member)"
                )
            key = (m.path, m.axis)
            if key not in lines:
                leaf = entry(jnp.asarray(table[m.path]))
                lines[key] = _reduce_to_axis(leaf, m.axis, jnp.sum)
            value = jnp.sum(_blocks(lines[key], m, d.size), axis=(0, 2))
            out[d.name].append((m, value))
    return out


def channels_alive(groups: Groups, tree: PyTree) -> jax.Array:
    """Which channels have a producer entry that is not exactly zero.

    Args:
      groups: the channel dimensions.
      tree: the parameters.

    Returns:
      A Boolean vector ``(num_channels,)``.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[1., 0.], [2., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(sdp_jax.channels_alive(groups, params))
      [ True False]
    """
    return reduce_channels(groups, tree, lambda x: x != 0, jnp.any, jnp.logical_or)


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
    table = producer_leaves(groups, tree)
    parts = _split(groups, factors)
    scales: dict[str, jax.Array] = {}
    for name, member, size in groups.producers:
        leaf = table[member.path]
        shape = [1] * leaf.ndim
        shape[member.axis] = length = leaf.shape[member.axis]
        factor = parts[name].astype(jnp.finfo(leaf.dtype).dtype)
        spread = _spread(factor, member, size, length).reshape(shape)
        old = scales.get(member.path)
        scales[member.path] = spread if old is None else old * spread
    leaves = [
        leaf * scales[path] if path in scales else leaf for path, leaf in table.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def producer_leaves(groups: Groups, tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, after checking the producers of ``groups``.

    Args:
      groups: the channel dimensions.
      tree: any pytree.

    Returns:
      All leaves by path.

    Raises:
      ValueError: if a producer is missing or has another shape.
    """
    table = leaf_table(tree)
    for name, member, _ in groups.producers:
        if member.path not in table:
            raise ValueError(
                f"dimension {name!r}: {missing_path_message(member.path, list(table))}"
                " (a mask hides leaves: it must keep or hide a group as a whole)"
            )
        shape = tuple(np.shape(table[member.path]))
        if shape != groups.shapes[member.path]:
            raise ValueError(
                f"dimension {name!r}: leaf {member.path!r} has shape {shape}, but the "
                f"groups were built for {groups.shapes[member.path]}; after a cut use "
                "cut.groups"
            )
    return table


def probe_channels(groups: Groups, tree: PyTree) -> jax.Array:
    """The largest magnitude of each channel in the small producers of its dimension.

    It looks at vectors (biases, scales) only, or at the smallest producer where there
    is none: reading a large leaf here would make XLA copy it when it is donated.

    Args:
      groups: the channel dimensions.
      tree: the parameters.

    Returns:
      A vector ``(num_channels,)``.
    """
    table = producer_leaves(groups, tree)
    probes: dict[str, jax.Array] = {}
    for d in groups:
        vectors = [m for m in d.producers if len(groups.shapes[m.path]) == 1]
        smallest = min(d.producers, key=lambda m: math.prod(groups.shapes[m.path]))
        for m in vectors or [smallest]:
            leaf = jnp.asarray(table[m.path])
            line = _reduce_to_axis(jnp.abs(leaf), m.axis, jnp.max)
            value = jnp.max(_blocks(line, m, d.size), axis=(0, 2))
            probes[d.name] = (
                jnp.maximum(probes[d.name], value) if d.name in probes else value
            )
    return groups.join(probes)


def reduce_channels(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    reduce: Callable[..., jax.Array],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Reduces ``entry(leaf)`` to one number per channel, one pass per leaf.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      entry: a function of one leaf, in the leaf's shape.
      reduce: a reduction with ``axis`` and ``keepdims``, for example ``jnp.sum``.
      combine: what joins the numbers of two producers, for example ``jnp.add``.

    Returns:
      A vector ``(num_channels,)``.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [-4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(reduce_channels(groups, params, magnitude, jnp.sum, jnp.add))
      [7. 1.]
    """
    table = producer_leaves(groups, tree)
    lines: dict[tuple[str, int], jax.Array] = {}
    out: dict[str, jax.Array] = {}
    for name, member, size in groups.producers:
        key = (member.path, member.axis)
        if key not in lines:
            leaf = jnp.asarray(table[member.path])
            lines[key] = _reduce_to_axis(entry(leaf), member.axis, reduce)
        value = reduce(_blocks(lines[key], member, size), axis=(0, 2))
        out[name] = combine(out[name], value) if name in out else value
    return groups.join(out)


def magnitude(leaf: jax.Array) -> jax.Array:
    """Magnitudes of the entries.

    Args:
      leaf: any array.

    Returns:
      Real numbers of the same shape, at least float32.
    """
    value = jnp.abs(leaf)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _square(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def _reduce_to_axis(
    x: jax.Array, axis: int, reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Reduces all axes but one, the longest first (a quarter faster on the CPU)."""
    axes = sorted(range(x.ndim), key=lambda a: x.shape[a])
    rest = [a for a in axes if a != axis]
    if not rest:
        return x
    x = reduce(x, axis=rest[-1], keepdims=True)
    return reduce(x, axis=tuple(rest)) if len(rest) > 1 else x.reshape(-1)


def _blocks(line: jax.Array, member: Member, size: int) -> jax.Array:
    """The entries of a vector along the axis as ``(outer, size, inner)``."""
    block = size * member.inner
    if member.outer == 1:
        line = line[member.offset : member.offset + block]
        return line.reshape(1, size, member.inner)
    period = member.period or block
    line = line[member.offset : member.offset + member.outer * period]
    line = jnp.pad(line, (0, member.outer * period - line.shape[0]))
    line = line.reshape(member.outer, period)[:, :block]
    return line.reshape(member.outer, size, member.inner)


def _split(groups: Groups, vector: jax.Array) -> dict[str, jax.Array]:
    """``groups.split`` for hundreds of dimensions.

    XLA compiles equal kernels once. A slice at a fixed place is in each kernel another
    number, and hundreds of equal layers would all be compiled: here the places are
    data. They are told from constants by an index that XLA does not know to be 0.
    """
    parts = groups.split(vector)
    if len(parts) < 2:
        return parts
    unknown = (vector[0] < 0).astype(jnp.int32)
    out, start = {}, 0
    for name, size in groups.sizes.items():
        place = jnp.asarray(np.array([start, start, -1], np.int32))
        place = jax.lax.dynamic_index_in_dim(place, unknown, keepdims=False)
        out[name] = jax.lax.dynamic_slice(vector, (place,), (size,))
        start += size
    return out


def _spread(factor: jax.Array, member: Member, size: int, length: int) -> jax.Array:
    """Inverse of :func:`_blocks`: factors along the axis, 1 where nobody is."""
    block = size * member.inner
    shape = (member.outer, size, member.inner)
    line = jnp.broadcast_to(factor[None, :, None], shape).reshape(member.outer, block)
    if member.outer > 1:
        period = member.period or block
        line = jnp.pad(line, ((0, 0), (0, period - block)), constant_values=1)
    line = line.reshape(-1)[: length - member.offset]
    after = length - member.offset - line.shape[0]
    return jnp.pad(line, (member.offset, after), constant_values=1)
