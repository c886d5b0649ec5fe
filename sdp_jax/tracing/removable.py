"""Which dimensions may vanish whole, so that a layer goes.

Inside a residual branch all channels of a dimension may go: what reads them gives
zeros, and the branch a constant. Elsewhere the outputs would no longer depend on the
inputs. One pass over a trace asks for each dimension which values still depend on which
inputs when it is empty. Where arrays are joined, a class token and patches for example,
it asks for each part along that axis, as long as later operations keep the parts apart.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sdp_jax.groups import Groups
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.flops import kinds
from sdp_jax.tracing.origins import CALLS
from sdp_jax.tracing.ports import class_channels
from sdp_jax.tracing.rules_elementwise import RULES as ELEMENTWISE
from sdp_jax.tracing.trace import Body, Record
from sdp_jax.tracing.values import Value

# By the number of an input that a value depends on: a bit for each set of dimensions
# without which it no longer does.
Ends: TypeAlias = Mapping[int, int]


class Parts(NamedTuple):
    """What a value depends on, part by part along an axis; the whole has axis -1."""

    axis: int
    parts: tuple[tuple[int, Ends], ...]  # Their lengths, and what each depends on.


NOTHING = Parts(-1, ())

_ELEMENTWISE = frozenset(ELEMENTWISE) - {"optimization_barrier"}
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split()
)
_PRODUCTS = frozenset("mul dot_general conv_general_dilated ragged_dot".split())
# Of these an operand may be empty, and the others remain.
_JOINED = frozenset(
    "concatenate dynamic_update_slice scatter scatter-add scatter_add".split()
)
_CALLS = CALLS | {"shard_map"}


def mark_removable(found: Analysis, groups: Groups) -> Groups:
    """The same groups, in which the dimensions are marked that may vanish.

    All that are marked may vanish together.
    """
    every = [frozenset({k}) for k in range(len(groups))]
    walk = _Walk(found, groups)
    ended = walk.ended(every)
    chosen = [k for k in range(len(groups)) if not ended >> k & 1]
    if chosen and walk.ended([frozenset(chosen)]):
        # One of two branches, for example, of which neither passes its input by.
        some: list[int] = []
        for k in chosen:
            if not walk.ended([frozenset([*some, k])]):
                some.append(k)
        chosen = some
    dimensions = tuple(
        dataclasses.replace(d, removable=k in chosen) for k, d in enumerate(groups)
    )
    return dataclasses.replace(groups, dimensions=dimensions)


class _Walk:
    """Passes over a trace, each for some sets of dimensions that are empty."""

    def __init__(self, found: Analysis, groups: Groups) -> None:
        self._found = found
        channel = class_channels(found, groups)
        rows = np.append(groups.owner, -1)[channel[found.solution.operands]]
        self._kind, rows = kinds(rows)
        self._dimensions = [frozenset(row) - {-1} for row in rows]
        self._label = found.solution.label

    def ended(self, sets: Sequence[frozenset[int]]) -> int:
        """A bit for each set without which an output loses an input."""
        self._hits = [
            _bits(j for j, one in enumerate(sets) if one & kind)
            for kind in self._dimensions
        ]
        self._known: dict[int, tuple[np.ndarray, int]] = {}
        body, inputs = self._found.body, self._found.inputs
        leaves = len(body.ins) - len(inputs)
        ins = [NOTHING] * leaves
        for k, var in enumerate(body.jaxpr.invars[leaves:]):
            ins.append(NOTHING if _is_key(var.aval) else _whole({k: 0}))
        outs = self._run(body, ins)
        ended = 0
        for path, out in zip(self._found.outputs, outs, strict=True):
            if path not in self._found.renewed:
                for ends in _any([out]).values():
                    ended |= ends
        return ended

    def _empty(self, value: Value) -> int:
        """A bit for each set without which an array has no entries."""
        bits = 0
        for axis in value.axes:
            for factor in axis:
                bits |= self._empty_along(factor.atoms)
        return bits

    def _empty_along(self, atoms: np.ndarray) -> int:
        known = self._known.get(id(atoms))
        if known is None:
            bits = -1
            for kind in np.unique(self._kind[self._label[atoms]]).tolist():
                bits &= self._hits[kind]
            # The arrays are kept alive, so that their identity stays theirs.
            known = self._known[id(atoms)] = (atoms, bits if len(atoms) else 0)
        return known[1]

    def _run(self, body: Body, ins: Sequence[Parts]) -> list[Parts]:
        env: dict[Any, Parts] = dict(zip(body.jaxpr.invars, ins, strict=True))

        def read(var: Any) -> Parts:
            return NOTHING if isinstance(var, Literal) else env.get(var, NOTHING)

        for record in body.records:
            given = [read(v) for v in record.eqn.invars]
            if record.outs and any(x.parts for x in given):
                outs = self._follow(record, given)
                for var, value, out in zip(
                    record.eqn.outvars, record.outs, outs, strict=True
                ):
                    if out.parts:
                        env[var] = _also(out, self._empty(value))
        return [read(v) for v in body.jaxpr.outvars]

    def _follow(self, record: Record, ins: list[Parts]) -> list[Parts]:
        name, bodies = record.eqn.primitive.name, record.bodies
        if name in _CALLS and bodies and len(bodies[0].ins) == len(ins):
            return self._run(bodies[0], ins)
        if name == "optimization_barrier":
            return ins
        if name == "scan":
            return self._scan(record, ins)
        if name == "cond":
            # Whichever branch is taken.
            each = [self._run(body, ins[1:]) for body in bodies]
            return [_whole(_all(outs)) for outs in zip(*each, strict=True)]
        empty = [self._empty(value) for value in record.ins]
        if name in _JOINED:
            alive = [_also(x, bits) for x, bits in zip(ins, empty, strict=True)]
            if name == "concatenate":
                return [_joined(record.eqn, alive)]
            return [_whole(_any(alive))] * len(record.outs)
        ends = 0
        for bits in empty:
            ends |= bits
        if name in _PRODUCTS:
            for x in ins:
                # A constant that may be zero.
                ends |= _constant(x)
        kept = _kept_apart(record.eqn, ins)
        out = _whole(_any(ins)) if kept is None else kept
        return [_also(out, ends)] * len(record.outs)

    def _scan(self, record: Record, ins: list[Parts]) -> list[Parts]:
        p, (body,) = record.eqn.params, record.bodies
        first, second = p["num_consts"], p["num_consts"] + p["num_carry"]
        lines = [_whole(_any([x])) for x in ins[second:]]
        carry = [_any([x]) for x in ins[first:second]]
        while True:
            given = [*ins[:first], *map(_whole, carry), *lines]
            outs = self._run(body, given)
            # A carry that does not change depends on what it began with.
            after = [_any([_whole(x), y]) for x, y in zip(carry, outs, strict=False)]
            if after == carry:
                return [_whole(_any([x])) for x in outs]
            carry = after


def _kept_apart(eqn: Any, ins: Sequence[Parts]) -> Parts | None:
    """The parts of the result, where an operation keeps those of its operands."""
    name, p, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    some = [x for x in ins if x.axis >= 0]
    if not some:
        return None
    if name in _ELEMENTWISE:
        return _side_by_side(ins, out)
    (x, *others), shape = ins, eqn.invars[0].aval.shape
    if x.axis < 0 or any(y.parts for y in others):
        return None
    if name in _REDUCTIONS:
        return _moved(x, [d for d in range(len(shape)) if d not in p["axes"]])
    if name == "squeeze":
        return _moved(x, [d for d in range(len(shape)) if d not in p["dimensions"]])
    if name == "transpose":
        return _moved(x, p["permutation"])
    if name == "broadcast_in_dim":
        to = p["broadcast_dimensions"][x.axis]
        return Parts(to, x.parts) if out[to] == shape[x.axis] else None
    if name == "slice":
        return _sliced(x, p["start_indices"][x.axis], p["limit_indices"][x.axis])
    if name == "dot_general":
        (contracted, _), (batch, _) = p["dimension_numbers"]
        rest = [d for d in range(len(shape)) if d not in (*batch, *contracted)]
        return _moved(x, [*batch, *rest])
    return None


def _side_by_side(ins: Sequence[Parts], shape: Sequence[int]) -> Parts | None:
    """The parts of an operation on operands of one shape, entry by entry."""
    axes = {x.axis for x in ins if x.axis >= 0}
    if len(axes) > 1 or not shape:
        return None
    (axis,) = axes
    stops = {0}
    for x in ins:
        if x.axis >= 0:
            stops |= set(np.cumsum([n for n, _ in x.parts]).tolist())
    edges, parts = sorted(stops), []
    for a, b in zip(edges, edges[1:], strict=False):
        here = [_sliced(x, a, b) if x.axis >= 0 else x for x in ins]
        parts.append((b - a, _any(here)))
    return Parts(axis, tuple(parts))


def _sliced(x: Parts, start: int, stop: int) -> Parts:
    parts, place = [], 0
    for n, ends in x.parts:
        length = min(stop, place + n) - max(start, place)
        if length > 0:
            parts.append((length, ends))
        place += n
    return Parts(x.axis, tuple(parts))


def _moved(x: Parts, axes: Sequence[int]) -> Parts | None:
    """With the axes of the operand that each axis of the result is."""
    return Parts(list(axes).index(x.axis), x.parts) if x.axis in axes else None


def _joined(eqn: Any, ins: Sequence[Parts]) -> Parts:
    axis, parts = eqn.params["dimension"], []
    if not all(isinstance(var.aval.shape[axis], int) for var in eqn.invars):
        return _whole(_any(ins))
    for x, var in zip(ins, eqn.invars, strict=True):
        if x.axis == axis:
            parts += x.parts
        else:
            parts.append((var.aval.shape[axis], _any([x])))
    return Parts(axis, tuple(parts))


def _whole(ends: Ends) -> Parts:
    return Parts(-1, ((1, ends),)) if ends else NOTHING


def _bits(numbers: Iterable[int]) -> int:
    out = 0
    for number in numbers:
        out |= 1 << number
    return out


def _is_key(aval: Any) -> bool:
    """Whether an input only draws random numbers."""
    dtype = aval.dtype
    return jnp.issubdtype(dtype, jax.dtypes.extended) or dtype == np.uint32


def _also(x: Parts, bits: int) -> Parts:
    parts = ((n, {k: e | bits for k, e in ends.items()}) for n, ends in x.parts)
    return Parts(x.axis, tuple(parts))


def _any(some: Iterable[Parts]) -> Ends:
    """What depends on an input if one of these does, at any place."""
    out: dict[int, int] = {}
    for x in some:
        for _, part in x.parts:
            for k, ends in part.items():
                out[k] = out[k] & ends if k in out else ends
    return out


def _all(some: Sequence[Parts]) -> Ends:
    """What depends on an input only if all of these do."""
    found = [_any([x]) for x in some]
    shared = set(found[0]).intersection(*found[1:])
    out = dict.fromkeys(shared, 0)
    for x in found:
        for k in shared:
            out[k] |= x[k]
    return out


def _constant(x: Parts) -> int:
    """The sets without which nothing is left of what a value depends on."""
    bits, found = -1, _any([x])
    for ends in found.values():
        bits &= ends
    return bits if found else 0
