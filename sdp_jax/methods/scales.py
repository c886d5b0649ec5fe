"""Which producers are scales of a normalisation, and what a gate multiplies.

A normalisation ends with ``γ x̂ + β``. Some methods read the importance of a channel off
its scale ``γ``, or put a *gate* ``φ`` behind it, ``φ (γ x̂ + β)``. Scales are told by
their names: a vector among the producers whose last key matches one of the patterns
``scales`` (as in a shell, with regard to case) is a scale, and a vector beside it in
the same module, of the same shape and at the same positions, is its bias.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdp_jax.dimension import Member
from sdp_jax.groups import Groups
from sdp_jax.mesh import replicated, sharded_like

# Flax and Haiku; gamma of Keras; weight of PyTorch and Equinox.
DEFAULT_SCALES = ("scale", "gamma", "weight")


class Gate(NamedTuple):
    """A scale, and the producers that its gate multiplies: it and its bias.

    In a dimension without a scale there is one gate, on all producers.
    """

    scale: Member | None
    members: tuple[Member, ...]


def find_gates(
    groups: Groups, scales: Sequence[str] = DEFAULT_SCALES
) -> dict[str, tuple[Gate, ...]]:
    """The gates of each dimension: one for each scale, or one on all its producers."""
    check_scales(scales)
    found = {}
    for d in groups:
        vectors = [m for m in d.producers if is_vector(groups, m)]
        named = [m for m in vectors if _matches(m.path, scales)]
        others = [m for m in vectors if m not in named]
        gates = []
        for m in named:
            bias = [b for b in others if _beside(groups, b, m)][:1]
            others = [b for b in others if b not in bias]
            gates.append(Gate(m, (m, *bias)))
        found[d.name] = tuple(gates) or (Gate(None, d.producers),)
    return found


def check_scales(scales: Any) -> None:
    """Refuses what is not a list or tuple of patterns."""
    if not isinstance(scales, list | tuple) or not all(
        isinstance(s, str) for s in scales
    ):
        raise TypeError(
            "scales must be a tuple of patterns for the names of scales, for example "
            f"{DEFAULT_SCALES}; got {scales!r}"
        )


def find_scales(
    groups: Groups, scales: Sequence[str] = DEFAULT_SCALES
) -> dict[str, tuple[Member, ...]]:
    """The scales of each dimension, none where it has none."""
    gates = find_gates(groups, scales)
    return {
        name: tuple(g.scale for g in found if g.scale is not None)
        for name, found in gates.items()
    }


def is_vector(groups: Groups, member: Member) -> bool:
    """Whether a leaf is a vector, or broadcasts as ``(1, C)``; ``(C, 1)`` does not."""
    shape = groups.shapes[member.path]
    alone = math.prod(shape) == shape[member.axis]
    return len(shape) == 1 or (member.axis > 0 and alone)


def take_entries(leaf: Any, member: Member, size: int) -> jax.Array:
    """The channels' entries of a vector, at least float32, ``(outer, size, inner)``."""
    leaf = jnp.asarray(leaf)
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return replicated(wide).reshape(-1)[member.positions(size)]


def put_entries(
    leaf: jax.Array, member: Member, size: int, values: jax.Array
) -> jax.Array:
    """Inverse of :func:`take_entries`: the leaf with these entries, in its dtype."""
    where = member.positions(size)
    values = jnp.broadcast_to(values, where.shape).astype(leaf.dtype)
    whole = replicated(leaf).reshape(-1).at[where].set(values).reshape(leaf.shape)
    return sharded_like(whole, leaf)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _beside(groups: Groups, bias: Member, scale: Member) -> bool:
    """Whether two vectors are of one module, entry by entry."""

    def place(m: Member) -> tuple[Any, ...]:
        where = (m.axis, m.outer, m.inner, m.offset, m.period, m.places)
        return m.path.rpartition("/")[0], groups.shapes[m.path], where

    return place(bias) == place(scale)
