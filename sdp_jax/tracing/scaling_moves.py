"""Scaling and shifting through what moves, sums and contracts entries, and calls."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sdp_jax.tracing.scaling import (
    BODIES,
    NONE,
    Degree,
    Follow,
    Scaling,
    Shift,
    Walk,
    is_zero,
    unknown,
)
from sdp_jax.tracing.scaling_elementwise import alike, each, joint
from sdp_jax.tracing.trace import Record
from sdp_jax.tracing.values import Value

# For each axis of an operand those of the result along which its channels may lie.
Places: TypeAlias = Sequence[Sequence[int]]


def _carried(
    w: Walk,
    record: Record,
    x: Scaling,
    places: Places,
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

    def place(d: int, axis: int) -> int | None:
        found = [a for a in places[axis] if w.holds(d, value.axes[a])]
        single = len(found) == 1 and w.lies_along(d, value.axes[found[0]])
        return found[0] if single else None

    degree: dict[int, Degree] = {}
    shift: dict[int, Shift] = {}
    state: dict[int, Degree] = {}
    for s, k in x.degree.items():
        axis = place(w.dimension(s), k.axis)
        if axis is None:
            w.uneven.add(s)
        else:
            degree[s] = Degree(axis, k.power)
    for b, k in x.shift.items():
        axis = place(w.dimension(b), k.axis) if even else None
        if axis is None:
            w.moves.add(b)
        elif k.squared is None:
            # A bias itself is zero if its leaf is, whatever has been done to it.
            steps = (*k.steps, step) if k.root >= 0 else ()
            shift[b] = Shift(axis, k.factor * times, k.root, steps)
        else:
            squared = (*k.squared, step)
            shift[b] = Shift(axis, k.factor * times, k.root, k.steps, squared)
    for d, k in x.state.items():
        axis = place(d, k.axis)
        if axis is not None:
            state[d] = Degree(axis, k.power)
    return Scaling(degree, shift, state, x.centred & degree.keys())


def _rank(record: Record) -> range:
    return range(len(record.ins[0].axes))


def _axes(record: Record) -> tuple[int, ...]:
    return tuple(record.eqn.params["axes"])


def _left(record: Record, operand: int = 0) -> Places:
    """Where axes are behind a reduction."""
    gone = _axes(record)
    rank = range(len(record.ins[operand].axes))
    return [() if a in gone else (a - sum(g < a for g in gone),) for a in rank]


def _reduce_sum(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Also over named axes of ``vmap``, which are axes of the arrays here."""
    if not all(isinstance(a, int | np.integer) for a in _axes(record)):
        return unknown(w, record, ins)
    outs = []
    for k, (x, value) in enumerate(zip(ins, record.ins, strict=True)):
        count = math.prod(value.shape[a] for a in _axes(record))
        places = _left(record, k)
        outs.append(_carried(w, record, x, places, out=k, times=float(count)))
    return outs


def _reduce_most(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    return [_carried(w, record, ins[0], _left(record), even=False)]


def _argument(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    found = _carried(w, record, ins[0], _left(record), even=False)
    w.ends.update(found.degree)
    return [NONE]


def _broadcast(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    places = [(a,) for a in record.eqn.params["broadcast_dimensions"]]
    return [_carried(w, record, ins[0], places)]


def _transpose(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    order = list(record.eqn.params["permutation"])
    return [_carried(w, record, ins[0], [(order.index(a),) for a in _rank(record)])]


def _reshape(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Axes share entries where their strides overlap."""
    before, after = record.ins[0].shape, record.outs[0].shape
    low, high = _strides(before)
    inner, outer = _strides(after)
    places = [
        [k for k in range(len(after)) if inner[k] < high[a] and outer[k] > low[a]]
        for a in range(len(before))
    ]
    return [_carried(w, record, ins[0], places)]


def _strides(shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The stride of each axis, and that times its length."""
    bounds = [math.prod(shape[a:]) for a in range(len(shape) + 1)]
    return bounds[1:], bounds[:-1]


def _taken(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Parts in their order."""
    places = [(a,) for a in _rank(record)]
    return [_carried(w, record, ins[0], places, out=k) for k in range(len(record.outs))]


def _along_others(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """What mixes along some axes, which may not be that of the channels."""
    if len(ins) > 1:
        return unknown(w, record, ins)
    p = record.eqn.params
    mixed = p.get("dimensions", [p.get("axis", p.get("dimension"))])
    places = [() if a in mixed else (a,) for a in _rank(record)]
    return [_carried(w, record, ins[0], places, even=False)]


def _dynamic_slice(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(*ins[1:])
    sizes = zip(record.ins[0].shape, record.outs[0].shape, strict=True)
    places = [(a,) if m == n else () for a, (m, n) in enumerate(sizes)]
    return [_carried(w, record, ins[0], places, even=False)]


def _pad(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    if not is_zero(record.ins[1]):
        return unknown(w, record, ins)
    return [_carried(w, record, ins[0], [(a,) for a in _rank(record)], even=False)]


def _concatenate(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Parts in which the channels lie have the same degree or shift, or are zero."""
    d = record.eqn.params["dimension"]
    new = w.root()

    def beside(s: int, axis: int, value: Value) -> bool:
        """Whether a part holds no channel; one of length 1 may have lost its atoms."""
        there = w.holds(w.dimension(s), value.axes[axis])
        return d == axis and value.shape[axis] > 1 and not there

    def common(parts: list[dict[int, Any]], bad: set[int]) -> dict[int, Any]:
        out: dict[int, Any] = {}
        for s in {s for part in parts for s in part}:
            axis = next(part[s].axis for part in parts if s in part)
            found = {
                part.get(s)
                for part, v in zip(parts, record.ins, strict=True)
                if not (beside(s, axis, v) or (is_zero(v) and bad is w.uneven))
            }
            if len(found) == 1 and (k := found.pop()) is not None:
                out[s] = k
            else:
                bad.add(s)
        return out

    shifts: list[dict[int, Any]] = []
    for x in ins:
        w.moves.update(b for b, k in x.shift.items() if k.squared is not None)
        shifts.append(
            {
                b: Shift(k.axis, k.factor, new)
                for b, k in x.shift.items()
                if k.squared is None
            }
        )
    degree = common([dict(x.degree) for x in ins], w.uneven)
    x = Scaling(degree, common(shifts, w.moves))
    return [_carried(w, record, x, [(a,) for a in _rank(record)])]


def _window(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(*ins[1:])
    sizes = record.eqn.params["window_dimensions"]
    places = [(a,) if n == 1 else () for a, n in enumerate(sizes)]
    return [_carried(w, record, ins[0], places, even=False)]


def _product(
    w: Walk, record: Record, ins: list[Scaling], left: Places, right: Places
) -> list[Scaling]:
    """A contraction of two operands, whose axes go to these places."""
    pairs = zip(ins, (left, right), strict=True)
    a, b = (
        _carried(w, record, Scaling(x.degree, x.shift), p, even=False) for x, p in pairs
    )
    return [Scaling(joint(w, a.degree, b.degree))]


def _dot(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    sums, batch = record.eqn.params["dimension_numbers"]
    places: list[list[tuple[int, ...]]] = []
    start = len(batch[0])
    for value, summed, shared in zip(record.ins, sums, batch, strict=True):
        rank = range(len(value.axes))
        free = [a for a in rank if a not in (*summed, *shared)]
        table = {a: (k,) for k, a in enumerate(shared)}
        table |= {a: (start + k,) for k, a in enumerate(free)}
        places.append([table.get(a, ()) for a in rank])
        start += len(free)
    return _product(w, record, ins, *places)


def _conv(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    p = record.eqn.params
    if p["batch_group_count"] > 1:
        return unknown(w, record, ins)
    spec = p["dimension_numbers"]
    batch, features = spec.out_spec[:2]
    left: list[tuple[int, ...]] = [() for _ in spec.lhs_spec]
    right = left.copy()
    left[spec.lhs_spec[0]] = (batch,)
    if record.ins[1].shape[spec.rhs_spec[1]] == 1:
        left[spec.lhs_spec[1]] = (features,)  # Each channel by itself.
    right[spec.rhs_spec[0]] = (features,)
    return _product(w, record, ins, left, right)


def _call(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    if len(record.bodies[0].jaxpr.invars) != len(ins):
        return unknown(w, record, ins)
    return w.run(record.bodies[0], ins)


def _scan(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    p, (body,) = record.eqn.params, record.bodies
    first, second = p["num_consts"], p["num_consts"] + p["num_carry"]
    w.moves.update(*(x.stacked for x in ins[:second]))
    carry = [Scaling(x.degree, x.shift) for x in ins[first:second]]
    lines = [_behind(w, x, -1) for x in ins[second:]]
    outs = w.run(body, [*ins[:first], *carry, *lines])
    for one, two in zip(carry, outs, strict=False):
        # What a step hands on is what it was given.
        _differ(one.degree, two.degree, w.uneven)
        _differ(one.shift, two.shift, w.moves)
    return [*carry, *(_behind(w, x, 1) for x in outs[len(carry) :])]


def _differ(one: Mapping[int, Any], two: Mapping[int, Any], bad: set[int]) -> None:
    bad.update(s for s in {**one, **two} if one.get(s) != two.get(s))


def _behind(w: Walk, x: Scaling, by: int) -> Scaling:
    """The same with one axis more in front, or one less, along which a loop runs."""
    w.moves.update(x.shift)
    degree = {s: Degree(k.axis + by, k.power) for s, k in x.degree.items()}
    state = {d: Degree(k.axis + by, k.power) for d, k in x.state.items()}
    # The bias of a step is a bias.
    shift = {s: Shift(degree[s].axis, 1.0, -1 - s) for s in x.stacked & degree.keys()}
    return Scaling(degree, shift, state)


def _cond(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.lose(ins[0])
    outs = zip(*(w.run(body, ins[1:]) for body in record.bodies), strict=True)
    values = zip(*(body.outs for body in record.bodies), strict=True)
    return [alike(w, *pair) for pair in zip(outs, values, strict=True)]


FOLLOW: dict[str, Follow] = {
    **each("reduce_sum psum", _reduce_sum),
    **each("reduce_max reduce_min", _reduce_most),
    **each("argmax argmin", _argument),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **each("reshape squeeze", _reshape),
    **each("slice split", _taken),
    **each("rev cumsum cummax cummin sort", _along_others),
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "concatenate": _concatenate,
    **each("reduce_window_sum reduce_window_max reduce_window_min", _window),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(BODIES, _call),
    "scan": _scan,
    "cond": _cond,
}
