"""Factorisations and solvers of matrices: batches of them pass, matrices stay whole."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import lax

from sdp_jax.tracing.rule import Rule
from sdp_jax.tracing.trace import Body, Nested, Record, Trace
from sdp_jax.tracing.values import Axis, Value, refill

_WHOLE = "needs its matrices whole"
_SINGULAR = "is not finite for a matrix of zeros"


def _batches(
    t: Trace, eqn: Any, ins: Sequence[Value], ranks: Sequence[int]
) -> list[Axis]:
    """Axes before the matrices (or vectors, by rank), which run along all operands."""
    for value, rank in zip(ins, ranks, strict=True):
        for axis in value.axes[len(value.axes) - rank :]:
            t.freeze(eqn, axis, _WHOLE)
    lines = [v.axes[: len(v.axes) - r] for v, r in zip(ins, ranks, strict=True)]
    return [t.unify(eqn, line)[0] for line in zip(*lines, strict=True)]


def _finite(t: Trace, eqn: Any, axes: Sequence[Axis]) -> None:
    """Refuses batches of which some become zero."""
    for axis in axes:
        for f in axis:
            if f.fill is not None and not t.space.is_plain(f):
                t.freeze(eqn, (f,), _SINGULAR)


def _results(t: Trace, eqn: Any, ins: Sequence[Value], batch: list[Axis]) -> Any:
    data = any(v.data for v in ins)
    rest = [v.aval.shape[len(batch) :] for v in eqn.outvars]
    batch = [refill(axis, None) for axis in batch]
    return [Value((*batch, *map(t.space.plain, shape)), data) for shape in rest]


def _factor(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Matrices in a batch, and vectors and matrices that belong to them."""
    before = len(ins[0].axes) - 2
    batch = _batches(t, eqn, ins, [len(v.axes) - before for v in ins])
    _finite(t, eqn, batch)
    return _results(t, eqn, ins, batch)


def _pivots(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    return _results(t, eqn, ins, _batches(t, eqn, ins, [1]))


def _triangular(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Solves for columns (or rows) that do not know of each other."""
    a, b = ins
    along = -2 if eqn.params["left_side"] else -1
    for axis in (*a.axes[-2:], b.axes[along]):
        t.freeze(eqn, axis, _WHOLE)
    batch = []
    for x, y in zip(a.axes[:-2], b.axes[:-2], strict=True):
        x, y = t.unify(eqn, [x, y])
        _finite(t, eqn, [x])
        batch.append(y)
    axes = [*batch, *b.axes[-2:]]
    axes[along] = t.space.plain(b.shape[along])
    return [Value(tuple(axes), a.data or b.data, b.zero)]


def _tridiagonal(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Solves for columns that do not know of each other."""
    *diagonals, b = ins
    _batches(t, eqn, diagonals, [1, 1, 1])
    t.freeze(eqn, b.axes[-2], _WHOLE)
    batch = []
    for *lines, y in zip(*(v.axes for v in ins), strict=False):
        if len(batch) < len(b.axes) - 2:
            *lines, y = t.unify(eqn, [*lines, y])
            _finite(t, eqn, [lines[1]])
            batch.append(y)
    axes = (*batch, t.space.plain(b.shape[-2]), b.axes[-1])
    return [Value(axes, any(v.data for v in ins), b.zero)]


def _parts(eqn: Any, ins: Sequence[Any]) -> tuple[dict[str, list[Any]], list[Any]]:
    """What each function of a linear solve has closed over; and the right-hand side."""
    rest, found = list(ins), {}
    for name in eqn.params["jaxprs"]._fields:
        count = getattr(eqn.params["const_lengths"], name)
        found[name], rest = rest[:count], rest[count:]
    return found, rest


def _names(eqn: Any) -> list[str]:
    """The functions of a linear solve that there are, the solver first."""
    names = ("solve", "matvec", "vecmat", "transpose_solve")
    return [n for n in names if getattr(eqn.params["jaxprs"], n) is not None]


def _linear_solve(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    # The right-hand side is as long as the solution.
    ins = [dataclasses.replace(v, free=False) for v in ins]
    consts, right = _parts(eqn, ins)
    bodies: list[Body] = []
    outs: list[Value] = []
    for name in _names(eqn):
        given = outs[: len(right)] if name == "matvec" else right
        body = t.run_closed(
            getattr(eqn.params["jaxprs"], name), [*consts[name], *given]
        )
        outs = outs or body.outs
        # Results of the function's own may follow.
        for a, b in zip(body.outs, right, strict=False):
            for x, y in zip(a.axes, b.axes, strict=True):
                t.unify(eqn, [x, y])
        bodies.append(body)
    return outs, tuple(bodies)


def _rebuild_linear_solve(n: Any, record: Record, args: list[Any]) -> list[Any]:
    eqn = record.eqn
    consts, right = _parts(eqn, args)
    bodies = dict(zip(_names(eqn), record.bodies, strict=True))

    more = len(eqn.outvars) - len(right)

    def run(name: str) -> Any:
        return lambda x: n.run(bodies[name], [*consts[name], *x])

    def solver(name: str) -> Any:
        def solve(_: Any, x: Any) -> Any:
            found = run(name)(x)
            return (found[: len(right)], found[len(right) :]) if more else found

        return solve if name in bodies else None

    found = lax.custom_linear_solve(
        run("matvec"),
        right,
        solver("solve"),
        solver("transpose_solve"),
        has_aux=more > 0,
    )
    return [*found[0], *found[1]] if more else found


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "cholesky cholesky_update lu qr eigh eig svd schur hessenberg tridiagonal "
        "geqrf geqp3 householder_product ormqr".split(),
        Rule(_factor),
    ),
    "lu_pivots_to_permutation": Rule(_pivots),
    "triangular_solve": Rule(_triangular),
    "tridiagonal_solve": Rule(_tridiagonal),
    "custom_linear_solve": Rule(_linear_solve, rebuild=_rebuild_linear_solve),
}
