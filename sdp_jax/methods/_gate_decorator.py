"""Gate Decorator: gates behind normalisations, and pruning in ticks and tocks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.base import (
    add_step,
    as_base,
    check_kind,
    check_params,
    check_rule,
    need_params,
    step_to,
)
from sdp_jax.channels import (
    PerChannel,
    channel_products,
    producer_leaves,
    scale_channels,
)
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.methods.hosted import hosted
from sdp_jax.methods.network_slimming import scale_penalty
from sdp_jax.methods.score import Score, need_gradients
from sdp_jax.methods.scales import (
    DEFAULT_SCALES,
    check_scales,
    find_gates,
    find_scales,
    put_entries,
    replace_leaves,
    take_entries,
)
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree, leaf_table

Gates = dict[str, tuple[jax.Array, ...]]


class TickTockState(NamedTuple):
    """State of :func:`tick_tock`.

    Attributes:
      strength: state of the strength.
      count: number of updates so far, int32 scalar; it tells the phase.
      gone: which channels are removed.
      total: scores summed over the current tick; during a tock those of the last tick
        stay, in the first tock they are summed as in a tick.
      steps: over how many updates they are summed, int32 scalar.
    """

    strength: Any
    count: jax.Array
    gone: PerChannel
    total: PerChannel
    steps: jax.Array


def decorate(
    groups: Groups,
    params: PyTree,
    *,
    scales: Sequence[str] = DEFAULT_SCALES,
    limit: float = 10.0,
) -> tuple[PyTree, Gates]:
    """Puts a gate behind each scale, without changing the network.

    ``γ x̂ + β`` becomes ``φ (γ' x̂ + β')`` with ``φ = γ``, ``γ' = 1`` and ``β' = β / γ``
    clipped to ``[−limit, limit]``. What is clipped changes the function: a bias above
    ``limit |γ|`` shrinks to it, and where ``γ = 0`` to 0. A dimension has one gate for
    each of its scales (those of a residual stream have several); a dimension without
    a scale has one gate, 1, on all its producers.

    Args:
      groups: the channel dimensions.
      params: the parameters.
      scales: patterns for the last key of a scale's path: a vector among the producers
        that matches is a scale, and a vector beside it in the same module its bias.
      limit: bound on ``|β'|``.

    Returns:
      The decorated parameters, of the same structure, and the gates: for each dimension
      a tuple of vectors, in the order of its scales, each with one entry for each entry
      of the scale (usually ``(size,)``). :func:`apply_gates` puts them together again.

    Raises:
      ValueError: if the parameters do not fit the groups, or ``limit`` is not positive.
      TypeError: if an argument is of another kind.

    References:
      You, Yan, Ye, Ma, Wang, "Gate Decorator: Global Filter Pruning Method for
      Accelerating Deep Convolutional Neural Networks", NeurIPS 2019, arXiv 1909.08174,
      section 3; the bound 10 is that of its code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"scale": jnp.array([2., 4.]), "bias": jnp.array([1., 1.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("scale", 0), sdp_jax.Member("bias", 0)]})
      >>> decorated, gates = methods.decorate(groups, params)
      >>> print(gates["hidden"][0], decorated["scale"], decorated["bias"])
      [2. 4.] [1. 1.] [0.5  0.25]
    """
    check_kind(groups)
    check_number("limit", limit, low=1e-30, rule="a positive number")
    table = producer_leaves(groups, params)
    changed: dict[str, Any] = {}
    gates: Gates = {}
    places = find_gates(groups, scales)
    for d in groups:
        found = []
        for gate in places[d.name]:
            if gate.scale is None:
                dtype = jnp.finfo(table[gate.members[0].path].dtype).dtype
                found.append(jnp.ones((d.size,), dtype))
                continue
            # Where dimensions share a scale, the first has taken it out.
            leaf = changed.get(gate.scale.path, jnp.asarray(table[gate.scale.path]))
            gamma = take_entries(leaf, gate.scale, d.size)
            found.append(gamma.reshape(-1).astype(leaf.dtype))
            old = changed.get(gate.scale.path, leaf)
            changed[gate.scale.path] = put_entries(
                old, gate.scale, d.size, jnp.ones_like(gamma)
            )
            for m in gate.members[1:]:
                beta = take_entries(changed.get(m.path, table[m.path]), m, d.size)
                ratio = beta / jnp.where(gamma == 0, 1, gamma)
                ratio = jnp.where(gamma == 0, jnp.sign(beta) * limit, ratio)
                ratio = jnp.clip(ratio, -limit, limit)
                old = changed.get(m.path, jnp.asarray(table[m.path]))
                changed[m.path] = put_entries(old, m, d.size, ratio)
        gates[d.name] = tuple(found)
    return replace_leaves(params, changed), gates


def apply_gates(
    groups: Groups,
    params: PyTree,
    gates: Mapping[str, Sequence[jax.Array]],
    *,
    scales: Sequence[str] = DEFAULT_SCALES,
) -> PyTree:
    """The ordinary parameters of a decorated network, ``γ = φ γ'`` and ``β = φ β'``.

    It is differentiable in both arguments, so that gates can be trained:
    ``jax.grad(lambda p, g: loss(apply_gates(groups, p, g)), (0, 1))``. No gradient
    flows to ``γ'``, which the paper holds at 1.

    Args:
      groups: the channel dimensions.
      params: the decorated parameters.
      gates: the gates.
      scales: the patterns that :func:`decorate` was given.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: if the parameters or gates do not fit the groups.
      TypeError: if an argument is of another kind.

    References:
      You et al., arXiv 1909.08174, see :func:`decorate`.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"scale": jnp.array([2., 4.]), "bias": jnp.array([1., 1.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("scale", 0), sdp_jax.Member("bias", 0)]})
      >>> back = methods.apply_gates(groups, *methods.decorate(groups, params))
      >>> print(back["scale"], back["bias"])
      [2. 4.] [1. 1.]
    """
    check_kind(groups)
    found = find_gates(groups, scales)
    expected = {
        d.name: [
            (d.size if g.scale is None else g.scale.positions(d.size).size,)
            for g in found[d.name]
        ]
        for d in groups
    }
    shapes = {name: [jnp.shape(x) for x in value] for name, value in gates.items()}
    if shapes != expected:
        raise ValueError(
            "gates must have, for each dimension, vectors of the shapes "
            f"{expected}, as decorate makes them; got {shapes}"
        )
    factors = {d.name: jnp.ones((d.size,)) for d in groups}
    factors |= {
        name: gates[name][0] for name, them in found.items() if them[0].scale is None
    }
    params = scale_channels(groups, params, factors)
    table = leaf_table(params)
    for d in groups:
        for gate, factor in zip(found[d.name], gates[d.name], strict=True):
            for m in gate.members if gate.scale is not None else ():
                shape = m.positions(d.size).shape
                values = take_entries(table[m.path], m, d.size)
                if m == gate.scale:
                    values = jax.lax.stop_gradient(values)
                values = values * factor.reshape(shape)
                table[m.path] = put_entries(table[m.path], m, d.size, values)
    return replace_leaves(params, table)


def gate_taylor(*, scales: Sequence[str] = DEFAULT_SCALES) -> Score:
    """The change of the loss when a gate closes, ``Σ |∂L/∂φ · φ|`` over its gates.

    In the ordinary parameters a gate is ``|γ ∂L/∂γ + β ∂L/∂β|`` for a scale and its
    bias: no network need be decorated. For a dimension without a scale it is
    :func:`sdp_jax.methods.taylor`. Where only some branches of a residual stream have a
    scale, only these count. The gradient is that of a batch; the paper sums the score
    over the batches of a tick.

    Args:
      scales: patterns for the last key of a scale's path, see :func:`decorate`.

    Returns:
      A score; it needs gradients of the shapes of the parameters.

    Raises:
      TypeError: if ``scales`` is not a list or tuple of strings.

    References:
      You et al., arXiv 1909.08174, see :func:`decorate`; the sum over the gates of
      channels that shortcuts tie is that of its code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"scale": jnp.array([2., 4.]), "bias": jnp.array([1., 1.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("scale", 0), sdp_jax.Member("bias", 0)]})
      >>> grads = {"scale": jnp.array([1., -1.]), "bias": jnp.array([-2., 1.])}
      >>> print(methods.gate_taylor()(groups, params, grads)["hidden"])
      [0. 3.]
    """
    check_scales(scales)

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> dict[str, jax.Array]:
        del activations
        grads = need_gradients(grads, "gate_taylor")
        found = find_gates(groups, scales)
        values, slopes = producer_leaves(groups, params), producer_leaves(groups, grads)
        bare = tuple(d for d in groups if found[d.name][0].scale is None)
        others = dataclasses.replace(groups, dimensions=bare)
        products = channel_products(others, params, grads) if bare else {}
        out = {}
        for d in groups:
            if d in bare:
                out[d.name] = jnp.abs(products[d.name])
                continue
            total = 0
            for gate in found[d.name]:
                terms = [
                    jnp.real(
                        jnp.conj(take_entries(values[m.path], m, d.size))
                        * take_entries(slopes[m.path], m, d.size)
                    )
                    for m in gate.members
                ]
                change = jnp.abs(sum(terms[1:], terms[0]))
                total = total + jnp.sum(change, axis=(0, 2))
            out[d.name] = jnp.asarray(total)
        return out

    return score


def tick_tock(
    groups: Groups,
    strength: StrengthLike,
    *,
    tick_steps: int,
    tock_steps: int,
    ticks: int = 10,
    until: int | None = None,
    scales: Sequence[str] = DEFAULT_SCALES,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Prunes at the end of short phases in which only gates learn.

    It begins with a *tock* of ``tock_steps`` updates, in which all is trained, then
    come ``ticks`` *ticks* of ``tick_steps`` updates each, then a tock, and so on. In a
    tick filters are frozen: the producers that are no gates, and those that are no
    vectors. :func:`gate_taylor` is summed over it, and at its end the channels of
    lowest mean score go, as many as ``strength`` says, and stay zero. What a base with
    momentum gathers for frozen filters it spends in the next tock.

    The strength is asked at each update, and channels go at the end of ticks only: let
    its ramp end with the last update of a tick, for example at update ``tock_steps +
    ticks · tick_steps`` or a multiple of it. Between ticks it ranks by the scores of
    the last tick, before the first one by the mean score so far. The paper removes the
    same share of the living channels at each tick.

    Args:
      groups: the channel dimensions.
      strength: how much goes when, for example ``sdp_jax.target_sparsity(0.5, 1000,
        5000, target="flops", power=1, …)``; a number or a schedule is the score below
        which channels go. The paper removes 0.5 % of the living filters at a tick for
        VGG-16 and 0.2 % for ResNet-56.
      tick_steps: updates of a tick; one epoch in the paper.
      tock_steps: updates of a tock, 0 for none; ten epochs in the paper.
      ticks: ticks from one tock to the next; 10 in the paper.
      until: number of updates after which there are no more ticks, so that what is left
        is trained as a whole; ``None`` for no such end.
      scales: patterns for the last key of a scale's path, see :func:`decorate`.
      min_channels: channels that stay in each dimension; a number, or one for each name. The
        paper's code keeps a tenth of each.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``
      and ``gradients=`` (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if a number of steps is too small, or strength or floor does not fit
        the groups.
      TypeError: if an argument is of another kind.

    References:
      You et al., arXiv 1909.08174, section 3 (Tick-Tock), see :func:`decorate`. Its
      learning rate is 1e-3 in ticks and rises to 1e-2 and falls again in each tock.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((1, 2)), "scale": jnp.array([2., 4.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("w", 1), sdp_jax.Member("scale", 0)]})
      >>> host = methods.tick_tock(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 2), tick_steps=1, tock_steps=1)
      >>> tx = methods.hosted(optax.sgd(0.5), host)
      >>> state, grads = tx.init(params), {"w": jnp.ones((1, 2)), "scale": jnp.ones(2)}
      >>> for _ in range(2):  # A tock and a tick.
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"], params["scale"])
      [[0.5 0.5]] [1.5 3.5]
      [[0.  0.5]] [0. 3.]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    phase = _phases(tick_steps, tock_steps, ticks, until)
    last = _last_tick(tick_steps, tock_steps, ticks, until)
    score = gate_taylor(scales=scales)
    filters = _filters(groups, scales)

    def init_fn(params: optax.Params) -> TickTockState:
        check_params(groups, params)
        size = (groups.num_channels,)
        return TickTockState(
            rule.init(groups, floors),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros(size, bool)),
            PerChannel(jnp.zeros(size, jnp.float32)),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        gradients: optax.Updates | None = None,
        released: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TickTockState]:
        del extra_args
        params = need_params(params, updates, "tick_tock")
        gone = state.gone.per_channel
        if released is not None:
            # Behind the last tick nothing would take it out again.
            gone = gone & ~(released & (state.count <= last))
        tick, begins, ends = phase(state.count)
        found = score(groups, params, gradients).astype(jnp.float32)
        # One bad batch must not spoil the sum.
        found = jnp.where(jnp.isfinite(found), found, 0)
        counts = tick | (state.count < tock_steps)
        total = jnp.where(begins, 0, state.total.per_channel)
        total = jnp.where(counts, total + found, total)
        steps = jnp.where(begins, 0, state.steps) + counts.astype(jnp.int32)
        # What is gone comes first, so that it counts towards the target.
        ranked = jnp.where(gone, -1, total / jnp.maximum(steps, 1))
        thresholds, strength_state = rule.update(state.strength, ranked, floors)
        gone = gone | (ends & (ranked < thresholds))
        frozen = {
            path: jnp.where(tick, jnp.zeros_like(leaf), leaf)
            for path, leaf in leaf_table(updates).items()
            if path in filters
        }
        candidate = add_step(params, replace_leaves(updates, frozen))
        factor = jnp.where(gone, 0.0, 1.0)
        point = scale_channels(groups, candidate, factor)
        new_state = TickTockState(
            strength_state,
            jnp.asarray(optax.safe_increment(state.count)),
            PerChannel(gone),
            PerChannel(total),
            steps,
        )
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def gate_decorator(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    strength: StrengthLike,
    *,
    tick_steps: int,
    tock_steps: int,
    ticks: int = 10,
    until: int | None = None,
    penalty: optax.ScalarOrSchedule = 1e-3,
    momentum: chex.Numeric | None = None,
    scales: Sequence[str] = DEFAULT_SCALES,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """The whole Gate Decorator: :func:`tick_tock`, and a penalty on gates in tocks.

    In tocks :func:`sdp_jax.methods.scale_penalty` adds ``λ sign(γ)`` to the gradients
    of scales, in ticks and after ``until`` it does not; scores are taken of the loss
    without it. Gates are read off the ordinary scales and biases, so that the network
    and its parameters stay as they are. The steps are then those of ``γ`` and ``β``,
    each on its own, where the paper trains ``φ`` and ``β'``, and ``β = φ β'`` follows
    its gate; a loss over :func:`apply_gates` has the paper's variables.

    Args:
      base: the optimizer: a learning rate, a schedule of it, or an Optax
        transformation.
      groups: the channel dimensions.
      strength: how much goes when, see :func:`tick_tock`.
      tick_steps: updates of a tick; one epoch in the paper.
      tock_steps: updates of a tock, 0 for none; ten epochs in the paper.
      ticks: ticks from one tock to the next; 10 in the paper.
      until: number of updates after which there are no more ticks and no penalty.
      penalty: ``λ`` or a schedule of it; 1e-3 in the paper. Dimensions without a scale
        are not penalised.
      momentum: momentum of the SGD, where ``base`` is a learning rate; 0.9 in the
        paper.
      scales: patterns for the last key of a scale's path, see :func:`decorate`.
      min_channels: channels that stay in each dimension; a number, or one for each name.

    Returns:
      An Optax transformation (:func:`sdp_jax.methods.hosted`); its ``update`` needs
      ``params``.

    Raises:
      ValueError: if an argument is out of range or does not fit the groups.
      TypeError: if an argument is of another kind.

    References:
      You, Yan, Ye, Ma, Wang, "Gate Decorator: Global Filter Pruning Method for
      Accelerating Deep Convolutional Neural Networks", NeurIPS 2019, arXiv 1909.08174.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((1, 2)), "scale": jnp.array([2., 4.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("w", 1), sdp_jax.Member("scale", 0)]})
      >>> tx = methods.gate_decorator(
      ...     0.5, groups, 0.0, tick_steps=1, tock_steps=1, penalty=0.5)
      >>> state, grads = tx.init(params), {"w": jnp.ones((1, 2)), "scale": jnp.ones(2)}
      >>> for _ in range(2):  # A tock and a tick.
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates["w"], updates["scale"])
      [[-0.5 -0.5]] [-0.75 -0.75]
      [[0. 0.]] [-0.5 -0.5]
    """
    host = tick_tock(
        groups,
        strength,
        tick_steps=tick_steps,
        tock_steps=tock_steps,
        ticks=ticks,
        until=until,
        scales=scales,
        min_channels=min_channels,
    )
    optimizer = as_base(base, momentum)
    if not callable(penalty):
        check_number(
            "penalty", penalty, low=0, rule="a non-negative number or a schedule"
        )
    phase = _phases(tick_steps, tock_steps, ticks, until)

    def in_tocks(count: Any) -> Any:
        rate: Any = penalty(count) if callable(penalty) else penalty
        off = phase(count)[0] if until is None else phase(count)[0] | (count >= until)
        return jnp.where(off, 0, rate)

    if any(find_scales(groups, scales).values()):
        # It counts updates as the host does, and so agrees with it on the phase.
        optimizer = optax.chain(
            scale_penalty(groups, in_tocks, scales=scales), optimizer
        )
    return hosted(optimizer, host)


def _phases(tick_steps: Any, tock_steps: Any, ticks: Any, until: Any) -> Any:
    """Which phase an update is in, by the number of updates before it.

    Returns:
      A function of the count: whether it is in a tick, the first of one, the last.
    """
    numbers = {
        "tick_steps": (tick_steps, 1),
        "tock_steps": (tock_steps, 0),
        "ticks": (ticks, 1),
        "until": (0 if until is None else until, 0),
    }
    for name, (value, low) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer number; got {value!r}")
        if not low <= value < 2**31:
            raise ValueError(f"{name} must be at least {low}; got {value!r}")
    period = int(tock_steps) + int(ticks) * int(tick_steps)
    if period >= 2**31:
        raise ValueError(
            f"a tock and its ticks take {period} updates together; they must take "
            "fewer than 2**31"
        )

    def phase(count: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        place = jnp.asarray(count) % period - tock_steps
        tick = place >= 0
        if until is not None:
            tick = tick & (count < until)
        step = place % tick_steps
        return tick, tick & (step == 0), tick & (step == tick_steps - 1)

    return phase


def _last_tick(tick_steps: int, tock_steps: int, ticks: int, until: int | None) -> int:
    """The number of updates before the one that ends the last tick, or no limit."""
    if until is None:
        return 2**31 - 1
    period = tock_steps + ticks * tick_steps
    for start in (until // period * period, (until // period - 1) * period):
        done = min((until - start - tock_steps) // tick_steps, ticks)
        if done > 0 and start >= 0:
            return start + tock_steps + done * tick_steps - 1
    return 0


def _filters(groups: Groups, scales: Sequence[str]) -> frozenset[str]:
    """Paths of what is frozen in a tick: producers that are no vectors or no gates."""
    gates = {
        m.path
        for found in find_gates(groups, scales).values()
        for gate in found
        for m in gate.members
        if gate.scale is not None or len(groups.shapes[m.path]) == 1
    }
    return frozenset(m.path for d in groups for m in d.producers) - gates
