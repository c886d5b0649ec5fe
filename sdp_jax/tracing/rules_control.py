"""Calls, loops, branches and custom derivatives: the trace goes into their bodies."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdp_jax.tracing import rules_elementwise
from sdp_jax.tracing.rule import Analyse, Rebuild, Rule, Runs, first_once
from sdp_jax.tracing.sizes import original
from sdp_jax.tracing.source import is_jax
from sdp_jax.tracing.trace import Body, Nested, Record, Trace, uneven
from sdp_jax.tracing.values import Axis, Factor, Value, agree, refill, union

# Rules of derivatives call the function itself; this deep their rules are followed.
MAX_DEPTH = 2
CLOSED = (
    "the derivative rule of a function that narrow has traced closes over values of "
    "the function around it; hand them over as arguments"
)


def _call(t: Trace, eqn: Any, ins: list[Value], *, even: bool = False) -> Nested:
    inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    consts = getattr(inner, "consts", ())
    # JAX traces its own functions once, wherever they were called first.
    with t.at(eqn) if is_jax(inner) else contextlib.nullcontext():
        body = t.run(getattr(inner, "jaxpr", inner), consts, ins, even=even)
    return body.outs, (body,)


_even_call = functools.partial(_call, even=True)


def _rebuild_call(n: Any, record: Record, args: list[Any]) -> list[Any]:
    def wrap(function: Any) -> Any:
        name = str(record.eqn.params.get("name", "f"))
        function.__name__ = function.__qualname__ = name
        return jax.jit(function)

    return n.call(record, args, wrap)


def _rebuild_checkpoint(n: Any, record: Record, args: list[Any]) -> list[Any]:
    how = {name: record.eqn.params[name] for name in ("prevent_cse", "policy")}
    return n.call(record, args, functools.partial(jax.checkpoint, **how))


def _inner(value: Value) -> Value:
    """A slice along the first axis."""
    return dataclasses.replace(value, axes=value.axes[1:], known=None)


def _repeat(
    t: Trace,
    eqn: Any,
    carry: Sequence[Value],
    run: Callable[[list[Value]], tuple[Body, list[Value]]],
    *,
    even: bool = False,
) -> tuple[Body, list[Value]]:
    """Traces a loop until the fills of what it carries hold all the time."""
    # What is known of the start need not hold later.
    less = {"zero": False, "known": None, "free": False, "still": False}
    now = [t.settled(dataclasses.replace(v, data=True, **less)) for v in carry]
    now = now if even else [uneven(v) for v in now]
    while True:
        body, outs = run(now)
        outs = [t.settled(dataclasses.replace(v, data=True)) for v in outs]
        changed = False
        after = []
        for value, out in zip(now, outs, strict=True):
            axes: list[Axis] = []
            for a, b in zip(value.axes, out.axes, strict=True):
                axes.append(_lasting(t, a, *t.unify(eqn, [a, b])))
            changed |= _holds(value.axes) != _holds(axes)
            after.append(dataclasses.replace(value, axes=tuple(axes)))
        if not changed:
            return body, now
        now = after


def _lasting(t: Trace, axis: Axis, before: Axis, later: Axis) -> Axis:
    """An axis that a loop carries, with what holds both before and after a step."""
    if len(axis) == len(before) == 1 and not t.space.is_plain(before[0]):
        pair = (before[0], later[0])
        if later[0].fill is not None:
            return axis
        rest = union(f.rest if f.fill is None else f.fill for f in pair)
        varied = rest is not None and any(f.varied for f in pair if f.fill is None)
        return (Factor(axis[0].atoms, None, rest, varied),)
    weaker = any(
        not t.space.is_plain(f) and f.fill is not None and g.fill is None
        for f, g in zip(before, later, strict=True)
    )
    return tuple(Factor(f.atoms, None if weaker else f.fill) for f in axis)


def _holds(axes: Sequence[Axis]) -> list[Any]:
    return [(f.fill, f.rest, f.varied) for axis in axes for f in axis]


def _scan(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    p = eqn.params
    consts = ins[: p["num_consts"]]
    carry = ins[p["num_consts"] : p["num_consts"] + p["num_carry"]]
    lines = ins[p["num_consts"] + p["num_carry"] :]
    for value in lines:
        t.freeze(eqn, value.axes[0], "loops along this axis")

    def run(now: list[Value]) -> tuple[Body, list[Value]]:
        ins = [*consts, *now, *map(_inner, lines)]
        body = t.run_closed(p["jaxpr"], ins, even=True)
        return body, body.outs[: p["num_carry"]]

    body, now = _repeat(t, eqn, carry, run, even=True)
    stacked = [
        dataclasses.replace(v, axes=(t.space.plain(p["length"]), *v.axes), known=None)
        for v in body.outs[p["num_carry"] :]
    ]
    return [*now, *stacked], (body,)


def _rebuild_scan(n: Any, record: Record, args: list[Any]) -> list[Any]:
    p, body = record.eqn.params, record.bodies[0]
    count = p["num_carry"]
    first, second = p["num_consts"], p["num_consts"] + count
    # What absent positions hold goes along with the arrays.
    given = n.lost(body.ins)
    fixed, moving = (sum(k < end for k, *_ in given) for end in (first, second))
    places = [_shifted(g) if g[0] >= second else g for g in given]
    rest = [n.absent(record, *place) for place in places]
    carried = [(k - first, *axes) for k, *axes in given[fixed:moving]]
    made = [g for g in n.lost(body.outs) if g[0] >= count]

    def step(carry: Any, line: Any) -> Any:
        operands = [*args[:first], *carry[0], *line[0]]
        held = [*rest[:fixed], *carry[1], *line[1]]
        outs, held = n.enter(body, operands, given, held, [*carried, *made])
        after, lines = held[: len(carried)], held[len(carried) :]
        return (outs[:count], after), (outs[count:], lines)

    (carry, after), (stacked, lines) = lax.scan(
        step,
        (args[first:second], rest[fixed:moving]),
        (args[second:], rest[moving:]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    n.remember(record, carried, after)
    n.remember(record, [_shifted(g) for g in made], lines)
    return [*carry, *stacked]


def _shifted(place: Any) -> Any:
    """A place in an array with the axis of the loop in front."""
    k, *axes = place
    return (k, *(tuple(d + 1 for d in some) for some in axes))


def _scan_runs(eqn: Any, bodies: Sequence[Any]) -> tuple[int, list[Sequence[Any]]]:
    return eqn.params["length"], [bodies]


def _while(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    p = eqn.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def run(now: list[Value]) -> tuple[Body, list[Value]]:
        body = t.run_closed(p["body_jaxpr"], [*ins[first:second], *now])
        return body, body.outs

    body, now = _repeat(t, eqn, ins[second:], run)
    test = t.run_closed(p["cond_jaxpr"], [*ins[:first], *now])
    for value in now:
        # Under vmap each example stops on its own: the test runs along the first axes.
        for a, b in zip(test.outs[0].axes, value.axes, strict=False):
            t.unify(eqn, [a, b])
    return now, (test, body)


def _rebuild_while(n: Any, record: Record, args: list[Any]) -> list[Any]:
    p = record.eqn.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body = record.bodies

    def goes_on(carry: Any) -> Any:
        return n.run(test, [*args[:first], *carry])[0]

    def step(carry: Any) -> Any:
        outs = n.run(body, [*args[first:second], *carry])
        if not np.ndim(test.jaxpr.outvars[0].aval):
            return outs
        which = goes_on(carry)
        lines = [jnp.expand_dims(which, range(which.ndim, x.ndim)) for x in outs]
        return [jnp.where(*line) for line in zip(lines, outs, carry, strict=True)]

    return lax.while_loop(lambda carry: jnp.any(goes_on(carry)), step, args[second:])


def _while_runs(eqn: Any, bodies: Sequence[Any]) -> tuple[int, list[Sequence[Any]]]:
    """Once, because nobody knows how often."""
    return 1, [bodies]


def _cond(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    bodies = tuple(t.run_closed(b, ins[1:]) for b in eqn.params["branches"])
    outs = []
    for values in zip(*(b.outs for b in bodies), strict=True):
        data = ins[0].data or any(v.data for v in values)
        values = [t.settled(dataclasses.replace(v, data=data)) for v in values]
        lines = zip(*(v.axes for v in values), strict=True)
        axes = [agree(t.unify(eqn, line)) for line in lines]
        outs.append(Value(tuple(axes), data, all(v.zero for v in values)))
    return outs, bodies


def _rebuild_cond(n: Any, record: Record, args: list[Any]) -> list[Any]:
    branches = [lambda *args, body=body: n.run(body, args) for body in record.bodies]
    return lax.switch(jnp.asarray(args[0], jnp.int32), branches, *args[1:])


def _cond_runs(eqn: Any, bodies: Sequence[Any]) -> tuple[int, list[Sequence[Any]]]:
    return 1, [[body] for body in bodies]


def _own(consts: Sequence[Any]) -> Sequence[Any]:
    """Refuses a rule that has closed over values of the trace that it is part of."""
    if any(isinstance(c, jax.core.Tracer) for c in consts):
        raise ValueError(CLOSED)
    return consts


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", np.int32), jnp.inexact)


def _elementwise(body: Body) -> bool:
    return all(
        all(map(_elementwise, r.bodies))
        if r.eqn.primitive.name in ("jit", "pjit", "custom_jvp_call")
        else r.eqn.primitive.name in rules_elementwise.RULES
        for r in body.records
    )


def _jvp_rule(eqn: Any) -> tuple[list[bool], Any, Sequence[Any], Sequence[bool]]:
    """Which operands have no tangent; the rule; which results have none."""
    operands = eqn.invars[eqn.params.get("num_consts", 0) :]
    # JAX hands zeros over as arrays, unless the rule asks for what they are.
    symbolic = eqn.params["symbolic_zeros"]
    fixed = [symbolic and not _is_float(v.aval) for v in operands]
    jaxpr, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*fixed)
    return fixed, jaxpr, _own(consts), zeros


def _custom_jvp(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    outs, bodies = _call(t, eqn, ins)
    known = is_jax(eqn.params["call_jaxpr"]) and _elementwise(bodies[0])
    if t.depth >= MAX_DEPTH or (known and not t.derivatives):
        return outs, bodies
    try:
        fixed, jaxpr, consts, zeros = _jvp_rule(original(eqn))
    except Exception:  # Without a derivative: whoever asks for it hears why.
        return outs, bodies
    operands = ins[eqn.params.get("num_consts", 0) :]
    tangents = [
        dataclasses.replace(v, known=None)
        for v, f in zip(operands, fixed, strict=True)
        if not f
    ]
    # Where a result is always zero, position by position, so is its true derivative.
    with t.deeper(asks=not known):
        rule = t.run(jaxpr, consts, [*operands, *tangents])
    _equate(t, eqn, outs, rule.outs[: len(outs)])
    moving = [v for v, z in zip(outs, zeros, strict=True) if not z]
    weak = [
        _weakened(t, eqn, v, w)
        for v, w in zip(moving, rule.outs[len(outs) :], strict=True)
    ]
    if known:
        return outs, (*bodies, rule)
    outs = [v if z else weak.pop(0) for v, z in zip(outs, zeros, strict=True)]
    return outs, (*bodies, rule)


def _weakened(t: Trace, eqn: Any, value: Value, tangent: Value) -> Value:
    """A result whose absent entries are 0 only if those of its tangent are, too."""
    axes = []
    for a, b in zip(value.axes, tangent.axes, strict=True):
        a, b = t.unify(eqn, [a, b])
        pairs = zip(a, b, strict=True)
        axes.append(
            tuple(Factor(f.atoms, None if g.fill is None else f.fill) for f, g in pairs)
        )
    return dataclasses.replace(value, axes=tuple(axes))


def _equate(t: Trace, eqn: Any, outs: Sequence[Value], others: Sequence[Value]) -> None:
    for a, b in zip(outs, others, strict=True):
        for x, y in zip(a.axes, b.axes, strict=True):
            t.unify(eqn, [x, y])


def _without(n: Any, body: Body, args: list[Any], rule: Callable[[], Any]) -> list[Any]:
    """Evaluates a function whose rule of derivatives was not followed."""

    def plain(*args: Any) -> tuple[Any, ...]:
        return tuple(n.run(body, args))

    function = jax.custom_jvp(plain)

    @function.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        rule()  # Raises what the user's does.
        return jax.jvp(plain, primals, tangents)

    return list(function(*args))


def _rebuild_custom_jvp(n: Any, record: Record, args: list[Any]) -> list[Any]:
    if len(record.bodies) == 1:
        return _without(n, record.bodies[0], args, lambda: _jvp_rule(record.eqn))
    body, rule = record.bodies
    skip = record.eqn.params.get("num_consts", 0)
    consts, args = args[:skip], args[skip:]
    fixed, _, _, zeros = _jvp_rule(record.eqn)
    function = jax.custom_jvp(lambda *args: tuple(n.run(body, [*consts, *args])))

    @function.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        moving = [x for x, f in zip(tangents, fixed, strict=True) if not f]
        found = n.run(rule, [*primals, *moving])
        outs, rest = tuple(found[: len(zeros)]), list(found[len(zeros) :])
        return outs, tuple(
            _zero_tangent(x) if zero else rest.pop(0)
            for x, zero in zip(outs, zeros, strict=True)
        )

    return list(function(*args))


def _zero_tangent(x: Any) -> Any:
    if _is_float(x):
        return jnp.zeros_like(x)
    return np.zeros(np.shape(x), jax.dtypes.float0)


def _vjp_rule(eqn: Any) -> tuple[Any, Sequence[Any], Any]:
    """The forward rule with its constants, and the backward rule."""
    skip = eqn.params.get("num_consts", 0)
    thunk = eqn.params["fwd_jaxpr_thunk"]
    forward, consts = thunk.call_wrapped(*[True] * len(eqn.invars[skip:]))
    count, sources = _residuals(eqn)
    produced = iter(forward.outvars[:count])
    residuals = [next(produced) if s is None else eqn.invars[s] for s in sources]
    cotangents = [v for v in eqn.outvars if _is_float(v.aval)]

    def function(residuals: Any, cotangents: Any) -> list[Any]:
        rest = list(cotangents)
        every = [
            rest.pop(0) if _is_float(v.aval) else _zero_tangent(v.aval)
            for v in eqn.outvars
        ]
        return _instantiate(eqn, [*residuals, *every])

    avals = [[v.aval for v in line] for line in (residuals, cotangents)]
    backward = jax.make_jaxpr(function)(*avals)
    _own(backward.consts)
    return forward, _own(consts), backward


def _custom_vjp(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    # Operands are as long as their cotangents, residuals as what they meet.
    ins = [dataclasses.replace(v, free=False) for v in ins]
    outs, bodies = _call(t, eqn, ins)
    if t.depth >= MAX_DEPTH:
        return outs, bodies
    try:
        forward, consts, backward = _vjp_rule(original(eqn))
    except Exception:  # Without a derivative: whoever asks for it hears why.
        return outs, bodies
    # The first operands are arrays that the function has closed over.
    skip = eqn.params.get("num_consts", 0)
    with t.deeper():
        first = t.run(forward, consts, ins[skip:])
        count, sources = _residuals(eqn)
        _equate(t, eqn, outs, first.outs[count:])
        produced = iter(first.outs[:count])
        residuals = [
            dataclasses.replace(next(produced) if s is None else ins[s], free=False)
            for s in sources
        ]
        # What comes back for an absent channel is whatever its readers weigh it with.
        unknown = [
            Value(tuple(refill(a, None) for a in v.axes), data=True)
            for v, var in zip(outs, eqn.outvars, strict=True)
            if _is_float(var.aval)
        ]
        second = t.run_closed(backward, [*residuals, *unknown])
    _equate(t, eqn, ins[skip:], second.outs)
    return outs, (*bodies, first, second)


def _residuals(eqn: Any) -> tuple[int, list[int | None]]:
    """How many residuals the forward rule returns; which inputs are others."""
    _, tree, sources = eqn.params["out_trees"]()
    sources = list(sources)
    return tree.num_leaves - sum(s is not None for s in sources), sources


def _instantiate(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """The backward rule with zeros where it says that there is no cotangent."""
    found = eqn.params["bwd"].call_wrapped(*args)
    return [
        x if isinstance(x, jax.Array) else jnp.zeros(v.aval.shape, jnp.float32)
        for x, v in zip(
            found, eqn.invars[eqn.params.get("num_consts", 0) :], strict=True
        )
    ]


def _rebuild_custom_vjp(n: Any, record: Record, args: list[Any]) -> list[Any]:
    if len(record.bodies) == 1:
        return _without(n, record.bodies[0], args, lambda: _vjp_rule(record.eqn))
    body, first, second = record.bodies
    count, sources = _residuals(record.eqn)
    skip = record.eqn.params.get("num_consts", 0)
    consts, args = args[:skip], args[skip:]
    function = jax.custom_vjp(lambda *args: tuple(n.run(body, [*consts, *args])))

    def forward(*args: Any) -> Any:
        outs = n.run(first, args)
        produced = iter(outs[:count])
        given = [*consts, *args]
        residuals = [next(produced) if s is None else given[s] for s in sources]
        return tuple(outs[count:]), residuals

    def backward(residuals: list[Any], cotangents: Any) -> Any:
        pairs = zip(cotangents, record.eqn.outvars, strict=True)
        moving = [x for x, v in pairs if _is_float(v.aval)]
        found = n.run(second, [*residuals, *moving])
        return tuple(
            x if _is_float(v.aval) else _zero_tangent(v.aval)
            for x, v in zip(found, record.eqn.invars[skip:], strict=True)
        )

    function.defvjp(forward, backward)
    return list(function(*args))


def _rule(
    analyse: Analyse, rebuild: Rebuild, runs: Runs = first_once, *, even: bool = False
) -> Rule:
    """What a body leaves unused of its operands is not used."""
    return Rule(analyse, rebuild=rebuild, picks=True, even=even, runs=runs)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("jit", "pjit", "closed_call", "core_call", "composite"),
        _rule(_even_call, _rebuild_call, even=True),
    ),
    **dict.fromkeys(
        ("remat2", "checkpoint", "remat"),
        _rule(_even_call, _rebuild_checkpoint, even=True),
    ),
    "scan": _rule(_scan, _rebuild_scan, _scan_runs, even=True),
    "while": _rule(_while, _rebuild_while, _while_runs),
    "cond": _rule(_cond, _rebuild_cond, _cond_runs),
    "custom_jvp_call": _rule(_custom_jvp, _rebuild_custom_jvp),
    "custom_vjp_call": _rule(_custom_vjp, _rebuild_custom_vjp),
}
