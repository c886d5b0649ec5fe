"""prune: from a model to a smaller one in one call, and what comes out of it."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from sdp_jax import files
from sdp_jax._narrow import narrow
from sdp_jax.compare import differences, rounding
from sdp_jax.cut import Cut
from sdp_jax.export import PLATFORMS, export_stablehlo
from sdp_jax.groups import Groups, Ranking, need_groups
from sdp_jax.matching import check_like
from sdp_jax.modules import split_module, take_apart
from sdp_jax.plan import RoundTo, Scores, Target, plan_cut
from sdp_jax.report import Report, make_report, need_values
from sdp_jax.tracing.find import find_groups
from sdp_jax.tracing.static import is_static, written
from sdp_jax.tree import PyTree, leaf_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A function without the channels that are cut out, with its small parameters.

    It is called as the model is, without parameters: ``pruned(x)``. It is a pytree
    whose leaves are the small arrays, so that it passes through ``jax.jit``,
    ``jax.grad``, ``jax.vmap`` and ``jax.tree.map`` like any parameters. Made by
    :func:`prune` and :func:`load`.

    Attributes:
      fn: the dense function, ``fn(params, *inputs)``.
      params: the small parameters.
      cut: which channels stay.
    """

    fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    params: PyTree
    cut: Cut = dataclasses.field(metadata={"static": True})

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """What the dense function gives for these inputs, with the channels zero.

        It is compiled once for each shape of the inputs, and for each number or string
        among them; with other objects that are no arrays it is not compiled.

        Args:
          *inputs: as the dense function takes them behind the parameters; a
            recurrent state or a cache small (:meth:`Cut.take_inputs`).
          **keywords: likewise.

        Returns:
          What the dense function returns.

        Raises:
          ValueError: if the parameters are not those of the cut, or the function needs
            channels that are gone.
        """
        leaves, treedef = jax.tree.flatten((inputs, keywords))
        moving = [None if is_static(leaf) else leaf for leaf in leaves]
        fixed = tuple(_Fixed(x, written(x)) if is_static(x) else None for x in leaves)
        if any(f is not None and f.key is None for f in fixed):
            # An object may change between two calls.
            return self.apply(self.params, *inputs, **keywords)
        fn = _Same(self.fn)
        return _call(fn, self.cut, treedef, fixed, self.params, moving)

    @property
    def apply(self) -> Callable[..., Any]:
        """The small function of small parameters and inputs, to train on with."""
        return narrow(self.fn, self.cut)

    @property
    def groups(self) -> Groups:
        """The groups of the small parameters, to prune further."""
        return self.cut.groups

    def take(self, tree: PyTree, *, tx: Any = None) -> PyTree:
        """Cuts whatever goes with the dense parameters: optimizer state, an EMA.

        A training state with a function (``apply_fn`` of Flax's ``TrainState``) gets
        the small one in its place, so that training goes on from it.

        Args:
          tree: any tree with dense parameters, or what is shaped like them, in it; see
            :meth:`Cut.take`.
          tx: for a training state that has an optimizer ``tx`` made with the dense
            groups: the same made with those of the small model (:attr:`groups`), which
            takes its place.

        Returns:
          A tree of the same structure with small leaves.

        Raises:
          ValueError: as :meth:`Cut.take`; or if the cut state is not that of ``tx``.
          TypeError: if ``tx`` is given and the tree has none to replace.
        """
        small = self.cut.take(tree)
        if not hasattr(small, "replace"):
            if tx is not None:
                raise TypeError(
                    "tx= replaces the optimizer of a training state such as Flax's "
                    f"TrainState; {type(tree).__name__} has none"
                )
            return small
        if hasattr(small, "apply_fn"):
            small = small.replace(apply_fn=narrow(small.apply_fn, self.cut))
        if tx is not None:
            small = small.replace(tx=tx)
            check_like(small.opt_state, jax.eval_shape(tx.init, small.params))
        return small

    def fill(self) -> PyTree:
        """The dense parameters, zero where channels are gone."""
        return self.cut.fill(self.params)

    def report(self, *inputs: Any, repeats: int = 20) -> Report:
        """What the cut has changed: widths, parameters, FLOPs, time, results.

        Args:
          *inputs: arrays to run both functions on, as the dense one takes them;
            without any, what is counted and timed on them is left out.
          repeats: how often each is timed.

        Returns:
          A :class:`sdp_jax.report.Report`, which prints as a table.

        Raises:
          ValueError: if ``repeats`` is below 1, or the parameters are not arrays.
        """
        return make_report(self.fn, self.params, self.cut, inputs, repeats)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes parameters (Orbax) and cut (JSON) into a new directory.

        The directory appears when everything is written, or not at all;
        :func:`sdp_jax.load` reads it. Of several processes (``jax.distributed``) all
        have to call this; parameters may be sharded over them.

        Args:
          directory: where to write; it must not exist. Several processes have to share
            it; that of the first one counts.

        Raises:
          FileExistsError: if the directory exists.
          ValueError: if the parameters are not those of the cut.
          RuntimeError: if it has failed in another process.
          ImportError: if orbax-checkpoint is not installed.
        """
        files.save(directory, self.params, self.cut)

    def export(
        self,
        path: str | os.PathLike[str] | None,
        *inputs: Any,
        in_axes: Any = 0,
        platforms: Sequence[str] = PLATFORMS,
        vjp_order: int = 0,
    ) -> jax_export.Exported:
        """Writes a StableHLO artefact that needs no Python code of yours.

        Its parameters are constants, and it takes any batch size; see
        :func:`sdp_jax.export_stablehlo`.

        Args:
          path: file to write; ``None`` for none.
          *inputs: arrays or shapes, as this takes them when called.
          in_axes: where their batch axes are, as in :func:`jax.vmap`.
          platforms: where it will run.
          vjp_order: how many times it can be differentiated.

        Returns:
          The exported function.

        Raises:
          ValueError: as :func:`sdp_jax.export_stablehlo`.
          ImportError: if a file is asked for and flatbuffers is not installed.
        """
        return export_stablehlo(
            self.apply,
            self.params,
            *inputs,
            in_axes=in_axes,
            path=path,
            embed_params=True,
            platforms=platforms,
            vjp_order=vjp_order,
        )

    def __str__(self) -> str:
        return self.cut.summary()


def prune(
    fn: Callable[..., Any],
    *args: Any,
    groups: Groups | None = None,
    cut: Cut | None = None,
    scores: Callable[..., Any] | Scores | None = None,
    sparsity: float | None = None,
    target: Target = "channels",
    grads: PyTree | None = None,
    activations: Any = None,
    ranking: Ranking = "global",
    min_channels: int = 1,
    round_to: RoundTo = 1,
    limits: Mapping[str, float] | None = None,
    check: bool = True,
) -> Pruned:
    """Cuts channels out of a trained model.

    Without ``scores`` those that are exactly zero go, as training with
    :func:`sdp_jax.altsdp` leaves them; with ``scores`` and ``sparsity`` those of lowest
    score, and no training is needed; with ``cut`` those that it names.

    On the given inputs the small function is run beside the dense one with these
    channels at zero, also in a state that goes in (:meth:`Cut.zero_inputs`): where they
    differ by more than rounding, nothing is returned.

    Args:
      fn: a function ``fn(params, *inputs)``, or a ``flax.nnx`` or Equinox module as it
        is (put it into evaluation mode first).
      *args: the parameters (not behind a module), then the inputs. Inputs are needed to
        find the groups, unless these are given, to check the result and to time it.
      groups: the channel dimensions, as :func:`sdp_jax.find_groups` finds them; by
        default they are found here.
      cut: what goes, decided already, as :func:`sdp_jax.plan_cut` does; then nothing
        else that decides may be given.
      scores: one of :mod:`sdp_jax.methods`, or any function ``score(groups, params,
        grads, activations)``; or its result: a number for each channel, or an array for
        each dimension name. The lowest goes first.
      sparsity: share of the target that goes, in [0, 1).
      target: ``"channels"``, ``"params"``, ``"bytes"``, ``"flops"`` or ``"latency"``
        (measured); see :func:`sdp_jax.plan_cut`.
      grads: gradients for scores that need them, shaped like the parameters, or like
        the part of them below one key (``variables["params"]``).
      activations: activations for scores that need them.
      ranking: ``"global"``, ``"dimension"`` or ``"isomorphic"``; see
        :func:`sdp_jax.plan_cut`.
      min_channels: channels that stay in each dimension.
      round_to: widths become multiples of this number where they can; ``"fast"`` for
        widths that are fast on the default device, ``"mesh"`` for widths that the
        devices of sharded parameters share equally.
      limits: largest share that may go, by pattern of the name of a dimension, or of
        the path of a leaf that makes its channels.
      check: whether to compare small and dense function on the inputs.

    Returns:
      A :class:`Pruned`, to be called as the model is.

    Raises:
      ValueError: if parameters, groups, scores or cut do not fit each other, a target
        cannot be met, values are missing (under ``jit``), or small and dense function
        differ: by how much, and in which output.
      TypeError: if ``fn`` is no function and no module that holds its arrays.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.array([[1., 0.], [2., 0.]]), "out": jnp.ones((2, 3))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> x = jnp.array([[0.1, 0.2]])
      >>> pruned = sdp_jax.prune(fn, params, x)
      >>> pruned.params["in"].shape
      (2, 1)
      >>> bool((pruned(x) == fn(params, x)).all())
      True
    """
    fn, params, inputs = take_apart(fn, args)
    for path, leaf in leaf_table(params).items():
        if is_static(leaf) and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"the parameters must be arrays, but leaf {path!r} is {leaf!r}: take "
                "the arrays out, as equinox.partition(model, equinox.is_array) does"
            )
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"prune needs the values of the parameters, but leaf {path!r} is "
                f"{leaf}: call it outside jit, on arrays. sdp_jax.plan_cut also takes "
                "shapes, if it gets scores"
            )
    if groups is not None:
        need_groups(groups)
    if cut is not None:
        if not isinstance(cut, Cut):
            raise TypeError(f"cut must be a Cut, as plan_cut makes it; got {cut!r}")
        decides = {"groups": groups, "scores": scores, "sparsity": sparsity}
        decides |= {"grads": grads, "activations": activations, "limits": limits}
        given = [name for name, value in decides.items() if value is not None]
        shapes = (target, ranking, min_channels, round_to)
        if shapes != ("channels", "global", 1, 1):
            given.append("target, ranking, min_channels or round_to")
        if given:
            raise ValueError(
                f"cut= says what goes; {given} decide it anew: give one or the other"
            )
    else:
        if groups is None:
            groups = find_groups(fn, params, *inputs)
        if callable(scores):
            found = _evaluate(scores, groups, params, grads, activations)
        elif grads is not None or activations is not None:
            raise ValueError(
                "grads and activations are for scores that are functions, as "
                "sdp_jax.methods.taylor(); these scores are none"
            )
        else:
            found = scores
        timed = {"fn": fn, "inputs": inputs} if target == "latency" else {}
        cut = plan_cut(
            groups,
            params,
            scores=found,
            sparsity=sparsity,
            target=target,
            ranking=ranking,
            min_channels=min_channels,
            round_to=round_to,
            limits=limits,
            **timed,
        )
    pruned = Pruned(fn, cut.take(params), cut)
    cut.check_small(pruned.params)
    if check and inputs:
        need_values(inputs, "prune (or give check=False)")
        _check(pruned, params, inputs)
    return pruned


def load(
    directory: str | os.PathLike[str],
    fn: Callable[..., Any],
    *inputs: Any,
    like: PyTree | None = None,
) -> Pruned:
    """Reads what :meth:`Pruned.save` wrote.

    Any number of processes may do so, each for itself; the parameters come to a device
    of the process, or where the arrays of ``like`` are.

    Args:
      directory: where it is.
      fn: the dense function, or the dense nnx or Equinox module, in the mode in which
        it was pruned (evaluation); its values do not matter.
      *inputs: arrays or shapes; with them the function is traced to see whether it is
        one of these parameters.
      like: a tree of arrays or shapes with the structure of the dense or small
        parameters. Needed if they are in other containers than dictionaries and lists,
        and the function is no module. Arrays come to lie where those of ``like`` do,
        on another mesh than before if it says so.

    Returns:
      The :class:`Pruned`.

    Raises:
      FileNotFoundError: if there is nothing, or not all of it.
      ValueError: if the files do not belong together, the function is another one, or
        the devices of ``like`` cannot share what stays of a leaf.
      ImportError: if orbax-checkpoint is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[1., 0.], [2., 0.]]), "v": jnp.ones((2, 1))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
      >>> pruned = sdp_jax.prune(fn, params, jnp.ones((1, 2)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pruned.save(folder + "/pruned")
      ...     again = sdp_jax.load(folder + "/pruned", fn)
      >>> bool((again(jnp.ones((3, 2))) == pruned(jnp.ones((3, 2)))).all())
      True
    """
    found = split_module(fn)
    if found is not None:
        fn, like = found[0], found[1] if like is None else like
    elif not callable(fn):
        take_apart(fn, ())
    params, cut = files.load(directory, like)
    pruned = Pruned(fn, params, cut)
    if inputs:
        try:
            jax.eval_shape(pruned.apply, params, *cut.take_inputs(*inputs))
        except Exception as error:
            raise ValueError(
                f"the function does not run on the parameters in {directory}: it is "
                f"another one than was pruned, or takes other inputs ({error})"
            ) from error
    return pruned


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A value by how it is written."""

    value: Any = dataclasses.field(compare=False)
    key: tuple[type, str] | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """A function by its identity, whether it can be hashed or not."""

    fn: Callable[..., Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.fn is other.fn

    def __hash__(self) -> int:
        return id(self.fn)


def _apply(
    fn: _Same, cut: Cut, treedef: Any, fixed: Any, params: Any, moving: Any
) -> Any:
    leaves = [a if f is None else f.value for a, f in zip(moving, fixed, strict=True)]
    inputs, keywords = jax.tree.unflatten(treedef, leaves)
    return narrow(fn.fn, cut)(params, *inputs, **keywords)


_call = jax.jit(_apply, static_argnums=(0, 1, 2, 3))


def _evaluate(
    score: Callable[..., Any],
    groups: Groups,
    params: PyTree,
    grads: PyTree | None,
    activations: Any,
) -> Any:
    """A score, with gradients of all parameters or of those below one key."""
    try:
        inspect.signature(score).bind(groups, params, grads, activations)
    except TypeError as error:
        raise TypeError(
            "scores must be a function score(groups, params, grads, activations), as "
            f"methods.taylor() is, or its result; got {score!r} ({error})"
        ) from error
    if grads is not None:
        grads = _laid_out(groups, params, grads)
    found = score(groups, params, grads, activations)
    if found is None:
        raise TypeError(f"the score {score!r} returned None; it must return numbers")
    return found


def _laid_out(groups: Groups, params: PyTree, grads: PyTree) -> PyTree:
    """Gradients in the structure of the parameters, zero where there are none."""
    have = {path: tuple(np.shape(leaf)) for path, leaf in leaf_table(grads).items()}
    needed = {m.path for d in groups for m in d.members if m.role != "state"}
    tops = {f"{path.partition('/')[0]}/" for path in groups.shapes if "/" in path}
    fitting = [
        top
        for top in ("", *sorted(tops))
        if needed <= {top + path for path in have}
        and all(groups.shapes.get(top + path) == shape for path, shape in have.items())
    ]
    if len(fitting) != 1:
        lacking = sorted(needed - have.keys())[:3]
        raise ValueError(
            "grads must be shaped like the parameters, or like the part of them below "
            f"one key, with a leaf for each member; got the leaves {list(have)[:5]}"
            + (f", without {lacking}" if lacking else "")
        )
    table = {fitting[0] + path: leaf for path, leaf in leaf_table(grads).items()}
    leaves = [
        table[path] if path in table else jnp.zeros(np.shape(leaf))
        for path, leaf in leaf_table(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _check(pruned: Pruned, params: PyTree, inputs: Sequence[Any]) -> None:
    """Compares small and dense function; rounding of the coarsest dtype is allowed."""
    cut = pruned.cut
    dense = pruned.fn, cut.zero(params), cut.zero_inputs(*inputs)
    small = pruned.apply, pruned.params, cut.take_inputs(*inputs)
    allowed = rounding(*small) ** 0.5
    for d in differences(dense, small, cut.take_output):
        if not d.size <= allowed * d.largest:
            raise ValueError(
                f"small and dense function differ by {d.size:.3g} in output {d.path!r} "
                f"at {d.index} of {d.shape}, whose largest entry is {d.largest:.3g}: "
                "the function draws random numbers of its own, reads what is not among "
                "its arguments, or is not the one that the groups were found on. With "
                "check=False the small function is returned all the same"
            )
