"""The importance of a channel: all that goes with it, also what reads it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.channels import (
    channels_alive,
    magnitude,
    member_sums,
    weighted_sums,
)
from sdp_jax.checks import check_number
from sdp_jax.dimension import Dimension, Member, Role
from sdp_jax.entries import keep_channels
from sdp_jax.groups import Groups
from sdp_jax.segments import max_over, sum_over
from sdp_jax.tree import PyTree, leaf_table

Normalizer = Literal["mean", "max", "sum"]
Reduce = Literal["mean", "sum", "max"]

ROLES: tuple[Role, ...] = ("producer", "consumer")
# Last keys of biases in the common libraries, and those of scales.
BIASES = ("bias", "beta", "offset", "shift", "b")
SCALES = ("scale", "gamma", "weight")


def channel_importance(
    groups: Groups,
    params: PyTree,
    *,
    gone: jax.Array | None = None,
    masked: bool = False,
    p: float = 2,
    bias: bool = False,
    normalizer: Normalizer | None = "mean",
    reduce: Reduce = "mean",
) -> jax.Array:
    """What :func:`sdp_jax.methods.group_importance` scores by; a target ranks by it.

    Args:
      groups: the channel dimensions.
      params: the parameters.
      gone: which channels are known to be zero, ``(num_channels,)``; they are looked
        for if it is not given.
      masked: whether a mask may hide consumers, which then do not count.
      p: the exponent.
      bias: whether biases count.
      normalizer: what the importances of a dimension are divided by.
      reduce: how the members of a channel are combined.

    Returns:
      Non-negative numbers ``(num_channels,)``, 0 for channels that are zero.

    Raises:
      ValueError: if a member is missing or has another shape.

    References:
      Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023,
      arXiv 2301.12900.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 1.]]), "v": jnp.array([[1.], [3.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {
      ...     "hidden": [sdp_jax.Member("w", 1), sdp_jax.Member("v", 0, "consumer")]})
      >>> print(channel_importance(groups, params))  # (9 + 1) / 2 and (1 + 9) / 2.
      [1. 1.]
    """
    groups = _seen(groups, params) if masked else groups
    alive = channels_alive(groups, params) if gone is None else ~gone
    # What would read a channel that is gone does not count.
    whole = keep_channels(groups, params, alive, "consumer")
    counted = {d.name: counted_members(groups, d, bias) for d in groups}
    places = {name: {_place(m) for m in members} for name, members in counted.items()}

    def part(d: Dimension, m: Member) -> float:
        if m not in counted[d.name]:
            return 0.0
        return 1 / len(places[d.name]) if reduce == "mean" else 1.0

    def produced(d: Dimension, m: Member) -> float:
        return float(m.role == "producer")

    if reduce == "max":
        sums = member_sums(groups, whole, _power(p), roles=ROLES)
        raw = groups.join(
            {d.name: _largest(sums[d.name], counted[d.name]) for d in groups}
        )
    else:
        raw, made = weighted_sums(groups, whole, _power(p), part, produced, roles=ROLES)
        alive &= made != 0
    return _normalised(raw, alive, groups.owner, normalizer)


def _seen(groups: Groups, params: PyTree) -> Groups:
    """The groups without the consumers that the parameters lack."""
    there = set(leaf_table(params))

    def seen(m: Member) -> bool:
        return m.role != "consumer" or m.path in there

    dimensions = (
        dataclasses.replace(d, members=tuple(filter(seen, d.members))) for d in groups
    )
    return dataclasses.replace(groups, dimensions=tuple(dimensions))


def check_importance(p: Any, normalizer: Any, reduce: Any) -> None:
    """Refuses options of :func:`channel_importance` that are out of range.

    Args:
      p: the exponent.
      normalizer: ``"mean"``, ``"max"``, ``"sum"`` or ``None``.
      reduce: ``"mean"``, ``"sum"`` or ``"max"``.

    Raises:
      ValueError: if one of them is.
      TypeError: if ``p`` is not a number.
    """
    check_number("p", p, low=1e-6, rule="a positive number")
    if normalizer is not None and normalizer not in get_args(Normalizer):
        raise ValueError(
            f"normalizer is {normalizer!r}; use one of {get_args(Normalizer)} or None"
        )
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce is {reduce!r}; use one of {get_args(Reduce)}")


def is_bias(groups: Groups, dimension: Dimension, member: Member) -> bool:
    """Whether a member is a bias, see :func:`sdp_jax.methods.group_importance`.

    Args:
      groups: the channel dimensions.
      dimension: one of them.
      member: one of its members.

    Returns:
      Whether it is.
    """
    if member.role != "producer":
        return False
    module, _, key = member.path.rpartition("/")
    if key == BIASES[0]:
        return True
    if key in SCALES:
        return False
    shape = groups.shapes[member.path]
    # A vector, or one that broadcasts, (1, 1, C).
    if key in BIASES and math.prod(shape) == shape[-1]:
        return True
    return len(shape) == 1 and any(
        m.path.rpartition("/")[0] == module and len(groups.shapes[m.path]) > 1
        for m in dimension.producers
    )


def counted_members(groups: Groups, dimension: Dimension, bias: bool) -> list[Member]:
    """The members that count: producers and consumers, and biases if asked.

    Args:
      groups: the channel dimensions.
      dimension: one of them.
      bias: whether biases count; where there is nothing else, they do.

    Returns:
      The members.
    """
    members = [m for m in dimension.members if m.role in ROLES]
    rest = [m for m in members if bias or not is_bias(groups, dimension, m)]
    return rest or members


def _power(p: float) -> Callable[[jax.Array], jax.Array]:
    """``|w|^p`` entry by entry, at least float32."""

    def entry(leaf: jax.Array) -> jax.Array:
        size = magnitude(leaf)
        if p == 1:
            return size
        return jnp.square(size) if p == 2 else size**p

    return entry


def _place(member: Member) -> tuple[str, int, Role]:
    """Members that cover one axis of one leaf are one."""
    return member.path, member.axis, member.role


def _largest(sums: list[tuple[Member, jax.Array]], counted: list[Member]) -> jax.Array:
    """The sum of the largest member of each channel."""
    places: dict[tuple[str, int, Role], jax.Array] = {}
    for m, value in sums:
        if m in counted:
            place = _place(m)
            places[place] = places[place] + value if place in places else value
    return jnp.max(jnp.stack(list(places.values())), axis=0)


def _normalised(
    values: jax.Array,
    alive: jax.Array,
    owner: np.ndarray,
    normalizer: Normalizer | None,
) -> jax.Array:
    """Importances over those of the living channels; the others are 0."""
    values = jnp.where(alive, values, 0)
    if normalizer is None:
        return values
    level = (max_over if normalizer == "max" else sum_over)(values, owner)
    if normalizer == "mean":
        level = level / jnp.maximum(sum_over(alive, owner), 1)
    return values / jnp.where(level == 0, 1, level)
