"""Scaling and shifting through element-wise primitives."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from sdp_jax.tracing.scaling import (
    NONE,
    NOTHING,
    Degree,
    Follow,
    Scaling,
    Shift,
    Walk,
    is_zero,
    number,
    unknown,
)
from sdp_jax.tracing.trace import Record
from sdp_jax.tracing.values import Value


def _times(factor: float, w: Walk, record: Record, ins: list[Scaling]) -> list[Any]:
    (x,) = ins
    if not jnp.issubdtype(record.eqn.outvars[0].aval.dtype, jnp.inexact):
        return unknown(w, record, ins)
    if factor != 1:
        x = x._replace(shift=_multiplied(x.shift, factor))
    return [x]


def _multiplied(shift: Mapping[int, Shift], factor: float) -> dict[int, Shift]:
    return {b: k._replace(factor=k.factor * factor) for b, k in shift.items()}


def _power(power: float, w: Walk, x: Scaling) -> list[Scaling]:
    """A power, as which a square keeps shifts."""
    w.lose(x._replace(degree=NOTHING))
    degree, state = (
        {s: Degree(a, k * power) for s, (a, k) in places.items() if power}
        for places in (x.degree, x.state)
    )
    return [Scaling(degree, NOTHING, state)]


def _root(power: float, w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    return _power(power, w, ins[0])


def _square(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    x = ins[0]
    kept = {
        b: Shift(k.axis, k.factor**2, k.root, k.steps, ())
        for b, k in x.shift.items()
        if k.squared is None
    }
    rest = {b: k for b, k in x.shift.items() if b not in kept}
    (out,) = _power(2.0, w, x._replace(shift=rest))
    return [out._replace(shift=kept)]


def _integer_pow(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    power = record.eqn.params["y"]
    return _square(w, record, ins) if power == 2 else _power(power, w, ins[0])


def _pow(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    power = number(record.ins[1])
    return unknown(w, record, ins) if power is None else _power(power, w, ins[0])


def _sign(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    w.ends.update(ins[0].degree)
    w.moves.update(ins[0].shift)
    return [NONE] * len(record.outs)


def _add(sign: float, w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
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
        elif not is_zero(value, nearly=one.power > 0):
            if not biases:
                w.uneven.add(s)
                continue
            w.needs.setdefault(s, set()).update(biases)
        degree[s] = one
    state: Mapping[int, Degree] = NOTHING
    if not (first.data or second.data):
        for mine, value in ((x, second), (y, first)):
            if mine.state and is_zero(value, nearly=True):
                state = mine.state
    return [Scaling(degree, _sum_shifts(sign, w, record, x, y), state, centred)]


def _sum_shifts(
    sign: float, w: Walk, record: Record, x: Scaling, y: Scaling
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
                if is_zero(value):
                    shift[b] = k
                else:
                    w.moves.add(b)
                continue
            held = other.state.get(w.dimension(b)) == Degree(k.axis, 1.0)
            if held and sign < 0:
                w.drops.add(b)
                continue
            if is_zero(value):
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


def _larger(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
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
        small = is_zero(value, nearly=near and k.power > 0)
        if a == b or ((a is None or b is None) and small):
            degree[s] = k
        else:
            w.uneven.add(s)
    state = NOTHING
    for mine, value in ((x, record.ins[1]), (y, record.ins[0])):
        if mine.state and is_zero(value, nearly=near):
            state = mine.state
    return [Scaling(degree, NOTHING, state)]


def _multiply(sign: int, w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """A product, or with ``sign`` -1 a quotient."""
    x, y = ins
    first, second = record.ins
    same = record.eqn.invars[0] is record.eqn.invars[1]
    if same and sign == 1:
        return _square(w, record, [x])
    shift: dict[int, Shift] = {}
    numbers = number(first), number(second)
    if numbers[1]:
        shift = _multiplied(x.shift, numbers[1] ** sign)
    elif numbers[0] and sign == 1:
        shift = _multiplied(y.shift, numbers[0])
    w.moves.update((x.shift.keys() | y.shift.keys()) - shift.keys())
    degree = joint(w, x.degree, y.degree, sign)
    centred = x.centred | y.centred
    if not (first.data or second.data):
        return [Scaling(degree, shift, _powers(x.state, y.state, sign), centred)]
    # A running variance is the square of what its mean has been subtracted from.
    for held, by in ((y.state, sign), (x.state, 1)):
        for s in centred & degree.keys():
            over = held.get(w.dimension(s))
            if over == Degree(degree[s].axis, -0.5 * by) and degree[s].power == 1:
                w.ends.add(s)
                del degree[s]
    return [Scaling(degree, shift, NOTHING, centred & degree.keys())]


def joint(
    w: Walk, x: Mapping[int, Degree], y: Mapping[int, Degree], sign: int = 1
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


def _compare(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    x, y = ins
    for s in {**x.degree, **y.degree}:
        a, b = x.degree.get(s), y.degree.get(s)
        value = record.ins[1 if a is not None else 0]
        if a == b or ((a is None or b is None) and is_zero(value)):
            w.ends.add(s)
        else:
            w.uneven.add(s)
    w.moves.update(x.shift, y.shift)
    return [NONE]


def _select(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    which = number(record.ins[0])
    if which is not None:
        w.lose(*(x for k, x in enumerate(ins) if k != 1 + int(which)))
        return [ins[1 + int(which)]]
    w.lose(ins[0])
    return [alike(w, ins[1:], record.ins[1:])]


def alike(w: Walk, ins: Sequence[Scaling], values: Sequence[Value]) -> Scaling:
    """One of several arrays: they have the same degree, or are zero."""
    w.moves.update(*(x.shift for x in ins))
    degree: dict[int, Degree] = {}
    for s in {s for x in ins for s in x.degree}:
        found = {
            x.degree.get(s) for x, v in zip(ins, values, strict=True) if not is_zero(v)
        }
        if len(found) == 1 and (k := found.pop()) is not None:
            degree[s] = k
        else:
            w.uneven.add(s)
    return Scaling(degree)


def _many(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """Operands that pass side by side."""
    return ins


def each(names: str, follow: Follow) -> dict[str, Follow]:
    """The same for several primitives."""
    return dict.fromkeys(names.split(), follow)


FOLLOW: dict[str, Follow] = {
    **each(
        "convert_element_type copy copy_p name device_put stop_gradient"
        " reduce_precision sharding_constraint reshard",
        functools.partial(_times, 1.0),
    ),
    "optimization_barrier": _many,
    "neg": functools.partial(_times, -1.0),
    "sqrt": functools.partial(_root, 0.5),
    "rsqrt": functools.partial(_root, -0.5),
    "cbrt": functools.partial(_root, 1 / 3),
    "square": _square,
    "integer_pow": _integer_pow,
    "pow": _pow,
    **each("abs real imag conj", functools.partial(_root, 1.0)),
    "sign": _sign,
    **each("add add_any", functools.partial(_add, 1.0)),
    "sub": functools.partial(_add, -1.0),
    **each("max min", _larger),
    "mul": functools.partial(_multiply, 1),
    "div": functools.partial(_multiply, -1),
    **each("eq ne lt le gt ge", _compare),
    "select_n": _select,
}
