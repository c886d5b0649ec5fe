"""The Optax pieces that :func:`sdp_jax.altsdp` is a chain of.

Every piece passes updates on, as Optax transformations do: what arrives is a step from
the parameters, what leaves is a step from the parameters. Inside :func:`sdp_jax.altsdp`
the pieces pass the point itself, ``params + step``, to each other (``candidates``): XLA
on the CPU would otherwise store ``v' - params`` only to add ``params`` back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.base import (
    add_step,
    check_inexact,
    check_params,
    check_rule,
    step_to,
    transformation,
    wide_copy,
)
from sdp_jax.channels import (
    PerChannel,
    Term,
    Weighting,
    channel_sums,
    nonzero,
    square,
    weighted_norms,
)
from sdp_jax.entries import gone_lines
from sdp_jax.factors import remove_channels, shrink_channels
from sdp_jax.groups import Groups
from sdp_jax.strength import Strength, StrengthLike, as_strength
from sdp_jax.tree import PyTree, leaf_keys


class DualAveragingState(NamedTuple):
    """The dual variable ``v``, shaped like the parameters, at least float32."""

    dual: optax.Params


class GroupSoftThresholdState(NamedTuple):
    """State of :func:`group_soft_threshold`, and what :func:`check_zeros` asks for."""

    strength: Any
    alive: PerChannel  # What the last update did not set to zero.
    intact: jax.Array  # False once zeros were found changed at the next update.


class SoftThresholdState(NamedTuple):
    """State of the strength."""

    strength: Any


def dual_averaging() -> optax.GradientTransformationExtraArgs:
    """Accumulates the incoming steps in a dual variable instead of in the parameters.

    Keeps ``v``, which starts at the parameters, adds each incoming step to it and
    emits ``v' - params``. The gradient is still taken at the parameters, which a
    later piece of the chain (the threshold) makes sparse, while ``v`` remembers what
    was cut off. Alone it changes nothing: ``chain(base, dual_averaging())`` takes the
    steps of ``base``.

    Returns:
      A transformation; its ``update`` needs ``params``. The dual variable and what is
      emitted have the dtype of the parameters, but at least float32.

    Raises:
      ValueError: in ``update``, if ``params`` is missing.
      TypeError: in ``init``, if a leaf is not floating-point or complex.

    References:
      Xiao, "Dual Averaging Methods for Regularized Stochastic Learning and Online
      Optimization", JMLR 2010; as in gRDA, arXiv 2006.09358.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> tx = optax.chain(optax.sgd(0.5), sdp_jax.dual_averaging())
      >>> params = jnp.array([1., 2.])
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.5 1.5]
    """
    return averaging(candidates=False)


def averaging(*, candidates: bool) -> optax.GradientTransformationExtraArgs:
    """:func:`dual_averaging`, which may emit ``v'`` itself."""

    def init(params: optax.Params) -> DualAveragingState:
        check_inexact(params)
        return DualAveragingState(jax.tree.map(wide_copy, params))

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        dual = jax.tree.map(lambda v, u: v + u.astype(v.dtype), state.dual, updates)
        return emit(dual, params, candidates), DualAveragingState(dual)

    return transformation("dual_averaging", init, update)


def group_soft_threshold(
    groups: Groups,
    strength: StrengthLike,
    *,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
    weights: Weighting | Mapping[str, float] = "plain",
) -> optax.GradientTransformationExtraArgs:
    """Moves to the proximal point of the candidate ``params + updates``.

    Each channel ``v_c`` becomes ``max(0, 1 - t k_c / ‖v_c‖) v_c``, with the threshold
    ``t`` of ``strength`` and the weight ``k_c`` of ``weights``; parameters outside the
    groups stay at the candidate. A channel that falls below is exactly zero after
    ``optax.apply_updates``. At least ``min_channels`` of each dimension survive. By a
    target ``t`` is 0 or infinite: channels go, and the others take the step that
    arrived, bit for bit.

    It must be the last piece of a chain: anything behind it that rescales or adds to
    its updates (a learning rate, weight decay, clipping, ``optax.lookahead``) destroys
    the zeros. :func:`check_zeros` finds out.

    Not-a-number or infinite gradients pass into the parameters as they do in
    ``optax.sgd``; wrap the whole chain in ``optax.apply_if_finite`` to skip them.

    Args:
      groups: the channel dimensions.
      strength: a :class:`sdp_jax.Strength`, a constant threshold or a schedule, in
        parameter units.
      min_channels: channels that survive in each dimension; a number, or one for each
        name.
      weights: weighting of the channel norms, see :func:`sdp_jax.channel_weights`.

    Returns:
      A transformation; its ``update`` needs ``params`` and emits their dtype.

    Raises:
      ValueError: if ``strength``, ``min_channels`` or ``weights`` does not fit the
        groups, or in ``init`` and ``update`` if the parameters do not.

    References:
      Yuan and Lin, "Model selection and estimation in regression with grouped
      variables", JRSS B 2006 (the group lasso and its proximal map).

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = sdp_jax.group_soft_threshold(groups, 2.5)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[1.5 0. ]
       [2.  0. ]]
    """
    return group_threshold(groups, strength, min_channels, weights, candidates=False)


def group_threshold(
    groups: Groups,
    strength: StrengthLike,
    min_channels: int | jax.Array | Mapping[str, int],
    weights: Weighting | Mapping[str, float],
    *,
    candidates: bool,
) -> optax.GradientTransformationExtraArgs:
    """:func:`group_soft_threshold`, which may take candidates."""
    rule, floors = check_rule(groups, strength, min_channels, weights)

    def init(params: optax.Params) -> GroupSoftThresholdState:
        check_params(groups, params)
        alive = PerChannel(jnp.ones((groups.num_channels,), bool))
        return GroupSoftThresholdState(
            rule.init(groups, floors), alive, jnp.ones((), bool)
        )

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        dead = (~state.alive.per_channel).astype(jnp.int32)
        probing = Term(nonzero, (params,), small=True, over=dead)
        removes = rule.score is not None
        candidate = updates if removes or candidates else add_step(params, updates)
        factor, strength_state, revived = channel_factors(
            groups,
            rule,
            floors,
            weights,
            candidate,
            state.strength,
            params,
            state.alive.per_channel,
            probing,
        )
        intact = state.intact & (revived == 0)
        alive = PerChannel(factor != 0)
        new_state = GroupSoftThresholdState(strength_state, alive, intact)
        if removes:
            # The others take the very step that arrived.
            return remove_channels(groups, updates, params, factor), new_state
        return step_to(shrink_channels(groups, candidate, factor), params), new_state

    return transformation("group_soft_threshold", init, update)


def soft_threshold(strength: StrengthLike) -> optax.GradientTransformationExtraArgs:
    """The same with every entry a group of its own: ``sign(v) max(0, |v| - t)``.

    Unlike :func:`group_soft_threshold` it works on all parameters and holds no floor.

    Args:
      strength: a constant threshold, a schedule, or a :class:`sdp_jax.Strength` that
        looks at each norm for itself: no target, which ranks channels.

    Returns:
      A transformation; its ``update`` needs ``params`` and emits their dtype.

    Raises:
      ValueError: if ``strength`` is negative, or in ``update`` without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> tx = optax.chain(optax.sgd(1.0), sdp_jax.soft_threshold(0.5))
      >>> params = jnp.array([2., 0.2])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> print(params + updates)
      [1.5 0. ]
    """
    return entry_threshold(strength, candidates=False)


def entry_threshold(
    strength: StrengthLike, *, candidates: bool
) -> optax.GradientTransformationExtraArgs:
    """:func:`soft_threshold`, which may take candidates."""
    rule, nothing = as_strength(strength), Groups((), ())

    def init(params: optax.Params) -> SoftThresholdState:
        check_inexact(params)
        return SoftThresholdState(rule.init(nothing, ()))

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        candidate = updates if candidates else add_step(params, updates)
        strength_state = state.strength

        def shrunk(leaf: jax.Array) -> jax.Array:
            nonlocal strength_state
            norms = jnp.abs(leaf)
            thresholds, strength_state = rule.update(state.strength, norms, nothing, ())
            return leaf * prox.soft_threshold_factor(norms, thresholds)

        point = jax.tree.map(shrunk, candidate)
        return step_to(point, params), SoftThresholdState(strength_state)

    return transformation("soft_threshold", init, update)


def check_zeros(opt_state: PyTree) -> None:
    """Raises if a later transformation destroyed the zeros of the threshold.

    The threshold remembers which channels it set to zero and looks at the next update
    whether they still were, in the vectors (biases, scales) of each dimension, or in
    its smallest producer where it has none: what changes matrices alone is not seen.
    Call this now and then outside ``jit``, for example once an epoch.

    Args:
      opt_state: the optimizer state, or any tree that contains it.

    Raises:
      ValueError: if the zeros of an earlier update had been changed, or the state has
        no :func:`group_soft_threshold` in it.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((3, 2))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> state = sdp_jax.altsdp(0.1, groups, strength=0.0).init(params)
      >>> sdp_jax.check_zeros(state)  # All is well.
    """
    # By name: nnx and checkpoints turn the state into dictionaries.
    found = [leaf for keys, leaf in leaf_keys(opt_state) if keys[-1:] == ("intact",)]
    if not found:
        raise ValueError(
            "no state of group_soft_threshold in this tree; pass the optimizer state "
            "of altsdp, prox_sgd or group_soft_threshold"
        )
    if not all(bool(jnp.all(jnp.asarray(intact))) for intact in found):
        raise ValueError(
            "channels that group_soft_threshold had set to zero were not zero at the "
            "next update: something behind it rescales or adds to its updates, or the "
            "parameters were changed from outside. Make it the last piece of the chain."
        )


def channel_factors(
    groups: Groups,
    rule: Strength,
    floors: prox.Floors,
    weights: Weighting | Mapping[str, float],
    candidate: optax.Params,
    state: Any,
    params: optax.Params,
    alive: jax.Array,
    *others: Term,
) -> tuple[Any, ...]:
    """The factor of each channel by which a strength leads on, and its next state.

    After them come the sums of other terms, joined with those of the norms, which do
    not count what reads a channel that is not alive. A rule that scores does so on the
    parameters, and only when it is due; else it gets no numbers.
    """
    if rule.score is None:
        gone = gone_lines(groups, alive)
        terms = (Term(square, (candidate,), shrinking=True, gone=gone), *others)
        squares, *sums = channel_sums(groups, *terms)
        norms = weighted_norms(groups, squares, weights, shrinking=True)
        thresholds, state = rule.update(state, norms, groups, floors)
        return prox.soft_threshold_factor(norms, thresholds), state, *sums
    score, sums = rule.score, channel_sums(groups, *others)
    due = True if rule.is_due is None else rule.is_due(state)
    dtype = jnp.result_type(float)
    scores = jax.lax.cond(
        due,
        lambda: score(state, groups, params).astype(dtype),
        lambda: jnp.full((groups.num_channels,), jnp.nan, dtype),
    )
    thresholds, state = rule.update(state, scores, groups, floors)
    return jnp.where(thresholds > 0, 0.0, 1.0).astype(dtype), state, *sums


def emit(point: optax.Params, params: optax.Params, candidates: bool) -> optax.Updates:
    """The point itself, or the step to it from the parameters, in the point's dtype."""
    if candidates:
        return point
    return jax.tree.map(lambda v, p: v - p.astype(v.dtype), point, params)
