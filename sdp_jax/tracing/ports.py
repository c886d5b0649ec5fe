"""Where the channels of groups sit in the arguments and results of a trace."""

import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.ports import Port, PortRole
from sdp_jax.tracing.analyse import Analysis, matches
from sdp_jax.tracing.values import Axis


def class_channels(found: Analysis, groups: Groups) -> np.ndarray:
    """For each class of a trace the number of its channel among all, or -1."""
    label, operands = found.solution.label, found.solution.operands
    atoms = {(axis.path, axis.axis): axis.atoms for axis in found.axes}
    number = np.full(len(operands), -1)
    start = 0
    for d in groups:
        # Many members have the same classes; they are looked at once.
        seen: set[bytes] = set()
        for m in d.members:
            places = m.positions(d.size).swapaxes(0, 1).reshape(d.size, -1)
            lines = label[atoms[m.path, m.axis][places]]
            if lines.shape[1] > 1:
                lines = np.unique(lines, axis=1)
            if lines.tobytes() in seen:
                continue
            seen.add(lines.tobytes())
            rows = operands[lines]
            # The class of a channel is the one that all of its positions have, and
            # that no other channel has.
            common = rows[:, 0]
            shared = (rows[:, :, None, :] == common[:, None, :, None]).any(3).all(1)
            channel, column = np.nonzero(shared & (common > 0))
            classes, first, times = np.unique(
                common[channel, column], return_index=True, return_counts=True
            )
            number[classes[times == 1]] = start + channel[first[times == 1]]
        start += d.size
    return number


def find_ports(found: Analysis, groups: Groups) -> tuple[Port, ...]:
    """The axes of arguments and results in which channels sit."""
    chosen = {
        p: v for p, v in found.outputs.items() if matches(p, groups.prune_outputs)
    }
    if not groups.prune_inputs and not chosen:
        return ()
    channel = class_channels(found, groups)
    ports: list[Port] = []

    def add(path: str, role: PortRole, axes: tuple[Axis, ...]) -> None:
        for d, axis in enumerate(axes):
            rows = _needs(axis, found, channel)
            if any(rows):
                ports.append(Port(path, d, role, rows))

    for path, value in found.inputs.items():
        add(path, "carry" if path in found.carries else "input", value.axes)
    for path, value in chosen.items():
        add(path, "output", value.axes)
    return tuple(ports)


def _needs(
    axis: Axis, found: Analysis, channel: np.ndarray
) -> tuple[tuple[int, ...], ...]:
    """For each position of an axis the channels that it needs."""
    label, operands = found.solution.label, found.solution.operands
    factors = [channel[operands[label[f.atoms]]] for f in axis]
    if all((line < 0).all() for line in factors):
        return ()
    rows: list[tuple[int, ...]] = [()]
    for line in factors:
        mine = [tuple(c for c in row if c >= 0) for row in line.tolist()]
        rows = [a + b for a in rows for b in mine]
    return tuple(tuple(sorted(set(row))) for row in rows)
