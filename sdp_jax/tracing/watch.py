"""Evaluates a trace and keeps statistics of the activations that it reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from sdp_jax.activations import Moments, WeightSums, merge_moments
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.evaluate import Evaluator
from sdp_jax.tracing.readings import Place
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.trace import Body, Record


class Seen(NamedTuple):
    """What was seen at a place: statistics, and sums of its weights if it has any."""

    moments: Moments
    weights: WeightSums | None


Watched = dict[int, Seen]


class Watcher:
    """Runs a trace as it is; gates multiply what is read, if they are given."""

    def __init__(self, found: Analysis, places: Sequence[Place]) -> None:
        self._found = found
        keep = np.ones(len(found.solution.operands), bool)
        self._evaluator = Evaluator(found.solution, keep, RULES)
        self._places = places
        self._at: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            self._at.setdefault(id(place.record), []).append(number)
        self._inside: dict[int, frozenset[int]] = {}
        self._gates: Mapping[int, jax.Array] | None = None

    def __call__(
        self, args: Sequence[Any], gates: Mapping[int, jax.Array] | None = None
    ) -> tuple[list[Any], Watched]:
        """The results of the function, and what was seen on the way."""
        self._gates = gates
        outs, seen = self._run(self._found.body, args)
        for number in self._at.get(id(None), ()):
            place = self._places[number]
            outs[place.operand] = x = self._gated(number, outs[place.operand])
            seen[number] = Seen(_moments(x, place.axes), None)
        return outs, seen

    def gates(self) -> dict[int, jax.Array]:
        """Ones, by which what is read can be multiplied."""
        out = {}
        for number, place in enumerate(self._places):
            if place.record is None:
                var = self._found.body.jaxpr.outvars[place.operand]
            else:
                var = place.record.eqn.invars[place.operand]
            kind = _wide(var.aval.dtype)
            shape = place.channels.shape[len(place.loops) : -1]
            out[number] = jnp.ones(shape, jnp.finfo(kind).dtype)
        return out

    def _run(self, body: Body, args: Sequence[Any]) -> tuple[list[Any], Watched]:
        env: dict[Any, Any] = {}
        env.update(zip(body.jaxpr.constvars, body.consts, strict=True))
        env.update(zip(body.jaxpr.invars, args, strict=True))
        seen: Watched = {}

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for record in body.records:
            values = [read(v) for v in record.eqn.invars]
            with record.eqn.ctx.manager:
                for number in self._at.get(id(record), ()):
                    place = self._places[number]
                    x = self._gated(number, values[place.operand])
                    values[place.operand] = x
                    seen[number] = _look(place, x, values)
                if self._numbers(record):
                    outs, more = self._enter(record, values)
                    seen |= more
                else:
                    outs = self._evaluator.rebind(record, values)
            env.update(zip(record.eqn.outvars, outs, strict=True))
        return [read(v) for v in body.jaxpr.outvars], seen

    def _gated(self, number: int, x: Any) -> Any:
        """An operand times its gates."""
        if self._gates is None or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        gate, axes = self._gates[number], self._places[number].axes
        gate = jnp.transpose(gate, _order(axes))
        rest = [d for d in range(x.ndim) if d not in axes]
        gate = jnp.expand_dims(gate, rest)
        # Wider than half precision, so that the derivative is summed in float32.
        wide = x.astype(_wide(x.dtype)) * gate
        return wide.astype(x.dtype)

    def _numbers(self, record: Record) -> frozenset[int]:
        """The places inside of what an equation calls."""
        if not record.bodies:
            return frozenset()
        if id(record) not in self._inside:
            found = frozenset[int]()
            for body in record.bodies:
                for inner in body.records:
                    found |= {*self._at.get(id(inner), ()), *self._numbers(inner)}
            self._inside[id(record)] = found
        return self._inside[id(record)]

    def _enter(self, record: Record, args: list[Any]) -> tuple[list[Any], Watched]:
        """Evaluates an equation that calls bodies in which something is read."""
        name = record.eqn.primitive.name
        if name == "scan":
            return self._scan(record, args)
        if name == "while":
            return self._while(record, args)
        if name == "cond":
            return self._cond(record, args)

        def function(*args: Any) -> tuple[list[Any], Watched]:
            return self._run(record.bodies[0], args)

        if self._gates is not None and "policy" in record.eqn.params:
            how = {k: record.eqn.params[k] for k in ("prevent_cse", "policy")}
            return jax.checkpoint(function, **how)(*args)
        return function(*args)

    def _scan(self, record: Record, args: list[Any]) -> tuple[list[Any], Watched]:
        p, body = record.eqn.params, record.bodies[0]
        first, count = p["num_consts"], p["num_carry"]
        consts, carry = args[:first], args[first : first + count]
        lines = args[first + count :]
        stacked = {
            n for n, place in enumerate(self._places) if id(record) in dict(place.loops)
        }

        def step(state: Any, line: Any) -> Any:
            carry, before = state
            outs, seen = self._run(body, [*consts, *carry, *line])
            after = {n: _merge(before[n], seen[n]) for n in before}
            own = {n: s for n, s in seen.items() if n in stacked}
            return (outs[:count], after), (outs[count:], own)

        one = [lax.index_in_dim(x, 0, keepdims=False) for x in lines]
        start = _nothing(lambda: self._run(body, [*consts, *carry, *one])[1])
        start = {n: s for n, s in start.items() if n not in stacked}
        (carry, seen), (stacks, own) = lax.scan(
            step,
            (carry, start),
            lines,
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *stacks], seen | own

    def _while(self, record: Record, args: list[Any]) -> tuple[list[Any], Watched]:
        p = record.eqn.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test, body = record.bodies

        def goes_on(state: Any) -> Any:
            return self._run(test, [*args[:first], *state[0]])[0][0]

        def step(state: Any) -> Any:
            outs, seen = self._run(body, [*args[first:second], *state[0]])
            return outs, {n: _merge(state[1][n], s) for n, s in seen.items()}

        start = _nothing(lambda: self._run(body, args[first:])[1])
        return lax.while_loop(goes_on, step, (args[second:], start))

    def _cond(self, record: Record, args: list[Any]) -> tuple[list[Any], Watched]:
        every: Watched = {}
        for body in record.bodies:
            every |= _nothing(lambda body=body: self._run(body, args[1:])[1])

        def branch(body: Body) -> Callable[..., Any]:
            def function(*args: Any) -> Any:
                outs, seen = self._run(body, args)
                return outs, every | seen

            return function

        index = jnp.asarray(args[0], jnp.int32)
        return lax.switch(index, list(map(branch, record.bodies)), *args[1:])


def _look(place: Place, x: Any, values: Sequence[Any]) -> Seen:
    """What is seen of an operand, and of the weights that it meets."""
    moments = _moments(x, place.axes)
    if place.weights is None:
        return Seen(moments, None)
    number, axes, groups = place.weights
    w = jnp.abs(jnp.asarray(values[number]).astype(_wide(values[number].dtype)))
    if groups > 1:
        # A convolution: outputs by groups, and the inputs of each group.
        parts = (_along(jnp.sum, v, axes) for v in (w, w * w))
        lines = (v.reshape(groups, -1, v.shape[1]).sum(axis=1) for v in parts)
        return Seen(moments, WeightSums(*(v.reshape(-1) for v in lines)))
    axes = axes[-len(place.axes) :]
    sums = (_along(jnp.sum, v, axes) for v in (w, w * w))
    return Seen(moments, WeightSums(*sums))


def _moments(x: Any, axes: Sequence[int]) -> Moments:
    """Statistics over all other axes of an array."""
    x = jnp.asarray(x)
    x = x.astype(_wide(x.dtype))
    mean = _along(jnp.mean, x, axes)
    rest = [d for d in range(x.ndim) if d not in axes]
    center = jnp.expand_dims(jnp.transpose(mean, _order(axes)), rest)
    mean_abs = _along(jnp.mean, jnp.abs(x), axes)
    variance = _along(jnp.mean, jnp.square(jnp.abs(x - center)), axes)
    count = jnp.asarray(int(np.prod([x.shape[d] for d in rest])), jnp.int32)
    square = variance + jnp.square(jnp.abs(mean))
    return Moments(count, mean, mean_abs, square, variance)


def _along(reduce: Callable[..., Any], x: Any, axes: Sequence[int]) -> Any:
    """Reduces over all other axes; those that stay come in their order."""
    out = reduce(x, axis=tuple(d for d in range(x.ndim) if d not in axes))
    return jnp.transpose(out, _order(_order(axes)))


def _order(axes: Sequence[int]) -> list[int]:
    """Where each axis is, in ascending order."""
    return np.argsort(axes).tolist()


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _nothing(function: Callable[[], Watched]) -> Watched:
    """What is seen before anything is."""
    shapes = jax.eval_shape(function)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _merge(before: Seen, later: Seen) -> Seen:
    """What is seen in several steps of a loop, with the same weights."""
    parts = (before.moments, later.moments)
    # Shares of integers would be in float32, whatever the means are in.
    wide = (m._replace(count=m.count.astype(m.mean_abs.dtype)) for m in parts)
    moments = merge_moments(*wide)
    moments = moments._replace(count=before.moments.count + later.moments.count)
    # The weights are the same in each step; zero before the first.
    weights = jax.tree.map(jnp.maximum, before.weights, later.weights)
    return Seen(moments, weights)
