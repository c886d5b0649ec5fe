"""find_groups: the channel dimensions of any function."""

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdp_jax.dimension import Frozen, Leaf
from sdp_jax.groups import Groups
from sdp_jax.modules import take_apart
from sdp_jax.tracing.analyse import Analysis, analyse, matches
from sdp_jax.tracing.flops import flop_polynomial
from sdp_jax.tracing.invariance import mark_invariant
from sdp_jax.tracing.members import find_dimensions
from sdp_jax.tracing.ports import class_channels, find_ports
from sdp_jax.tracing.removable import mark_removable
from sdp_jax.tree import leaf_table

# Running statistics by the names that Flax, Haiku and Equinox give them.
STATE = (
    "*batch_stats* *running_* *moving_* *_ema/* *spectral_norm*/u0 "
    "mean */mean var */var"
).split()

_UNUSED = "is not used by the function at these input shapes"
_UNEVEN = (
    "belong to channels that lie like no other one; dimensions are two channels or more"
)


def find_groups(
    fn: Callable[..., Any],
    *args: Any,
    prune_inputs: bool | Sequence[str] = False,
    prune_outputs: bool | Sequence[str] = False,
    ignore: Sequence[str] = (),
    whole: Sequence[str] = (),
    state: Sequence[str] = STATE,
) -> Groups:
    """Finds which slices of which parameters form channels, by tracing a function.

    It traces ``fn(params, *inputs)`` without computing anything, for a module that
    holds its arrays ``module(*inputs)``. Which slices go
    together follows from the primitives of the trace alone, not from names or layer
    classes. Whatever no rule covers stays whole, and the reason is kept.

    It warns where a derivative is not finite once a channel is zero (the root of a sum
    of squares), which would end the training.

    Heads and head dimensions of attention share entries; if both are trained to zero,
    their factors multiply.

    Args:
      fn: any function of the parameters that JAX can trace: a model or a loss, in
        inference or training mode; or a ``flax.nnx`` or Equinox module as it is, whose
        parameters are then its state (``nnx.split``) or its arrays
        (``equinox.partition``).
      *args: its arguments. First the parameters, any pytree of arrays or
        ``jax.ShapeDtypeStruct`` (not behind a module); leaves that are not
        floating-point or complex are cut, but never thresholded. Then the inputs,
        likewise; what is no array (Python numbers, strings) stays what it is: give
        arrays for what will vary.
      prune_inputs: whether features of the inputs count as channels, too: of all of
        them, or of those whose paths match one of some patterns. The path of an input
        begins with its number behind the parameters, from 0: ``"1/cache/*"``. The small
        function takes the whole input and leaves out what it does not need, or
        :meth:`Cut.take_inputs` of it.
      prune_outputs: whether positions of the outputs do, likewise; the path of an
        output is that in the tree of results. An input and an output that both match
        patterns and have the same shape, if need be the same end of their paths, are
        one *carry*: a recurrent state, the keys and values of a decoder. It has the
        same channels on both sides, and the small function takes and returns a small
        one. A carry is zero where channels are gone; it has to begin so, as with
        :meth:`Cut.zero_inputs`.
      ignore: patterns (as in :mod:`fnmatch`) of paths of leaves, whose channels stay:
        those that a leaf makes (as a producer). What it only reads may go.
      whole: patterns of paths of leaves that keep their shape: what they read stays,
        too.
      state: patterns of paths of running statistics: cut, but never thresholded. An
        output with the path and shape of one is its new value, and is cut with it; all
        other outputs stay whole. State of a model that is not in its parameters
        (``equinox.nn.State``) goes there, ``{"model": arrays, "state": state}`` with
        ``state=("state/*",)``: as an input it stays whole, and all that meets it.

    Returns:
      The :class:`Groups`, with the FLOPs of the function. Cut out where all producers
      of a channel are zero, ``fn`` gives the same result: see :func:`sdp_jax.narrow`.

    Raises:
      ValueError: if a pattern matches no leaf, or a module has state that is no array.
      TypeError: if patterns are no sequence of strings, or ``fn`` is neither a function
        nor a module that holds arrays. Whatever ``fn`` raises when it
        is traced with these arguments is raised on, with a note.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> print(sdp_jax.find_groups(fn, params, jnp.ones((2, 4))))
      ... # doctest: +ELLIPSIS
      dimension  channels  entries/channel  members
      in                8                7  in[1], out[0] (consumer)
      1 dimensions, 8 channels; they hold 56 of 56 entries (100.0%)
      cannot be cut:
        in[0]: dot_general: meets an axis that is always kept (...)
        out[1]: output: is an output of the function
    """
    fn, params, inputs = take_apart(fn, args)
    for name, patterns in (("ignore", ignore), ("whole", whole), ("state", state)):
        _check_patterns(name, patterns, list(leaf_table(params)))
    chosen_in = _chosen("prune_inputs", prune_inputs)
    chosen_out = _chosen("prune_outputs", prune_outputs)
    found = analyse(
        fn,
        params,
        inputs,
        {},
        is_state=lambda path: matches(path, state),
        ignore=ignore,
        whole=whole,
        prune_inputs=chosen_in,
        prune_outputs=chosen_out,
        carries=() if prune_inputs is True or prune_outputs is True else None,
        derivatives=False,
    )
    _check_patterns("prune_inputs", chosen_in, list(found.inputs))
    _check_patterns("prune_outputs", chosen_out, list(found.outputs))
    leaves = tuple(
        Leaf(path, tuple(np.shape(leaf))) for path, leaf in leaf_table(params).items()
    )
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    groups = Groups(
        find_dimensions(found, shapes),
        leaves,
        prune_inputs=chosen_in,
        prune_outputs=chosen_out,
    )
    groups = mark_removable(found, mark_invariant(found, groups))
    _warn_of_steep(found, groups)
    return dataclasses.replace(
        groups,
        frozen=_frozen(found, groups),
        flops=flop_polynomial(found, groups),
        ports=find_ports(found, groups),
    )


def _chosen(name: str, flag: Any) -> tuple[str, ...]:
    """Patterns of paths, from them or from whether all are meant."""
    if isinstance(flag, bool):
        return ("*",) if flag else ()
    _check_sequence(name, flag)
    return tuple(flag)


def _check_sequence(name: str, patterns: Any) -> None:
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{name} must be a sequence of patterns, as in {name}=('*/norm/*',); got "
            f"{patterns!r}"
        )


def _check_patterns(name: str, patterns: Any, paths: Sequence[str]) -> None:
    _check_sequence(name, patterns)
    for pattern in patterns:
        if pattern not in ("*", *STATE) and not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"{name} pattern {pattern!r} matches none of the leaves; there are, "
                f"for example, {paths[:5]}"
            )


def _warn_of_steep(found: Analysis, groups: Groups) -> None:
    """Says where exact zeros would end the training."""
    if not found.trace.steep:
        return
    label, operands = found.solution.label, found.solution.operands
    channel = class_channels(found, groups)
    told: dict[str, dict[str, None]] = {}
    for reason, factor in found.trace.steep:
        if factor.fill is not None and factor.fill <= found.trace.producers:
            numbers = channel[np.unique(operands[label[factor.atoms]])]
            for number in np.unique(groups.owner[numbers[numbers >= 0]]).tolist():
                told.setdefault(str(reason), {})[groups.dimensions[number].name] = None
    for reason, names in told.items():
        some = [repr(name) for name in list(names)[:4]] + ["…"] * (len(names) > 4)
        warnings.warn(
            f"{reason}, and its operand is zero where channels of {', '.join(some)} "
            "are: once training has made one of them zero, all gradients are NaN. Add "
            "a small number before, as in x * jax.lax.rsqrt((x**2).sum() + eps), or "
            "see that another number stands there: jnp.sqrt(jnp.where(s > 0, s, 1.0))",
            UserWarning,
            stacklevel=3,
        )


def _frozen(found: Analysis, groups: Groups) -> tuple[Frozen, ...]:
    solution = found.solution
    label, reasons = found.trace.space.atoms.reasons()
    out = []
    for axis in found.axes:
        size = len(axis.atoms)
        masks = groups.covered.get((axis.path, axis.axis), {})
        free = np.any([np.zeros(size, bool), *masks.values()], axis=0)
        if size < 2 or free.all():
            continue
        why: dict[str, None] = {}
        for one in np.unique(label[axis.atoms[~free]]).tolist():
            why.update((str(reason), None) for reason in reasons.get(one, ()))
        classes = solution.label[axis.atoms[~free]]
        used = found.used[solution.operands[classes]].any() or not classes.all()
        told = tuple(why) or (_UNEVEN if used else _UNUSED,)
        if len(told) > 4:
            told = (*told[:4], f"and {len(told) - 4} more")
        out.append(Frozen(axis.path, axis.axis, int((~free).sum()), told))
    return tuple(out)
