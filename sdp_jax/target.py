"""The strength that hits a target of channels, parameters or FLOPs."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox, segments
from sdp_jax.channels import PerChannel
from sdp_jax.checks import check_share, check_steps
from sdp_jax.fast import steps_of
from sdp_jax.groups import Groups, Ranking, check_ranking
from sdp_jax.importance import channel_importance
from sdp_jax.polynomial import Polynomial
from sdp_jax.strength import Strength
from sdp_jax.widths import Steps, round_up

Target = Literal["channels", "params", "flops"]

# The ramp is that of Zhu and Gupta. Scoring reads all parameters, so it is not done at
# every step.
POWER, EVENTS = 3, 100
# Importances say little about how many channels a whole dimension needs. None falls
# below this part of the width that it would have if all were cut to the same share.
GUARD = 0.5


class TargetState(NamedTuple):
    """State of :func:`target_sparsity`.

    Attributes:
      count: number of updates so far, int32 scalar.
      removed: which channels the target has taken.
      level: for each channel the mean score of those of its dimension that stay.
    """

    count: jax.Array
    removed: PerChannel
    level: PerChannel


def target_sparsity(
    sparsity: float,
    begin_step: int,
    end_step: int,
    *,
    target: Target = "channels",
    ranking: Ranking = "global",
    round_to: int | Literal["fast"] = 1,
) -> Strength:
    """Prunes at least the asked-for share of channels, parameters or FLOPs.

    After step ``n`` the share ::

        sparsity · (1 − (1 − (n − begin_step) / (end_step − begin_step))³)

    of the target is gone, and less than one channel more: at up to a hundred of these
    steps the channels of lowest importance go, and what is gone stays gone. The others
    are not shrunk. Their threshold is 0, and they take the steps of the base optimizer;
    what has not gone at ``end_step`` stays. The importance is that of
    :func:`sdp_jax.methods.group_importance`, as a share of the mean of its dimension,
    in which channels that are gone still count as they last did: otherwise the mean
    would rise with each that goes, and the others would look the weaker for it. Hosts,
    such as :func:`sdp_jax.methods.remove_lowest`, bring their own scores. No dimension
    falls below half of the width that it would have if all were cut to the same share.

    Args:
      sparsity: share of the target that is gone from ``end_step`` on, in [0, 1). It is
        one of the dense model: with the groups that a cut has left it goes on.
      begin_step: last step without pruning.
      end_step: number of updates after which the share is reached.
      target: what the share is of: ``"channels"``; ``"params"``, all entries of all
        leaves of the groups; ``"flops"`` of the function that the groups were found on,
        counted as :func:`sdp_jax.cost` counts those of the narrowed function.
      ranking: compare scores over all channels (``"global"``), within each dimension,
        or within dimensions that are built alike (``"isomorphic"``); in the latter two
        each of these loses the same share of its channels. It is for hosts whose scores
        do not compare dimensions.
      round_to: a number of which all widths shall be multiples, or ``"fast"`` for what
        is fast on the device, see :func:`sdp_jax.fast_multiple`. Dimensions that would
        end in between keep more channels, and others fewer: the target counts the
        rounded widths, and more than a channel more may go.

    Returns:
      A :class:`Strength`. Its ``init`` raises ``ValueError`` if the floors leave fewer
      channels to prune than asked for, or FLOPs are asked for and the groups do not
      know them. Floors that are arrays cannot be checked there: where they forbid the
      share, they win.

    Raises:
      ValueError: if ``sparsity`` is outside [0, 1), the steps are not in order, target
        or ranking are unknown, or ``round_to`` is neither a positive integer nor
        ``"fast"``.
      TypeError: if ``sparsity`` is not a number or a step not an integer.

    References:
      The ramp: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.
      The importance: Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural
      Pruning", CVPR 2023, arXiv 2301.12900. Isomorphic ranking: Fang, Ma, Wang et al.,
      "Isomorphic Pruning for Vision Models", ECCV 2024, arXiv 2407.04616. The floor of
      half the uniform width is our own.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 4))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> strength = sdp_jax.target_sparsity(0.5, begin_step=0, end_step=1)
      >>> state, scores = strength.init(groups, [1]), jnp.array([1., 4., 2., 3.])
      >>> thresholds, state = strength.update(state, scores, groups, [1])
      >>> print(thresholds)
      [inf  0. inf  0.]
    """
    check_share("sparsity", sparsity)
    check_steps(begin_step, end_step)
    check_ranking(ranking)
    every = max(1, (end_step - begin_step) // EVENTS)
    if target not in get_args(Target):
        raise ValueError(f"target is {target!r}; use one of {get_args(Target)}")
    steps = steps_of(round_to)

    def init(groups: Groups, floors: prox.Floors) -> TargetState:
        if not len(groups):
            raise ValueError(
                "target_sparsity ranks channels, and these groups have none: "
                "single entries, as soft_threshold has them, cannot be ranked"
            )
        _check_floors(_goal(sparsity, target, groups), target, groups, floors, steps)
        gone = jnp.zeros((groups.num_channels,), bool)
        level = jnp.ones((groups.num_channels,), jnp.result_type(float))
        count = jnp.zeros((), jnp.int32)
        return TargetState(count, PerChannel(gone), PerChannel(level))

    def score(state: TargetState, groups: Groups, params: Any) -> jax.Array:
        gone = state.removed.per_channel
        importance = channel_importance(groups, params, gone=gone, masked=True)
        return importance * state.level.per_channel

    def on_ramp(count: jax.Array) -> jax.Array:
        return (count > begin_step) & (count <= end_step)

    def is_due(state: TargetState) -> jax.Array:
        count = jnp.asarray(optax.safe_increment(state.count))
        event = ((count - begin_step) % every == 0) | (count == end_step)
        return event & on_ramp(count)

    def update(
        state: TargetState, scores: jax.Array, groups: Groups, floors: prox.Floors
    ) -> tuple[jax.Array, TargetState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        old = state.removed.per_channel, state.level.per_channel

        def decide() -> tuple[jax.Array, jax.Array]:
            done = (count - begin_step) / (end_step - begin_step)
            # Division may round: at the end the share is exact.
            share = jnp.where(count >= end_step, 1, ramp(done))
            goal = 1 - share * (1 - _goal(sparsity, target, groups))
            gone = _lowest(groups, scores, floors, steps, target, ranking, goal)
            # What was taken back from outside is not zero.
            gone |= old[0] & (scores <= 0)
            kept = segments.sum_over(jnp.where(gone, 0, scores), groups.owner)
            mean = kept / jnp.maximum(segments.sum_over(~gone, groups.owner), 1)
            known = jnp.isfinite(mean) & (mean > 0)
            return gone, jnp.where(known, mean, old[1]).astype(old[1].dtype)

        known = jnp.any(jnp.isfinite(scores))
        gone, level = jax.lax.cond(on_ramp(count) & known, decide, lambda: old)
        thresholds = jnp.where(gone, jnp.inf, 0).astype(scores.dtype)
        return thresholds, TargetState(count, PerChannel(gone), PerChannel(level))

    return Strength(init, update, score=score, is_due=is_due)


def ramp(done: Any) -> Any:
    """The share of its goal that a target has reached.

    Args:
      done: the share of the steps between begin and end, in [0, 1]; any array.

    Returns:
      Numbers from 0 to 1.

    References:
      Zhu and Gupta, arXiv 1710.01878, eq. 1.

    Example:
      >>> print(ramp(0.5))
      0.875
    """
    return 1 - (1 - done) ** POWER


def _polynomial(groups: Groups, target: Target) -> Polynomial:
    """What a target counts of the dense model, in the widths."""
    dense = groups.dense
    if target == "channels":
        return Polynomial.of({(k,): 1.0 for k in range(len(dense))})
    return dense.parameters if target == "params" else dense.need_flops()


def _goal(sparsity: float, target: Target, groups: Groups) -> float:
    """The share that is left in the end; of channels, a whole number."""
    if target != "channels":
        return 1 - sparsity
    total = groups.dense.num_channels
    return (total - round(sparsity * total)) / total


def _check_floors(
    goal: float, target: Target, groups: Groups, floors: prox.Floors, steps: Steps
) -> None:
    dense = groups.dense
    counts, full = _polynomial(groups, target), list(dense.sizes.values())
    if any(isinstance(f, jax.Array) for f in floors):
        return
    pairs = zip(groups.sizes, floors, strict=True)
    left = {name: round_up(int(n), dense.sizes[name], steps) for name, n in pairs}
    widths = [left.get(name, 0) for name in dense.sizes]
    least = counts.at(widths) / max(counts.at(full), 1e-300)
    if least > goal * (1 + 1e-6):
        exact = list(left.values()) == list(floors)
        raise ValueError(
            "target_sparsity cannot be met: where only min_channels are left, "
            f"{'' if exact else 'rounded by round_to, '}so are {least:.1%} of the "
            f"{target}, and at most {goal:.1%} shall be; lower the sparsity"
            f"{' or' if exact else ','} min_channels{'' if exact else ' or round_to'}"
        )


def _lowest(
    groups: Groups,
    scores: jax.Array,
    floors: prox.Floors,
    steps: Steps,
    target: Target,
    ranking: Ranking,
    goal: jax.Array,
) -> jax.Array:
    """The channels of lowest score without which ``goal`` of a count is left.

    They go by score, or by rank as a share of those that their ranking compares.
    """
    owner, block = groups.owner, groups.blocks(ranking)
    every, names = groups.dense.sizes, list(groups.dense.sizes)
    share_left = _polynomial(groups, target).share(list(every.values()))
    dense = [d.size for d in groups.dense_dimensions]
    sizes, full = jnp.asarray(list(groups.sizes.values())), jnp.asarray(dense)
    # Layers that a cut has taken have no width.
    there = np.asarray([names.index(name) for name in groups.sizes])
    goal = (goal * (1 + 1e-6)).astype(scores.dtype)  # rounding

    rounds = any(step > 1 for _, step in steps)

    def met(widths: jax.Array) -> jax.Array:
        # As they are, whole numbers or not, if nothing is rounded.
        widths = round_up(widths, full, steps) if rounds else widths
        widths = widths.astype(scores.dtype)
        if len(there) < len(names):
            widths = jnp.zeros(len(names), scores.dtype).at[there].set(widths)
        return share_left(widths) <= goal

    least: Any = prox.floor_counts(floors)
    if ranking == "global":
        uniform = _uniform(met, full)
        guard = jnp.round(GUARD * uniform * full).astype(jnp.int32)
        # Where a floor is above it, the guard of others may forbid the goal: it yields.
        guarded = jnp.maximum(least, guard)
        least = jnp.minimum(jnp.where(met(guarded), guarded, least), sizes)
    keep = prox.largest_each(groups, scores, least)
    flat = jnp.where(keep | jnp.isnan(scores), jnp.inf, scores)
    free = jnp.isfinite(flat)
    order = flat
    if block.any():
        # What a cut has taken came first.
        lost = np.asarray(dense) - np.asarray(list(groups.sizes.values()))
        first = np.unique(owner, return_index=True)[1]
        cut = np.bincount(block[first], lost)[block]
        rank = segments.ranks(flat, block) + 1 + cut
        shares = rank / jnp.maximum(segments.sum_over(free, block) + cut, 1)
        order = jnp.where(free, shares, jnp.inf)
    place = segments.ranks(order, np.zeros_like(block))

    def left(number: jax.Array) -> jax.Array:
        """Channels of each dimension without the first ``number``."""
        return sizes - segments.sum_each(place < number, owner)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> Any:
        low, high = between
        middle = (low + high) // 2
        enough = met(left(middle))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    most = free.sum()
    start = (jnp.zeros((), most.dtype), most)
    number, _ = jax.lax.fori_loop(0, len(owner).bit_length(), halve, start)
    # Floors that are arrays may forbid the goal: they win.
    number = jnp.minimum(number, most)
    kept = round_up(left(number), sizes, steps)
    return segments.lowest(flat, sizes - kept, owner).mask


def _uniform(met: Callable[[jax.Array], jax.Array], sizes: jax.Array) -> jax.Array:
    """The largest share of every dimension at which the goal is met."""

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> Any:
        low, high = between
        middle = (low + high) / 2
        enough = met(middle * sizes)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    dtype = jnp.result_type(float)
    ends = jnp.zeros((), dtype), jnp.ones((), dtype)
    return jax.lax.fori_loop(0, 20, halve, ends)[0]
