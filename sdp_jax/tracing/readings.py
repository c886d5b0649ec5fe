"""Where a trace reads channels: the places whose operands carry their activations.

A channel is *read* where its axis ends: in a contraction with weights; for dimensions
that no weights read, in one of two activations (queries and keys), in any other
operation behind which it is gone (a sum over channels), or as an output.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from sdp_jax.activations import Kernel
from sdp_jax.groups import Groups
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.atoms import Reason
from sdp_jax.tracing.origins import CALLS, Frame, Origin, added, frame_of, moved
from sdp_jax.tracing.ports import class_channels
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.trace import NO_RULE, Record
from sdp_jax.tracing.values import Axis

# How a channel is read, the first that there is counts.
WEIGHTS, ACTIVATIONS, GONE, OUTPUT = range(4)
# The number of an operand, its axes that the statistics have, its number of groups.
Weights: TypeAlias = tuple[int, tuple[int, ...], int]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """An operand of an equation along whose axes channels are read.

    Attributes:
      record: the equation; ``None`` for an output of the function.
      operand: the number of the operand, or of the output.
      axes: its axes that the statistics have, in this order.
      channels: the numbers of the channels of each position, -1 for none.
      how: how it is read.
      text: the operation, and the user's file and line.
      weights: the operand that holds weights.
      loops: the lengths of the loops whose steps take other weights, by their numbers,
        outermost first: they have statistics of their own.
      refused: why nothing can be computed here, or "".
      kernel: the leaf of the weights.
    """

    record: Record | None
    operand: int
    axes: tuple[int, ...]
    channels: np.ndarray
    how: int
    text: str
    weights: Weights | None = None
    loops: tuple[tuple[int, int], ...] = ()
    refused: str = ""
    kernel: Kernel | None = None


def find_places(found: Analysis, groups: Groups, paths: Sequence[str]) -> list[Place]:
    """The places where the channels of each dimension are read.

    ``paths`` are those of all parameters, in their order.

    Raises:
      ValueError: if a dimension is read nowhere, or where nothing can be computed.
    """
    finder = _Finder(found, groups)
    finder.start(paths)
    best: dict[int, int] = {}
    for place in finder.places:
        for d in finder.dimensions(place.channels):
            best[d] = min(best.get(d, OUTPUT), place.how)
    lost = [d.name for k, d in enumerate(groups) if k not in best]
    if lost:
        raise ValueError(
            f"no activation of dimension {lost[0]!r} is read by this function at these "
            "input shapes: it reads its channels not at all, or among the parameters "
            "alone. Give the function that the groups were found on, or "
            f"groups.without({', '.join(map(repr, lost))})"
        )
    owner = np.append(groups.owner, -1)
    rank = np.array([*(best[k] for k in range(len(groups))), -1])
    chosen = []
    for place in finder.places:
        here = rank[owner[place.channels]] == place.how
        if not here.any():
            continue
        table = np.where(here, place.channels, -1)
        table = table[..., (table >= 0).reshape(-1, table.shape[-1]).any(axis=0)]
        if place.refused:
            (first, *_) = finder.dimensions(table)
            name = groups.dimensions[first].name
            raise ValueError(
                f"the activations of dimension {name!r} cannot be had: {place.text} "
                f"reads them {place.refused}. Leave it out with "
                f"groups.without({name!r})"
            )
        front = tuple(length for _, length in place.loops)
        table = np.broadcast_to(table, (*front, *table.shape))
        chosen.append(dataclasses.replace(place, channels=table))
    seen = np.zeros(groups.num_channels + 1, bool)
    for place in chosen:
        seen[place.channels] = True
    if not seen[:-1].all():
        name = groups.dimensions[groups.owner[int(np.argmin(seen[:-1]))]].name
        raise ValueError(
            f"this function does not read all channels of dimension {name!r} as the "
            "groups have them: give the function that the groups were found on, or "
            f"groups.without({name!r})"
        )
    return chosen


class _Finder:
    """Goes through a trace, and through the bodies that it runs."""

    def __init__(self, found: Analysis, groups: Groups) -> None:
        self.places: list[Place] = []
        # What is added behind a kernel is known once the walk is over.
        self._kernels: list[tuple[int, Frame, Record, Weights, Origin]] = []
        self._found = found
        self._owner = groups.owner
        solution = found.solution
        channel = class_channels(found, groups)
        self._rows = channel[solution.operands]
        self._label = solution.label
        # The arrays are kept alive, so that their identity stays theirs.
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def dimensions(self, channels: np.ndarray) -> list[int]:
        """The numbers of the dimensions of some channels."""
        return np.unique(self._owner[channels[channels >= 0]]).tolist()

    def start(self, paths: Sequence[str]) -> None:
        """Goes through the whole function."""
        body = self._found.body
        origins: list[Origin | None] = [None] * len(body.ins)
        for i, path in enumerate(paths):
            origins[i] = Origin(path, tuple(range(len(body.ins[i].axes))))
        frame = frame_of(body, None, None, origins, [frozenset()] * len(origins))
        self._walk(frame, (), "")
        for k, value in enumerate(body.outs):
            if value.data:
                self._add(None, k, value.axes, OUTPUT, (), "")
        for number, frame, record, weights, origin in self._kernels:
            kernel = self._kernel(frame, record, weights, origin)
            self.places[number] = dataclasses.replace(
                self.places[number], kernel=kernel
            )

    def _channels(self, axis: Axis) -> np.ndarray:
        """For each position of an axis the channels that it needs."""
        table = np.zeros((1, 0), np.int64)
        for f in axis:
            if id(f.atoms) not in self._known:
                rows = self._rows[self._label[f.atoms]]
                rows = rows[:, (rows >= 0).any(axis=0)]
                self._known[id(f.atoms)] = (f.atoms, rows)
            table = _grid([table, self._known[id(f.atoms)][1]])
            table = table.reshape(table.shape[0] * table.shape[1], table.shape[2])
        return table

    def _walk(self, frame: Frame, loops: tuple[Record, ...], refused: str) -> None:
        for record in frame.body.records:
            self._look(frame, record, loops, refused)
            vars_in = record.eqn.invars
            steps = frozenset[int]().union(
                *(frame.steps.get(v, ()) for v in vars_in if not hasattr(v, "val"))
            )
            frame.steps.update(dict.fromkeys(record.eqn.outvars, steps))
            if record.bodies:
                self._enter(frame, record, loops, refused)
                continue
            first = vars_in[0] if vars_in else None
            origin = None if hasattr(first, "val") else frame.origins.get(first)
            axes = None if origin is None else moved(record, origin.axes)
            if origin is not None and axes is not None:
                out = dataclasses.replace(origin, axes=axes)
                frame.origins[record.eqn.outvars[0]] = out

    def _enter(
        self, frame: Frame, record: Record, loops: tuple[Record, ...], refused: str
    ) -> None:
        """Goes into the bodies that an equation runs."""
        name, p = record.eqn.primitive.name, record.eqn.params
        vars_in = record.eqn.invars
        origins = [None if hasattr(v, "val") else frame.origins.get(v) for v in vars_in]
        steps = [
            frozenset[int]() if hasattr(v, "val") else frame.steps.get(v, frozenset())
            for v in vars_in
        ]
        every = list(range(len(vars_in)))
        if name in CALLS:
            inner = self._inner(frame, record, 0, record, origins, steps)
            self._walk(inner, loops, refused)
            for var, out in zip(
                record.eqn.outvars, inner.body.jaxpr.outvars, strict=True
            ):
                if not hasattr(out, "val") and out in inner.origins:
                    frame.origins[var] = inner.origins[out]
            return
        if name == "scan":
            first = p["num_consts"] + p["num_carry"]
            number = id(record)
            for i in every[p["num_consts"] : first]:
                origins[i] = None
            for i in every[first:]:
                steps[i] = steps[i] | {number}
                if (o := origins[i]) is not None and o.axes[0] is not None:
                    lead = (*o.loops, (number, o.axes[0]))
                    origins[i] = Origin(o.path, o.axes[1:], lead)
                else:
                    origins[i] = None
            inner = self._inner(frame, record, 0, None, origins, steps)
            self._walk(inner, (*loops, record), refused)
        elif name == "while":
            end = p["cond_nconsts"] + p["body_nconsts"]
            for i in every[end:]:
                origins[i] = None
            test, step = record.bodies
            alone = np.ndim(test.jaxpr.outvars[0].aval) == 0
            chosen, why = [*every[: p["cond_nconsts"]], *every[end:]], "to end a loop"
            self._some(frame, record, 0, chosen, origins, steps, loops, why)
            chosen = every[p["cond_nconsts"] :]
            many = "in a loop that ends for each example on its own (while under vmap)"
            why = refused if alone else many
            self._some(frame, record, 1, chosen, origins, steps, loops, why)
        elif name == "cond":
            for k in range(len(record.bodies)):
                self._some(frame, record, k, every[1:], origins, steps, loops, refused)
        else:
            rule = RULES.get(name, NO_RULE)
            _, choices = rule.runs(record.view, record.bodies)
            why = f"inside {name}, where each device or solver has its own"
            for body in (b for choice in choices for b in choice):
                none = [None] * len(body.ins)
                inner = frame_of(body, frame, None, none, [frozenset()] * len(none))
                self._walk(inner, loops, why)

    def _some(
        self,
        frame: Frame,
        record: Record,
        number: int,
        chosen: Sequence[int],
        origins: Sequence[Origin | None],
        steps: Sequence[frozenset[int]],
        loops: tuple[Record, ...],
        refused: str,
    ) -> None:
        """Goes into a body that takes some of the operands."""
        inner = self._inner(
            frame,
            record,
            number,
            None,
            [origins[i] for i in chosen],
            [steps[i] for i in chosen],
        )
        self._walk(inner, loops, refused)

    def _inner(
        self,
        frame: Frame,
        record: Record,
        number: int,
        call: Record | None,
        origins: Sequence[Origin | None],
        steps: Sequence[frozenset[int]],
    ) -> Frame:
        return frame_of(record.bodies[number], frame, call, origins, steps)

    def _look(
        self, frame: Frame, record: Record, loops: tuple[Record, ...], refused: str
    ) -> None:
        """Notes what an equation reads."""
        if record.bodies:
            return
        name = record.eqn.primitive.name
        if name == "dot_general":
            self._dot(frame, record, loops, refused)
        elif name == "ragged_dot_general":
            self._ragged(record, refused)
        elif name == "conv_general_dilated":
            self._conv(frame, record, loops, refused)
        else:
            self._last(record, refused)

    def _dot(
        self, frame: Frame, record: Record, loops: tuple[Record, ...], refused: str
    ) -> None:
        contract, batch = record.eqn.params["dimension_numbers"]
        for k, value in enumerate(record.ins):
            if not value.data:
                continue
            ends = [value.axes[d] for d in contract[k]]
            if record.ins[1 - k].data:
                axes = tuple(contract[k])
                self._add(record, k, value.axes, ACTIVATIONS, axes, refused)
                continue
            axes = (*batch[k], *contract[k])
            other = (*batch[1 - k], *contract[1 - k])
            table = _grid(
                [np.zeros((value.shape[d], 0), np.int64) for d in batch[k]]
                + [self._channels(axis) for axis in ends]
            )
            self._weighted(
                frame, record, k, axes, table, (1 - k, other, 1), loops, refused
            )

    def _ragged(self, record: Record, refused: str) -> None:
        p = record.eqn.params["ragged_dot_dimension_numbers"]
        contract, _ = p.dot_dimension_numbers
        value = record.ins[0]
        if value.data:
            axes = tuple(contract[0])
            if record.ins[1].data:
                self._add(record, 0, value.axes, ACTIVATIONS, axes, refused)
                return
            table = _grid([self._channels(value.axes[d]) for d in axes])
            # The weights of all experts together.
            weights = (1, tuple(contract[1]), 1)
            self._note(record, 0, axes, table, WEIGHTS, refused, weights=weights)

    def _conv(
        self, frame: Frame, record: Record, loops: tuple[Record, ...], refused: str
    ) -> None:
        value, kernel = record.ins
        spec, p = record.eqn.params["dimension_numbers"], record.eqn.params
        if not value.data or p["batch_group_count"] > 1:
            return
        count = p["feature_group_count"]
        table = np.tile(self._channels(kernel.axes[spec.rhs_spec[1]]), (count, 1))
        axes = (spec.lhs_spec[1],)
        weights = (1, (spec.rhs_spec[0], spec.rhs_spec[1]), count)
        if kernel.data:
            self._note(record, 0, axes, table, ACTIVATIONS, refused)
        else:
            self._weighted(frame, record, 0, axes, table, weights, loops, refused)

    def _last(self, record: Record, refused: str) -> None:
        """Notes operands behind which channels are gone."""
        after = {
            d
            for value in record.outs
            for axis in value.axes
            for d in self.dimensions(self._channels(axis))
        }
        for k, value in enumerate(record.ins):
            if value.data:
                axes = tuple(
                    d
                    for d, axis in enumerate(value.axes)
                    if set(self.dimensions(self._channels(axis))) - after
                )
                self._add(record, k, value.axes, GONE, axes, refused)

    def _add(
        self,
        record: Record | None,
        operand: int,
        given: Sequence[Axis],
        how: int,
        axes: tuple[int, ...],
        refused: str,
    ) -> None:
        """Notes an operand by itself; of an output all axes of channels."""
        tables = [self._channels(axis) for axis in given]
        if record is None:
            axes = tuple(d for d, table in enumerate(tables) if table.shape[1])
        table = _grid([tables[d] for d in axes])
        self._note(record, operand, axes, table, how, refused)

    def _note(
        self,
        record: Record | None,
        operand: int,
        axes: tuple[int, ...],
        table: np.ndarray,
        how: int,
        refused: str,
        **more: Any,
    ) -> None:
        if table.size:
            text = "an output" if record is None else _text(record)
            place = Place(record, operand, axes, table, how, text, refused=refused)
            self.places.append(dataclasses.replace(place, **more))

    def _weighted(
        self,
        frame: Frame,
        record: Record,
        operand: int,
        axes: tuple[int, ...],
        table: np.ndarray,
        weights: Weights,
        loops: tuple[Record, ...],
        refused: str,
    ) -> None:
        """Notes what is read by weights, and which leaf these are."""
        var = record.eqn.invars[weights[0]]
        steps, origin = frozenset[int](), None
        if not hasattr(var, "val"):
            steps = frame.steps.get(var, frozenset())
            origin = frame.origins.get(var)
        own = tuple((id(r), r.eqn.params["length"]) for r in loops if id(r) in steps)
        loops_of = [] if origin is None else [n for n, _ in origin.loops]
        if table.size and origin is not None and loops_of == [n for n, _ in own]:
            kernel = (len(self.places), frame, record, weights, origin)
            self._kernels.append(kernel)
        self._note(
            record,
            operand,
            axes,
            table,
            WEIGHTS,
            refused,
            weights=weights,
            loops=own,
        )

    def _kernel(
        self,
        frame: Frame,
        record: Record,
        weights: Weights,
        origin: Origin,
    ) -> Kernel | None:
        number, axes, groups = weights
        conv = record.eqn.primitive.name == "conv_general_dilated"
        if groups > 1:
            return None
        axes = axes[1:] if conv else axes
        mine = [origin.axes[d] for d in axes]
        front = [axis for _, axis in origin.loops]
        leaf = tuple(a for a in (*front, *mine) if a is not None)
        if len(leaf) < len(front) + len(mine):
            return None
        return Kernel(origin.path, leaf, *self._bias(frame, record, number, origin))

    def _bias(
        self, frame: Frame, record: Record, number: int, origin: Origin
    ) -> tuple[Any, ...]:
        """The leaf behind the kernel, its axes as those of the kernel, and its sign."""
        found = added(frame, record, _labels(record, number, origin))
        if found is None:
            return ()
        bias, labels, sign = found
        mine = dict(origin.loops)
        at: dict[int, int] = {}
        for d, label in zip(bias.axes, labels, strict=True):
            if d is not None and label is not None:
                at[d] = label
        for loop, d in bias.loops:
            if loop in mine:
                at[d] = mine[loop]
        rank = len(bias.axes) - bias.axes.count(None) + len(bias.loops)
        outs = {label for label in labels if label is not None} | set(mine.values())
        if sorted(at) != list(range(rank)) or set(at.values()) != outs:
            return ()
        return bias.path, tuple(at[d] for d in range(rank)), sign


def _labels(record: Record, number: int, origin: Origin) -> list[int | None]:
    """For each axis of a product the axis of the leaf of its weights."""
    if record.eqn.primitive.name == "conv_general_dilated":
        spec = record.eqn.params["dimension_numbers"]
        labels: list[int | None] = [None] * len(spec.out_spec)
        labels[spec.out_spec[1]] = origin.axes[spec.rhs_spec[0]]
        return labels
    contract, batch = record.eqn.params["dimension_numbers"]
    labels = [origin.axes[d] for d in batch[number]]
    for k in range(2):
        gone = (*batch[k], *contract[k])
        free = [d for d in range(len(record.ins[k].axes)) if d not in gone]
        labels += [origin.axes[d] if k == number else None for d in free]
    return labels


def _grid(tables: Sequence[np.ndarray]) -> np.ndarray:
    """The channels of each combination of positions along several axes."""
    shape = tuple(len(table) for table in tables)
    parts = []
    for k, table in enumerate(tables):
        ones = [1] * len(tables)
        ones[k] = len(table)
        line = table.reshape(*ones, table.shape[1])
        parts.append(np.broadcast_to(line, (*shape, table.shape[1])))
    return np.concatenate(parts, axis=-1) if parts else np.zeros((0,), np.int64)


def _text(record: Record) -> str:
    """The operation, and the user's file and line."""
    reason = Reason(record.eqn.primitive.name, "", record.eqn.source_info)
    place = f" ({reason.where})" if reason.where else ""
    return f"{reason.primitive}{place}"
