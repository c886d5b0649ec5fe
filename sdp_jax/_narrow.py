"""narrow: the function without the channels that are cut out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sdp_jax.cut import Cut
from sdp_jax.tracing.analyse import Analysis, analyse_with
from sdp_jax.tracing.evaluate import Evaluator
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.static import separate
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table


def narrow(fn: Callable[..., Any], cut: Cut) -> Callable[..., Any]:
    """The small function: ``fn`` without the channels that are cut out.

    It traces ``fn`` at the dense shapes of the parameters and evaluates the trace on
    the small arrays. Constants stay what they are: a mean over 64 channels, 40 of them
    left, still divides by 64, as the dense function with zeros does. That is why it
    needs no edit of the model and stays the same function where a module rebuilt at
    the smaller widths would not.

    Args:
      fn: the function that :func:`sdp_jax.find_groups` was given, or another one of the
        same parameters: the loss, the model in training mode, at any batch size.
      cut: which channels stay.

    Returns:
      A function of the same signature that takes ``cut.take(params)``. It traces at
      each call, so put ``jax.jit`` around it; ``grad``, ``vmap``, ``checkpoint`` and
      ``jax.export`` work on it as on any other function.

    Raises:
      TypeError: if ``cut`` is no :class:`Cut`.
      ValueError: when called, if the parameters are not those of the cut, or ``fn``
        needs channels that the cut has removed, or needs entries to be zero that the
        groups of the cut do not count among the producers.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.array([[1., 0.], [2., 0.]]), "out": jnp.ones((2, 3))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> groups = sdp_jax.find_groups(fn, params, jnp.ones((1, 2)))
      >>> cut = sdp_jax.plan_cut(groups, params)
      >>> small = sdp_jax.narrow(fn, cut)
      >>> x = jnp.array([[0.1, 0.2]])
      >>> bool((small(cut.take(params), x) == fn(params, x)).all())
      True
    """
    if not isinstance(cut, Cut):
        raise TypeError(
            f"narrow takes a Cut, as sdp_jax.plan_cut makes it; got "
            f"{type(cut).__name__}"
        )

    @functools.wraps(fn)
    def small_fn(params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        cut.check_small(params)
        table = leaf_table(params)
        dense = jax.tree.unflatten(
            jax.tree.structure(params),
            [
                jax.ShapeDtypeStruct(cut.dense.shapes[path], leaf_dtype(leaf))
                for path, leaf in table.items()
            ],
        )
        found = analyse_with(
            cut.dense,
            lambda p, rest: fn(p, *rest[0], **rest[1]),
            dense,
            ((args, kwargs),),
        )
        _check_producers(found, cut)
        evaluator = Evaluator(found.solution, _kept_classes(found, cut), RULES)
        moving, _ = separate((args, kwargs))
        inputs = found.body.ins[len(table) :]
        moving = map(evaluator.take, moving, inputs)
        outs = evaluator.run(found.body, [*table.values(), *moving])
        return jax.tree.unflatten(found.out_tree, outs)

    return small_fn


def _check_producers(found: Analysis, cut: Cut) -> None:
    """Refuses functions that need more to be zero than the cut's groups say."""
    zero = {(m.path, m.axis) for d in cut.dense for m in d.producers}
    for axis in found.axes:
        index = cut.index(axis.path, axis.axis)
        where = (axis.path, axis.axis)
        if index is None or len(index) == len(axis.atoms):
            continue
        if where in zero and axis.number in found.trace.nonzero:
            raise ValueError(
                f"this function divides by what axis {axis.axis} of {axis.path!r} "
                "holds, or takes its logarithm, but the removed slices of it are zero "
                "in the groups of the cut: the dense function is not finite. Find the "
                "groups on this function, or take that part out of it"
            )
        if where in zero:
            continue
        if axis.number in found.trace.producers:
            raise ValueError(
                f"this function equals the dense one only if the removed slices of "
                f"axis {axis.axis} of {axis.path!r} were zero, but in the groups of "
                "the cut they only read channels that are zero. It uses them in "
                "another way than the function that the groups were found on (a "
                "penalty on the parameters inside the loss, for example): find the "
                "groups on this function, or take that part out of it"
            )


def _kept_classes(found: Analysis, cut: Cut) -> np.ndarray:
    """For each class of the trace whether it is kept."""
    label, operands = found.solution.label, found.solution.operands
    keep = np.ones(len(operands), bool)
    masks = []
    for axis in found.axes:
        mask = np.ones(len(axis.atoms), bool)
        index = cut.index(axis.path, axis.axis)
        if index is not None:
            mask[:] = False
            mask[index] = True
        masks.append(mask)
        keep[operands[label[axis.atoms]]] = False
    for axis, mask in zip(found.axes, masks, strict=True):
        keep[operands[label[axis.atoms[mask]]]] = True
    keep[0] = True
    keep = np.asarray(keep[operands].all(axis=1))
    for axis, mask in zip(found.axes, masks, strict=True):
        differ = keep[label[axis.atoms]] != mask
        if differ.any():
            classes, reasons = found.trace.space.atoms.reasons()
            why = {
                str(reason)
                for one in np.unique(classes[axis.atoms[differ]]).tolist()
                for reason in reasons.get(one, ())
            } or {"its channels belong together in another way"}
            raise ValueError(
                f"the cut removes positions of axis {axis.axis} of {axis.path!r} that "
                f"this function needs: {'; '.join(sorted(why))}. Find the groups on "
                "this function, or cut less"
            )
    return keep
