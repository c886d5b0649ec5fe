"""What groups are made of: channel dimensions, and where their channels live.

A *channel dimension* is a set of interchangeable channels (the filters of one
convolution, the neurons of one hidden layer, the heads of one attention layer). Its
*members* say where each channel lives: in which leaf, along which axis, at which
positions. Channel ``c`` of a member occupies, along its axis, the positions ::

    offset + o * period + c * inner + i      for o < outer, i < inner

which covers a plain axis (``outer = inner = 1``), a flattened convolution
(``outer = height * width``), an attention head (``inner = head_dim``), a
concatenation (``offset``) and their combinations (``period``). Where the channels do
not sit side by side in their order (a permutation, a strided slice), ``places[c]``
stands for ``c * inner``.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from sdp_jax.tree import missing_path_message

Role = Literal["producer", "consumer", "state"]


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the channels of one dimension sit along one axis of one leaf.

    Attributes:
      path: path of the leaf, its keys joined by ``/``.
      axis: axis of the leaf, negative from the end; non-negative once it is part of a
        :class:`Groups`.
      role: ``"producer"`` if zeroing these entries zeroes the channel's activation
        (filter, bias, scale and bias of a normalisation) or has to be for the rest to
        stay exact (input slices over which weights are standardised), ``"consumer"`` if
        they only read it (the input slices of the next layer) or must not be zero (what
        divides), ``"state"`` for running statistics. Producers are thresholded; all
        three are cut.
      outer: how often the whole set of channels is repeated along the axis.
      inner: how many neighbouring positions belong to one channel.
      offset: the position of the first entry of channel 0.
      period: distance between two repetitions, at least ``size * inner``;
        ``None`` stands for "the axis divided by ``outer``". Giving it also says that
        positions which no member covers are meant to stay.
      places: where each channel begins, counted from ``offset``, if they do not sit
        side by side in their order.
      scale_invariant: whether the function stays the same when these entries of a
        channel are multiplied by a positive number (a filter in front of a batch
        normalisation). Such a producer is zeroed with its channel, but a threshold
        neither counts nor shrinks it.

    Example:
      >>> import sdp_jax
      >>> sdp_jax.Member("conv/kernel", 3).role
      'producer'
      >>> # Behind the flattening of 4 × 4 positions each channel is read 16 times.
      >>> sdp_jax.Member("dense/kernel", 0, "consumer", outer=16).positions(2).shape
      (16, 2, 1)
    """

    path: str
    axis: int
    role: Role = "producer"
    outer: int = 1
    inner: int = 1
    offset: int = 0
    period: int | None = None
    places: tuple[int, ...] | None = None
    scale_invariant: bool = False

    def positions(self, size: int) -> np.ndarray:
        """Positions along the axis, an integer array ``(outer, size, inner)``."""
        period = size * self.inner if self.period is None else self.period
        places = self.inner * np.arange(size) if self.places is None else self.places
        return (
            self.offset
            + period * np.arange(self.outer)[:, None, None]
            + np.asarray(places)[None, :, None]
            + np.arange(self.inner)[None, None, :]
        )


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A set of interchangeable channels.

    Attributes:
      name: its name, unique within a :class:`Groups`.
      size: how many channels it has.
      members: where they live.
      removable: whether all of its channels may go, so that a layer vanishes: the
        hidden channels of a residual branch. The others keep at least one. All
        dimensions of a :class:`Groups` that are removable may vanish together.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    removable: bool = False

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that are thresholded."""
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def shrinking(self) -> tuple[Member, ...]:
        """Those that a threshold counts and shrinks before it zeroes them all.

        They are the producers that are not scale-invariant, or all if there is no
        other one.
        """
        found = tuple(m for m in self.producers if not m.scale_invariant)
        return found or self.producers


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Path and shape of one leaf of the tree that the groups describe."""

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An axis of a leaf that has to stay whole, or some positions of it, and why."""

    path: str
    axis: int
    positions: int
    reasons: tuple[str, ...]


# Where a row of channels begins, how many positions each has, and where they lie in it.
Row = tuple[int, int, tuple[int, ...]]


def members_after(
    d: Dimension, kept: tuple[int, ...], stays: Callable[[Member], np.ndarray]
) -> tuple[Member, ...]:
    """The members of a dimension as they sit on their axes after a cut.

    Other dimensions may have been cut from within its channels, or from between them.
    Rows of channels are joined wherever they repeat, whichever members they were of, so
    that several cuts give the members of the one that they are together.

    Args:
      d: the dimension.
      kept: its channels that stay.
      stays: which positions along the axis of a member stay.

    Returns:
      The members.

    Raises:
      ValueError: if what is left cannot be written as members.
    """
    members: list[Member] = []
    places = itertools.groupby(
        d.members, lambda m: (m.path, m.axis, m.role, m.scale_invariant)
    )
    for _, group in places:
        same = list(group)
        rows = [row for m in same for row in _rows_after(d, m, kept, stays(m))]
        members += _joined(same[0], rows, len(kept))
    return tuple(members)


def _rows_after(
    d: Dimension, m: Member, kept: tuple[int, ...], stays: np.ndarray
) -> list[Row]:
    rank = np.cumsum(stays) - 1
    rows: list[Row] = []
    for row in m.positions(d.size)[:, list(kept), :]:
        columns = np.flatnonzero(stays[row].any(axis=0))
        new = rank[row[:, columns]]
        if not stays[row[:, columns]].all() or (np.diff(new, axis=1) != 1).any():
            raise ValueError(
                f"dimension {d.name!r}: what is left of its channels on axis {m.axis} "
                f"of {m.path!r} is irregular and cannot be written as groups; cut.take "
                "works, but build the groups of the small parameters by hand"
            )
        if new.size:
            start = int(new[:, 0].min())
            rows.append((start, len(columns), tuple((new[:, 0] - start).tolist())))
    return rows


def _joined(m: Member, rows: list[Row], size: int) -> list[Member]:
    """Members of so many channels, each of rows that repeat at one distance."""
    members = []
    while rows:
        start, inner, places = rows[0]
        step = rows[1][0] - start if len(rows) > 1 else 0
        outer = 1
        while (
            step > 0
            and outer < len(rows)
            and rows[outer] == (start + outer * step, inner, places)
        ):
            outer += 1
        regular = places == tuple(range(0, size * inner, inner))
        members.append(
            dataclasses.replace(
                m,
                outer=outer,
                inner=inner,
                offset=start,
                period=step if outer > 1 else max(places) + inner,
                places=None if regular else places,
            )
        )
        rows = rows[outer:]
    return members


def as_text(value: Any) -> str:
    """Refuses what is no string."""
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def as_count(value: Any) -> int:
    """Refuses what is no non-negative integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a non-negative integer, got {value!r}")
    return value


def as_flag(value: Any) -> bool:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise TypeError(f"expected a Boolean, got {value!r}")
    return value


def member_from_json(raw: dict[str, Any]) -> Member:
    """The member of what ``dataclasses.asdict`` gives, checked."""
    numbers = ("axis", "outer", "inner", "offset")
    period, places = raw.get("period"), raw.get("places")
    return Member(
        as_text(raw["path"]),
        role=raw["role"],
        period=None if period is None else as_count(period),
        places=None if places is None else tuple(map(as_count, places)),
        scale_invariant=as_flag(raw.get("scale_invariant", False)),
        **{k: as_count(raw[k]) for k in numbers},
    )


def check_member(
    shapes: Mapping[str, tuple[int, ...]], d: Dimension, m: Member
) -> None:
    """Refuses a member that does not fit its leaf."""
    where = f"dimension {d.name!r}, member {m.path!r}"
    if m.role not in get_args(Role):
        raise ValueError(f"{where}: role {m.role!r} is not one of {get_args(Role)}")
    if m.scale_invariant and m.role != "producer":
        raise ValueError(
            f"{where}: scale_invariant is meant for producers, which a threshold "
            f"shrinks; this one is a {m.role}: leave it out"
        )
    if m.path not in shapes:
        raise ValueError(f"{where}: {missing_path_message(m.path, list(shapes))}")
    shape = shapes[m.path]
    if not 0 <= m.axis < len(shape):
        raise ValueError(f"{where}: axis {m.axis} does not exist; the shape is {shape}")
    if m.outer < 1 or m.inner < 1 or m.offset < 0:
        raise ValueError(
            f"{where}: outer and inner must be at least 1 and offset at least 0; got "
            f"outer={m.outer}, inner={m.inner}, offset={m.offset}"
        )
    if m.places is not None:
        _check_places(f"{where}, axis {m.axis}", d, m, shape[m.axis])
        return
    block = d.size * m.inner
    period = block if m.period is None else m.period
    if m.outer > 1 and period < block:
        raise ValueError(
            f"{where}: period {period} is shorter than {d.size} channels of {m.inner}; "
            f"axis {m.axis} has length {shape[m.axis]}"
        )
    end = m.offset + (m.outer - 1) * period + block
    if end > shape[m.axis]:
        raise ValueError(
            f"{where}: {d.size} channels need {end} positions, but axis {m.axis} has "
            f"length {shape[m.axis]} (shape {shape}, outer={m.outer}, inner={m.inner}, "
            f"offset={m.offset})"
        )


def _check_places(where: str, d: Dimension, m: Member, length: int) -> None:
    places = m.places or ()
    if len(places) != d.size or min(places) < 0:
        raise ValueError(
            f"{where}: places must hold a non-negative integer for each of {d.size} "
            f"channels; got {places}"
        )
    positions = m.positions(d.size)
    if positions.max() >= length or len(np.unique(positions)) < positions.size:
        raise ValueError(
            f"{where}: places {places} with inner={m.inner}, outer={m.outer}, "
            f"offset={m.offset} overlap, or go beyond the length {length}"
        )
