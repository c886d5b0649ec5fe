"""Groups by hand: for each dimension, where its channels live."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdp_jax.dimension import Dimension, Leaf, Member
from sdp_jax.groups import Groups, check_groups, overlaps
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table, missing_path_message


def groups_from_axes(
    params: PyTree,
    axes: Mapping[str, Sequence[Member]],
    *,
    sizes: Mapping[str, int] | None = None,
) -> Groups:
    """Builds groups by hand: for each dimension, where its channels live.

    Args:
      params: the parameters (any pytree of arrays or ``jax.ShapeDtypeStruct``).
      axes: for each dimension name its members. A dimension needs at least one
        producer. Its producers together must be *zero-invariant*: when their entries
        of a channel are all zero, so is the channel's activation. For a convolution
        with batch normalisation these are the filter, its bias, and the scale and
        bias of the normalisation.
      sizes: numbers of channels, by dimension name; needed only where no producer
        fills its axis from offset 0.

    Returns:
      The checked :class:`Groups`.

    Raises:
      ValueError: if a path is not in ``params``, an axis or its factors do not fit
        the shape, a dimension has no producer or no channel, members disagree on the
        size, or producers overlap.
      TypeError: if a producer is not an array of floating-point or complex numbers,
        or a member is not a :class:`Member`.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
      ...           "out": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("in/kernel", 1), sdp_jax.Member("in/bias", 0),
      ...     sdp_jax.Member("out/kernel", 0, "consumer")]})
      >>> groups.sizes
      {'hidden': 8}
    """
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"axes must map dimension names to their members; got {type(axes).__name__}"
        )
    if not axes:
        raise ValueError("axes names no dimension; give at least one, with a producer")
    table = leaf_table(params)
    leaves = tuple(Leaf(p, tuple(np.shape(x))) for p, x in table.items())
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    given = {
        name: int(size) if isinstance(size, np.integer) else size
        for name, size in (sizes or {}).items()
    }
    unknown = sorted(set(given) - set(axes))
    if unknown:
        raise ValueError(f"sizes names dimensions that axes does not have: {unknown}")
    dimensions = []
    axes = {k: [m] if isinstance(m, Member) else list(m) for k, m in axes.items()}
    for name, members in axes.items():
        members = [_normalise(name, m, shapes) for m in members]
        if not any(m.role == "producer" for m in members):
            raise ValueError(
                f"dimension {name!r} has no producer; name the parameters whose zeros "
                "make the channel zero with sdp_jax.Member(path, axis)"
            )
        size = given[name] if name in given else _infer_size(name, members, shapes)
        for m in members:
            dtype = leaf_dtype(table[m.path])
            if m.role == "producer" and not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"dimension {name!r}: producer {m.path!r} has dtype {dtype}; only "
                    "floating-point and complex parameters can be thresholded"
                )
        for k, m in enumerate(members):
            if m.period is None:
                whole = shapes[m.path][m.axis] // m.outer
                period = whole if m.outer > 1 else size * m.inner
                if m.places is not None and m.outer == 1:
                    period = max(m.places, default=0) + m.inner
                members[k] = dataclasses.replace(m, period=period)
        dimensions.append(Dimension(name, size, tuple(members)))
    groups = Groups(tuple(dimensions), leaves)
    check_groups(groups)
    _check_overlap(groups)
    _check_coverage(groups, axes, shapes)
    return groups


def _normalise(name: str, member: Any, shapes: Mapping[str, tuple[int, ...]]) -> Member:
    if not isinstance(member, Member):
        raise TypeError(
            f"dimension {name!r}: {member!r} is not a member; make it with "
            "sdp_jax.Member(path, axis, role)"
        )
    if member.path not in shapes:
        raise ValueError(
            f"dimension {name!r}: {missing_path_message(member.path, list(shapes))}"
        )
    counts = ["axis", "outer", "inner", "offset"]
    counts += [] if member.period is None else ["period"]
    plain = {}
    for field in counts:
        value = getattr(member, field)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"dimension {name!r}, member {member.path!r}: {field} must be an "
                f"integer; got {value!r}"
            )
        plain[field] = int(value)
    if member.places is not None:
        plain["places"] = _places(name, member)
    member = dataclasses.replace(member, **plain)
    rank = len(shapes[member.path])
    if not -rank <= member.axis < rank:
        raise ValueError(
            f"dimension {name!r}: axis {member.axis} of {member.path!r} does not "
            f"exist; its shape is {shapes[member.path]}"
        )
    return dataclasses.replace(member, axis=member.axis % rank)


def _places(name: str, member: Member) -> tuple[int, ...]:
    places = member.places
    whole = isinstance(places, Sequence) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in places
    )
    if not whole:
        raise TypeError(
            f"dimension {name!r}, member {member.path!r}: places must be a tuple of "
            f"integers, one for each channel; got {places!r}"
        )
    return tuple(int(n) for n in places or ())


def _infer_size(
    name: str, members: Sequence[Member], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    for m in members:
        if m.places is not None:
            return len(m.places)
        if m.role == "producer" and m.offset == 0 and m.period is None:
            length, each = shapes[m.path][m.axis], m.outer * m.inner
            if each < 1 or length % each:
                raise ValueError(
                    f"dimension {name!r}: axis {m.axis} of {m.path!r} has length "
                    f"{length}, which outer * inner = {m.outer} * {m.inner} does not "
                    "divide"
                )
            return length // each
    raise ValueError(
        f"dimension {name!r}: its size cannot be read off, because every producer has "
        f"an offset or a period; pass sizes={{{name!r}: number_of_channels}}"
    )


def _check_overlap(groups: Groups) -> None:
    for path, first, second in overlaps(groups):
        axes = [
            next(m.axis for m in d.producers if m.path == path) for d in (first, second)
        ]
        raise ValueError(
            f"producers overlap: {path!r} belongs to dimension {first.name!r} along "
            f"axis {axes[0]} and to {second.name!r} along axis {axes[1]}; an entry can "
            "be thresholded by one dimension only"
        )


def _check_coverage(
    groups: Groups, axes: Mapping[str, Sequence[Member]], shapes: Mapping[str, Any]
) -> None:
    """Refuses axes that are partly described without saying so."""
    declared = {
        (m.path, m.axis)
        for d in groups.dimensions
        for given, m in zip(axes[d.name], d.members, strict=True)
        if given.period is not None
    }
    for key, masks in groups.covered.items():
        mask = np.any(list(masks.values()), axis=0)
        if not mask.all() and key not in declared:
            path, axis = key
            raise ValueError(
                f"the members on axis {axis} of {path!r} cover {mask.sum()} of its "
                f"{mask.size} positions (shape {shapes[path]}); correct outer, inner "
                "or offset, or give period= to say that the rest is meant to stay"
            )
