"""From classes of atoms to channel dimensions."""

import dataclasses
import math

import numpy as np

from sdp_jax.dimension import Dimension, Member, Role
from sdp_jax.tracing.analyse import Analysis, ParameterAxis


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Where the channels of a candidate sit along an axis, ``(channels, of each)``."""

    axis: ParameterAxis
    positions: np.ndarray


def find_dimensions(
    found: Analysis, shapes: dict[str, tuple[int, ...]]
) -> tuple[Dimension, ...]:
    """The dimensions of at least two channels, in the order of the leaves."""
    runs: list[list[_Place]] = []
    for places in _candidates(found):
        runs += _runs(places)
    dimensions: list[tuple[tuple[int, ...], list[Member], int]] = []
    for places in runs:
        size = len(places[0].positions)
        members = [m for p in places for m in _members(found, p)]
        if size > 1 and any(m.role == "producer" for m in members):
            first, second = places[0].positions[:2, 0].tolist()
            start = (places[0].axis.number, first, second)
            dimensions.append((start, members, size))
    dimensions.sort(key=lambda item: item[0])
    names: set[str] = set()
    makers = {(a.path, a.axis) for a in found.axes if a.number in found.trace.makers}
    out = []
    for _, members, size in dimensions:
        name = _name(members, makers, shapes, names)
        names.add(name)
        out.append(Dimension(name, size, tuple(members)))
    tops = {d.name.partition("/")[0] for d in out}
    if tops == {"params"} and all("/" in d.name for d in out):
        # All in the same collection: that says nothing.
        out = [dataclasses.replace(d, name=d.name.partition("/")[2]) for d in out]
    return tuple(out)


def _candidates(found: Analysis) -> list[list[_Place]]:
    """Base classes that occur in the same parameter axes, equally often."""
    solution = found.solution
    labels, numbers, positions = [], [], []
    for axis in found.axes:
        mine = solution.label[axis.atoms]
        operands = solution.operands[mine]
        where, column = np.nonzero(operands * found.used[operands])
        labels.append(operands[where, column])
        numbers.append(np.full(len(where), axis.number, np.int32))
        positions.append(where.astype(np.int32))
    if not labels:
        return []
    # These are the largest arrays of a search: as long as all axes of all parameters.
    label, number, position = (
        np.concatenate(lines, dtype=np.int32) for lines in (labels, numbers, positions)
    )
    del labels, numbers, positions
    if not len(label):
        return []
    # They come in the order of axes and positions; stable sorts keep that.
    order = np.argsort(label, kind="stable").astype(np.int32)
    label, number, position = label[order], number[order], position[order]
    # A signature for each class: a sum of random numbers, one for each axis and one for
    # neighbours along it (as many heads as dimensions of a head differ in these).
    codes = np.random.default_rng(0).integers(1, 2**63, (2, len(found.axes)), np.uint64)
    signature = np.zeros(len(solution.operands), np.uint64)
    np.add.at(signature, label, codes[0, number])
    near = (np.diff(label) == 0) & (np.diff(number) == 0) & (np.diff(position) == 1)
    np.add.at(signature, label[1:][near], codes[1, number[1:][near]])
    kind = np.unique(signature, return_inverse=True)[1].reshape(-1)
    dtype = np.min_scalar_type(-int(kind.max() + 1) * len(found.axes))
    key = kind.astype(dtype)[label] * dtype.type(len(found.axes)) + number.astype(dtype)
    order = np.argsort(key, kind="stable").astype(np.int32)
    del key
    label, number, position = label[order], number[order], position[order]
    del order
    code = kind[label]
    edge = (code[1:] != code[:-1]) | (number[1:] != number[:-1])
    starts = np.flatnonzero(np.concatenate([[True], edge]))
    stops = np.append(starts[1:], len(label))
    out: dict[int, list[_Place]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        channels = 1 + np.count_nonzero(np.diff(label[start:stop]))
        table = position[start:stop].reshape(channels, -1)
        place = _Place(found.axes[number[start]], table)
        out.setdefault(int(code[start]), []).append(place)
    return list(out.values())


def _runs(places: list[_Place]) -> list[list[_Place]]:
    """Breaks a candidate into runs of evenly spaced channels."""
    order = np.argsort(places[0].positions[:, 0], kind="stable")
    places = [_Place(p.axis, p.positions[order]) for p in places]
    size = len(order)
    if size < 2:
        return []
    even = np.ones(size - 1, bool)
    for p in places:
        steps = np.diff(p.positions, axis=0)
        inner = _inner(p.positions)
        even &= (inner > 0) & (steps == inner).all(axis=1)
    stops = [*(np.flatnonzero(~even) + 1).tolist(), size]
    starts = [0, *stops[:-1]]
    runs = [np.arange(a, b) for a, b in zip(starts, stops, strict=True) if b - a > 1]
    if sum(map(len, runs)) < size:
        # A permutation, a strided slice: each member says where its channels are.
        runs = _alike(places)
    out = [[_Place(p.axis, p.positions[run]) for p in places] for run in runs]
    rest = np.delete(np.arange(size), np.concatenate([[], *runs]).astype(int))
    return out + _apart([_Place(p.axis, p.positions[rest]) for p in places])


def _alike(places: list[_Place]) -> list[np.ndarray]:
    """Channels that lie in the same way from their first positions, and apart."""
    lines = np.concatenate([p.positions - p.positions[:, :1] for p in places], axis=1)
    kind = np.unique(lines, axis=0, return_inverse=True)[1].reshape(-1)
    runs = [np.flatnonzero(kind == k) for k in range(kind.max() + 1)]
    return [
        run
        for run in runs
        if len(run) > 1
        and all(
            len(np.unique(p.positions[run])) == p.positions[run].size for p in places
        )
    ]


def _apart(places: list[_Place]) -> list[list[_Place]]:
    """Runs of channels whose parts lie evenly, each with a step of its own.

    A head of a fused projection, with its dimensions here and its gate there.
    """
    steps = np.diff(np.concatenate([p.positions for p in places], axis=1), axis=0)
    out, start = [], 0
    while start < len(steps):
        differ = (steps[start:] != steps[start]).any(axis=1)
        count = int(differ.argmax()) if differ.any() else len(differ)
        run = [p.positions[start : start + count + 1] for p in places]
        start += count + 1
        if all(len(np.unique(line)) == line.size for line in run):
            parts = []
            for p, line in zip(places, run, strict=True):
                step = line[1] - line[0]
                parts += [_Place(p.axis, line[:, step == n]) for n in np.unique(step)]
            out.append(parts)
    return out


def _inner(positions: np.ndarray) -> int:
    """How many neighbouring positions belong to one channel, 0 if that is uneven."""
    steps = np.diff(positions[:, 0])
    inner = int(np.sort(steps)[len(steps) // 2])
    if inner < 1 or positions.shape[1] % inner:
        return 0
    blocks = positions.reshape(len(positions), -1, inner)
    whole = (blocks - blocks[:, :, :1] == np.arange(inner)).all()
    return inner if whole else 0


def _members(found: Analysis, place: _Place) -> list[Member]:
    axis, positions = place.axis, place.positions
    role: Role = "consumer"
    if axis.state:
        role = "state"
    elif axis.number in found.trace.producers:
        role = "producer"
    size, inner = len(positions), _inner(positions)
    places, first = None, positions[0]
    if not inner or (np.diff(positions, axis=0) != inner).any():
        start = positions[:, 0].min()
        places = tuple((positions[:, 0] - start).tolist())
        first = first - first[0] + start
        edges = np.flatnonzero(np.diff(first) != 1) + 1
        inner = math.gcd(len(first), *edges.tolist())
    starts = first[::inner]
    steps = set(np.diff(starts).tolist())
    block = size * inner if places is None else max(places) + inner
    if len(steps) <= 1:
        period = steps.pop() if steps else block
        runs = [(len(starts), int(starts[0]), period)]
    else:
        runs = [(1, int(start), block) for start in starts]
    return [
        Member(axis.path, axis.axis, role, outer, inner, offset, period, places)
        for outer, offset, period in runs
    ]


def _name(
    members: list[Member],
    makers: set[tuple[str, int]],
    shapes: dict[str, tuple[int, ...]],
    taken: set[str],
) -> str:
    """A name from the path of the largest producer, of a reader only if need be."""
    first = max(
        (m for m in members if m.role == "producer"),
        key=lambda m: ((m.path, m.axis) in makers, math.prod(shapes[m.path])),
    )
    parent = first.path.rpartition("/")[0]
    for name in (parent, first.path, f"{first.path}[{first.axis}]"):
        if name and name not in taken:
            return name
    number = 2
    while f"{first.path}[{first.axis}]#{number}" in taken:
        number += 1
    return f"{first.path}[{first.axis}]#{number}"
