"""Controllers that hit a target of channels, parameters or FLOPs."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox, segments
from sdp_jax.channels import PerChannel
from sdp_jax.checks import check_number, check_share, check_steps
from sdp_jax.groups import Groups, Ranking, check_ranking
from sdp_jax.polynomial import Polynomial
from sdp_jax.strength import Strength

Target = Literal["channels", "params", "flops"]
# The share that is left of a target when this many channels of each dimension are.
ShareLeft: TypeAlias = Callable[[jax.Array], jax.Array]

# The norms of a layer often lie close together, far from zero. Over this part of its
# ramp a target therefore lets the threshold rise from zero to the norms it must reach.
RISE = 0.3


class TargetState(NamedTuple):
    """Updates so far, and thresholds: infinite where zero, fixed from the end on."""

    count: jax.Array
    thresholds: PerChannel


def target_sparsity(
    sparsity: float,
    begin_step: int,
    end_step: int,
    *,
    target: Target = "channels",
    ranking: Ranking = "global",
    power: float = 3.0,
) -> Strength:
    """Prunes exactly the asked-for share of channels, parameters or FLOPs.

    At step ``n`` the threshold is the norm below which those channels lie that make up
    the share ``sparsity · (1 − (1 − (n − begin_step) / (end_step −
    begin_step))^power)`` of the
    target; over the first 30 % of the ramp it rises to there from zero, linearly. Until
    ``end_step`` channels may return; after it the set stays fixed and the thresholds
    too, while training goes on. A share of channels is rounded to whole channels; of
    parameters or FLOPs goes at least the share, and less than one channel more.

    Args:
      sparsity: share of the target that is gone from ``end_step`` on, in [0, 1). After
        a cut it counts the channels of the small model: 0 prunes no further.
      begin_step: last step without pruning.
      end_step: number of updates after which the share is reached.
      target: what the share is of: ``"channels"``; ``"params"``, all entries of all
        leaves of the groups; ``"flops"`` of the function that the groups were found on,
        counted as :func:`sdp_jax.cost` counts those of the narrowed function.
      ranking: compare norms over all channels (``"global"``), within each dimension, or
        within dimensions that are built alike (``"isomorphic"``); in the latter two
        each of these loses the same share of its channels.
      power: exponent of the rise; 3 is the cubic ramp of Zhu and Gupta 2017.

    Returns:
      A :class:`Strength`. Its ``init`` raises ``ValueError`` if the floors leave fewer
      channels to prune than asked for, or FLOPs are asked for and the groups do not
      know them. Floors that are arrays cannot be checked there: where they forbid the
      share, they win.

    Raises:
      ValueError: if ``sparsity`` is outside [0, 1), ``power`` not positive, the steps
        are not in order, or target or ranking are unknown.
      TypeError: if ``sparsity`` or ``power`` is not a number or a step not an integer.

    References:
      The ramp: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.
      Isomorphic ranking: Fang, Ma, Wang et al., "Isomorphic Pruning for Vision
      Models", ECCV 2024, arXiv 2407.04616.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 4))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> strength = sdp_jax.target_sparsity(0.5, begin_step=0, end_step=1)
      >>> state, norms = strength.init(groups, [1]), jnp.array([1., 4., 2., 3.])
      >>> thresholds, state = strength.update(state, norms, groups, [1])
      >>> print(thresholds)
      [inf  2. inf  2.]
    """
    check_share("sparsity", sparsity)
    check_number("power", power, low=1e-6, rule="a positive number")
    check_steps(begin_step, end_step)
    check_ranking(ranking)
    if target not in get_args(Target):
        raise ValueError(f"target is {target!r}; use one of {get_args(Target)}")

    def init(groups: Groups, floors: prox.Floors) -> TargetState:
        if not len(groups):
            raise ValueError(
                "target_sparsity ranks channels, and these groups have none: "
                "single entries, as soft_threshold has them, cannot be ranked"
            )
        if target == "channels":
            _check_channels(sparsity, groups, floors, ranking)
        else:
            _check_counts(sparsity, target, groups, floors)
        zeros = jnp.zeros((groups.num_channels,), jnp.result_type(float))
        return TargetState(jnp.zeros((), jnp.int32), PerChannel(zeros))

    def update(
        state: TargetState, norms: jax.Array, groups: Groups, floors: prox.Floors
    ) -> tuple[jax.Array, TargetState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        done = jnp.clip((count - begin_step) / (end_step - begin_step), 0, 1)
        # Division may round: at the end the share is exact.
        final = count >= end_step
        share = jnp.where(final, 1, 1 - (1 - done) ** power)
        rise = jnp.where(final, 1, jnp.minimum(1, done / RISE))
        old = state.thresholds.per_channel
        block = groups.blocks(ranking)

        def ranked() -> jax.Array:
            keep = prox.largest_each(groups, norms, floors)
            if target == "channels":
                sizes = np.bincount(block).tolist()
                wanted = share * np.asarray([round(sparsity * n) for n in sizes])
            else:
                left = _polynomial(groups, target).share(list(groups.sizes.values()))
                goal = (1 - share * sparsity) * (1 + 1e-6)  # rounding
                wanted = _wanted(groups, norms, keep, block, left, goal, final)
            levels, gone = _rank(norms, keep, block, wanted)
            # Floors that are arrays were not checked against the target: they win.
            levels = jnp.where(rise > 0, rise * levels, 0)
            held = prox.hold_floors(groups, norms, levels, floors)
            gone &= ~keep & (rise >= 1)
            return jnp.where(gone, jnp.inf, held).astype(old.dtype)

        fixed = jax.lax.cond(count > end_step, lambda: old, ranked)
        held = prox.keep_alive(norms, fixed.astype(norms.dtype))
        thresholds = jnp.where(jnp.isinf(fixed), jnp.inf, held)
        return thresholds, TargetState(count, PerChannel(fixed))

    return Strength(init, update)


def _polynomial(groups: Groups, target: Target) -> Polynomial:
    """What a target counts, in the widths."""
    if target == "params":
        return groups.parameters
    return groups.need_flops()


def _check_channels(
    sparsity: float, groups: Groups, floors: prox.Floors, ranking: Ranking
) -> None:
    block = groups.blocks(ranking)
    for number, size in enumerate(np.bincount(block).tolist()):
        members = np.unique(groups.owner[block == number]).tolist()
        held = [floors[k] for k in members]
        wanted = round(sparsity * size)
        if any(isinstance(f, jax.Array) for f in held):
            continue
        kept = sum(int(f) for f in held)
        if size - wanted >= kept:
            continue
        names = " and ".join(repr(groups.dimensions[k].name) for k in members)
        what = "the model" if ranking == "global" else f"dimension {names}"
        raise ValueError(
            f"target_sparsity({sparsity}) wants {wanted} of the {size} channels "
            f"of {what} to be zero, but min_channels keeps {kept}; lower the sparsity "
            "or min_channels"
        )


def _check_counts(
    sparsity: float, target: Target, groups: Groups, floors: prox.Floors
) -> None:
    counts = _polynomial(groups, target)
    if any(isinstance(f, jax.Array) for f in floors):
        return
    dense = counts.at(list(groups.sizes.values()))
    least = counts.at([int(f) for f in floors]) / max(dense, 1e-300)
    if least > 1 - sparsity:
        raise ValueError(
            f"target_sparsity({sparsity}, target={target!r}) cannot be met: where only "
            f"min_channels are left, so are {least:.1%}; lower the sparsity or "
            "min_channels"
        )


def _wanted(
    groups: Groups,
    norms: jax.Array,
    keep: jax.Array,
    block: np.ndarray,
    share_left: ShareLeft,
    goal: jax.Array,
    final: jax.Array,
) -> jax.Array:
    """How many channels of each block must go until ``goal`` of a count is left.

    They go by norm, or by rank as a share of their block; in between a part counts.
    """
    sizes = jnp.asarray(list(groups.sizes.values()))
    flat = jnp.where(keep | jnp.isnan(norms), jnp.inf, norms)
    if block.any():
        free = jnp.isfinite(flat)
        rank = segments.ranks(flat, block) + 1
        shares = rank / jnp.maximum(segments.sum_over(free, block), 1)
        flat = jnp.where(free, shares, jnp.inf)
    place = segments.ranks(flat, np.zeros_like(block))
    most = jnp.isfinite(flat).sum()

    def gone(number: jax.Array, owner: np.ndarray) -> jax.Array:
        """Channels of each owner among the first ``number``."""
        return segments.sum_each(place < number, owner)

    def left(number: jax.Array) -> jax.Array:
        return share_left((sizes - gone(number, groups.owner)).astype(norms.dtype))

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> Any:
        low, high = between
        middle = (low + high) // 2
        enough = left(middle) <= goal
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = (jnp.zeros((), most.dtype), most)
    number, _ = jax.lax.fori_loop(0, len(block).bit_length(), halve, start)
    fewer = jnp.maximum(number - 1, 0)
    # The share in between, linearly: the widths change by one channel.
    before = left(fewer)
    part = (before - goal) / jnp.maximum(before - left(number), 1e-30)
    part = jnp.where(final | (number == 0), 1, jnp.clip(part, 0, 1))
    low, high = gone(fewer, block), gone(number, block)
    return low + part * (high - low)


def _rank(
    norms: jax.Array, keep: jax.Array, block: np.ndarray, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Levels that the ``⌊wanted⌋`` smallest channels lie below, and these channels."""
    free = jnp.where(keep, jnp.inf, norms)
    # float32 may put a whole number a hair below itself.
    count = jnp.floor(wanted + 1e-3).astype(jnp.int32)
    found = segments.lowest(free, count, block)
    below = jnp.where(count > 0, found.last, 0)
    part = jnp.clip(wanted - count, 0, 1).astype(norms.dtype)
    between = jnp.where(jnp.isinf(found.next), 0, part * (found.next - below))
    return (below + between)[block], found.mask
