"""channel_activations: what the channels of any function put out, on data."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.activations import (
    ChannelActivations,
    Moments,
    Reading,
    merge_moments,
    scatter,
)
from sdp_jax.groups import Groups, need_groups
from sdp_jax.modules import take_apart
from sdp_jax.tracing.analyse import analyse_with, check_leaves
from sdp_jax.tracing.readings import Place, find_places
from sdp_jax.tracing.static import is_static, separate, written
from sdp_jax.tracing.watch import Seen, Watcher
from sdp_jax.tree import PyTree, leaf_table


def channel_activations(
    groups: Groups,
    fn: Callable[..., Any],
    *args: Any,
    per_example: bool = False,
    gradients: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ChannelActivations:
    """Statistics of the activations of each channel, where the function reads them.

    It evaluates the trace of ``fn`` on calibration data. A channel is read where it is
    summed over with weights: behind norms, activation functions and residual
    connections, as the next layer sees it. Channels that no weights read (those of
    queries and keys) are taken where they are alive for the last time. Everything
    else, batch, pixels, tokens, is averaged over. No names and no hooks are needed:
    loops, ``remat``, ``jit``, branches and custom derivatives are followed inside.
    Layers that a loop goes through, each with its own slice of the weights, have
    statistics of their own; what else a loop reads is averaged over its steps.

    Means and variances are computed on the devices, in float32 or wider, under ``jit``
    and with shardings as they are, and joined over batches on the host, in float64.

    Args:
      groups: the channel dimensions of ``fn``.
      fn: any function of the parameters, as :func:`sdp_jax.find_groups` takes it: a
        model, a loss, a ``flax.nnx`` or Equinox module.
      *args: the parameters (not behind a module), then the batches: an iterable, also
        one that ends only once, of the inputs behind the parameters, a tuple of them
        or the only one. Sizes of batches may differ.
      per_example: whether to keep the statistics of each example, too. The inputs then
        have the examples along their first axes, and ``fn`` is evaluated for each of
        them as a batch of one.
      gradients: whether to compute, for each channel, the derivative of the loss with
        respect to a factor of its activations, as :func:`methods.activation_taylor`
        needs it. ``fn`` then returns a loss, a scalar.
      progress: called as ``progress(done)`` with the number of batches behind it.

    Returns:
      What was seen: for each place its statistics, and those of each channel over all
      places, ``.moments``, vectors ``(num_channels,)``.

    Raises:
      TypeError: if ``groups`` are none, or ``fn`` is no function or module.
      ValueError: if parameters or function are not those of the groups, a dimension is
        read nowhere or where nothing can be computed, there is no batch, the
        function cannot take one, or what it puts out is not finite.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.array([[1., 2.]]), "out": jnp.ones((2, 3))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> batches = [jnp.array([[0.], [1.]]), jnp.array([[-1.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(groups, fn, params, batches)
      >>> print(found.moments.mean_abs.round(3))  # 2 tanh(1) / 3, 2 tanh(2) / 3
      [0.508 0.643]
    """
    need_groups(groups)
    fn, params, rest = take_apart(fn, args)
    if len(rest) != 1 or hasattr(rest[0], "shape") or not isinstance(rest[0], Iterable):
        raise ValueError(
            "expected one iterable of batches behind the parameters, for example "
            f"[x] or [(x, labels)]; got {len(rest)} arguments of the types "
            f"{[type(x).__name__ for x in rest]}"
        )
    check_leaves(groups, params)
    total = _Total(groups, per_example, gradients)
    steps: dict[Any, _Step] = {}
    waiting: tuple[int, _Step, Any] | None = None
    number = 0
    for number, batch in enumerate(rest[0], start=1):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        step = _step_for(steps, groups, fn, params, inputs, number, total)
        moving, _ = separate((inputs, {}))
        outcome = step.function(jax.tree.leaves(params), moving)
        if waiting is not None:  # The device goes on in the meantime.
            total.add(*waiting)
        waiting = (number, step, outcome)
        if progress is not None:
            progress(number)
    if waiting is None:
        raise ValueError("there is no batch: channel_activations needs one at least")
    total.add(*waiting)
    return total.result(number)


class _Step(NamedTuple):
    """What is computed for batches of one shape."""

    places: list[Place]
    function: Callable[..., tuple[dict[int, Seen], Any]]


def _step_for(
    steps: dict[Any, _Step],
    groups: Groups,
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    number: int,
    total: "_Total",
) -> _Step:
    """The step for a batch, traced once for all of its shape."""
    leaves, treedef = jax.tree.flatten(inputs)
    parts = [written(x) if is_static(x) else jax.typeof(x) for x in leaves]
    key = None if None in parts else (treedef, tuple(parts))
    if key is not None and key in steps:
        return steps[key]
    shapes = [np.shape(x) for x in leaves if not is_static(x)]
    if total.per_example and (
        not shapes or len({n[:1] for n in shapes}) > 1 or not shapes[0]
    ):
        raise ValueError(
            "per_example needs inputs with the examples along their first axes, as "
            f"many in each; batch {number} has arrays of the shapes {shapes}"
        )
    try:
        step = _make_step(groups, fn, params, inputs, total)
    except _Unfit:
        raise
    except Exception as error:
        raise ValueError(
            f"the function cannot be evaluated on batch {number}, whose arrays have "
            f"the shapes {shapes}: {error}. Give batches of the inputs behind the "
            "parameters, as the groups were found with, (x, labels) for several"
        ) from error
    first = next(iter(steps.values()), step)
    if len(first.places) != len(step.places) or not all(
        np.array_equal(a.channels, b.channels)
        for a, b in zip(first.places, step.places, strict=True)
    ):
        raise ValueError(
            f"with batch {number}, whose arrays have the shapes {shapes}, the function "
            "reads its channels in other places than with the batches before: give "
            "batches that differ in the number of examples alone"
        )
    steps[key if key is not None else len(steps)] = step
    return step


class _Unfit(ValueError):
    """What is wrong with function and groups, whatever the batch."""


def _make_step(
    groups: Groups,
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    total: "_Total",
) -> _Step:
    traced = inputs
    if total.per_example:
        traced = jax.tree.map(lambda x: x if is_static(x) else _one(x), inputs)
    found = analyse_with(groups, fn, params, traced, {}, derivatives=False)
    try:
        places = find_places(found, groups, list(leaf_table(params)))
    except ValueError as error:
        raise _Unfit(*error.args) from None
    outs = found.body.jaxpr.outvars
    if total.gradients and (len(outs) != 1 or outs[0].aval.shape != ()):
        shapes = [getattr(v.aval, "shape", ()) for v in outs]
        raise _Unfit(
            "gradients=True needs a function that returns a loss, one scalar; this one "
            f"returns arrays of the shapes {shapes}"
        )
    watcher = Watcher(found, places)

    def one(leaves: Sequence[Any], moving: Sequence[Any]) -> Any:
        args = [*leaves, *moving]
        if not total.gradients:
            return watcher(args)[1], {}

        def loss(gates: Mapping[int, jax.Array]) -> Any:
            outs, seen = watcher(args, gates)
            return outs[0], seen

        slopes, seen = jax.grad(loss, has_aux=True)(watcher.gates())
        return seen, slopes

    def every(leaves: Sequence[Any], moving: Sequence[Any]) -> Any:
        lines = [jnp.expand_dims(x, 1) for x in moving]
        seen, slopes = jax.vmap(one, in_axes=(None, 0))(leaves, lines)
        # The weights are the same for all examples; zero where a branch was not taken.
        for n, s in seen.items():
            weights = jax.tree.map(lambda w: jnp.max(w, axis=0), s.weights)
            seen[n] = s._replace(weights=weights)
        return seen, slopes

    return _Step(places, jax.jit(every if total.per_example else one))


def _one(x: Any) -> jax.ShapeDtypeStruct:
    """A batch of one example."""
    return jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype)


class _Total:
    """What was seen in all batches so far, on the host."""

    def __init__(self, groups: Groups, per_example: bool, gradients: bool) -> None:
        self.per_example, self.gradients = per_example, gradients
        self._groups = groups
        self._readings: list[Reading] = []
        self._examples: dict[int, list[Moments]] = {}
        self._slopes = np.zeros(groups.num_channels)
        self._times = 0

    def add(self, number: int, step: _Step, outcome: Any) -> None:
        """Adds a batch."""
        seen, slopes = jax.device_get(outcome)
        readings = []
        for n, place in enumerate(step.places):
            moments = _on_host(seen[n].moments, place.channels.shape[:-1])
            self._check(number, place, moments)
            if self.per_example:
                self._examples.setdefault(n, []).append(moments)
                moments = _joined(moments)
            weights = jax.tree.map(lambda w: np.asarray(w, np.float64), seen[n].weights)
            reading = Reading(
                place.text, place.channels, moments, weights, place.kernel
            )
            readings.append(reading)
        if slopes:
            sums = sum(
                scatter(
                    self._groups.num_channels,
                    place.channels[(0,) * len(place.loops)],
                    np.asarray(slopes[n], np.float64),
                )
                for n, place in enumerate(step.places)
            )
            lines = np.abs(sums).reshape(-1, self._groups.num_channels)
            self._slopes, self._times = (
                self._slopes + lines.sum(axis=0),
                self._times + len(lines),
            )
        if self._readings:
            readings = list(map(_merged, self._readings, readings))
        self._readings = readings

    def _check(self, number: int, place: Place, moments: Moments) -> None:
        """Refuses what is not finite."""
        good = np.isfinite(moments.mean) & np.isfinite(moments.mean_square)
        good = good.reshape(-1, *place.channels.shape[:-1]).all(axis=0)
        if good.all():
            return
        channels = place.channels[~good]
        names = self._groups.owner[channels[channels >= 0]]
        first = names[0] if len(names) else self._groups.owner[place.channels.max()]
        raise ValueError(
            f"batch {number}: the activations of dimension "
            f"{self._groups.dimensions[int(first)].name!r} are not finite where "
            f"{place.text} reads them, at {int((~good).sum())} of {good.size} "
            "positions. Look for NaN in the batch, or in the parameters"
        )

    def result(self, batches: int) -> ChannelActivations:
        """What was seen in all batches."""
        slopes = self._slopes / max(self._times, 1) if self.gradients else None
        readings = [
            dataclasses.replace(reading, examples=_concatenated(self._examples.get(n)))
            for n, reading in enumerate(self._readings)
        ]
        found = ChannelActivations(self._groups, tuple(readings), batches, slopes)
        never = found.moments.count == 0
        if never.any():
            name = self._groups.dimensions[self._groups.owner[never.argmax()]].name
            raise ValueError(
                f"no batch has reached what reads dimension {name!r}: a branch, or a "
                "loop, that was never entered. Give other batches, or "
                f"groups.without({name!r})"
            )
        return found


def _on_host(moments: Moments, shape: tuple[int, ...]) -> Moments:
    """The statistics in float64 or wider, with the number behind each of them."""
    wide = [np.asarray(x, np.result_type(x.dtype, np.float64)) for x in moments]
    count = wide[0].reshape(wide[0].shape + (1,) * (wide[1].ndim - wide[0].ndim))
    return Moments(np.broadcast_to(count, wide[1].shape), *wide[1:])


def _joined(m: Moments) -> Moments:
    """The statistics over a first axis of examples."""
    count = m.count.sum(axis=0)
    many = count + (count == 0)
    mean, mean_abs = ((m.count * x).sum(axis=0) / many for x in (m.mean, m.mean_abs))
    spread = m.variance + np.abs(m.mean - mean) ** 2
    variance = (m.count * spread).sum(axis=0) / many
    return Moments(count, mean, mean_abs, variance + np.abs(mean) ** 2, variance)


def _concatenated(parts: list[Moments] | None) -> Moments | None:
    """The statistics of all examples."""
    if parts is None:
        return None
    return Moments(*map(np.concatenate, zip(*parts, strict=True)))


def _merged(first: Reading, second: Reading) -> Reading:
    """A place in the batches before and in another one."""
    # Zero where no batch has come.
    return dataclasses.replace(
        first,
        moments=merge_moments(first.moments, second.moments),
        weights=jax.tree.map(np.maximum, first.weights, second.weights),
    )
