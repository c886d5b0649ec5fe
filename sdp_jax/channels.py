"""Arithmetic on channels: what every transformation does at each step.

All that is known of channels one by one (norms, thresholds, factors, scores) is one
vector ``(num_channels,)``, dimension after dimension in the order of the groups.
``groups.split`` takes it apart by dimension name and ``groups.join`` puts it together.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.dimension import Dimension, Member, Role
from sdp_jax.groups import Groups
from sdp_jax.mesh import Line, replicated, sharding_of, sum_lines, zero_like
from sdp_jax.tree import PyTree, leaf_table, missing_path_message

Weighting = Literal["plain", "size", "cost"]
# By path and axis of a leaf and dimension, for each position along the axis 0 if a
# channel that counts is there, or none.
Gone = Mapping[str, Mapping[int, Mapping[str, jax.Array]]]


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
    groups: Groups,
    weights: Weighting | Mapping[str, float] = "plain",
    *,
    shrinking: bool = False,
) -> np.ndarray:
    """The factor ``k`` by which each channel's threshold is multiplied.

    Args:
      groups: the channel dimensions.
      weights: ``"plain"`` for 1; ``"size"`` for the square root of the number of
        producer entries of a channel, as in the group lasso (Yuan and Lin 2006);
        ``"cost"`` for the number of parameters that go with the channel, divided by
        the mean over all channels; or a positive number for each dimension name,
        for example FLOPs per channel.
      shrinking: whether ``"size"`` counts only ``groups.shrinking``.

    Returns:
      Positive numbers ``(num_channels,)``, float64; of groups that a cut has left,
      those of the dense model.

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
    dense = groups.dense
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
        there = groups.dense_dimensions
        some = [d.shrinking if shrinking else d.producers for d in there]
        own = [
            dataclasses.replace(d, members=m) for d, m in zip(there, some, strict=True)
        ]
        values = [dense.entries(d, roles=("producer",)) ** 0.5 for d in own]
    elif weights == "cost":
        roles: tuple[Role, ...] = ("producer", "consumer")
        cost = {d.name: dense.entries(d, roles=roles) for d in dense}
        total = np.dot(list(cost.values()), list(dense.sizes.values()))
        mean = total / max(dense.num_channels, 1)
        values = [cost[name] / mean for name in groups.sizes]
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
    (squares,) = channel_sums(groups, Term(square, (tree,)))
    return weighted_norms(groups, squares, weights)


def weighted_norms(
    groups: Groups,
    squares: jax.Array,
    weights: Weighting | Mapping[str, float],
    *,
    shrinking: bool = False,
) -> jax.Array:
    """Norms from sums of squares, as :func:`channel_norms` gives them.

    Args:
      groups: the channel dimensions.
      squares: the sums ``(num_channels,)``.
      weights: the weighting, see :func:`channel_weights`.
      shrinking: whether the sums are those of what a threshold shrinks.

    Returns:
      The norms ``(num_channels,)``.
    """
    norms = jnp.sqrt(squares)
    if weights == "plain":
        return norms
    factors = channel_weights(groups, weights, shrinking=shrinking)
    return norms / jnp.asarray(factors, norms.dtype)


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
    return channel_sums(groups, Term(product, (first, second)))[0]


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
    counted, lines = _member_lines(groups, tree, entry, roles)
    out: dict[str, list[tuple[Member, jax.Array]]] = {name: [] for name in groups.sizes}
    values = sum_lines(lines, lambda sums: _member_values(counted, sums))
    for (d, m), value in zip(counted, values, strict=True):
        out[d.name].append((m, value))
    return out


def weighted_sums(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    *weights: Callable[[Dimension, Member], float],
    roles: Sequence[Role] = ("producer",),
) -> list[jax.Array]:
    """Sums of ``entry(leaf)`` over each channel, members weighted, one pass for all.

    On a mesh with explicit axes the members are joined before the one all-reduce.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the members of these roles as leaves.
      entry: a function of one leaf, in the leaf's shape and at least float32.
      *weights: for each result how much a member counts, 0 for not at all.
      roles: which members are read.

    Returns:
      For each of ``weights`` a vector ``(num_channels,)``.

    Raises:
      ValueError: if a member is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.]]), "b": jnp.array([1., 2.])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"unit": [sdp_jax.Member("w", 1), sdp_jax.Member("b", 0)]})
      >>> vectors = lambda d, m: float(m.path == "b")
      >>> print(*weighted_sums(groups, params, magnitude, lambda d, m: 1., vectors))
      [4. 2.] [1. 2.]
    """
    counted, lines = _member_lines(groups, tree, entry, roles)

    def finish(sums: list[jax.Array]) -> list[jax.Array]:
        values = _member_values(counted, sums)
        out = []
        for weight in weights:
            parts = {
                d.name: jnp.zeros((d.size,), jnp.result_type(*sums)) for d in groups
            }
            for (d, m), value in zip(counted, values, strict=True):
                share = weight(d, m)
                if share:
                    parts[d.name] = parts[d.name] + share * value
            out.append(groups.join(parts))
        return out

    return sum_lines(lines, finish)


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
    return channel_sums(groups, Term(nonzero, (tree,)))[0] > 0


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


class Term(NamedTuple):
    """What :func:`channel_sums` sums.

    Attributes:
      entry: a function of one leaf of each tree, in the shape of the leaf.
      trees: trees that have the producers of the groups as leaves.
      small: whether only the vectors (biases, scales) of each dimension count, or its
        smallest producer where it has none: reading a large leaf once more would make
        XLA copy it when it is donated.
      shrinking: whether only ``groups.shrinking`` count.
      gone: which entries do not count for channels that are of another dimension, or
        along another axis, see :func:`sdp_jax.entries.gone_lines`; default: none.
      over: weights of the channels, ``(num_channels,)``; what comes out is then one
        number, the weighted sum over all channels.
    """

    entry: Callable[..., jax.Array]
    trees: tuple[PyTree, ...]
    small: bool = False
    shrinking: bool = False
    gone: Gone | None = None
    over: jax.Array | None = None


def channel_sums(groups: Groups, *terms: Term) -> list[jax.Array]:
    """Sums over the producers of each channel, one pass over each leaf and term.

    On a mesh with explicit axes all terms together take one all-reduce.

    Args:
      groups: the channel dimensions.
      *terms: what to sum, in the dtype of what its function gives.

    Returns:
      For each term a vector ``(num_channels,)``, or a scalar.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [-4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(channel_sums(groups, Term(magnitude, (params,)))[0])
      [7. 1.]
    """
    lines: list[Line] = []
    parts: list[list[tuple[str, Member, int, int, int | None]]] = []
    given = [term.over for term in terms if term.over is not None]
    weights = len(given)
    for term in terms:
        tables = [producer_leaves(groups, tree) for tree in term.trees]
        numbers: dict[tuple[str, int], int] = {}
        parts.append([])
        members = groups.shrinking if term.shrinking else groups.producers
        for name, m, size in _small(groups) if term.small else members:
            gone = (term.gone or {}).get(m.path, {})
            if (m.path, m.axis) not in numbers:
                numbers[m.path, m.axis] = len(lines)
                across = {axis: x for axis, x in gone.items() if axis != m.axis}
                leaves = tuple(jnp.asarray(table[m.path]) for table in tables)
                lines.append(_line(term.entry, leaves, m.axis, across))
            along = _others(groups, name, m, gone.get(m.axis, {}))
            place = None if along is None else len(given)
            given += [] if along is None else [along]
            parts[-1].append((name, m, size, numbers[m.path, m.axis], place))

    def finish(sums: list[jax.Array], *given: jax.Array) -> list[jax.Array]:
        vectors, left = [], iter(given[:weights])
        for part, term in zip(parts, terms, strict=True):
            out: dict[str, jax.Array] = {}
            for name, m, size, number, place in part:
                line = sums[number]
                if place is not None:
                    line = jnp.where(given[place] == 0, line, 0)
                value = _per_channel(line, m, size)
                out[name] = out[name] + value if name in out else value
            vector = groups.join(out)
            if term.over is not None:
                vector = jnp.sum(vector * next(left), keepdims=True)
            vectors.append(vector)
        return vectors

    found = sum_lines(lines, finish, *given)
    return [
        vector if term.over is None else vector[0]
        for vector, term in zip(found, terms, strict=True)
    ]


def channel_maxima(groups: Groups, tree: PyTree) -> jax.Array:
    """The largest magnitude of each channel's producer entries.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.

    Returns:
      A vector ``(num_channels,)``, at least float32.

    Raises:
      ValueError: if a producer is missing or has another shape.
    """
    table = producer_leaves(groups, tree)
    out: dict[str, jax.Array] = {}
    for name, m, size in groups.producers:
        leaf = magnitude(jnp.asarray(table[m.path]))
        rest = tuple(axis for axis in range(leaf.ndim) if axis != m.axis)
        line = replicated(jnp.max(leaf, axis=rest, initial=0))
        value = jnp.max(_blocks(line, m, size), axis=(0, 2))
        out[name] = jnp.maximum(out[name], value) if name in out else value
    return groups.join(out)


def _line(
    entry: Callable[..., jax.Array],
    leaves: tuple[jax.Array, ...],
    axis: int,
    gone: Mapping[int, Mapping[str, jax.Array]],
) -> Line:
    """The sums along an axis of what counts.

    A factor goes into the sum where a choice would make XLA store the leaf once more.
    """
    if not gone:
        return Line(entry, leaves, axis)
    if any(sharding_of(jax.typeof(leaf)) for leaf in leaves):
        return Line(entry, tuple(without_lines(x, gone) for x in leaves), axis)
    factors = []
    for other, lines in gone.items():
        shape = [1] * leaves[0].ndim
        shape[other] = leaves[0].shape[other]
        factors.append((_total(lines) == 0).reshape(shape))

    def masked(*arrays: jax.Array) -> jax.Array:
        value = entry(*arrays)
        for factor in factors:
            value = value * factor.astype(value.dtype)
        return value

    return Line(masked, leaves, axis)


def without_lines(
    leaf: jax.Array, gone: Mapping[int, Mapping[str, jax.Array]]
) -> jax.Array:
    """Zeros in a leaf at the positions that do not count.

    Args:
      leaf: any array.
      gone: by axis and dimension a vector along it, 0 where entries count.

    Returns:
      An array of the same shape, dtype and sharding.
    """
    for axis, lines in gone.items():
        shape = [1] * leaf.ndim
        shape[axis] = leaf.shape[axis]
        counts = zero_like(_total(lines).reshape(shape), leaf)
        leaf = jnp.where(counts, leaf, jnp.zeros((), leaf.dtype))
    return leaf


def square(leaf: jax.Array) -> jax.Array:
    """Squared magnitudes of the entries.

    Args:
      leaf: any array.

    Returns:
      Real numbers of the same shape, at least float32.
    """
    x = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def product(first: jax.Array, second: jax.Array) -> jax.Array:
    """Real part of ``conj(first) · second``, entry by entry.

    Args:
      first: any array.
      second: another one of the same shape.

    Returns:
      Real numbers of the same shape, at least float32.
    """
    dtype = jnp.promote_types(jnp.result_type(first, second), jnp.float32)
    value = jnp.conj(first.astype(dtype)) * second.astype(dtype)
    return value.real if jnp.iscomplexobj(value) else value


def nonzero(leaf: jax.Array) -> jax.Array:
    """Which entries are not zero.

    Args:
      leaf: any array.

    Returns:
      1 or 0 in the same shape, int32.
    """
    return (leaf != 0).astype(jnp.int32)


def magnitude(leaf: jax.Array) -> jax.Array:
    """Magnitudes of the entries.

    Args:
      leaf: any array.

    Returns:
      Real numbers of the same shape, at least float32.
    """
    value = jnp.abs(leaf)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _member_lines(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    roles: Sequence[Role],
) -> tuple[list[tuple[Dimension, Member]], list[Line]]:
    """The members of these roles, and one line for each axis that they lie along."""
    table = producer_leaves(groups, tree)
    counted = [(d, m) for d in groups for m in d.members if m.role in roles]
    for d, m in counted:
        if m.path not in table or np.shape(table[m.path]) != groups.shapes[m.path]:
            raise ValueError(
                f"dimension {d.name!r}: the tree has no leaf {m.path!r} of shape "
                f"{groups.shapes[m.path]}, a {m.role} that is counted here; give "
                "groups and parameters of the same model (and hide no member)"
            )
    places = dict.fromkeys((m.path, m.axis) for _, m in counted)
    lines = [Line(entry, (jnp.asarray(table[p]),), axis) for p, axis in places]
    return counted, lines


def _member_values(
    counted: list[tuple[Dimension, Member]], sums: list[jax.Array]
) -> list[jax.Array]:
    """For each member its sums over the channels, from those along its axis."""
    places = dict.fromkeys((m.path, m.axis) for _, m in counted)
    line = dict(zip(places, sums, strict=True))
    return [_per_channel(line[m.path, m.axis], m, d.size) for d, m in counted]


def _small(groups: Groups) -> list[tuple[str, Member, int]]:
    """The vectors among the producers of each dimension, or its smallest producer."""
    found = []
    for d in groups:
        vectors = [m for m in d.producers if len(groups.shapes[m.path]) == 1]
        smallest = min(d.producers, key=lambda m: math.prod(groups.shapes[m.path]))
        found += [(d.name, m, d.size) for m in vectors or [smallest]]
    return found


def _others(
    groups: Groups, name: str, member: Member, gone: Mapping[str, jax.Array]
) -> jax.Array | None:
    """What of other dimensions, which share its positions, is gone along its axis."""
    masks = groups.covered[member.path, member.axis]
    found = {
        n: x for n, x in gone.items() if n != name and (masks[n] & masks[name]).any()
    }
    return _total(found) if found else None


def _total(lines: Mapping[str, jax.Array]) -> jax.Array:
    first, *rest = lines.values()
    return sum(rest, first)


def _per_channel(line: jax.Array, member: Member, size: int) -> jax.Array:
    """The sum over the positions of each channel."""
    return jnp.sum(_blocks(line, member, size), axis=(0, 2))


def _blocks(line: jax.Array, member: Member, size: int) -> jax.Array:
    """The entries of a vector along the axis as ``(outer, size, inner)``."""
    if member.places is not None:
        return line[member.positions(size)]
    block = size * member.inner
    if member.outer == 1:
        line = line[member.offset : member.offset + block]
        return line.reshape(1, size, member.inner)
    period = member.period or block
    line = line[member.offset : member.offset + member.outer * period]
    line = jnp.pad(line, (0, member.outer * period - line.shape[0]))
    line = line.reshape(member.outer, period)[:, :block]
    return line.reshape(member.outer, size, member.inner)
