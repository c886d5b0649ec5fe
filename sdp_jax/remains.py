"""Zeros that stay: what makes a channel is zero in part, or the whole cannot be cut."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdp_jax.dimension import Dimension
from sdp_jax.groups import Groups
from sdp_jax.tree import leaf_dtype
from sdp_jax.zeros import look_along

# A vector of zeros is a dead channel if one of them is a scale, by its name.
_SCALES = ("scale", "gamma", "weight")


def zeros_that_stay(
    groups: Groups, table: Mapping[str, Any], kept: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """Says which channels stay though something that makes them is exactly zero."""
    places = [(m.path, m.axis) for _, m, _ in groups.producers]
    places += [(f.path, f.axis) for f in groups.frozen]
    places = list(dict.fromkeys(p for p in places if _is_number(table[p[0]])))
    found = look_along([table[path] for path, _ in places], [a for _, a in places])
    along = {p: line.zero for p, line in zip(places, found, strict=True)}
    notes = []
    for d, stay in zip(groups, kept, strict=True):
        zero = {m.path: np.ones(d.size, bool) for m in d.producers}
        for m in d.producers:
            lines = along[m.path, m.axis]
            zero[m.path] &= lines[m.positions(d.size)].all(axis=(0, 2))
        stays = np.zeros(d.size, bool)
        stays[list(stay)] = True
        gone = np.logical_and.reduce(list(zero.values()))
        if count := int((gone & stays).sum()):
            notes.append(
                f"{d.name}: {_channels(count)}, zero, for min_channels or round_to"
            )
        notes += _in_part(d, groups, zero, stays & ~gone)
    for f in groups.frozen:
        if len(groups.shapes[f.path]) < 2 or (f.path, f.axis) not in along:
            continue  # A bias is often zero.
        lines = along[f.path, f.axis].copy()
        for mask in groups.covered.get((f.path, f.axis), {}).values():
            lines &= ~mask
        if 0 < lines.sum() < len(lines):
            notes.append(
                f"{f.path}[{f.axis}]: {int(lines.sum())} of {len(lines)} positions "
                f"stay, zero: {'; '.join(f.reasons)}"
            )
    return tuple(notes)


def _is_number(leaf: Any) -> bool:
    return jnp.issubdtype(leaf_dtype(leaf), jnp.inexact)


def _in_part(
    d: Dimension, groups: Groups, zero: Mapping[str, np.ndarray], stays: np.ndarray
) -> list[str]:
    """Channels of which some leaves are zero: matrices, or a normalisation."""
    # What is zero as a whole was set up so.
    part = {path: line for path, line in zero.items() if not line.all()}
    rank = {path: len(groups.shapes[path]) for path in zero}
    vectors = [path for path in zero if rank[path] == 1]
    scales = [p for p in vectors if p in part and p.rpartition("/")[2] in _SCALES]
    dead = np.ones(d.size, bool) if scales else np.zeros(d.size, bool)
    for path in vectors:
        dead &= zero[path]
    for path, line in part.items():
        if rank[path] > 1:
            dead |= line
    kinds: collections.Counter[tuple[str, ...]] = collections.Counter()
    first: dict[tuple[str, ...], int] = {}
    for c in np.flatnonzero(dead & stays).tolist():
        kind = tuple(path for path, line in zero.items() if line[c])
        kinds[kind] += 1
        first.setdefault(kind, c)
    notes = []
    for kind, count in kinds.most_common(2):
        rest = [path for path in zero if path not in kind]
        notes.append(
            f"{d.name}: {_channels(count)} (number {first[kind]}): zero in "
            f"{_few(kind)}, but not in {_few(rest)}"
        )
    return notes


def _channels(count: int) -> str:
    return f"{count} channels stay" if count > 1 else "1 channel stays"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
