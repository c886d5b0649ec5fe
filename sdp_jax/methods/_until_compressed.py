"""A strength that stops when the PQ Index tells that the model is compressed."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.channels import PerChannel
from sdp_jax.checks import check_number, check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods.pqi import check_exponents, index_of
from sdp_jax.strength import Strength, StrengthLike, as_strength


class UntilCompressedState(NamedTuple):
    """State of :func:`until_compressed`.

    Attributes:
      inner: state of the strength inside; it stays once ``stopped``.
      count: number of updates so far, int32 scalar.
      index: smoothed PQ Index of the living channels.
      minimum: its smallest value since channels are removed, infinite before.
      stopped: whether the strength no longer advances.
      thresholds: those of the last update that was not stopped.
    """

    inner: Any
    count: jax.Array
    index: jax.Array
    minimum: jax.Array
    stopped: jax.Array
    thresholds: PerChannel


def until_compressed(
    strength: StrengthLike,
    *,
    p: float = 0.5,
    q: float = 1.0,
    rise: float = 0.02,
    decay: float = 0.9,
    begin_step: int = 0,
    scope: Literal["global", "dimension"] = "global",
) -> Strength:
    """Lets a strength advance only as long as the model can still be compressed.

    While a network is pruned the PQ Index of what is left falls at first, rises when
    the limit of compression is reached, and falls again when the model collapses. This
    rule watches the index of the norms that the thresholds leave, ``‖v_c‖ − t_c`` over
    the living channels, smoothed over the steps. Once it exceeds its smallest value by
    ``rise``, the strength inside stays as it is: the thresholds of that moment are used
    from then on, lowered only where a floor demands it. A channel that they hold at
    infinity stays at zero; others may still cross a threshold that no longer moves.

    The index also moves because the network trains. It is therefore watched only while
    channels are zero or cut, and from ``begin_step`` on. The paper prunes weights,
    round after round; to stop a strength in this way is our own extension.

    Args:
      strength: a :class:`sdp_jax.Strength`, a number or a schedule.
      p: the smaller exponent of the index.
      q: the larger one.
      rise: how far above its minimum the index may be.
      decay: the share of the past that the smoothed index keeps in each step, in
        [0, 1).
      begin_step: number of updates before the index is watched.
      scope: ``"global"`` for one index of all channels, ``"dimension"`` for the mean of
        those of the dimensions, weighted by their living channels.

    Returns:
      A :class:`sdp_jax.Strength`, to be used wherever ``strength`` could be.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument is of another kind.

    References:
      Diao et al., arXiv 2302.05601, hypothesis on the sparsity of pruned models.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((1, 4))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> strength = methods.until_compressed(lambda step: 0.5 * (step + 1), decay=0.)
      >>> state = strength.init(groups, [1])
      >>> norms = jnp.array([.4, 2., 2.1, 8.])
      >>> for _ in range(4):
      ...     thresholds, state = strength.update(state, norms, groups, [1])
      ...     print(thresholds[0], state.index.round(2), state.stopped)
      0.5 0.14 False
      1.0 0.19 True
      1.0 0.19 True
      1.0 0.19 True
    """
    check_exponents(p, q)
    inner = as_strength(strength)
    check_number("rise", rise, low=0, rule="a non-negative number")
    check_number("decay", decay, low=0, high=math.nextafter(1, 0), rule="in [0, 1)")
    check_whole("begin_step", begin_step)
    if scope not in ("global", "dimension"):
        raise ValueError(f"scope must be 'global' or 'dimension'; got {scope!r}")

    def bind(rate: Any, momentum: Any) -> Strength:
        assert inner.bind is not None
        numbers = {"p": p, "q": q, "rise": rise, "decay": decay}
        bound = inner.bind(rate, momentum)
        return until_compressed(bound, **numbers, begin_step=begin_step, scope=scope)

    def init(groups: Groups, floors: prox.Floors) -> UntilCompressedState:
        dtype = jnp.result_type(float)
        return UntilCompressedState(
            inner.init(groups, floors),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), dtype),
            jnp.full((), jnp.inf, dtype),
            jnp.zeros((), bool),
            PerChannel(jnp.zeros((groups.num_channels,), dtype)),
        )

    def update(
        state: UntilCompressedState,
        norms: jax.Array,
        groups: Groups,
        floors: prox.Floors,
    ) -> tuple[jax.Array, UntilCompressedState]:
        stopped, kept = state.stopped, state.thresholds.per_channel
        fresh, advanced = inner.update(state.inner, norms, groups, floors)
        # Thresholds of an earlier step, so that the floors hold at these norms; a floor
        # is made of those that may live.
        gone = jnp.isinf(kept)
        ranked = jnp.where(gone, -jnp.inf, norms)
        held = prox.hold_floors(groups, ranked, kept, floors)
        held = jnp.where(gone, jnp.inf, held)
        used = jnp.where(stopped, held, jnp.asarray(fresh, norms.dtype))
        left = jnp.maximum(norms - used, 0)
        seen = _left_index(groups, left, p, q, scope).astype(state.index.dtype)
        past = jnp.where(state.count == 0, 0, decay).astype(seen.dtype)
        # What is not a number would stay so for ever.
        smooth = past * state.index + (1 - past) * seen
        index = jnp.where(jnp.isfinite(seen), smooth, state.index)
        count = jnp.asarray(optax.safe_increment(state.count))
        cut = groups.num_channels < groups.dense.num_channels
        watched = (count > begin_step) & (jnp.any(left == 0) | cut)
        minimum = jnp.where(watched, jnp.minimum(state.minimum, index), state.minimum)
        thresholds = jnp.where(stopped, kept, used.astype(kept.dtype))
        new_state = UntilCompressedState(
            jax.tree.map(lambda a, b: jnp.where(stopped, a, b), state.inner, advanced),
            count,
            index,
            minimum,
            stopped | (watched & (index > minimum + rise)),
            PerChannel(thresholds),
        )
        return used, new_state

    def score(state: UntilCompressedState, groups: Groups, params: Any) -> jax.Array:
        assert inner.score is not None
        return inner.score(state.inner, groups, params)

    return Strength(
        init,
        update,
        None if inner.bind is None else bind,
        None if inner.score is None else score,
    )


def _left_index(
    groups: Groups, left: jax.Array, p: float, q: float, scope: str
) -> jax.Array:
    """The index of the channels that are not zero."""
    pairs = [(v, v > 0) for v in groups.split(left).values()]
    if scope == "global":
        return index_of(pairs, p, q)
    total, weight = jnp.zeros(()), jnp.zeros(())
    for v, alive in pairs:
        number = jnp.sum(alive)
        total = total + number * index_of([(v, alive)], p, q)
        weight = weight + number
    return total / jnp.maximum(weight, 1)
