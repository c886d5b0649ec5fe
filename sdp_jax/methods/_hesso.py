"""HESSO: redundant channels are chosen period by period and fade out meanwhile."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import segments
from sdp_jax.base import check_rule
from sdp_jax.channels import PerChannel, channel_norms, channel_products
from sdp_jax.checks import check_number, check_steps, check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods._hosted import HostStep, channel_host, no_channels
from sdp_jax.methods.score import (
    Score,
    check_score,
    check_scores,
    of_gradients,
    producer_entries,
    unit,
)
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree


class HESSOState(NamedTuple):
    """State of :func:`hesso`.

    Attributes:
      strength: state of the strength after ``begin_step`` updates.
      fading: which channels fade out in the present period.
      gone: which channels have faded out.
    """

    strength: Any
    fading: PerChannel
    gone: PerChannel


def hesso_score(
    *,
    magnitude: chex.Numeric = 0.2,
    average: chex.Numeric = 0.2,
    cosine: chex.Numeric = 0.2,
    first: chex.Numeric = 0.2,
    second: chex.Numeric = 0.2,
) -> Score:
    """The weighted sum of five criteria, of which each has length 1 over all channels.

    For a channel ``x`` of ``n`` entries with the gradient ``∇`` they are ``‖x‖``,
    ``‖x‖ / n``, ``cos(x, ∇) + 1``, and the change of the loss when the channel goes, to
    first and to second order, ``|⟨x, ∇⟩|`` and ``½ ⟨x, ∇⟩²``. Each is divided by its
    Euclidean norm over the channels of all dimensions. A channel that is zero scores 0.

    A large cosine counts as important here, while :func:`sdp_jax.methods.dhspg_score`
    counts it as redundant: so it is in the published code of both.

    Args:
      magnitude: weight of ``‖x‖``.
      average: weight of ``‖x‖ / n``.
      cosine: weight of ``cos(x, ∇) + 1``.
      first: weight of ``|⟨x, ∇⟩|``.
      second: weight of ``½ ⟨x, ∇⟩²``.

    Returns:
      A score; it needs gradients of the shapes of the parameters.

    Raises:
      ValueError: if a weight is negative.
      TypeError: if a weight is not a number.

    References:
      Chen et al., "HESSO: Towards Automatic Efficient and User Friendly Any Neural
      Network Training and Pruning", arXiv 2409.09085; the weights are those of its
      published code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> grads = {"w": jnp.array([[1., 0.], [0., 1.]])}
      >>> score = methods.hesso_score()(groups, params, grads)
      >>> print(score.round(2))
      [0.93 0.22]
    """
    weights = {
        "magnitude": magnitude,
        "average": average,
        "cosine": cosine,
        "first": first,
        "second": second,
    }
    for name, weight in weights.items():
        check_number(name, weight, low=0, rule="a non-negative weight")

    def score(groups: Groups, params: PyTree, grads: PyTree) -> jax.Array:
        norms = channel_norms(groups, params)
        lengths = norms * channel_norms(groups, grads)
        products = channel_products(groups, params, grads)
        turned = lengths > 0
        cosines = jnp.where(turned, products / jnp.where(turned, lengths, 1), 0)
        change = unit(jnp.abs(products))
        total = (
            magnitude * unit(norms)
            + average * unit(norms / producer_entries(groups))
            + cosine * unit(jnp.where(norms > 0, jnp.maximum(cosines + 1, 0), 0))
            + first * change
            + second * unit(jnp.square(change))
        )
        return jnp.asarray(total)

    return of_gradients("hesso_score", score)


def hesso(
    groups: Groups,
    strength: StrengthLike,
    *,
    begin_step: int,
    end_step: int,
    periods: int = 10,
    score: Score | None = None,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Hybrid Efficient Structured Sparse Optimizer.

    After ``begin_step`` updates follow ``periods`` of ``D = (end_step - begin_step) //
    periods`` updates. At the first update of each, with the scores of that moment, the
    channels of lowest score are chosen: of the ``K`` that ``strength`` asks for
    ``K // periods``, in the last period all that are lacking. They go on training, and
    are multiplied by ::

        (D − t − 1) / (D − t)        after the update t = 0, …, D − 1 of the period

    so that without gradient they fall linearly, to zero at its last update. What has
    faded out stays zero. Channels that a wrapper such as
    :func:`sdp_jax.methods.decay_pruning` releases are free to be chosen in a later
    period; the last period fills up the target.

    The published code counts ``t`` from 1, so that channels are zero one update before
    their period ends; otherwise the two agree.

    Args:
      groups: the channel dimensions.
      strength: how much is to go in the end, not when: what it asks for at update
        ``begin_step + 1``, asked anew with the scores of each period. Give
        ``sdp_jax.target_sparsity(sparsity, begin_step, begin_step + 1)``, a rise in one
        step; of a longer ramp only its first step would count.
      begin_step: last update before the first period.
      end_step: number of updates after which the target is reached; what the periods do
        not divide is left over before it.
      periods: number of periods, at most one for each update between the two.
      score: the score (see :class:`sdp_jax.methods.Score`) on the parameters before
        the step and the raw gradients; ``None`` for
        :func:`sdp_jax.methods.hesso_score`.
      min_channels: channels that stay in each dimension; a number, or one for each
        name.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``,
      and ``gradients=`` if the score does (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Chen et al., "HESSO: Towards Automatic Efficient and User Friendly Any Neural
      Network Training and Pruning", arXiv 2409.09085.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.hesso(groups, sdp_jax.target_sparsity(0.5, 0, 1),
      ...     begin_step=0, end_step=2, periods=1)
      >>> tx = methods.hosted(1.0, host)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"][1])
      [4.  0.2]
      [4. 0.]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    check_steps(begin_step, end_step)
    check_whole("periods", periods, low=1, of="periods")
    period = (end_step - begin_step) // periods
    if not period:
        raise ValueError(
            f"the {end_step - begin_step} updates from begin_step to end_step cannot "
            f"be divided into periods={periods}; give at least one update for each "
            "period"
        )
    # Of what is asked for, a cut has taken these.
    cut = groups.dense.num_channels - groups.num_channels
    rate: Score = hesso_score() if score is None else score
    check_score(rate)

    def init(groups: Groups) -> HESSOState:
        strength_state = rule.init(groups, floors)
        return HESSOState(strength_state, no_channels(groups), no_channels(groups))

    def decide(step: HostStep) -> tuple[jax.Array, HESSOState]:
        state: HESSOState = step.inner
        # Behind the last choice nothing would take out again what is released.
        choices_left = step.count <= begin_step + 1 + (periods - 1) * period
        stay = ~(step.released & choices_left)
        fading, gone = state.fading.per_channel & stay, state.gone.per_channel & stay
        early = step.count <= begin_step
        done = jnp.maximum(step.count - begin_step - 1, 0)
        number, place = done // period, done % period
        due = ~early & (place == 0) & (number < periods)

        def ask() -> tuple[jax.Array, Any]:
            scores = rate(groups, step.living.params, step.living.gradients)
            # What is gone comes first, so that it counts towards the target.
            ranked = jnp.where(gone, -1, check_scores(groups, scores))
            thresholds, after = rule.update(state.strength, ranked, groups, floors)
            wanted = ranked < thresholds
            total = jnp.sum(wanted, dtype=jnp.int32) + cut
            share = jnp.where(number < periods - 1, total // periods, total)
            wanted &= ~gone
            order = segments.ranks(
                jnp.where(wanted, ranked, jnp.inf), groups.blocks("global")
            )
            # The strength stands still when the first period begins.
            held = jax.tree.map(
                lambda new, old: jnp.where(early, new, old).astype(old.dtype),
                after,
                state.strength,
            )
            return wanted & (order < share) & due, held

        fading, strength_state = jax.lax.cond(
            early | due, ask, lambda: (fading, state.strength)
        )
        left = (period - place).astype(jnp.result_type(float))
        factors = jnp.where(gone, 0, jnp.where(fading, (left - 1) / left, 1))
        gone |= fading & (left == 1)
        fading &= ~gone
        return factors, HESSOState(strength_state, PerChannel(fading), PerChannel(gone))

    return channel_host(groups, init, decide, name="hesso")
