"""Element-wise primitives: positions are equated; what matters is f(0, …)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sdp_jax.tracing import numbers
from sdp_jax.tracing.devices import divides
from sdp_jax.tracing.rule import Flops, Rule, moves, per_entry
from sdp_jax.tracing.trace import Record, Trace, number_of
from sdp_jax.tracing.values import ZERO, Factor, Fill, Value, length, union

# f(x) = x
COPY = "convert_element_type copy copy_p name device_put stop_gradient".split()
# f(0) = 0
KEEP = (
    "neg tanh sin tan asin atan sinh asinh atanh erf expm1 log1p abs sign "
    "floor ceil round real imag conj reduce_precision square population_count "
    "erf_inv bessel_i1e"
).split()
# f(0) is another number, or nobody knows
LOSE = (
    "exp exp2 cos acos cosh acosh logistic not is_finite erfc bessel_i0e "
    "igamma igammac polygamma eq ge le nextafter clz xor shift_left "
    "shift_right_logical shift_right_arithmetic threefry2x32 random_gamma_grad "
    "regularized_incomplete_beta zeta igamma_grad_a eq_to le_to lt_to"
).split()
# f(0) is not finite, and 0 times it is not 0
POLE = "log rsqrt lgamma digamma".split()
# 0 if all operands are
ALL = "add sub add_any max min or ne gt lt complex".split()
# 0 if one operand is
ANY = "mul and mulhi".split()
# 0 if the first operand is; the others must not be
FIRST = "div rem".split()


def combine(
    t: Trace,
    eqn: Any,
    ins: Sequence[Value],
    fills: str,
    *,
    skip: int = 0,
    otherwise: Callable[[Sequence[Fill]], Fill] = lambda given: None,
) -> Value:
    """Equates all operands position by position.

    The first ``skip`` do not count for the fills. Where these give none, ``otherwise``
    may, from the fills of all operands.
    """
    data = any(v.data for v in ins)
    arrays = [i for i, v in enumerate(ins) if v.axes]
    zero = _zero([v.zero for v in ins[skip:]], fills)
    if not arrays:
        return Value((), data, zero)
    axes = []
    for k in range(len(ins[arrays[0]].axes)):
        # An operand of length 1 stands for its one entry at every position.
        size = max(length(ins[i].axes[k]) for i in arrays)
        along = [i for i in arrays if length(ins[i].axes[k]) == size]
        lines = t.unify(eqn, [ins[i].axes[k] for i in along])
        axis = []
        for factors in zip(*lines, strict=True):
            given: list[Fill] = [ZERO if v.zero else None for v in ins]
            for i, f in zip(along, factors, strict=True):
                given[i] = ZERO if ins[i].zero else f.fill
            operands = factors
            poles = {"pole": given, "first": given[1:]}.get(fills, [])
            poles = [f for f in poles if f is not None]
            if all(poles):  # What parameters hold must not become zero.
                t.nonzero |= ZERO.union(*poles)
            else:
                factors = t.freeze(eqn, factors[:1], "is not finite at zero")
            fill = joint_fill(t, given[skip:], fills, data)
            fill = otherwise(given) if fill is None else fill
            lost = [f for i, f in zip(along, operands, strict=True) if given[i] is None]
            rest = union([*(given[i] or ZERO for i in along), *(f.rest for f in lost)])
            varied = any(f.varied for f in lost)
            axis.append(Factor(factors[0].atoms, fill, rest, varied))
        axes.append(tuple(axis))
    return Value(tuple(axes), data, zero)


def _zero(zeros: list[bool], fills: str) -> bool:
    if fills == "first":
        return zeros[0] and not any(zeros[1:])
    return {"all": all(zeros), "any": any(zeros)}.get(fills, False)


def joint_fill(t: Trace, fills: Sequence[Fill], how: str, data: bool) -> Fill:
    """What a result holds at absent positions, by what its operands hold there."""
    known = [f for f in fills if f is not None]
    if how in ("lose", "pole") or not known:
        return None
    if how == "first":
        return fills[0]
    if how == "all":
        return ZERO.union(*known) if len(known) == len(fills) else None
    if len(known) == 1:
        return known[0]
    if not data:  # One is enough: of g · v / ‖v‖ the scale.
        return min(known, key=t.entries)
    for f in known:
        t.settle(f)
    return ZERO


def _map(fills: str, t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    at_zero = functools.partial(_evaluated, eqn, ins)
    return [combine(t, eqn, ins, fills, otherwise=at_zero)] * len(eqn.outvars)


def _steep(fills: str, t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Where all operands are zero, there is no finite derivative."""
    zero = combine(t, eqn, ins, "all")
    t.is_steep(eqn, ins, zero)
    return [zero if fills == "all" else combine(t, eqn, ins, fills)]


def _evaluated(eqn: Any, ins: Sequence[Value], given: Sequence[Fill]) -> Fill:
    """The fill of f(0, constants), by evaluation."""
    operands, fill = [], ZERO
    for value, one, var in zip(ins, given, eqn.invars, strict=True):
        dtype = var.aval.dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return None
        if one is not None:
            operands.append(np.zeros((), dtype))
            fill |= one
        elif (number := number_of(value.known)) is not None:
            operands.append(np.asarray(number))
        else:
            return None
    known = numbers.ELEMENTWISE.get(eqn.primitive.name)
    if all(one is None for one in given):
        return None  # In the latter case no operand is absent anywhere.
    found = numbers.evaluate(known, eqn, operands)
    return None if found is None or any(map(np.any, found)) else fill


def _literal(eqn: Any, position: int) -> float | None:
    var = eqn.invars[position]
    if isinstance(var, Literal) and np.ndim(var.val) == 0:
        return float(np.real(var.val))
    return None


def _select(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    which = ins[0].known
    if which is None or which.ndim:
        # Where the condition is zero, the first case is taken.
        def first(given: Sequence[Fill]) -> Fill:
            if given[0] is None or given[1] is None:
                return None
            return given[0] | given[1]

        return [combine(t, eqn, ins, "all", skip=1, otherwise=first)]
    # The others only lend their shape.
    value = combine(t, eqn, ins, "lose")
    chosen = combine(t, eqn, [ins[1 + int(which)]], "all")
    if not chosen.axes:
        return [dataclasses.replace(value, zero=chosen.zero)]
    return [dataclasses.replace(chosen, data=value.data)]


def _repeat_select(
    n: Any, record: Record, whole: Any, dimensions: Any, each: Any
) -> Any:
    which = record.ins[0].known
    if which is not None and not which.ndim:  # Of the others nothing is known.
        return n.absent(record, 1 + int(which), dimensions, each)
    ins = [n.absent(record, k, dimensions, each) for k in range(len(record.ins))]
    return n.rebind(record, ins)[0]


def _integer_pow(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    return [combine(t, eqn, ins, "all" if eqn.params["y"] > 0 else "pole")]


def _pow(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    exponent = _literal(eqn, 1)
    if exponent is not None:
        if 0 < exponent < 1:
            return _steep("all", t, eqn, ins[:1])
        return [combine(t, eqn, ins[:1], "all" if exponent > 0 else "pole")]
    base = _literal(eqn, 0)
    if base is not None and base > 0:
        return [combine(t, eqn, ins[1:], "lose")]
    return [combine(t, eqn, ins, "pole")]


def _many(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Operands that pass side by side."""
    return list(ins)


def _bitcast(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    shape = eqn.outvars[0].aval.shape
    if shape == x.shape:
        return [combine(t, eqn, ins, "all")]
    for axis in x.axes:
        t.freeze(eqn, axis, "reads bits of another width")
    return [t.space.plain_value(shape, data=x.data)]


def _look(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Effects that only look at values, whatever their shape."""
    return []


def _rebuild_sharding(n: Any, record: Record, args: list[Any]) -> list[Any]:
    """A constraint on small arrays, if its mesh divides them."""
    eqn = record.eqn
    sharding = eqn.params.get("sharding", eqn.params.get("dst_sharding"))
    return n.rebind(record, args) if divides(sharding, args[0].shape) else args


def _each(
    names: Sequence[str], fills: str, flops: Flops = per_entry
) -> dict[str, Rule]:
    analyse = functools.partial(_map, fills)
    return {
        n: Rule(analyse, known=numbers.ELEMENTWISE.get(n), even=True, flops=flops)
        for n in names
    }


RULES: dict[str, Rule] = {
    **_each(COPY, "all", moves),
    **_each(KEEP + ALL, "all"),
    **_each(ANY, "any"),
    **_each(LOSE, "lose"),
    **_each(POLE, "pole"),
    **_each(FIRST, "first"),
    "select_n": Rule(
        _select,
        known=numbers.ELEMENTWISE["select_n"],
        even=True,
        repeat=_repeat_select,
        flops=moves,
    ),
    **_each(["clamp"], "lose"),
    **{
        name: Rule(
            functools.partial(_steep, fills),
            known=numbers.ELEMENTWISE.get(name),
            even=True,
        )
        for name, fills in (("sqrt", "all"), ("cbrt", "all"), ("atan2", "lose"))
    },
    "integer_pow": Rule(
        _integer_pow, known=numbers.ELEMENTWISE["integer_pow"], even=True
    ),
    "pow": Rule(_pow, even=True),
    "optimization_barrier": Rule(_many, flops=moves),
    "bitcast_convert_type": Rule(
        _bitcast, known=numbers.ELEMENTWISE["bitcast_convert_type"], flops=moves
    ),
    **dict.fromkeys(
        ("sharding_constraint", "reshard"),
        Rule(
            functools.partial(_map, "all"),
            rebuild=_rebuild_sharding,
            even=True,
            flops=moves,
        ),
    ),
    **dict.fromkeys(("debug_callback", "debug_print"), Rule(_look)),
}
