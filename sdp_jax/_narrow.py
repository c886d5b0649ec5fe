"""narrow: the function without the channels that are cut out."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax.cut import Cut
from sdp_jax.mesh import sharding_of
from sdp_jax.tracing.analyse import Analysis, analyse_with, input_paths
from sdp_jax.tracing.evaluate import Evaluator
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.static import is_static, separate, written
from sdp_jax.tracing.trace import Body
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table

KNOWN = 8  # So many traces a small function remembers.


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
      A function of the same signature that takes ``cut.take(params)``; a recurrent
      state or a cache goes in and out small (:meth:`Cut.take_inputs`). It runs
      operation by operation, so put ``jax.jit`` around it; ``grad``, ``vmap``,
      ``checkpoint`` and ``jax.export`` work on it as on any other function. As under
      ``jax.jit``, ``fn`` itself is called once for arguments of the same shapes.

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

    known: dict[Any, tuple[Analysis, np.ndarray]] = {}
    carries = {p.path for p in cut.dense.ports if p.role == "carry"}

    def analysed(
        params: PyTree,
        moving: Sequence[Any],
        join: Callable[[Sequence[Any]], Any],
        forms: Mapping[str, str],
        small: Collection[str],
    ) -> tuple[Analysis, np.ndarray]:
        """A trace at the dense shapes, and for each of its classes whether it stays."""
        dense = [
            _dense(leaf, cut.dense.shapes[path])
            for path, leaf in leaf_table(params).items()
        ]
        dense = jax.tree.unflatten(jax.tree.structure(params), dense)
        args, kwargs = join(
            [
                cut.dense_input(path, leaf) if path in small else leaf
                for path, leaf in zip(forms, moving, strict=True)
            ]
        )
        found, back = None, carries & set(small)
        try:
            found = analyse_with(cut.dense, fn, dense, args, kwargs, carries=back)
            _check_producers(found, cut)
            return found, _kept_classes(found, cut, small)
        except Exception as error:
            if carries or (moving and found is None):
                error.add_note(_about_inputs(moving, forms, carries))
            raise

    @functools.wraps(fn)
    def small_fn(params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        cut.check_small(params)
        args, kwargs = _positional(fn, params, args, kwargs)
        moving, join = separate((args, kwargs))
        forms = {
            path: cut.input_form(path, np.shape(leaf))
            for path, leaf in zip(input_paths(args, kwargs), moving, strict=True)
        }
        small = {path for path, form in forms.items() if form == "small"}
        key = _key(params, (args, kwargs), small)
        if key in known:
            found, keep = known[key]
        else:
            found, keep = analysed(params, moving, join, forms, small)
            if key is not None and not _holds_tracers(found.body):
                if len(known) == KNOWN:
                    known.pop(next(iter(known)))
                known[key] = found, keep
        evaluator = Evaluator(found.solution, keep, RULES)
        leaves = jax.tree.leaves(params)
        values = found.body.ins[len(leaves) :]
        moving = [
            leaf if path in small else evaluator.take(leaf, value)
            for path, leaf, value in zip(forms, moving, values, strict=True)
        ]
        outs = evaluator.run(found.body, [*leaves, *moving])
        # Constants are numbers and arrays of NumPy; a tangent of integers stays one.
        outs = [
            x if getattr(x, "dtype", None) == jax.dtypes.float0 else jnp.asarray(x)
            for x in outs
        ]
        return jax.tree.unflatten(found.out_tree, outs)

    return small_fn


def _key(params: PyTree, rest: Any, small: Collection[str]) -> Any:
    """What a trace depends on, or ``None`` where that cannot be compared."""
    leaves, treedef = jax.tree.flatten(rest)
    parts = tuple(written(x) if is_static(x) else jax.typeof(x) for x in leaves)
    if None in parts:
        return None
    names = ("enable_x64", "default_matmul_precision", "numpy_dtype_promotion")
    settings = [getattr(jax.config, f"jax_{name}") for name in names]
    settings = (*settings, jax.sharding.get_abstract_mesh())
    shapes = tuple(map(jax.typeof, jax.tree.leaves(params)))
    structure = jax.tree.structure(params), treedef
    return structure, shapes, parts, frozenset(small), settings


def _holds_tracers(body: Body) -> bool:
    """Whether a trace holds values of a surrounding one, which end with it."""
    return any(isinstance(c, jax.core.Tracer) for c in body.consts) or any(
        _holds_tracers(inner) for record in body.records for inner in record.bodies
    )


def _about_inputs(
    leaves: Sequence[Any], forms: Mapping[str, str], carries: Collection[str]
) -> str:
    """How the inputs were taken, for who hands in a state of another size."""
    if not carries:
        return (
            "the small function takes all inputs as the dense one does. That a state "
            "goes in and out small is said when the groups are found, by prune_inputs= "
            "and prune_outputs=; sdp_jax.Cut(groups, cut.kept) is then the same cut"
        )
    given = [
        f"{path!r} of shape {np.shape(leaf)}, taken as {form}"
        for (path, form), leaf in zip(forms.items(), leaves, strict=True)
        if path in carries
    ]
    return (
        "the groups of the cut were found on a function that hands on its inputs "
        f"{sorted(carries)}, which the small one takes small, as cut.take_inputs makes "
        f"them; here {'; '.join(given) or 'none of them by position'}"
    )


def _positional(
    fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...], kwargs: dict
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position where the function lets them be, as paths number them."""
    if not kwargs:
        return args, kwargs
    try:
        bound = inspect.signature(fn).bind(params, *args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs  # The function itself says what is wrong.
    return bound.args[1:], bound.kwargs


def _dense(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The dense shape of a small leaf, on the devices that its type names."""
    sharding = sharding_of(jax.typeof(leaf))
    return jax.ShapeDtypeStruct(shape, leaf_dtype(leaf), sharding=sharding)


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


def _kept_classes(found: Analysis, cut: Cut, small: Collection[str]) -> np.ndarray:
    """For each class of the trace whether it is kept; some inputs are small already."""
    label, operands = found.solution.label, found.solution.operands
    keep = np.ones(len(operands), bool)
    axes = [
        (axis.path, axis.axis, axis.atoms, cut.index(axis.path, axis.axis))
        for axis in found.axes
    ]
    for path in small:
        for d, index in cut.input_indices(path).items():
            factors = found.inputs[path].axes[d]  # One, as it is an input.
            axes += [(path, d, f.atoms, index) for f in factors]
    masks = []
    for _, _, atoms, index in axes:
        mask = np.ones(len(atoms), bool)
        if index is not None:
            mask[:] = False
            mask[index] = True
        masks.append(mask)
        keep[operands[label[atoms]]] = False
    for (_, _, atoms, _), mask in zip(axes, masks, strict=True):
        keep[operands[label[atoms[mask]]]] = True
    keep[0] = True
    keep = np.asarray(keep[operands].all(axis=1))
    for (path, d, atoms, _), mask in zip(axes, masks, strict=True):
        differ = keep[label[atoms]] != mask
        if differ.any():
            classes, reasons = found.trace.space.atoms.reasons()
            why = {
                str(reason)
                for one in np.unique(classes[atoms[differ]]).tolist()
                for reason in reasons.get(one, ())
            } or {"its channels belong together in another way"}
            raise ValueError(
                f"the cut removes positions of axis {d} of {path!r} that "
                f"this function needs: {'; '.join(sorted(why))}. Find the groups on "
                "this function, with prune_outputs= for outputs that may shrink, or "
                "cut less"
            )
    return keep
