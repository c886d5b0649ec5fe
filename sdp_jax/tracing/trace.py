"""Walks a jaxpr and gives every array its abstract value."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sdp_jax.tracing.atoms import Reason
from sdp_jax.tracing.sizes import Sizes
from sdp_jax.tracing.values import ZERO, Axis, Factor, Fill, Space, Value

INEXACT = "sums over channels that do not become zero"


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """An equation with the values around it and the traces of what it calls.

    Attributes:
      eqn: the equation.
      view: the same with numbers for symbolic sizes.
      ins: values of its operands.
      outs: values of its results.
      bodies: traces of the functions that it calls.
    """

    eqn: Any
    view: Any
    ins: list[Value]
    outs: list[Value]
    bodies: tuple["Body", ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The trace of one jaxpr at one place where it is called."""

    jaxpr: Any
    consts: Sequence[Any]
    const_values: list[Value]
    ins: list[Value]
    records: list[Record]
    outs: list[Value]


Nested: TypeAlias = tuple[list[Value], tuple[Body, ...]]
Outcome: TypeAlias = list[Value] | Nested
Analyse: TypeAlias = Callable[["Trace", Any, list[Value]], Outcome]


class Trace:
    """One walk: the space of atoms, and which parameter axes must be zero.

    Attributes:
      space: makes and equates axes.
      sizes: numbers for symbolic sizes.
      producers: numbers of the parameter axes whose zeros the fills rely on.
      derivatives: whether to follow derivative rules of element-wise functions.
      depth: how many rules of derivatives deep the walk is.
    """

    def __init__(
        self, rules: Mapping[str, Analyse], *, derivatives: bool = True
    ) -> None:
        """Starts a walk.

        Args:
          rules: what to do with each primitive.
          derivatives: whether to follow the derivative rules of element-wise
            functions, too; they ask for nothing new, but evaluation needs them.
        """
        self.derivatives = derivatives
        self.space = Space()
        self.sizes = Sizes()
        self.producers: set[int] = set()
        self.depth = 0
        self._rules = rules

    @contextlib.contextmanager
    def deeper(self) -> Iterator[None]:
        """While the rule of a derivative is followed."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def run(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value]) -> Body:
        """Walks a jaxpr.

        Args:
          jaxpr: an open jaxpr.
          consts: arrays for its constant variables.
          ins: values of its inputs.

        Returns:
          Its trace.
        """
        const_values = [self.constant(c) for c in consts]
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, const_values, strict=True))
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(var: Any) -> Value:
            if isinstance(var, Literal):
                return self.constant(var.val)
            return env[var]

        records = []
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            rule = self._rules.get(eqn.primitive.name, freeze_all)
            view = self.sizes.view(eqn)
            if view.outvars and all(map(is_empty, view.outvars)):
                rule = _nothing
            outcome = rule(self, view, values)
            outs, bodies = outcome if isinstance(outcome, tuple) else (outcome, ())
            outs = [self.settled(v) for v in outs]
            records.append(Record(eqn, view, values, outs, bodies))
            env.update(zip(eqn.outvars, outs, strict=True))
        outs = [read(v) for v in jaxpr.outvars]
        return Body(jaxpr, consts, const_values, list(ins), records, outs)

    def run_closed(self, closed: Any, ins: Sequence[Value]) -> Body:
        """Walks a closed jaxpr."""
        return self.run(closed.jaxpr, closed.consts, ins)

    def constant(self, array: Any) -> Value:
        """A constant: any part of it can be taken."""
        shape = self.sizes.shape(np.shape(array))
        dtype = getattr(array, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
            return self.space.plain_value(shape, data=False)
        known = not isinstance(array, jax.core.Tracer) and np.size(array) <= 4096
        zero = known and not np.any(np.asarray(array))
        return self.space.fresh_value(shape, data=False, zero=bool(zero))

    def settle(self, fill: Fill) -> Fill:
        """Makes a fill unconditional: its parameter axes become producers."""
        if fill:
            self.producers |= fill
            return ZERO
        return fill

    def settled(self, value: Value) -> Value:
        """Settles the fills of an activation."""
        if not value.data or not any(f.fill for axis in value.axes for f in axis):
            return value
        axes = tuple(
            tuple(Factor(f.atoms, self.settle(f.fill)) for f in axis)
            for axis in value.axes
        )
        return dataclasses.replace(value, axes=axes)

    def freeze(self, eqn: Any, axis: Axis, why: str) -> Axis:
        """Freezes an axis on account of an equation."""
        return self.space.freeze(axis, reason(eqn, why))

    def unify(self, eqn: Any, axes: Sequence[Axis]) -> list[Axis]:
        """Equates axes on account of an equation; each keeps its own fills."""
        why = reason(eqn, "meets an axis that is always kept")
        return self.space.unify(axes, why)


def reason(eqn: Any, why: str) -> Reason:
    """A reason with the place of an equation."""
    return Reason(eqn.primitive.name, why, eqn.source_info)


def need_zero(t: Trace, eqn: Any, axis: Axis) -> None:
    """Freezes the factors of an axis whose absent entries are not zero."""
    for f in axis:
        if t.space.is_plain(f):
            continue
        if f.fill is None:
            t.freeze(eqn, (f,), INEXACT)
        else:
            t.settle(f.fill)


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


def freeze_all(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """The rule of a primitive that has none: nothing around it can be cut."""
    for value in ins:
        for axis in value.axes:
            t.freeze(eqn, axis, "no rule for this primitive")
    data = any(v.data for v in ins)
    return [
        t.space.plain_value(getattr(v.aval, "shape", ()), data=data)
        for v in eqn.outvars
    ]
