"""Which producers may be scaled, channel by channel, without changing the function.

One pass over a trace, forward. Scale the entries of one producer in channel ``c`` by
``λ_c``: an array in which ``c`` lies along one axis is *homogeneous of degree k* if its
entries there are multiplied by ``λ_c^k`` and no others change. Products add degrees,
roots halve them, sums need equal ones; a sum over the channels or a function of another
kind ends it. A producer is scale-invariant if its degree has become 0 wherever it goes.

A bias moves its channels instead: it is followed as a *shift* that is the same at all
places, until the mean is subtracted, or the variance taken. A producer in front of it is
then judged as if the bias were zero, since the function does not depend on it.

Small constants that keep a denominator from zero count as zero, and running statistics
follow what they are statistics of, as they do in training.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sdp_jax.dimension import Member
from sdp_jax.groups import Groups
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.flops import kinds
from sdp_jax.tracing.ports import class_channels
from sdp_jax.tracing.trace import Body, Record, number_of
from sdp_jax.tracing.values import Axis, Value

# Constants below this, added to a variance or a norm, count as zero.
SMALL = 1e-2
_NOTHING: Mapping[int, Any] = {}


class Degree(NamedTuple):
    """Along which axis the channels lie, and the power of their factors."""

    axis: int
    power: float


class Shift(NamedTuple):
    """How an array moves with a bias: ``factor`` times sums of an array that does.

    The array is ``root``, ``steps`` are what has been done to it; with ``squared`` steps
    they were done to the square of what the first steps gave.
    """

    axis: int
    factor: float
    root: int
    steps: tuple[Any, ...] = ()
    squared: tuple[Any, ...] | None = None


class Scaling(NamedTuple):
    """What is known of an array.

    Attributes:
      degree: by producer, where it is not 0.
      shift: by bias.
      state: of what comes from running statistics alone, by dimension.
      centred: the producers of which running statistics have been subtracted.
      stacked: biases of the steps of a loop, which begin to move in it.
    """

    degree: Mapping[int, Degree] = _NOTHING
    shift: Mapping[int, Shift] = _NOTHING
    state: Mapping[int, Degree] = _NOTHING
    centred: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()


NONE = Scaling()
Follow: TypeAlias = Callable[["_Walk", Record, list[Scaling]], list[Scaling]]


def mark_invariant(found: Analysis, groups: Groups) -> Groups:
    """The same groups, in which the scale-invariant producers are marked."""
    walk = _Walk(found, groups)
    invariant = walk.invariant()

    def marked(d: int, m: Member) -> Member:
        free = m.role == "producer" and (d, m.path, m.axis) in invariant
        return dataclasses.replace(m, scale_invariant=True) if free else m

    dimensions = [
        dataclasses.replace(d, members=tuple(marked(k, m) for m in d.members))
        for k, d in enumerate(groups.dimensions)
    ]
    return dataclasses.replace(groups, dimensions=tuple(dimensions))


class _Walk:
    """One pass over a trace for all producers of all dimensions."""

    def __init__(self, found: Analysis, groups: Groups) -> None:
        self._found = found
        self._groups = groups
        # Producers by number: dimension, path, axis.
        self.sources: list[tuple[int, str, int]] = []
        self.uneven: set[int] = set()  # Not homogeneous somewhere.
        self.moves: set[int] = set()  # A shift that does not drop out.
        self.ends: set[int] = set()  # Of degree 0 from some place on.
        self.drops: set[int] = set()  # A shift that drops out somewhere.
        self.needs: dict[int, set[int]] = {}  # Biases that have to drop out.
        self._roots = 0
        self._label = found.solution.label
        self._there: dict[int, tuple[np.ndarray, frozenset[int]]] = {}

    def invariant(self) -> set[tuple[int, str, int]]:
        """The producers that are scale-invariant."""
        outs = self.run(self._found.body, self._leaves())
        for path, out in zip(self._found.outputs, outs, strict=True):
            if path not in self._found.renewed:
                self.lose(out)
        gone = self.drops - self.moves
        free = {s for s in self.ends - self.uneven if self.needs.get(s, gone) <= gone}
        return {self.sources[s] for s in free | gone}

    def _leaves(self) -> list[Scaling]:
        """The arguments of the function."""
        numbers: dict[tuple[int, str, int], int] = {}
        leaves: dict[str, Scaling] = {}
        for k, d in enumerate(self._groups):
            for m in d.members:
                if m.role == "consumer":
                    continue
                old = leaves.get(m.path, NONE)
                if m.role == "state":
                    state = {**old.state, k: Degree(m.axis, 1.0)}
                    leaves[m.path] = old._replace(state=state)
                    continue
                place = (k, m.path, m.axis)
                if place not in numbers:
                    numbers[place] = len(self.sources)
                    self.sources.append(place)
                s = numbers[place]
                degree = {**old.degree, s: Degree(m.axis, 1.0)}
                shift, stacked = old.shift, old.stacked
                shape = self._groups.shapes[m.path]
                if math.prod(shape) == shape[m.axis]:
                    shift = {**shift, s: Shift(m.axis, 1.0, -1 - s)}
                elif m.axis and math.prod(shape[1:]) == shape[m.axis]:
                    stacked |= {s}
                leaves[m.path] = Scaling(degree, shift, stacked=stacked)
        found = [leaves.get(leaf.path, NONE) for leaf in self._groups.leaves]
        return found + [NONE] * (len(self._found.body.ins) - len(found))

    def run(self, body: Body, ins: Sequence[Scaling]) -> list[Scaling]:
        """Follows the arguments of a jaxpr to its results."""
        env: dict[Any, Scaling] = dict(zip(body.jaxpr.invars, ins, strict=True))

        def read(var: Any) -> Scaling:
            return NONE if isinstance(var, Literal) else env.get(var, NONE)

        for record in body.records:
            given = [self._live(read(v)) for v in record.eqn.invars]
            if all(x is NONE for x in given):
                continue
            follow = FOLLOW.get(record.eqn.primitive.name, _unknown)
            if follow not in (_call, _scan):
                self.moves.update(*(x.stacked for x in given))
            outs = follow(self, record, given)
            for var, out in zip(record.eqn.outvars, outs, strict=True):
                if any(out):
                    env[var] = out
        return [self._live(read(v)) for v in body.jaxpr.outvars]

    def _live(self, x: Scaling) -> Scaling:
        """Less those of which all is known."""
        if x is NONE:
            return x
        if not self.uneven.isdisjoint(x.degree):
            degree = {s: k for s, k in x.degree.items() if s not in self.uneven}
            x = x._replace(degree=degree)
        if not self.moves.isdisjoint(x.shift):
            x = x._replace(
                shift={b: k for b, k in x.shift.items() if b not in self.moves}
            )
        return x if any(x) else NONE

    def lose(self, *some: Scaling) -> None:
        """Says that nothing is known of what is made of these."""
        for x in some:
            self.uneven.update(x.degree)
            self.moves.update(x.shift, x.stacked)

    def root(self) -> int:
        """A number for an array that shifts are told of."""
        self._roots += 1
        return self._roots

    def dimension(self, source: int) -> int:
        """The number of a producer's dimension."""
        return self.sources[source][0]

    def lies_along(self, d: int, axis: Axis) -> bool:
        """Whether channels of a dimension lie along an axis, one at each position."""
        return sum(d in self.along(f.atoms) for f in axis) == 1 and not any(
            ~d in self.along(f.atoms) for f in axis
        )

    def along(self, atoms: np.ndarray) -> frozenset[int]:
        """The dimensions along a factor; ``~d`` if two of its channels meet there."""
        known = self._there.get(id(atoms))
        if known is None:
            kind, dimensions = self._kinds
            there = np.flatnonzero(np.bincount(kind[self._label[atoms]])).tolist()
            all_of = frozenset().union(*(dimensions[k] for k in there))
            # The arrays are kept alive, so that their identity stays theirs.
            known = self._there[id(atoms)] = (atoms, all_of)
        return known[1]

    @functools.cached_property
    def _kinds(self) -> tuple[np.ndarray, list[frozenset[int]]]:
        """For each class a number, and the dimensions of classes of that number."""
        channel = class_channels(self._found, self._groups)
        rows = np.append(self._groups.owner, -1)[channel[self._found.solution.operands]]
        kind, rows = kinds(rows)
        sets = []
        for row in rows:
            twice = {~d for d in row if row.count(d) > 1}
            sets.append(frozenset(row) | twice)
        return kind, sets


def _unknown(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(*ins)
    return [NONE] * len(record.outs)


def _is_float(record: Record) -> bool:
    return jnp.issubdtype(record.eqn.outvars[0].aval.dtype, jnp.inexact)


def _number(value: Value) -> float | None:
    """The one real number that all entries of a constant are."""
    found = number_of(value.known)
    return None if found is None or np.iscomplexobj(found) else float(found)


def _is_zero(value: Value, *, nearly: bool = False) -> bool:
    """Whether it is zero, or a small positive constant."""
    if value.zero:
        return True
    number = _number(value)
    return number is not None and (number == 0 or (nearly and 0 < number < SMALL))


# Element by element, of one operand.


def _times(factor: float, w: _Walk, record: Record, ins: list[Scaling]) -> list[Any]:
    (x,) = ins
    if not _is_float(record):
        return _unknown(w, record, ins)
    if factor != 1:
        x = x._replace(shift=_multiplied(x.shift, factor))
    return [x]


def _multiplied(shift: Mapping[int, Shift], factor: float) -> dict[int, Shift]:
    return {b: k._replace(factor=k.factor * factor) for b, k in shift.items()}


def _power(power: float, w: _Walk, x: Scaling) -> list[Scaling]:
    """A power, as which a square keeps shifts."""
    w.lose(x._replace(degree=_NOTHING))
    degree, state = (
        {s: Degree(a, k * power) for s, (a, k) in places.items() if power}
        for places in (x.degree, x.state)
    )
    return [Scaling(degree, _NOTHING, state)]


def _root(power: float, w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    return _power(power, w, ins[0])


def _square(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    x = ins[0]
    kept = {
        b: Shift(k.axis, k.factor**2, k.root, k.steps, ())
        for b, k in x.shift.items()
        if k.squared is None
    }
    rest = {b: k for b, k in x.shift.items() if b not in kept}
    (out,) = _power(2.0, w, x._replace(shift=rest))
    return [out._replace(shift=kept)]


def _integer_pow(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    power = record.eqn.params["y"]
    return _square(w, record, ins) if power == 2 else _power(power, w, ins[0])


def _pow(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    power = _number(record.ins[1])
    return _unknown(w, record, ins) if power is None else _power(power, w, ins[0])


def _abs(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    return _power(1.0, w, ins[0])


def _sign(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.ends.update(ins[0].degree)
    w.moves.update(ins[0].shift)
    return [NONE] * len(record.outs)


# Element by element, of two operands.


def _add(sign: float, w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    x, y = ins
    first, second = record.ins
    degree: dict[int, Degree] = {}
    centred = x.centred | y.centred
    for s in {**x.degree, **y.degree}:
        a, b = x.degree.get(s), y.degree.get(s)
        if a is not None and a == b:
            degree[s] = a
            continue
        if a is not None and b is not None:
            w.uneven.add(s)
            continue
        (one, other, value) = (a, y, second) if a is not None else (b, x, first)
        assert one is not None
        d = w.dimension(s)
        biases = {
            t
            for t, k in other.shift.items()
            if k.root < 0 and k.squared is None
            if w.dimension(t) == d and k.axis == one.axis
        }
        if other.state.get(d) == Degree(one.axis, 1.0):
            centred |= {s}
        elif not _is_zero(value, nearly=one.power > 0):
            if not biases or value.data:
                w.uneven.add(s)
                continue
            w.needs.setdefault(s, set()).update(biases)
        degree[s] = one
    state: Mapping[int, Degree] = _NOTHING
    if not (first.data or second.data):
        for mine, value in ((x, second), (y, first)):
            if mine.state and _is_zero(value, nearly=True):
                state = mine.state
    return [Scaling(degree, _sum_shifts(sign, w, record, x, y), state, centred)]


def _sum_shifts(
    sign: float, w: _Walk, record: Record, x: Scaling, y: Scaling
) -> dict[int, Shift]:
    shift: dict[int, Shift] = {}
    new: int | None = None
    right = y.shift if sign == 1 else _multiplied(y.shift, sign)
    for b in {**x.shift, **right}:
        one, two = x.shift.get(b), right.get(b)
        if one is None or two is None:
            k = one or two
            assert k is not None
            other = y if one is not None else x
            value = record.ins[1 if one is not None else 0]
            if k.squared is not None:
                if _is_zero(value):
                    shift[b] = k
                else:
                    w.moves.add(b)
                continue
            held = other.state.get(w.dimension(b))
            if held == Degree(k.axis, 1.0):
                w.drops.add(b)
                continue
            if _is_zero(value):
                shift[b] = k
                continue
            new = w.root() if new is None else new
            shift[b] = Shift(k.axis, k.factor, new)
        elif one.axis != two.axis or (one.squared is None) != (two.squared is None):
            w.moves.add(b)
        elif one.squared is None:
            factor = one.factor + two.factor
            if abs(factor) <= 1e-6 * abs(one.factor):
                w.drops.add(b)
            else:
                new = w.root() if new is None else new
                shift[b] = Shift(one.axis, factor, new)
        elif _is_variance(one, two):
            w.drops.add(b)
        else:
            w.moves.add(b)
    return shift


def _is_variance(one: Shift, two: Shift) -> bool:
    """Whether it is the mean of the squares less the square of the mean."""
    mean, square = (two, one) if one.squared else (one, two)
    return (
        one.root == two.root
        and not mean.squared
        and mean.steps == (*square.steps, *(square.squared or ()))
        and abs(one.factor + two.factor) <= 1e-6 * abs(one.factor)
    )


def _larger(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """The larger or smaller of two: relu, and floors of a variance."""
    x, y = ins
    near = record.eqn.primitive.name == "max"
    w.moves.update(x.shift, y.shift)
    degree: dict[int, Degree] = {}
    for s in {**x.degree, **y.degree}:
        a, b = x.degree.get(s), y.degree.get(s)
        k = a or b
        assert k is not None
        value = record.ins[1 if a is not None else 0]
        if a == b or ((a is None or b is None) and _is_zero(value, nearly=near)):
            degree[s] = k
        else:
            w.uneven.add(s)
    state = _NOTHING
    for mine, value in ((x, record.ins[1]), (y, record.ins[0])):
        if mine.state and _is_zero(value, nearly=near):
            state = mine.state
    return [Scaling(degree, _NOTHING, state)]


def _multiply(sign: int, w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """A product, or with ``sign`` -1 a quotient."""
    x, y = ins
    first, second = record.ins
    same = record.eqn.invars[0] is record.eqn.invars[1]
    if same and sign == 1:
        return _square(w, record, [x])
    shift: dict[int, Shift] = {}
    numbers = _number(first), _number(second)
    if numbers[1]:
        shift = _multiplied(x.shift, numbers[1] ** sign)
    elif numbers[0] and sign == 1:
        shift = _multiplied(y.shift, numbers[0])
    w.moves.update((x.shift.keys() | y.shift.keys()) - shift.keys())
    degree = _joint(w, x.degree, y.degree, sign)
    centred = x.centred | y.centred
    if not (first.data or second.data):
        return [Scaling(degree, shift, _powers(x.state, y.state, sign), centred)]
    for held, with_ in ((y.state, sign), (x.state, 1)):
        for s in [s for s in centred if s in degree]:
            over = held.get(w.dimension(s))
            k = degree[s]
            if over is not None and over.axis == k.axis:
                if over.power * with_ == -0.5 and k.power == 1:
                    w.ends.add(s)
                    del degree[s]
    return [Scaling(degree, shift, _NOTHING, centred & degree.keys())]


def _joint(
    w: _Walk, x: Mapping[int, Degree], y: Mapping[int, Degree], sign: int = 1
) -> dict[int, Degree]:
    """Degrees of a product whose operands lie side by side."""
    out = dict(x)
    for s, (axis, power) in y.items():
        old = out.get(s)
        if old is None:
            out[s] = Degree(axis, sign * power)
        elif old.axis != axis:
            w.uneven.add(s)
            del out[s]
        elif old.power + sign * power == 0:
            w.ends.add(s)
            del out[s]
        else:
            out[s] = Degree(axis, old.power + sign * power)
    return out


def _powers(
    x: Mapping[int, Degree], y: Mapping[int, Degree], sign: int
) -> dict[int, Degree]:
    """What a product of running statistics is a power of."""
    out = dict(x)
    for d, (axis, power) in y.items():
        if d in out:
            del out[d]
        else:
            out[d] = Degree(axis, sign * power)
    return out


def _compare(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    x, y = ins
    for s in {**x.degree, **y.degree}:
        a, b = x.degree.get(s), y.degree.get(s)
        value = record.ins[1 if a is not None else 0]
        if a == b or ((a is None or b is None) and _is_zero(value)):
            w.ends.add(s)
        else:
            w.uneven.add(s)
    w.moves.update(x.shift, y.shift)
    return [NONE]


def _select(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(ins[0])
    return [_alike(w, ins[1:], record.ins[1:])]


def _alike(w: _Walk, ins: Sequence[Scaling], values: Sequence[Value]) -> Scaling:
    """One of several arrays: they have the same degree, or are zero."""
    w.moves.update(*(x.shift for x in ins))
    degree: dict[int, Degree] = {}
    for s in {s for x in ins for s in x.degree}:
        found = {
            x.degree.get(s) for x, v in zip(ins, values, strict=True) if not _is_zero(v)
        }
        if len(found) == 1 and (k := found.pop()) is not None:
            degree[s] = k
        else:
            w.uneven.add(s)
    return Scaling(degree)


# What moves entries.


def _carried(
    w: _Walk,
    record: Record,
    x: Scaling,
    axis_of: Callable[[int], int | None],
    *,
    out: int = 0,
    times: float = 1.0,
    even: bool = True,
) -> Scaling:
    """What goes along with its axis; without ``even`` a shift is no longer the same."""
    value = record.outs[out]
    step = None
    if x.shift:
        step = (record.eqn.primitive.name, value.shape, out, str(record.eqn.params))

    def lies(d: int, axis: int) -> int | None:
        new = axis_of(axis)
        there = new is not None and w.lies_along(d, value.axes[new])
        return new if there else None

    degree: dict[int, Degree] = {}
    shift: dict[int, Shift] = {}
    state: dict[int, Degree] = {}
    for s, k in x.degree.items():
        new = lies(w.dimension(s), k.axis)
        if new is None:
            w.uneven.add(s)
        else:
            degree[s] = Degree(new, k.power)
    for b, k in x.shift.items():
        new = lies(w.dimension(b), k.axis) if even else None
        if new is None:
            w.moves.add(b)
        elif k.squared is None:
            steps = (*k.steps, step) if k.root >= 0 else ()
            shift[b] = Shift(new, k.factor * times, k.root, steps)
        else:
            after = (*k.squared, step)
            shift[b] = Shift(new, k.factor * times, k.root, k.steps, after)
    for d, k in x.state.items():
        new = lies(d, k.axis)
        if new is not None:
            state[d] = Degree(new, k.power)
    return Scaling(degree, shift, state, x.centred & degree.keys())


def _axes(record: Record) -> tuple[int, ...]:
    return tuple(record.eqn.params.get("axes", record.eqn.params.get("dimensions", ())))


def _reduced(record: Record, axis: int) -> int | None:
    gone = _axes(record)
    return None if axis in gone else axis - sum(a < axis for a in gone)


def _reduce_sum(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    if not all(isinstance(a, int) for a in _axes(record)):
        return _unknown(w, record, ins)
    along = functools.partial(_reduced, record)
    counts = [math.prod(v.shape[a] for a in _axes(record)) for v in record.ins]
    return [
        _carried(w, record, x, along, out=k, times=float(count))
        for k, (x, count) in enumerate(zip(ins, counts, strict=True))
    ]


def _reduce_most(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    along = functools.partial(_reduced, record)
    return [_carried(w, record, ins[0], along, even=False)]


def _argument(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    found = _carried(w, record, ins[0], functools.partial(_reduced, record))
    w.ends.update(found.degree)
    w.moves.update(found.shift)
    return [NONE]


def _broadcast(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    places = record.eqn.params["broadcast_dimensions"]
    return [_carried(w, record, ins[0], places.__getitem__)]


def _transpose(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    order = list(record.eqn.params["permutation"])
    return [_carried(w, record, ins[0], order.index)]


def _reshape(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    before, after = record.ins[0].shape, record.outs[0].shape
    x, value = ins[0], record.outs[0]

    def place(d: int, axis: int) -> int | None:
        low = math.prod(before[axis + 1 :])
        high = low * before[axis]
        there = []
        for k, n in enumerate(after):
            inner = math.prod(after[k + 1 :])
            if n > 1 and inner < high and inner * n > low:
                there += [k] if w.lies_along(d, value.axes[k]) else []
                twice = any(~d in w.along(f.atoms) for f in value.axes[k])
                there += [k, k] if twice else []
        return there[0] if len(there) == 1 else None

    # All producers of one dimension that lie along the same axis go the same way.
    out = NONE
    places = {(w.dimension(s), k.axis) for m in x[:2] for s, k in m.items()}
    for d, axis in places | {(d, k.axis) for d, k in x.state.items()}:
        part = Scaling(
            {s: k for s, k in x.degree.items() if (w.dimension(s), k.axis) == (d, axis)},
            {s: k for s, k in x.shift.items() if (w.dimension(s), k.axis) == (d, axis)},
            {e: k for e, k in x.state.items() if (e, k.axis) == (d, axis)},
            x.centred,
        )
        found = _carried(w, record, part, lambda axis, d=d: place(d, axis))
        out = Scaling(
            {**out.degree, **found.degree},
            {**out.shift, **found.shift},
            {**out.state, **found.state},
            out.centred | found.centred,
        )
    return [out]


def _same_axis(axis: int) -> int:
    return axis


def _taken(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Slices and orders along other axes, or parts along this one in their order."""
    w.lose(*ins[1:])
    return [
        _carried(w, record, ins[0], _same_axis, out=k) for k in range(len(record.outs))
    ]


def _along_others(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """What mixes along some axes, which may not be that of the channels."""
    p = record.eqn.params
    name = record.eqn.primitive.name
    single = p.get("axis", p.get("dimension"))
    mixed = set(p.get("dimensions") or ()) if single is None else {single}
    if len(ins) > 1 or len(record.outs) > 1:
        return _unknown(w, record, ins)

    def along(axis: int) -> int | None:
        return None if axis in mixed else axis

    return [_carried(w, record, ins[0], along, even=name == "rev")]


def _dynamic_slice(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(*ins[1:])
    before, after = record.ins[0].shape, record.outs[0].shape

    def along(axis: int) -> int | None:
        return axis if before[axis] == after[axis] else None

    return [_carried(w, record, ins[0], along, even=False)]


def _pad(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(ins[1])
    if not _is_zero(record.ins[1]):
        return _unknown(w, record, ins)
    return [_carried(w, record, ins[0], _same_axis, even=False)]


def _concatenate(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Parts in which the channels lie have the same degree or shift, or are zero."""
    d = record.eqn.params["dimension"]
    new = w.root()

    def beside(s: int, axis: int, value: Value) -> bool:
        """Whether a part holds no channel; one of length 1 may have lost its atoms."""
        dims = [w.along(f.atoms) for f in value.axes[axis]]
        mine = w.dimension(s)
        there = any(mine in some or ~mine in some for some in dims)
        return d == axis and value.shape[axis] > 1 and not there

    def joint(places: list[Mapping[int, Any]], bad: set[int]) -> dict[int, Any]:
        out: dict[int, Any] = {}
        for s in {s for some in places for s in some}:
            axis = next(some[s].axis for some in places if s in some)
            found = {
                some.get(s)
                for some, v in zip(places, record.ins, strict=True)
                if not (beside(s, axis, v) or (_is_zero(v) and bad is w.uneven))
            }
            if len(found) == 1 and (k := found.pop()) is not None:
                out[s] = k
            else:
                bad.add(s)
        return out

    degree = joint([x.degree for x in ins], w.uneven)
    shifts = [
        {
            b: k._replace(root=new, steps=()) if k.squared is None else None
            for b, k in x.shift.items()
        }
        for x in ins
    ]
    w.moves.update(b for some in shifts for b, k in some.items() if k is None)
    kept = [{b: k for b, k in some.items() if k is not None} for some in shifts]
    return [
        _carried(w, record, Scaling(degree, joint(kept, w.moves)), _same_axis)
    ]


def _window(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(*ins[1:])
    sizes = record.eqn.params["window_dimensions"]

    def along(axis: int) -> int | None:
        return axis if sizes[axis] == 1 else None

    return [_carried(w, record, ins[0], along, even=False)]


# Contractions.


def _product(
    w: _Walk,
    record: Record,
    ins: list[Scaling],
    left: Callable[[int], int | None],
    right: Callable[[int], int | None],
) -> list[Scaling]:
    x, y = (z._replace(state=_NOTHING, centred=frozenset()) for z in ins)
    a = _carried(w, record, x, left, even=False)
    b = _carried(w, record, y, right, even=False)
    return [Scaling(_joint(w, a.degree, b.degree))]


def _dot(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    sums, batch = record.eqn.params["dimension_numbers"]
    ranks = [len(v.axes) for v in record.ins]
    free = [
        [a for a in range(n) if a not in (*c, *b)]
        for n, c, b in zip(ranks, sums, batch, strict=True)
    ]
    places: list[dict[int, int]] = []
    for side, start in ((0, 0), (1, len(free[0]))):
        order = [*batch[side]]
        table = {a: k for k, a in enumerate(order)}
        table |= {a: len(order) + start + k for k, a in enumerate(free[side])}
        places.append(table)
    return _product(w, record, ins, places[0].get, places[1].get)


def _conv(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    p = record.eqn.params
    if p["batch_group_count"] > 1:
        return _unknown(w, record, ins)
    spec = p["dimension_numbers"]
    batch, features = spec.out_spec[:2]
    left = {spec.lhs_spec[0]: batch}
    if record.ins[1].shape[spec.rhs_spec[1]] == 1:
        # Each channel by itself.
        left[spec.lhs_spec[1]] = features
    right = {spec.rhs_spec[0]: features}
    return _product(w, record, ins, left.get, right.get)


# Calls.


def _many(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Operands that pass side by side."""
    return ins


def _call(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    if not record.bodies or len(record.bodies[0].jaxpr.invars) != len(ins):
        return _unknown(w, record, ins)
    return w.run(record.bodies[0], ins)


def _scan(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    p, (body,) = record.eqn.params, record.bodies
    first, second = p["num_consts"], p["num_consts"] + p["num_carry"]
    carry = [x._replace(centred=frozenset()) for x in ins[first:second]]
    w.moves.update(*(x.stacked for x in ins[:second]))
    lines = [_behind(w, x, -1) for x in ins[second:]]
    outs = w.run(body, [*ins[:first], *carry, *lines])
    after = outs[: len(carry)]
    for one, two in zip(carry, after, strict=True):
        # What a step hands on is what it was given.
        for a, b, bad in (
            (one.degree, two.degree, w.uneven),
            (one.shift, two.shift, w.moves),
        ):
            bad.update(s for s in {**a, **b} if a.get(s) != b.get(s))
    kept = [Scaling(x.degree, x.shift) for x in carry]
    return [*kept, *(_behind(w, x, 1) for x in outs[len(carry) :])]


def _behind(w: _Walk, x: Scaling, by: int) -> Scaling:
    """The same with an axis more in front, or one less."""
    w.moves.update(x.shift)
    degree, state = (
        {s: Degree(k.axis + by, k.power) for s, k in places.items()}
        for places in (x.degree, x.state)
    )
    lost = {s for s, k in degree.items() if k.axis < 0}
    w.uneven.update(lost)
    degree = {s: k for s, k in degree.items() if s not in lost}
    shift = {s: Shift(degree[s].axis, 1.0, -1 - s) for s in x.stacked & degree.keys()}
    return Scaling(degree, shift, {d: k for d, k in state.items() if k.axis >= 0})


def _cond(w: _Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(ins[0])
    outs = [w.run(body, ins[1:]) for body in record.bodies]
    values = [body.outs for body in record.bodies]
    return [
        _alike(w, x, v)
        for x, v in zip(
            zip(*outs, strict=True), zip(*values, strict=True), strict=True
        )
    ]


def _each(names: str, follow: Follow) -> dict[str, Follow]:
    return dict.fromkeys(names.split(), follow)


FOLLOW: dict[str, Follow] = {
    **_each(
        "convert_element_type copy copy_p name device_put stop_gradient reduce_precision"
        " sharding_constraint reshard",
        functools.partial(_times, 1.0),
    ),
    "neg": functools.partial(_times, -1.0),
    "sqrt": functools.partial(_root, 0.5),
    "rsqrt": functools.partial(_root, -0.5),
    "cbrt": functools.partial(_root, 1 / 3),
    "square": _square,
    "integer_pow": _integer_pow,
    "pow": _pow,
    **_each("abs real imag conj", _abs),
    "sign": _sign,
    **_each("add add_any", functools.partial(_add, 1.0)),
    "sub": functools.partial(_add, -1.0),
    **_each("max min", _larger),
    "mul": functools.partial(_multiply, 1),
    "div": functools.partial(_multiply, -1),
    **_each("eq ne lt le gt ge", _compare),
    "select_n": _select,
    **_each("reduce_sum psum", _reduce_sum),
    **_each("reduce_max reduce_min", _reduce_most),
    **_each("argmax argmin", _argument),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **_each("reshape squeeze", _reshape),
    **_each("slice split", _taken),
    **_each("rev cumsum cummax cummin sort", _along_others),
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "concatenate": _concatenate,
    **_each("reduce_window_sum reduce_window_max reduce_window_min", _window),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **_each(
        "jit pjit closed_call core_call composite remat2 checkpoint remat"
        " custom_jvp_call custom_vjp_call",
        _call,
    ),
    "optimization_barrier": _many,
    "scan": _scan,
    "cond": _cond,
}
