"""Walks a jaxpr and gives every array its abstract value."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sdp_jax.mesh import sharding_of, split_over
from sdp_jax.tracing.atoms import Reason
from sdp_jax.tracing.numbers import evaluate
from sdp_jax.tracing.rule import Rule
from sdp_jax.tracing.sizes import Equation, Sizes, original
from sdp_jax.tracing.values import ZERO, Axis, Factor, Fill, Space, Value, length

_SMALL = 65536
SHARES = "is split over devices, which must hold equal shares"
INEXACT = "sums over channels that do not become zero"
# No derivative goes through them.
_STILL = frozenset("stop_gradient sign floor ceil round".split())


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """An equation with the values around it and the traces of what it calls."""

    eqn: Any
    view: Any  # The same with numbers for symbolic sizes.
    ins: list[Value]
    outs: list[Value]
    bodies: tuple["Body", ...] = ()
    copied: frozenset[int] = frozenset()  # Operands of which it takes its own part.


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The trace of one jaxpr at one place where it is called.

    Attributes:
      copied: results of which the caller takes a part of its own.
    """

    jaxpr: Any
    consts: Sequence[Any]
    const_values: list[Value]
    ins: list[Value]
    records: list[Record]
    outs: list[Value]
    copied: frozenset[int] = frozenset()


Nested: TypeAlias = tuple[list[Value], tuple[Body, ...]]


class Trace:
    """One walk: the space of atoms, and which parameter axes must be zero or not."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        nonzero: Iterable[int] = (),
        *,
        derivatives: bool = True,
    ) -> None:
        # Derivative rules of element-wise functions: they ask for nothing, but
        # evaluation needs them.
        self.derivatives = derivatives
        self.space = Space()
        self.sizes = Sizes()
        self.producers: set[int] = set()
        self.makers: set[int] = set()  # Those that make activations zero.
        self.nonzero = set(nonzero)
        self.weights: list[int] = []  # Entries at a position of each parameter axis.
        # Where a derivative is not finite once channels are zero.
        self.steep: list[tuple[Reason, Factor]] = []
        self.depth = 0
        self.devices: dict[str, int] = {}  # Along each axis of the mesh.
        self._moves = True  # Whether derivatives go back through the equation at hand.
        self._place: Any = None
        self._asks = True
        self._rules = rules

    @contextlib.contextmanager
    def deeper(self, *, asks: bool = True) -> Iterator[None]:
        """While the rule of a derivative is followed, which may ask for nothing."""
        before = self._asks
        self.depth += 1
        self._asks = before and asks
        try:
            yield
        finally:
            self.depth -= 1
            self._asks = before

    @contextlib.contextmanager
    def at(self, eqn: Any) -> Iterator[None]:
        """While reasons give the place of this equation."""
        before = self._place
        self._place = before or eqn.source_info
        try:
            yield
        finally:
            self._place = before

    def _reason(self, eqn: Any, why: str) -> Reason:
        if eqn is None:
            return Reason("parameter", why)
        return Reason(eqn.primitive.name, why, self._place or eqn.source_info)

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        ins: Sequence[Value],
        *,
        even: bool = False,
    ) -> Body:
        """Walks a jaxpr; ``even`` if it is given what absent positions hold."""
        const_values = [self.constant(c) for c in consts]
        ins = list(ins) if even else [uneven(v) for v in ins]
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, const_values, strict=True))
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(var: Any) -> Value:
            if isinstance(var, Literal):
                # The abstract value of a literal is slow to make.
                dtype = getattr(var.val, "dtype", None)
                dtype = jnp.result_type(var.aval) if dtype is None else dtype
                return self.constant(np.asarray(var.val, dtype))
            return env[var]

        records = []
        outer = self._moves
        for eqn, moves in _live(jaxpr):
            # Of what has a derivative of its own, no other is taken.
            own = eqn.primitive.name.startswith("custom_")
            self._moves = outer and moves and not own
            values = [read(v) for v in eqn.invars]
            free = all(v.free for v in values)
            still = all(v.free or v.still for v in values)
            still = still or eqn.primitive.name in _STILL
            copied = frozenset(
                i for i, v in enumerate(values) if v.free and v.axes and not free
            )
            for i in copied:
                values[i] = self.space.copy(values[i])
            rule = self._rules.get(eqn.primitive.name, NO_RULE)
            view = self.sizes.view(eqn)
            empty = eqn.outvars and all(map(is_empty, eqn.outvars))
            analyse = _nothing if empty else rule.analyse
            outcome = analyse(self, view, values)
            outs, bodies = outcome if isinstance(outcome, tuple) else (outcome, ())
            outs = [self.settled(v) for v in outs]
            pairs = zip(outs, original(eqn).outvars, strict=True)
            outs = [
                v if _is_kept_alike(eqn, v, var) else self.spread(eqn, v, var.aval)
                for v, var in pairs
            ]
            if not (rule.even or rule.repeat):
                outs = [uneven(v) for v in outs]
            outs = [
                dataclasses.replace(v, free=free, still=still or v.still) for v in outs
            ]
            if rule.known is not None:
                outs = self._compute(rule, view, values, outs)
            records.append(Record(eqn, view, values, outs, bodies, copied))
            env.update(zip(eqn.outvars, outs, strict=True))
        self._moves = outer
        outs = [read(v) for v in jaxpr.outvars]
        # What is free is whole in its body, whatever the caller takes of it.
        copied = frozenset(
            i
            for i, v in enumerate(outs)
            if v.free and v.axes and not all(v.free for v in ins)
        )
        for i in copied:
            outs[i] = dataclasses.replace(self.space.copy(outs[i]), free=False)
        return Body(jaxpr, consts, const_values, list(ins), records, outs, copied)

    def run_closed(
        self, closed: Any, ins: Sequence[Value], *, even: bool = False
    ) -> Body:
        """Walks a closed jaxpr."""
        return self.run(closed.jaxpr, closed.consts, ins, even=even)

    def constant(self, array: Any) -> Value:
        """A constant: any part of it can be taken."""
        shape = self.sizes.shape(np.shape(array))
        dtype = getattr(array, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
            return self.space.plain_value(shape, data=False)
        known = not isinstance(array, jax.core.Tracer) and np.size(array) <= 4096
        zero = known and not np.any(np.asarray(array))
        value = self.space.fresh_value(shape, data=False, zero=bool(zero))
        index = known and dtype is not None and _is_index(shape, dtype)
        entries = np.asarray(array) if index else None
        return dataclasses.replace(value, free=True, known=entries)

    def _compute(
        self, rule: Rule, eqn: Any, ins: list[Value], outs: list[Value]
    ) -> list[Value]:
        """Adds the entries of results whose operands are known: indices, often."""
        operands = [v.known for v in ins if v.known is not None]
        if len(operands) < len(ins) or isinstance(eqn, Equation):
            return outs
        if not all(_is_index(v.aval.shape, v.aval.dtype) for v in eqn.outvars):
            return self._uniform(rule, eqn, operands, outs)
        if not all(_is_small(x) for x in operands):
            return outs
        found = evaluate(rule.known, eqn, operands)
        if found is None:
            return outs
        return [
            dataclasses.replace(v, known=x, zero=not x.any())
            for v, x in zip(outs, found, strict=True)
        ]

    def _uniform(
        self, rule: Rule, eqn: Any, operands: list[np.ndarray], outs: list[Value]
    ) -> list[Value]:
        """Adds the one number that all entries of a result are, without memory."""
        numbers = [number_of(x) for x in operands]
        if None in numbers or len(outs) != 1 or not rule.even:
            return outs
        found = [np.asarray(numbers[0])]
        if eqn.primitive.name != "broadcast_in_dim":
            found = evaluate(rule.known, eqn, list(map(np.asarray, numbers)))
        if found is None:
            return outs
        known = np.broadcast_to(found[0], eqn.outvars[0].aval.shape)
        return [dataclasses.replace(outs[0], known=known)]

    def settle(self, fill: Fill) -> Fill:
        """Makes a fill unconditional: its parameter axes become producers."""
        if fill:
            if self._asks:
                self.producers |= fill
            return ZERO
        return fill

    def zero(self, axis: Axis, why: Reason) -> Axis:
        """An axis whose absent entries are zero, or which is frozen."""
        if any(f.fill is None and not self.space.is_plain(f) for f in axis):
            return self.space.freeze(axis, why)
        return tuple(Factor(f.atoms, self.settle(f.fill or ZERO)) for f in axis)

    def entries(self, fill: frozenset[int]) -> int:
        """How many parameters of a channel a fill asks to be zero."""
        return sum(self.weights[number] for number in fill)

    def settled(self, value: Value) -> Value:
        """Settles the fills of an activation."""
        if not value.data or not any(f.fill for axis in value.axes for f in axis):
            return value
        if self._asks:
            for fill in (f.fill for axis in value.axes for f in axis):
                self.makers |= fill or ZERO
        axes = tuple(
            tuple(dataclasses.replace(f, fill=self.settle(f.fill)) for f in axis)
            for axis in value.axes
        )
        return dataclasses.replace(value, axes=axes)

    def share(self, eqn: Any, axis: Axis, count: int) -> tuple[Axis, Axis]:
        """The devices of an axis, and what each of them holds, at the same places."""
        if count == 1:
            return (), axis
        size = length(axis) // count
        parts = self.space.regroup([axis], [count, size])
        if parts is None:
            self.freeze(eqn, axis, SHARES)
            return self.space.plain(count), self.space.plain(size)
        return self.freeze(eqn, parts[0], SHARES), parts[1]

    def spread(self, eqn: Any, value: Value, aval: Any) -> Value:
        """An array whose type says over which devices its axes are split."""
        sharding = sharding_of(aval)
        if sharding is None:
            return value
        counts = split_over(sharding.mesh, sharding.spec, len(value.axes))
        pairs = [
            self.share(eqn, *pair) for pair in zip(value.axes, counts, strict=True)
        ]
        return dataclasses.replace(value, axes=tuple((*a, *b) for a, b in pairs))

    def is_steep(self, eqn: Any, ins: Sequence[Value], value: Value) -> None:
        """Notes that a derivative is not finite where a value is zero."""
        if self._moves and not all(v.free or v.still for v in ins):
            why = self._reason(eqn, "has no finite derivative at zero")
            for f in (f for axis in value.axes for f in axis):
                if f.fill is not None and not self.space.is_plain(f):
                    self.steep.append((why, f))

    def freeze(self, eqn: Any, axis: Axis, why: str) -> Axis:
        """Freezes an axis on account of an equation."""
        if not self._asks:
            return axis
        return self.space.freeze(axis, self._reason(eqn, why))

    def unify(self, eqn: Any, axes: Sequence[Axis]) -> list[Axis]:
        """Equates axes on account of an equation; each keeps its own fills."""
        why = self._reason(eqn, "meets an axis that is always kept")
        return self.space.unify(axes, why)


def need_zero(t: Trace, eqn: Any, axis: Axis) -> None:
    """Freezes the factors of an axis whose absent entries are not zero."""
    for f in axis:
        if t.space.is_plain(f):
            continue
        if f.fill is None:
            t.freeze(eqn, (f,), INEXACT)
        else:
            t.settle(f.fill)


def uneven(value: Value) -> Value:
    """The value if nothing is known of what absent positions hold but zeros."""
    if all(f.rest is None for axis in value.axes for f in axis):
        return value
    axes = tuple(tuple(Factor(f.atoms, f.fill) for f in axis) for axis in value.axes)
    return dataclasses.replace(value, axes=axes)


def _is_kept_alike(eqn: Any, value: Value, var: Any) -> bool:
    """Whether it is made of parameters alone, and split as one of them is."""
    if value.data or sharding_of(var.aval) is None:
        return False
    like = var.aval.shape, sharding_of(var.aval)
    return any((x.aval.shape, sharding_of(x.aval)) == like for x in eqn.invars)


def _live(jaxpr: Any) -> list[tuple[Any, bool]]:
    """The equations on which results depend, and whether derivatives come to them."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    moving = {v for v in needed if _is_float(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            operands = {v for v in eqn.invars if not isinstance(v, Literal)}
            needed |= operands
            still = eqn.primitive.name in _STILL or moving.isdisjoint(eqn.outvars)
            if not still:
                moving.update(filter(_is_float, operands))
            live.append((eqn, not still))
    return live[::-1]


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.inexact)


def _is_index(shape: Sequence[int], dtype: Any) -> bool:
    """Whether the entries are worth knowing: small integers, and scalars."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    if shape == ():
        return True
    return np.dtype(dtype).kind in "iub" and math.prod(shape) <= _SMALL


def _is_small(known: np.ndarray) -> bool:
    """Whether it takes no time to look at all entries."""
    return known.size <= 4 * _SMALL


def number_of(known: np.ndarray | None) -> Any:
    """The one number that all entries are, if that can be seen."""
    if known is None or not known.size or (known.size > 1 and any(known.strides)):
        return None
    return known.reshape(-1)[0]


def is_empty(var: Any) -> bool:
    """Whether an array has no entries."""
    return 0 in getattr(var.aval, "shape", ())


def _nothing(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Arrays without entries ask for nothing."""
    data = any(v.data for v in ins)
    return [
        Value(
            tuple(
                t.space.fresh(n, ZERO) if n else t.space.plain(n) for n in v.aval.shape
            ),
            data,
        )
        for v in eqn.outvars
    ]


def freeze_all(
    t: Trace, eqn: Any, ins: list[Value], why: str = "no rule for this primitive"
) -> list[Value]:
    """Where there is no rule, nothing around the equation can be cut."""
    for value in ins:
        for axis in value.axes:
            t.freeze(eqn, axis, why)
    data = any(v.data for v in ins)
    return [
        t.space.plain_value(getattr(v.aval, "shape", ()), data=data)
        for v in eqn.outvars
    ]


# Of a primitive that has no rule.
NO_RULE = Rule(freeze_all)
