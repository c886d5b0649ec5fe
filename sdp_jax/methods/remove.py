"""Removing the channels of lowest score while training goes on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from sdp_jax.base import check_rule
from sdp_jax.channels import PerChannel
from sdp_jax.checks import check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods._hosted import HostStep, channel_host, no_channels
from sdp_jax.methods.score import Score, check_score, check_scores
from sdp_jax.strength import StrengthLike


class RemoveLowestState(NamedTuple):
    """State of :func:`remove_lowest`.

    Attributes:
      strength: state of the strength.
      gone: which channels are removed.
      total: scores summed over the steps since the last removal; not a number before
        there are any.
      advanced: number of updates that the strength knows of, int32 scalar.
    """

    strength: Any
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
        5000, target="flops")``; a number or a schedule is the score below which
        channels go.
      score: the score (see :class:`sdp_jax.methods.Score`), evaluated inside ``jit`` on
        the parameters before the step and the raw gradients; ``None`` for scores that
        :func:`set_scores` gives from outside.
      every: steps from one removal to the next.
      accumulate: use the mean of the scores over these steps, instead of the last.
      min_channels: channels that stay in each dimension; a number, or one for each
        name.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``,
      and ``gradients=`` if the score does (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if strength or minimum does not fit the groups, ``every`` is below 1,
        or scores from outside are to be accumulated.
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
      >>> tx = methods.hosted(0.1, host)
      >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[2.9 0. ]
       [3.9 0. ]]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    check_whole("every", every, low=1)
    if score is not None:
        check_score(score)
    elif accumulate:
        raise ValueError(
            "scores that come from outside (score=None) cannot be accumulated here; "
            "average them before set_scores"
        )

    def init(groups: Groups) -> RemoveLowestState:
        total = jnp.full(groups.num_channels, 0 if accumulate else jnp.nan, jnp.float32)
        return RemoveLowestState(
            rule.init(groups, floors),
            no_channels(groups),
            PerChannel(total),
            jnp.zeros((), jnp.int32),
        )

    def decide(step: HostStep) -> tuple[jax.Array, RemoveLowestState]:
        state: RemoveLowestState = step.inner
        gone = state.gone.per_channel & ~step.released
        total = state.total.per_channel
        due = step.count % every == 0

        def found() -> jax.Array:
            assert score is not None
            return check_scores(
                groups, score(groups, step.living.params, step.living.gradients)
            )

        if score is not None and accumulate:
            # One bad batch must not spoil the mean.
            latest = found()
            total = total + jnp.where(jnp.isfinite(latest), latest, 0)
        elif score is not None:
            total = jax.lax.cond(due, found, lambda: total)
        mean = total / every if accumulate else total
        ready = due & jnp.all(jnp.isfinite(mean))

        def remove() -> tuple[jax.Array, Any, jax.Array]:
            # What is gone comes first, so that it counts towards the target.
            ranked = jnp.where(gone, -1, mean)

            def advance(_: Any, carry: Any) -> Any:
                thresholds, inner = rule.update(carry[1], ranked, groups, floors)
                return thresholds.astype(ranked.dtype), inner

            # The strength counts every update, and decides by the scores of this one.
            start = (jnp.zeros_like(ranked), state.strength)
            thresholds, inner = jax.lax.fori_loop(
                state.advanced, step.count, advance, start
            )
            return gone | (ranked < thresholds), inner, step.count

        gone, strength_state, advanced = jax.lax.cond(
            ready, remove, lambda: (gone, state.strength, state.advanced)
        )
        if accumulate:
            total = jnp.where(due, 0, total)
        new_state = RemoveLowestState(
            strength_state, PerChannel(gone), PerChannel(total), advanced
        )
        return jnp.where(gone, 0.0, 1.0), new_state

    return channel_host(groups, init, decide, name="remove_lowest")


def set_scores(
    opt_state: optax.OptState, groups: Groups, scores: jax.Array | Mapping[str, Any]
) -> optax.OptState:
    """Gives :func:`remove_lowest` scores that are computed outside of the step.

    Args:
      opt_state: an optimizer state with a :class:`RemoveLowestState` in it.
      groups: the channel dimensions.
      scores: non-negative numbers ``(num_channels,)``, or for each dimension name an
        array ``(size,)``.

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
        shown = {name: part.tolist() for name, part in groups.split(flat).items()}
        raise ValueError(
            "scores must be finite and not negative, the lowest goes first; got "
            f"{shown}. Subtract their minimum"
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
