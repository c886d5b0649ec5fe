"""Traces a function of parameters and inputs, and solves for its classes."""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.tracing.atoms import Reason, Solution
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.static import is_static, separate
from sdp_jax.tracing.trace import NO_RULE, Body, Trace, is_empty
from sdp_jax.tracing.values import ZERO, Value
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
    inputs: dict[str, Value]
    outputs: dict[str, Value]
    carries: frozenset[str]  # The inputs that come back as outputs.
    renewed: frozenset[str]  # The outputs that are new running statistics.


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of several patterns."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def analyse(
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    is_state: Callable[[str], bool],
    ignore: Sequence[str] = (),
    whole: Sequence[str] = (),
    prune_inputs: Sequence[str] = (),
    prune_outputs: Sequence[str] = (),
    carries: Collection[str] | None = None,
    derivatives: bool = True,
) -> Analysis:
    """Traces ``fn(params, *args, **kwargs)`` and solves for its classes.

    Without ``carries`` they are the inputs that come back among the outputs.
    """
    moving, join = separate((args, kwargs))
    names = input_paths(args, kwargs)

    def function(params: PyTree, moving: list[Any]) -> Any:
        args, kwargs = join(moving)
        return fn(params, *args, **kwargs)

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
            names,
            Trace(RULES, nonzero, derivatives=derivatives),
            is_state=is_state,
            ignore=ignore,
            whole=whole,
            prune_inputs=prune_inputs,
            prune_outputs=prune_outputs,
            carries=carries,
        )
        if found.trace.nonzero == nonzero:
            return found
        nonzero = found.trace.nonzero


def _walk(
    closed: Any,
    out_shape: Any,
    params: PyTree,
    names: Sequence[str],
    trace: Trace,
    *,
    is_state: Callable[[str], bool],
    ignore: Sequence[str],
    whole: Sequence[str],
    prune_inputs: Sequence[str],
    prune_outputs: Sequence[str],
    carries: Collection[str] | None,
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
            if matches(path, whole):
                space.freeze(axis, Reason("whole", "was asked to stay whole"))
        # How devices split it says where it is kept, not how it is computed with.
        values.append(Value(tuple(factors), data=False))
    variables = closed.jaxpr.invars[len(values) :]
    sizes = [trace.sizes.shape(getattr(v.aval, "shape", ())) for v in variables]
    results = [
        ("/".join(keys), trace.sizes.shape(np.shape(leaf)))
        for keys, leaf in leaf_keys(out_shape)
    ]
    pairs = _pairs(
        [(p, n) for p, n in zip(names, sizes, strict=True) if matches(p, prune_inputs)],
        [(p, n) for p, n in results if matches(p, prune_outputs)],
    )
    back = frozenset(pairs.values() if carries is None else carries)
    inputs: dict[str, Value] = {}
    for path, shape in zip(names, sizes, strict=True):
        if path in back:
            axes_in = tuple(space.fresh(n, ZERO) for n in shape)
            inputs[path] = Value(axes_in, data=True)
        elif matches(path, prune_inputs):
            inputs[path] = space.fresh_value(shape, data=True)
        else:
            inputs[path] = space.plain_value(shape, data=True)
    values += inputs.values()
    body = trace.run(closed.jaxpr, closed.consts, values)
    running = {axis.path for axis in axes if axis.state}
    leaves = dict(zip(leaf_table(params), values, strict=False))
    why = Reason("output", "is an output of the function")
    grows = Reason("output", "is handed on, and does not stay zero")
    outputs: dict[str, Value] = {}
    renewed: set[str] = set()
    for (keys, _), value in zip(leaf_keys(out_shape), body.outs, strict=True):
        outputs[path := "/".join(keys)] = value
        shapes = {path: leaves[path].shape for path in running}
        found = owner_of(keys, value.shape, shapes)
        owner = leaves[found] if found else None
        carry = pairs.get(path)
        for d, axis in enumerate(value.axes):
            if owner is not None:
                renewed.add(path)
                space.unify([axis, owner.axes[d]], why)
            elif carry in back:
                space.unify([trace.zero(axis, grows), inputs[carry].axes[d]], why)
            elif not matches(path, prune_outputs):
                space.freeze(axis, why)
    asked = Reason("ignore", "its channels were asked to stay")
    for axis in axes:
        if axis.number in trace.producers and matches(axis.path, ignore):
            space.atoms.freeze(axis.atoms, asked)
    out_tree = jax.tree.structure(out_shape)
    solution = space.atoms.solve()
    used = _used(body, solution)
    return Analysis(
        trace,
        body,
        axes,
        solution,
        used,
        out_tree,
        inputs,
        outputs,
        back,
        frozenset(renewed),
    )


def input_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The paths of the arrays among the arguments behind the parameters."""
    found = leaf_keys((tuple(args), dict(kwargs)))
    return ["/".join(keys[1:]) for keys, leaf in found if not is_static(leaf)]


def _pairs(
    inputs: Sequence[tuple[str, Any]], outputs: Sequence[tuple[str, Any]]
) -> dict[str, str]:
    """Which output is the new value of which input.

    They have the same shape; the longest common end of their paths decides, then order.
    """
    ranked = sorted(
        (-_common(a, b), i, j)
        for i, (a, shape) in enumerate(inputs)
        for j, (b, other) in enumerate(outputs)
        if shape and shape == other
    )
    found: dict[int, int] = {}
    for _, i, j in ranked:
        if i not in found.values() and j not in found:
            found[j] = i
    return {outputs[j][0]: inputs[i][0] for j, i in found.items()}


def _common(a: str, b: str) -> int:
    """How many of the last keys of two paths are the same."""
    pairs = zip(reversed(a.split("/")), reversed(b.split("/")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def analyse_with(
    groups: Groups,
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    carries: Collection[str] | None = None,
    derivatives: bool = True,
) -> Analysis:
    """The same for a function of parameters whose groups are known."""
    state = {m.path for d in groups for m in d.members if m.role == "state"}
    if carries is None:
        carries = {p.path for p in groups.ports if p.role == "carry"}
    return analyse(
        fn,
        params,
        args,
        kwargs,
        is_state=state.__contains__,
        prune_inputs=groups.prune_inputs,
        prune_outputs=groups.prune_outputs,
        carries=carries,
        derivatives=derivatives,
    )


def check_leaves(groups: Groups, params: PyTree) -> None:
    """Refuses parameters that are not those of the groups."""
    have = {path: np.shape(leaf) for path, leaf in leaf_table(params).items()}
    odd = [p for p in {**have, **groups.shapes} if have.get(p) != groups.shapes.get(p)]
    if odd:
        raise ValueError(
            f"leaf {odd[0]!r} has shape {have.get(odd[0])} in the parameters, but "
            f"{groups.shapes.get(odd[0])} in the groups; give groups and parameters of "
            "the same model"
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
            if record.eqn.outvars and all(map(is_empty, record.eqn.outvars)):
                continue  # It asks for nothing, and computes nothing.
            visit(record.outs)
            if not RULES.get(record.eqn.primitive.name, NO_RULE).picks:
                visit(record.ins)
            for inner in record.bodies:
                walk(inner)
        visit(body.outs)

    walk(body)
    used = np.zeros_like(there)
    used[solution.operands[there]] = True
    used[0] = False
    return used
