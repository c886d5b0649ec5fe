"""Evaluates a trace on the small arrays."""

import contextlib
import dataclasses
import itertools
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from sdp_jax.mesh import sharding_of
from sdp_jax.tracing.atoms import Solution
from sdp_jax.tracing.devices import alike, pick_shares, vary, varying
from sdp_jax.tracing.rule import Rule
from sdp_jax.tracing.trace import NO_RULE, Body, Record, is_empty
from sdp_jax.tracing.values import Axis, Value, length

# The number of an array, axes along which positions are absent, where they differ.
Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass
class _Frame:
    """What a body that runs has computed."""

    env: dict[Any, Any]
    makers: dict[Any, Record] = dataclasses.field(default_factory=dict)
    absent: dict[tuple[Any, tuple[int, ...]], Any] = dataclasses.field(
        default_factory=dict
    )


def pick_out(array: Any, index: np.ndarray, axis: int) -> Any:
    """The positions ``index`` of an array along an axis."""
    if sharding := sharding_of(jax.typeof(array)):
        return pick_shares(array, index, axis, sharding)
    if len(index) and (np.diff(index) == 1).all():
        return lax.slice_in_dim(array, int(index[0]), int(index[-1]) + 1, axis=axis)
    where = jnp.asarray(array).at[(slice(None),) * axis + (index,)]
    return where.get(mode="promise_in_bounds", wrap_negative_indices=False)


def subsets(items: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """All of them but the empty one: the axes along which an entry is absent."""
    given = list(items)
    sizes = range(1, len(given) + 1)
    return itertools.chain.from_iterable(
        itertools.combinations(given, size) for size in sizes
    )


_NOTHING = contextlib.nullcontext()


class Evaluator:
    """Runs traced bodies with what is kept of every array."""

    def __init__(
        self, solution: Solution, keep: np.ndarray, rules: Mapping[str, Rule]
    ) -> None:
        self._frames: list[_Frame] = []
        self._label = solution.label
        self._keep = keep
        self._rules = rules
        self._masks: dict[int, tuple[np.ndarray, np.ndarray, bool]] = {}

    def _factor(self, atoms: np.ndarray) -> tuple[np.ndarray, bool]:
        found = self._masks.get(id(atoms))
        if found is None:
            mask = self._keep[self._label[atoms]]
            # The atoms are kept alive, so that their identity stays theirs.
            found = self._masks[id(atoms)] = (atoms, mask, bool(mask.all()))
        return found[1], found[2]

    def check_fixed(self, size: Any) -> None:
        """Refuses to pick positions along an axis of symbolic length."""
        if not isinstance(size, int):
            raise ValueError(
                "channels are cut along an axis whose length is symbolic, in a way "
                "that depends on it; make that size a number, or a multiple of the "
                "symbol, or find the groups with fewer channels along that axis"
            )

    def is_cut(self, axis: Axis) -> bool:
        """Whether positions of an axis are gone."""
        return not all(self._factor(f.atoms)[1] for f in axis)

    def is_lost(self, axis: Axis) -> bool:
        """Whether positions of an axis are gone that are not zero."""
        return any(f.fill is None and not self._factor(f.atoms)[1] for f in axis)

    def varies(self, value: Value, dimension: int) -> bool:
        """Whether absent positions along an axis differ."""
        axis = value.axes[dimension]
        return self.is_lost(axis) and len(axis) == 1 and axis[0].varied

    def mask(self, axis: Axis) -> np.ndarray:
        """Which positions of an axis are kept."""
        mask = np.ones(1, bool)
        for f in axis:
            mask = np.logical_and.outer(mask, self._factor(f.atoms)[0]).reshape(-1)
        return mask

    def size(self, axis: Axis, dense: Any) -> Any:
        """Length of what is kept of an axis whose dense length may be symbolic."""
        whole, left = 1, 1
        for f in axis:
            mask, full = self._factor(f.atoms)
            if not full:
                whole, left = whole * f.size, left * int(mask.sum())
        if whole == left:
            return dense
        if not isinstance(dense % whole, int):
            self.check_fixed(dense)
        return dense // whole * left

    def shape(self, record: Record, result: int = 0) -> tuple[Any, ...]:
        """Shape of what is kept of a result of an equation."""
        dense = record.eqn.outvars[result].aval.shape
        axes = record.outs[result].axes
        return tuple(self.size(a, n) for a, n in zip(axes, dense, strict=True))

    def take(self, array: Any, value: Value) -> Any:
        """What is kept of a dense array."""
        for d, axis in enumerate(value.axes):
            if self.is_cut(axis):
                self.check_fixed(array.shape[d])
                if array.shape[d] != length(axis):
                    raise AssertionError(
                        f"axis {d} of an array of shape {array.shape} was taken as one "
                        f"of length {length(axis)}: a fault of sdp_jax; please report "
                        "it with the function"
                    )
                array = pick_out(array, np.flatnonzero(self.mask(axis)), d)
        return array

    def run(self, body: Body, args: Sequence[Any]) -> list[Any]:
        """Evaluates a body on small arrays."""
        with self._frame() as frame:
            return self._run(body, args, frame)

    @contextlib.contextmanager
    def _frame(self) -> Iterator[_Frame]:
        self._frames.append(_Frame({}))
        try:
            yield self._frames[-1]
        finally:
            self._frames.pop()

    def call(
        self, record: Record, args: Sequence[Any], wrap: Callable[[Any], Any]
    ) -> list[Any]:
        """Evaluates the body of a call, which ``wrap`` makes one.

        What absent positions hold goes in, and comes back, along with the arrays.
        """
        given, asked = self.lost(record.ins), self.lost(record.outs)

        def function(args: Sequence[Any], rest: Sequence[Any]) -> Any:
            return self.enter(record.bodies[0], args, given, rest, asked)

        rest = [self.absent(record, k, where) for k, where, _ in given]
        outs, rest = wrap(function)(args, rest)
        self.remember(record, asked, rest)
        return outs

    def enter(
        self,
        body: Body,
        args: Sequence[Any],
        given: Sequence[Place],
        rest: Sequence[Any],
        asked: Sequence[Place],
    ) -> tuple[list[Any], list[Any]]:
        """Evaluates a body, given what absent positions of its operands hold.

        Returns its results, and what those of its results hold that are asked for.
        """
        with self._frame() as frame:
            for (k, where, _), array in zip(given, rest, strict=True):
                frame.absent[body.jaxpr.invars[k], where] = array
            outs, var = self._run(body, args, frame), body.jaxpr.outvars
            return outs, [
                self._absent(var[k], body.outs[k], where, k in body.copied, each)
                for k, where, each in asked
            ]

    def remember(
        self, record: Record, places: Sequence[Place], rest: Sequence[Any]
    ) -> None:
        """Keeps what absent positions of the results of an equation hold."""
        for (k, where, _), array in zip(places, rest, strict=True):
            self._frames[-1].absent[record.eqn.outvars[k], where] = array

    def lost(self, values: Sequence[Value]) -> list[Place]:
        """Where it is known what absent positions hold, which is not zero."""
        out: list[Place] = []
        for k, value in enumerate(values):
            known = [
                d
                for d, axis in enumerate(value.axes)
                if self.is_lost(axis) and len(axis) == 1 and axis[0].rest is not None
            ]
            for where in subsets(known):
                each = tuple(d for d in where if self.varies(value, d))
                out.append((k, where, each))
        return out

    def _run(self, body: Body, args: Sequence[Any], frame: _Frame) -> list[Any]:
        env = frame.env
        consts = map(self.take, body.consts, body.const_values)
        env.update(zip(body.jaxpr.constvars, consts, strict=True))
        env.update(zip(body.jaxpr.invars, args, strict=True))
        for record in body.records:
            small = [
                v.val if isinstance(v, Literal) else env[v] for v in record.eqn.invars
            ]
            for i in record.copied:
                small[i] = self.take(small[i], record.ins[i])
            name_stack = str(record.eqn.source_info.name_stack)
            scope = jax.named_scope(name_stack) if name_stack else _NOTHING
            with scope, record.eqn.ctx.manager:
                outs = self._evaluate(record, small)
                self._check(record, outs)
            env.update(zip(record.eqn.outvars, outs, strict=True))
            frame.makers.update((v, record) for v in record.eqn.outvars)
        outs = [v.val if isinstance(v, Literal) else env[v] for v in body.jaxpr.outvars]
        for i in body.copied:
            outs[i] = self.take(outs[i], body.outs[i])
        return outs

    def _check(self, record: Record, outs: Sequence[Any]) -> None:
        """No array may have another size than what is kept of it."""
        for k, (found, var) in enumerate(zip(outs, record.eqn.outvars, strict=True)):
            if not hasattr(var.aval, "shape"):
                continue
            want = self.shape(record, k)
            if tuple(np.shape(found)) != want:
                raise AssertionError(
                    f"{record.eqn.primitive.name} gave an array of shape "
                    f"{np.shape(found)} where {want} is kept: a fault of sdp_jax; "
                    "please report it with the function"
                )

    def absent(
        self,
        record: Record,
        operand: int,
        dimensions: Sequence[int],
        each: Collection[int] = (),
    ) -> Any:
        """What positions of an operand hold that are absent along axes.

        It has length 1 there, unless they differ, or for what meets it along ``each``.
        """
        copied = operand in record.copied
        var = record.eqn.invars[operand]
        return self._absent(var, record.ins[operand], dimensions, copied, each)

    def _absent(
        self,
        var: Any,
        value: Value,
        dimensions: Sequence[int],
        copied: bool,
        each: Collection[int] = (),
    ) -> Any:
        if isinstance(var, Literal):
            return var.val
        frame = self._frames[-1]
        array = frame.env[var]
        # A scalar has none of these axes; length 1 stands for every position.
        where = tuple(sorted(d for d in dimensions if value.axes and value.axes[d]))
        if not where and not copied:
            return array
        zero = value.zero or not all(self.is_lost(value.axes[d]) for d in where)
        own = [d for d in where if not zero and self.varies(value, d)]
        if copied:
            gone = tuple(() if d in where else a for d, a in enumerate(value.axes))
            for d in where:
                self.check_fixed(array.shape[d])
                some = np.flatnonzero(~self.mask(value.axes[d]))
                array = pick_out(array, some if d in own else some[:1], d)
            found = self.take(array, dataclasses.replace(value, axes=gone))
        elif zero:
            shape = [1 if d in where else n for d, n in enumerate(array.shape)]
            found = jnp.zeros(shape, array.dtype)
        else:
            if (var, where) not in frame.absent:
                found = self._repeat(frame.makers[var], array.shape, where, own)
                frame.absent[var, where] = found
            found = frame.absent[var, where]
        shape = list(found.shape)
        for d in set(each).intersection(where):
            shape[d] = int((~self.mask(value.axes[d])).sum())
        return jnp.broadcast_to(found, shape)

    def _repeat(
        self,
        record: Record,
        whole: Sequence[Any],
        dimensions: Sequence[int],
        each: Sequence[int],
    ) -> Any:
        """An equation again, on what absent positions hold."""
        repeat = self._rules[record.eqn.primitive.name].repeat
        if repeat is not None:
            return repeat(self, record, whole, dimensions, each)
        operands = range(len(record.ins))
        ins = [self.absent(record, k, dimensions, each) for k in operands]
        return self.rebind(record, ins)[0]

    def _evaluate(self, record: Record, args: list[Any]) -> Sequence[Any]:
        # Also where a cut has emptied a part: a group of which no channel is left.
        nothing = record.outs and all(
            is_empty(var) or self._is_empty(value)
            for var, value in zip(record.eqn.outvars, record.outs, strict=True)
        )
        if nothing and not record.eqn.effects:
            return [
                vary(jnp.zeros(self.shape(record, k), v.aval.dtype), varying(v.aval))
                for k, v in enumerate(record.eqn.outvars)
            ]
        values = (*record.ins, *record.outs)
        cut = any(self.is_cut(axis) for value in values for axis in value.axes)
        rule = self._rules.get(record.eqn.primitive.name, NO_RULE)
        if rule.rebuild is None or not cut:
            return self.rebind(record, args)
        return rule.rebuild(self, record, args)

    def _is_empty(self, value: Value) -> bool:
        factors = (f for axis in value.axes for f in axis)
        return any(f.size and not self._factor(f.atoms)[0].any() for f in factors)

    def rebind(self, record: Record, args: Sequence[Any], **changed: Any) -> list[Any]:
        """Binds the primitive of an equation to other operands and parameters."""
        eqn = record.eqn
        known = self._rules.get(eqn.primitive.name, NO_RULE).known
        # Not where operands only pass side by side, or talk across a mesh.
        if known and len(eqn.outvars) == 1:
            args = alike(args)
        params = eqn.primitive.get_bind_params({**eqn.params, **changed})
        if isinstance(params, tuple):  # before JAX 0.9 functions came apart
            functions, params = params
            args = [*functions, *args]
        outs = eqn.primitive.bind(*args, **params)
        return list(outs) if eqn.primitive.multiple_results else [outs]
