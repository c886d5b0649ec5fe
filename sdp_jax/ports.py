"""Ports: where channels sit in the arguments and results of a function.

Parameters hold channels as members say; what a function passes in and out (a recurrent
state, a cache of keys and values, features beside logits) holds them by position.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

PortRole = Literal["carry", "input", "output"]


@dataclasses.dataclass(frozen=True)
class Port:
    """An axis of an argument or of a result in which channels sit.

    Attributes:
      path: path of the leaf, its keys joined by ``/``. That of an argument begins with
        its number behind the parameters, from 0; that of a result is its path in what
        the function returns.
      axis: the axis.
      role: ``"carry"`` for an argument that comes back as a result, ``"input"`` for any
        other argument, ``"output"`` for a result.
      channels: for each position the channels that it needs, by their numbers in a
        vector of all; it is there as long as all of them are.
    """

    path: str
    axis: int
    role: PortRole
    channels: tuple[tuple[int, ...], ...]

    def stays(self, alive: np.ndarray) -> np.ndarray:
        """Which positions are left, from which channels are, ``(num_channels,)``."""
        return np.asarray([all(alive[c] for c in row) for row in self.channels])


def ports_after(ports: Sequence[Port], alive: np.ndarray) -> tuple[Port, ...]:
    """Ports once only some of the channels are left."""
    number = (np.cumsum(alive) - 1).tolist()
    out = []
    for p in ports:
        left = zip(p.channels, p.stays(alive), strict=True)
        rows = (tuple(number[c] for c in row) for row, stays in left if stays)
        out.append(dataclasses.replace(p, channels=tuple(rows)))
    return tuple(out)


def ports_among(ports: Sequence[Port], inside: np.ndarray) -> tuple[Port, ...]:
    """Ports where the other channels are taken to stay; those without any go."""
    number = (np.cumsum(inside) - 1).tolist()
    out = []
    for p in ports:
        rows = tuple(tuple(number[c] for c in r if inside[c]) for r in p.channels)
        if any(rows):
            out.append(dataclasses.replace(p, channels=rows))
    return tuple(out)


def check_ports(ports: Sequence[Port], count: int) -> None:
    """Refuses what does not fit so many channels."""
    for p in ports:
        if p.role not in get_args(PortRole):
            raise ValueError(
                f"{p.path!r}: role {p.role!r} is not one of {get_args(PortRole)}"
            )
        bad = [c for row in p.channels for c in row if not 0 <= c < count]
        if bad:
            raise ValueError(
                f"axis {p.axis} of {p.path!r} needs channel {bad[0]}, but there are "
                f"{count}"
            )
