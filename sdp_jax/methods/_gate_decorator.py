"""Gate Decorator: gates behind normalisations, and pruning in ticks and tocks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import add_step, check_kind, check_rule
from sdp_jax.channels import (
    PerChannel,
    channel_products,
    producer_leaves,
)
from sdp_jax.checks import check_number, check_whole
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.methods._hosted import HostStep, channel_host, no_channels
from sdp_jax.methods.scales import (
    DEFAULT_SCALES,
    check_scales,
    find_gates,
    put_entries,
    take_entries,
)
from sdp_jax.methods.score import Score, of_gradients
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree, leaf_table, replace_leaves

Gates = dict[str, tuple[jax.Array, ...]]


class GateDecoratorState(NamedTuple):
    """State of :func:`gate_decorator`.

    Attributes:
      strength: state of the strength.
      gone: which channels are removed.
      total: scores summed over the current tick; during a tock those of the last tick
        stay, in the first tock they are summed as in a tick.
      steps: over how many updates they are summed, int32 scalar.
    """

    strength: Any
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
    params = scale_channels(groups, params, groups.join(factors))
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
      >>> print(methods.gate_taylor()(groups, params, grads))
      [0. 3.]
    """
    check_scales(scales)

    def score(groups: Groups, params: PyTree, grads: PyTree) -> jax.Array:
        found = find_gates(groups, scales)
        values, slopes = producer_leaves(groups, params), producer_leaves(groups, grads)
        bare = tuple(d for d in groups if found[d.name][0].scale is None)
        others = groups.without(*(d.name for d in groups if d not in bare))
        products = others.split(channel_products(others, params, grads))
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
        return groups.join(out)

    return of_gradients("gate_taylor", score)


def gate_decorator(
    groups: Groups,
    strength: StrengthLike,
    *,
    tick_steps: int,
    tock_steps: int,
    ticks: int = 10,
    end_step: int | None = None,
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

    In tocks the paper penalises gates, which is the matter of the base; scores are
    taken of the loss without it::

        period = tock_steps + ticks * tick_steps
        penalty = lambda n: jnp.where(n % period < tock_steps, 1e-3, 0.0)
        base = optax.chain(methods.scale_penalty(groups, penalty), optax.sgd(…))
        tx = methods.hosted(base, methods.gate_decorator(groups, …))

    Gates are read off the ordinary scales and biases, so that the network and its
    parameters stay as they are. The steps are then those of ``γ`` and ``β``, each on
    its own, where the paper trains ``φ`` and ``β'``, and ``β = φ β'`` follows its gate;
    a loss over :func:`apply_gates` has the paper's variables.

    Args:
      groups: the channel dimensions.
      strength: how much goes when, for example ``sdp_jax.target_sparsity(0.5, 1000,
        5000, target="flops", power=1)``; a number or a schedule is the score below
        which channels go. The paper removes 0.5 % of the living filters at a tick for
        VGG-16 and 0.2 % for ResNet-56.
      tick_steps: updates of a tick; one epoch in the paper.
      tock_steps: updates of a tock, 0 for none; ten epochs in the paper.
      ticks: ticks from one tock to the next; 10 in the paper.
      end_step: number of updates after which there are no more ticks, so that what is
        left is trained as a whole; ``None`` for no such end.
      scales: patterns for the last key of a scale's path, see :func:`decorate`.
      min_channels: channels that stay in each dimension; a number, or one for each
        name. The paper's code keeps a tenth of each.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``
      and ``gradients=`` (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if a number of steps is too small, or strength or minimum does not fit
        the groups.
      TypeError: if an argument is of another kind.

    References:
      You, Yan, Ye, Ma, Wang, "Gate Decorator: Global Filter Pruning Method for
      Accelerating Deep Convolutional Neural Networks", NeurIPS 2019, arXiv 1909.08174,
      section 3 (Tick-Tock). Its learning rate is 1e-3 in ticks and rises to 1e-2 and
      falls again in each tock.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((1, 2)), "scale": jnp.array([2., 4.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("w", 1), sdp_jax.Member("scale", 0)]})
      >>> host = methods.gate_decorator(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 2), tick_steps=1, tock_steps=1)
      >>> tx = methods.hosted(0.5, host)
      >>> state, grads = tx.init(params), {"w": jnp.ones((1, 2)), "scale": jnp.ones(2)}
      >>> for _ in range(2):  # A tock and a tick.
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"], params["scale"])
      [[0.5 0.5]] [1.5 3.5]
      [[0.  0.5]] [0. 3.]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    check_whole("tick_steps", tick_steps, low=1)
    check_whole("tock_steps", tock_steps)
    check_whole("ticks", ticks, low=1, of="ticks")
    if end_step is not None:
        check_whole("end_step", end_step)
    period = int(tock_steps) + int(ticks) * int(tick_steps)
    if period >= 2**31:
        raise ValueError(
            f"a tock and its ticks take {period} updates together; they must take "
            "fewer than 2**31"
        )
    last = _last_tick(tick_steps, tock_steps, ticks, end_step)
    score = gate_taylor(scales=scales)
    filters = _filters(groups, scales)

    def init(groups: Groups) -> GateDecoratorState:
        return GateDecoratorState(
            rule.init(groups, floors),
            no_channels(groups),
            PerChannel(jnp.zeros((groups.num_channels,), jnp.float32)),
            jnp.zeros((), jnp.int32),
        )

    def decide(step: HostStep) -> tuple[jax.Array, GateDecoratorState, PyTree]:
        state: GateDecoratorState = step.inner
        before = step.count - 1
        place = before % period - tock_steps
        tick = place >= 0
        if end_step is not None:
            tick &= before < end_step
        begins = tick & (place % tick_steps == 0)
        ends = tick & (place % tick_steps == tick_steps - 1)
        # Behind the last tick nothing would take out again what is released.
        gone = state.gone.per_channel & ~(step.released & (before <= last))
        found = score(groups, step.living.params, step.living.gradients).astype(
            jnp.float32
        )
        # One bad batch must not spoil the sum.
        found = jnp.where(jnp.isfinite(found), found, 0)
        counts = tick | (before < tock_steps)
        total = jnp.where(begins, 0, state.total.per_channel)
        total = jnp.where(counts, total + found, total)
        steps = jnp.where(begins, 0, state.steps) + counts.astype(jnp.int32)
        # What is gone comes first, so that it counts towards the target.
        ranked = jnp.where(gone, -1, total / jnp.maximum(steps, 1))
        thresholds, strength_state = rule.update(state.strength, ranked, groups, floors)
        gone |= ends & (ranked < thresholds)
        frozen = {
            path: jnp.where(tick, jnp.zeros_like(leaf), leaf)
            for path, leaf in leaf_table(step.updates).items()
            if path in filters
        }
        new_state = GateDecoratorState(
            strength_state, PerChannel(gone), PerChannel(total), steps
        )
        candidate = add_step(step.params, replace_leaves(step.updates, frozen))
        return jnp.where(gone, 0.0, 1.0), new_state, candidate

    return channel_host(groups, init, decide, name="gate_decorator")


def _last_tick(
    tick_steps: int, tock_steps: int, ticks: int, end_step: int | None
) -> int:
    """The number of updates before the one that ends the last tick, or no limit."""
    if end_step is None:
        return 2**31 - 1
    period = tock_steps + ticks * tick_steps
    for start in (end_step // period * period, (end_step // period - 1) * period):
        done = min((end_step - start - tock_steps) // tick_steps, ticks)
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
