"""HESSO: redundant channels are chosen period by period and fade out meanwhile."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import (
    add_step,
    as_base,
    check_params,
    check_rule,
    need_params,
    step_to,
)
from sdp_jax.channels import PerChannel, channel_norms, channel_products, scale_channels
from sdp_jax.checks import check_number, check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods.hosted import hosted
from sdp_jax.methods.score import Score, check_score, check_scores, need_gradients, unit
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree


class HESSOState(NamedTuple):
    """State of :func:`hesso_host`.

    Attributes:
      strength: state of the strength after ``begin`` updates.
      count: number of updates so far, int32 scalar.
      fading: which channels fade out in the present period.
      gone: which channels have faded out.
    """

    strength: Any
    count: jax.Array
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
      >>> score = methods.hesso_score()(groups, params, grads)["hidden"]
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

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> dict[str, jax.Array]:
        del activations
        grads = need_gradients(grads, "hesso_score")
        norms = channel_norms(groups, params)
        lengths = norms * channel_norms(groups, grads)
        products = channel_products(groups, params, grads)
        turned = lengths > 0
        cosines = jnp.where(turned, products / jnp.where(turned, lengths, 1), 0)
        entries = np.repeat(
            [groups.entries(d, roles=("producer",)) for d in groups],
            [d.size for d in groups],
        ).astype(np.float32)
        change = unit(jnp.abs(products))
        total = (
            magnitude * unit(norms)
            + average * unit(norms / entries)
            + cosine * unit(jnp.where(norms > 0, jnp.maximum(cosines + 1, 0), 0))
            + first * change
            + second * unit(jnp.square(change))
        )
        return jnp.asarray(total)

    return score


def hesso_host(
    groups: Groups,
    strength: StrengthLike,
    *,
    begin: int,
    steps: int,
    periods: int = 10,
    score: Score | None = None,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """What :func:`hesso` puts behind its base optimizer.

    Channels that a wrapper such as :func:`sdp_jax.methods.decay_pruning` releases are
    free to be chosen in a later period; the last period fills up the target.

    Args:
      groups: the channel dimensions.
      strength: see :func:`hesso`.
      begin: see :func:`hesso`.
      steps: see :func:`hesso`.
      periods: see :func:`hesso`.
      score: see :func:`hesso`.
      min_channels: see :func:`hesso`.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``,
      and ``gradients=`` if the score does (:func:`sdp_jax.methods.hosted` gives them).

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      See :func:`hesso`.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.hesso_host(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), begin=0, steps=2, periods=1,
      ...     score=methods.l2_norm())
      >>> tx = optax.chain(optax.sgd(1.0), host)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[3.   0.15]
       [4.   0.2 ]]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    check_whole("begin", begin)
    check_whole("periods", periods, low=1)
    check_whole("steps", steps, low=1)
    if steps < periods:
        raise ValueError(
            f"steps={steps} updates cannot be divided into periods={periods}; give at "
            "least one update for each period"
        )
    if score is not None and not callable(score):
        raise TypeError(
            "score must be a function score(groups, params, grads=None, "
            f"activations=None), for example methods.hesso_score(); got {score!r}"
        )
    rate: Score = hesso_score() if score is None else score
    period = steps // periods

    def init_fn(params: optax.Params) -> HESSOState:
        check_params(groups, params)
        size = (groups.num_channels,)
        return HESSOState(
            rule.init(groups, floors),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros(size, bool)),
            PerChannel(jnp.zeros(size, bool)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        gradients: optax.Updates | None = None,
        released: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HESSOState]:
        del extra_args
        params = need_params(params, updates, "hesso_host")
        count = jnp.asarray(optax.safe_increment(state.count))
        fading, gone = state.fading.per_channel, state.gone.per_channel
        if released is not None:
            # Behind the last choice nothing would take it out again.
            released &= count <= begin + 1 + (periods - 1) * period
            fading, gone = fading & ~released, gone & ~released
        early = count <= begin
        done = jnp.maximum(count - begin - 1, 0)
        number, place = done // period, done % period
        due = ~early & (place == 0) & (number < periods)

        def ask() -> tuple[jax.Array, Any]:
            found = check_scores(groups, rate(groups, params, gradients))
            # What is gone comes first, so that it counts towards the target.
            ranked = jnp.where(gone, -1, found)
            thresholds, after = rule.update(state.strength, ranked, floors)
            wanted = ranked < thresholds
            total = jnp.sum(wanted, dtype=jnp.int32)
            share = jnp.where(number < periods - 1, total // periods, total)
            wanted &= ~gone
            place = prox.ranks(jnp.where(wanted, ranked, jnp.inf))
            chosen = wanted & (place < share) & due
            # The strength stands still when the first period begins.
            held = jax.tree.map(
                lambda new, old: jnp.where(early, new, old).astype(old.dtype),
                after,
                state.strength,
            )
            return chosen, held

        def go_on() -> tuple[jax.Array, Any]:
            return fading, state.strength

        fading, strength_state = jax.lax.cond(early | due, ask, go_on)
        left = (period - place).astype(jnp.result_type(float))
        share = jnp.where(fading, (left - 1) / left, 1)
        factor = jnp.where(gone, 0, share)
        candidate = add_step(params, updates)
        point = scale_channels(groups, candidate, factor)
        gone |= fading & (left == 1)
        new_state = HESSOState(
            strength_state, count, PerChannel(fading & ~gone), PerChannel(gone)
        )
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hesso(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    strength: StrengthLike,
    *,
    begin: int,
    steps: int,
    periods: int = 10,
    score: Score | None = None,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Hybrid Efficient Structured Sparse Optimizer.

    After ``begin`` updates follow ``periods`` of ``D = steps // periods`` updates. At
    the first update of each, with the scores of that moment, the channels of lowest
    score are chosen: of the ``K`` that ``strength`` asks for ``K // periods``, in the
    last period all that are lacking. They go on training, and are multiplied by ::

        (D − t − 1) / (D − t)        after the update t = 0, …, D − 1 of the period

    so that without gradient they fall linearly, to zero at its last update. What has
    faded out stays zero.

    The published code counts ``t`` from 1, so that channels are zero one update before
    their period ends; otherwise the two agree.

    Args:
      base: a learning rate, a schedule or an Optax transformation.
      groups: the channel dimensions.
      strength: how much is to go in the end, not when: what it asks for at update
        ``begin + 1``, asked anew with the scores of each period. Give
        ``sdp_jax.target_sparsity(fraction, begin, begin + 1, …)``, a rise in one step;
        of a longer ramp only its first step would count.
      begin: number of updates before the first period.
      steps: number of updates in which the target is reached, at least ``periods``.
      periods: number of periods.
      score: the score (see :class:`sdp_jax.methods.Score`) on the parameters before
        the step and the raw gradients; ``None`` for
        :func:`sdp_jax.methods.hesso_score`.
      momentum: momentum of the SGD that a learning rate stands for.
      nesterov: whether it is Nesterov's.
      min_channels: channels that stay in each dimension; a number, or one for each name.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

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
      >>> tx = methods.hesso(
      ...     1.0, groups, sdp_jax.target_sparsity(0.5, 0, 1), begin=0, steps=2,
      ...     periods=1)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"][1])
      [4.  0.2]
      [4. 0.]
    """
    host = hesso_host(
        groups,
        strength,
        begin=begin,
        steps=steps,
        periods=periods,
        score=score,
        min_channels=min_channels,
    )
    return hosted(as_base(base, momentum, nesterov), host)
