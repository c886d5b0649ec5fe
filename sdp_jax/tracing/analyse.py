"""Traces a function of parameters and inputs, and solves for its classes."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.tracing.atoms import Reason, Solution
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.static import separate
from sdp_jax.tracing.trace import NO_RULE, Body, Trace
from sdp_jax.tracing.values import Value
from sdp_jax.tree import PyTree, leaf_dtype, leaf_keys, leaf_table, owner_of


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterAxis:
    """An axis of a leaf: its atoms, and the number by which fills refer to it."""

    path: str
    axis: int
    atoms: np.ndarray
    number: int
    state: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A traced function, its classes, and which of them it needs for anything."""

    trace: Trace
    body: Body
    axes: list[ParameterAxis]
    solution: Solution
    used: np.ndarray
    out_tree: Any


def analyse(
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    *,
    is_state: Callable[[str], bool],
    ignore: Sequence[str] = (),
    prune_inputs: bool = False,
    prune_outputs: bool = False,
    derivatives: bool = True,
) -> Analysis:
    """Traces ``fn(params, *args)`` and solves for its classes."""
    moving, join = separate(args)

    def function(params: PyTree, moving: list[Any]) -> Any:
        return fn(params, *join(moving))

    try:
        closed, out_shape = jax.make_jaxpr(function, return_shape=True)(params, moving)
    except Exception as error:
        shapes = [f"{np.shape(x)}" for x in moving]
        error.add_note(
            f"sdp_jax traced the function with {len(leaf_table(params))} leaves of "
            f"parameters and arrays of the shapes {', '.join(shapes) or '(none)'}, and "
            "the function raised this. Check that it runs with them: the first "
            "argument must be the parameters as the function takes them, the others "
            "its inputs in order; Python code must not depend on the values of arrays"
        )
        raise
    nonzero: set[int] = set()
    while True:
        found = _walk(
            closed,
            out_shape,
            params,
            Trace(RULES, nonzero, derivatives=derivatives),
            is_state=is_state,
            ignore=ignore,
            prune_inputs=prune_inputs,
            prune_outputs=prune_outputs,
        )
        if found.trace.nonzero == nonzero:
            return found
        nonzero = found.trace.nonzero


def _walk(
    closed: Any,
    out_shape: Any,
    params: PyTree,
    trace: Trace,
    *,
    is_state: Callable[[str], bool],
    ignore: Sequence[str],
    prune_inputs: bool,
    prune_outputs: bool,
) -> Analysis:
    """One walk, in which the parameter axes of ``trace.nonzero`` do not become zero."""
    known = frozenset(trace.nonzero)
    space = trace.space
    ins = (*closed.jaxpr.invars, *closed.jaxpr.constvars)
    trace.sizes.start(n for v in ins for n in getattr(v.aval, "shape", ()))
    axes: list[ParameterAxis] = []
    values: list[Value] = []
    for path, leaf in leaf_table(params).items():
        state = is_state(path) or not jnp.issubdtype(leaf_dtype(leaf), jnp.inexact)
        factors = []
        for d, size in enumerate(np.shape(leaf)):
            number = len(axes)
            fixed = state or number in known
            axis = space.fresh(size, None if fixed else frozenset({number}))
            trace.weights.append(math.prod(np.shape(leaf)) // max(size, 1))
            if 0 in np.shape(leaf):
                axis = space.plain(size)
            factors.append(axis)
            atoms = axis[0].atoms if axis else np.zeros(size, np.int32)
            axes.append(ParameterAxis(path, d, atoms, number, state))
            if any(fnmatch.fnmatch(path, pattern) for pattern in ignore):
                space.freeze(axis, Reason("ignore", "was asked to stay whole"))
        values.append(Value(tuple(factors), data=False))
    for var in closed.jaxpr.invars[len(values) :]:
        shape = getattr(var.aval, "shape", ())
        make = space.fresh_value if prune_inputs else space.plain_value
        values.append(make(trace.sizes.shape(shape), data=True))
    body = trace.run(closed.jaxpr, closed.consts, values)
    states = {axis.path for axis in axes if axis.state}
    leaves = dict(zip(leaf_table(params), values, strict=False))
    why = Reason("output", "is an output of the function")
    for (keys, _), value in zip(leaf_keys(out_shape), body.outs, strict=True):
        shapes = {path: leaves[path].shape for path in states}
        found = owner_of(keys, value.shape, shapes)
        owner = leaves[found] if found else None
        for d, axis in enumerate(value.axes):
            if owner is not None:
                space.unify([axis, owner.axes[d]], why)
            elif not prune_outputs:
                space.freeze(axis, why)
    out_tree = jax.tree.structure(out_shape)
    solution = space.atoms.solve()
    return Analysis(trace, body, axes, solution, _used(body, solution), out_tree)


def analyse_with(
    groups: Groups,
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    *,
    derivatives: bool = True,
) -> Analysis:
    """The same for a function of parameters whose groups are known."""
    state = {m.path for d in groups for m in d.members if m.role == "state"}
    return analyse(
        fn,
        params,
        args,
        is_state=state.__contains__,
        prune_inputs=groups.prune_inputs,
        prune_outputs=groups.prune_outputs,
        derivatives=derivatives,
    )


def _used(body: Body, solution: Solution) -> np.ndarray:
    """Which classes an equation computes with, or another than one that picks makes."""
    there = np.zeros(len(solution.operands), bool)
    seen: dict[int, np.ndarray] = {}

    def visit(values: Sequence[Value]) -> None:
        for f in (f for v in values for axis in v.axes for f in axis):
            if id(f.atoms) not in seen:
                seen[id(f.atoms)] = f.atoms
                there[solution.label[f.atoms]] = True

    def walk(body: Body) -> None:
        for record in body.records:
            visit(record.outs)
            if not RULES.get(record.eqn.primitive.name, NO_RULE).picks:
                visit(record.ins)
            for inner in record.bodies:
                walk(inner)
        visit(body.outs)

    walk(body)
    used = np.zeros_like(there)
    used[solution.operands[there]] = True
    return used
