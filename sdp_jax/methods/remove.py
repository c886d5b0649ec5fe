"""Removing the channels of lowest score while training goes on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.base import add_step, check_params, check_rule, need_params, step_to
from sdp_jax.channels import PerChannel, scale_channels
from sdp_jax.checks import check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score, check_score, check_scores
from sdp_jax.strength import StrengthLike


class RemoveLowestState(NamedTuple):
    """State of :func:`remove_lowest`.

    Attributes:
      strength: state of the strength.
      count: number of updates so far, int32 scalar.
      gone: which channels are removed.
      total: scores summed over the steps since the last removal; not a number before
        there are any.
      advanced: number of updates that the strength knows of, int32 scalar.
    """

    strength: Any
    count: jax.Array
    gone: PerChannel
    total: PerChannel
    advanced: jax.Array


def remove_lowest(
    groups: Groups,
    strength: StrengthLike,
    score: Score | None = None,
    *,
    every: int = 1,
    accumulate: bool = False,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Sets the channels of lowest score to zero and keeps them there.

    The classical loop of structured pruning, score, remove, train on, as one
    transformation: all at once (a ramp of one step), gradually, or a few at a time
    every so many steps. What is removed stays zero, unless a wrapper such as
    :func:`sdp_jax.methods.decay_pruning` releases it. As long as a score is not finite,
    nothing is decided; it is made up for at the next time.

    Args:
      groups: the channel dimensions.
      strength: how much goes when, for example ``sdp_jax.target_sparsity(0.5, 1000,
        5000, target="flops", …)``; a number or a schedule is the score below which
        channels go.
      score: the score (see :class:`sdp_jax.methods.Score`), evaluated inside ``jit`` on
        the parameters before the step and the raw gradients; ``None`` for scores that
        :func:`set_scores` gives from outside.
      every: steps from one removal to the next.
      accumulate: use the mean of the scores over these steps, instead of the last.
      min_channels: channels that stay in each dimension; a number, or one for each name.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``,
      and ``gradients=`` if the score does (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if strength or floor does not fit the groups, ``every`` is below 1, or
        scores from outside are to be accumulated.
      TypeError: if an argument is of another kind.

    References:
      The schedule of gradual pruning: Zhu and Gupta, arXiv 1710.01878.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.remove_lowest(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.l2_norm())
      >>> tx = optax.chain(optax.sgd(0.1), host)
      >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[2.9 0. ]
       [3.9 0. ]]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    check_whole("every", every, low=1)
    if score is not None and not callable(score):
        raise TypeError(
            "score must be a function score(groups, params, grads=None, "
            f"activations=None), for example methods.l2_norm(); got {score!r}"
        )
    if score is None and accumulate:
        raise ValueError(
            "scores that come from outside (score=None) cannot be accumulated here; "
            "average them before set_scores"
        )

    def init_fn(params: optax.Params) -> RemoveLowestState:
        check_params(groups, params)
        size = (groups.num_channels,)
        return RemoveLowestState(
            rule.init(groups, floors),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros(size, bool)),
            PerChannel(jnp.full(size, 0 if accumulate else jnp.nan, jnp.float32)),
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
    ) -> tuple[optax.Updates, RemoveLowestState]:
        del extra_args
        params = need_params(params, updates, "remove_lowest")
        count = jnp.asarray(optax.safe_increment(state.count))
        gone = state.gone.per_channel
        if released is not None:
            gone = gone & ~released
        total = state.total.per_channel
        due = count % every == 0

        def found() -> jax.Array:
            assert score is not None
            return check_scores(groups, score(groups, params, gradients))

        if score is not None and accumulate:
            # One bad batch must not spoil the mean.
            latest = found()
            total = total + jnp.where(jnp.isfinite(latest), latest, 0)
        elif score is not None:
            total = jax.lax.cond(due, found, lambda: total)
        mean = total / every if accumulate else total
        due &= jnp.all(jnp.isfinite(mean))

        def decide() -> tuple[jax.Array, Any, jax.Array]:
            # What is gone comes first, so that it counts towards the target.
            ranked = jnp.where(gone, -1, mean)
            values = ranked

            def advance(_: Any, carry: Any) -> Any:
                thresholds, inner = rule.update(carry[1], values, floors)
                flat = {k: thresholds[k] for k in groups.sizes}
                return flat.astype(ranked.dtype), inner

            # The strength counts every update, and decides by the scores of this one.
            start = (jnp.zeros_like(ranked), state.strength)
            flat, inner = jax.lax.fori_loop(state.advanced, count, advance, start)
            return gone | (ranked < flat), inner, count

        gone, strength_state, advanced = jax.lax.cond(
            due, decide, lambda: (gone, state.strength, state.advanced)
        )
        if accumulate:
            total = jnp.where(count % every == 0, 0, total)
        factor = jnp.where(gone, 0.0, 1.0)
        candidate = add_step(params, updates)
        point = scale_channels(groups, candidate, factor)
        new_state = RemoveLowestState(
            strength_state, count, PerChannel(gone), PerChannel(total), advanced
        )
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def set_scores(
    opt_state: optax.OptState, groups: Groups, scores: Mapping[str, Any]
) -> optax.OptState:
    """Gives :func:`remove_lowest` scores that are computed outside of the step.

    Args:
      opt_state: an optimizer state with a :class:`RemoveLowestState` in it.
      groups: the channel dimensions.
      scores: for each dimension an array ``(size,)`` of non-negative numbers.

    Returns:
      The same state, with these scores.

    Raises:
      ValueError: if there is no such state, the scores do not fit the groups, or one is
        negative or not finite.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((2, 2))}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> tx = methods.remove_lowest(groups, sdp_jax.target_sparsity(0.5, 0, 1))
      >>> state = methods.set_scores(
      ...     tx.init(params), groups, {"hidden": jnp.array([2., 1.])})
      >>> updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      >>> print(params["w"] + updates["w"])
      [[1. 0.]
       [1. 0.]]
    """
    flat = check_scores(groups, scores)
    known = not isinstance(flat, jax.core.Tracer)
    if known and not bool(jnp.all(jnp.isfinite(flat) & (flat >= 0))):
        raise ValueError(
            "scores must be finite and not negative, the lowest goes first; got "
            f"{ {k: np.asarray(v).tolist() for k, v in scores.items()} }. Subtract "
            "their minimum"
        )

    def is_ours(node: Any) -> bool:
        return isinstance(node, RemoveLowestState)

    leaves, treedef = jax.tree.flatten(opt_state, is_leaf=is_ours)
    if not any(map(is_ours, leaves)):
        raise ValueError(
            "no state of remove_lowest in this tree; pass the optimizer state of a "
            "chain that has remove_lowest in it"
        )
    return treedef.unflatten(
        leaf._replace(total=PerChannel(flat)) if is_ours(leaf) else leaf
        for leaf in leaves
    )
