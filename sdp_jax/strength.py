"""How strong to prune when: tuning functions, ramps, and controllers that hit a target.

A :class:`Strength` turns the channel norms of a step into one threshold per channel.
Step ``n`` counts updates: the first update is ``n = 1``. All thresholds are in the
units of the parameters (divided by the channel weight ``k``).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.groups import PerChannel, join_channels, split_channels

Sizes: TypeAlias = Mapping[str, int]
Norms: TypeAlias = Mapping[str, jax.Array]
Thresholds: TypeAlias = dict[str, jax.Array]


# The norms of a layer often lie close together, far from zero. Over this part of its
# ramp a target therefore lets the threshold rise from zero to the norms it must reach.
RISE = 0.3


class Strength(NamedTuple):
    """A rule that gives thresholds, as a pair of pure functions.

    Attributes:
      init: ``init(sizes, floors) -> state``; raises ``ValueError`` if the rule cannot
        be met for dimensions of these sizes and floors.
      update: ``update(state, norms, floors) -> (thresholds, state)``, with weighted
        norms and thresholds by dimension name, shape ``(size,)``. The thresholds must
        leave ``floors[name]`` channels alive (see :func:`sdp_jax.prox.hold_floor`).
      bind: for a rule that wants the learning rate and momentum of the base optimizer:
        ``bind(learning_rate, momentum) -> Strength``, which keeps those that the rule
        was given; otherwise ``None``.
    """

    init: Callable[[Sizes, prox.Floors], Any]
    update: Callable[[Any, Norms, prox.Floors], tuple[Thresholds, Any]]
    bind: Callable[[Any, Any], "Strength"] | None = None


StrengthLike: TypeAlias = Strength | float | jax.Array | optax.Schedule


class ScheduleState(NamedTuple):
    """State of a strength that follows a schedule.

    Attributes:
      count: number of updates so far, int32 scalar.
    """

    count: jax.Array


class ValleyState(NamedTuple):
    """State of :func:`valley_strength`.

    Attributes:
      count: number of updates so far, int32 scalar.
      total: ``g`` so far, floating-point scalar.
      carry: what rounding has kept from ``total`` (compensated summation).
    """

    count: jax.Array
    total: jax.Array
    carry: jax.Array


class TargetState(NamedTuple):
    """State of :func:`target_sparsity`.

    Attributes:
      count: number of updates so far, int32 scalar.
      thresholds: the latest thresholds, infinite for a channel that is zero; they stay
        fixed once the end step is reached.
    """

    count: jax.Array
    thresholds: PerChannel


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, rule: str
) -> None:
    """Refuses a Python number outside ``[low, high]``; arrays pass unchecked.

    Args:
      name: name of the argument.
      value: what was given.
      low: smallest allowed value.
      high: largest allowed value.
      rule: what is expected, for the message.

    Raises:
      TypeError: if the value is neither a number nor an array.
      ValueError: if it is a number that breaks the rule.
    """
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise TypeError(f"{name} must be {rule}; got {value!r}")
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be {rule}; got {value!r}")


def check_momentum(momentum: Any) -> None:
    """Refuses a Python number outside ``[0, 1)``; arrays pass unchecked.

    Args:
      momentum: what was given.

    Raises:
      TypeError: if it is neither a number nor an array.
      ValueError: if it is a number outside.
    """
    high = math.nextafter(1, 0)
    check_number("momentum", momentum, low=0, high=high, rule="a number in [0, 1)")


def as_strength(strength: StrengthLike) -> Strength:
    """Reads a number or a schedule as a :class:`Strength`.

    Args:
      strength: a :class:`Strength`, a number, or a schedule (``step -> number``,
        counted from 0 as everywhere in Optax; negative values count as 0).

    Returns:
      A :class:`Strength`.

    Raises:
      ValueError: if a number is negative or not finite.
      TypeError: if it is none of these.
    """
    if isinstance(strength, Strength):
        return strength
    if callable(strength):
        return _follow(strength)
    check_number(
        "strength",
        strength,
        low=0,
        rule="a non-negative number, a schedule or a Strength",
    )
    return _follow(lambda count: strength)


def ramp_strength(
    value: chex.Numeric, begin_step: int, end_step: int, *, power: float = 1.0
) -> Strength:
    """A threshold that rises from 0 to ``value`` between two steps, then stays.

    Args:
      value: threshold from ``end_step`` on, in parameter units.
      begin_step: last step at which the threshold is 0.
      end_step: first step at which it is ``value``.
      power: exponent of the rise; 1 is linear.

    Returns:
      A :class:`Strength`.

    Raises:
      ValueError: if ``value`` or ``power`` is negative or the steps are not in order.
      TypeError: if a step is not an integer.
    """
    check_number("value", value, low=0, rule="a non-negative number")
    check_number("power", power, low=0, rule="a non-negative number")
    _check_steps(begin_step, end_step)

    def schedule(count: Any) -> Any:
        done = (count + 1 - begin_step) / (end_step - begin_step)
        return value * jnp.clip(done, 0, 1) ** power

    return _follow(schedule)


def valley_strength(
    c: chex.Numeric,
    mu: chex.Numeric,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: chex.Numeric | None = None,
) -> Strength:
    """The tuning function of gRDA, ``g(n, γ) = c √γ (n γ)^μ``.

    Under a learning-rate schedule it grows by the increments
    ``c γ^(μ+½) (n^μ − (n−1)^μ)`` at the current rate, as gRDA's released code does.
    With momentum ``β`` the effective rate ``γ / (1 − β)`` counts.

    A rule of thumb: choose ``mu`` between 0.51 and 0.7, then the largest ``c`` that
    keeps the loss of the first epochs at that of plain SGD.

    Args:
      c: scale, at least 0; 0 gives plain SGD.
      mu: exponent, strictly between ½ and 1.
      learning_rate: the rate ``γ`` or its schedule.
      momentum: the momentum ``β`` of the base optimizer, if any. Both may be left out
        inside :func:`sdp_jax.altsdp`, which fills in its own if its base is a learning
        rate.

    Returns:
      A :class:`Strength`.

    Raises:
      ValueError: if ``c`` is negative, ``mu`` outside (½, 1), the rate negative or the
        momentum outside [0, 1).
      TypeError: if one of them is not a number.

    References:
      Chao, Wang, Xing, Cheng, "Directional Pruning of Deep Neural Networks", NeurIPS
      2020, arXiv 2006.09358; its use for groups is our reading of Li, Liu, Shao, Wang,
      Geng, "Structured Directional Pruning", arXiv 2107.05328.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> strength = sdp_jax.valley_strength(c=1.0, mu=0.75, learning_rate=0.01)
      >>> state = strength.init({"hidden": 2}, {"hidden": 1})
      >>> norms = {"hidden": jnp.array([3., 4.])}
      >>> thresholds, state = strength.update(state, norms, {"hidden": 1})
      >>> [f"{t:.4f}" for t in thresholds["hidden"]]  # 1 · 0.01^½ · 0.01^¾
      ['0.0032', '0.0032']
    """
    check_number("c", c, low=0, rule="a non-negative number")
    check_number("mu", mu, low=0, rule="a number strictly between 0.5 and 1")
    if not isinstance(mu, jax.Array) and not 0.5 < mu < 1:
        raise ValueError(f"mu must be a number strictly between 0.5 and 1; got {mu!r}")
    if momentum is not None:
        check_momentum(momentum)
    if learning_rate is not None and not callable(learning_rate):
        check_number(
            "learning_rate", learning_rate, low=0, rule="a non-negative number"
        )

    def bind(rate: Any, beta: Any) -> Strength:
        return valley_strength(
            c,
            mu,
            rate if learning_rate is None else learning_rate,
            momentum=beta if momentum is None else momentum,
        )

    def init(sizes: Sizes, floors: prox.Floors) -> ValleyState:
        del sizes, floors
        if learning_rate is None:
            raise ValueError(
                "valley_strength needs learning_rate= here (a number or the schedule "
                "of the base optimizer, and momentum= if it has one): altsdp fills "
                "them in only where its own base is a learning rate"
            )
        dtype = jnp.result_type(float)
        # Two arrays, not one twice: a donated state must not hold a buffer two times.
        return ValleyState(
            jnp.zeros((), jnp.int32), jnp.zeros((), dtype), jnp.zeros((), dtype)
        )

    def update(
        state: ValleyState, norms: Norms, floors: prox.Floors
    ) -> tuple[Thresholds, ValleyState]:
        assert learning_rate is not None
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = jnp.asarray(optax.safe_increment(state.count))
        dtype = state.total.dtype
        rate = jnp.asarray(rate, dtype)
        if momentum is not None:
            rate = rate / (1 - jnp.asarray(momentum, dtype))
        n = count.astype(dtype)
        exponent = jnp.asarray(mu, dtype)
        # n^μ − (n−1)^μ without cancellation; at n = 1 the logarithm is −∞: fine.
        growth = -(n**exponent) * jnp.expm1(exponent * jnp.log1p(-1 / n))
        step = jnp.asarray(c, dtype) * rate ** (exponent + 0.5) * growth - state.carry
        total = state.total + step
        carry = (total - state.total) - step
        return _same_for_all(total, norms, floors), ValleyState(count, total, carry)

    complete = learning_rate is not None and momentum is not None
    return Strength(init, update, None if complete else bind)


def target_sparsity(
    fraction: float,
    begin_step: int,
    end_step: int,
    *,
    per_dimension: bool = False,
    power: float = 3.0,
) -> Strength:
    """Prunes exactly the asked-for share of channels by a given step.

    At step ``n`` the threshold is the norm below which the share
    ``fraction · (1 − (1 − (n − begin) / (end − begin))^power)`` of all channels lies;
    over the first 30 % of the ramp it rises to there from zero, linearly. Until
    ``end_step`` channels may return; after it the set stays fixed and the thresholds
    too, while training goes on. ``fraction`` is rounded to whole channels.

    Args:
      fraction: share of channels that are zero from ``end_step`` on, in [0, 1). After
        a cut it counts the channels of the small model: 0 prunes no further.
      begin_step: last step without pruning.
      end_step: number of updates after which the share is reached.
      per_dimension: rank the channels within each dimension (every layer loses the
        same share) instead of all together.
      power: exponent of the rise; 3 is the cubic ramp of Zhu and Gupta 2017.

    Returns:
      A :class:`Strength`. Its ``init`` raises ``ValueError`` if the floors leave fewer
      channels to prune than asked for. Floors that are arrays cannot be checked there:
      where they forbid the share, they win.

    Raises:
      ValueError: if ``fraction`` is outside [0, 1), ``power`` not positive or the steps
        are not in order.
      TypeError: if ``fraction`` or ``power`` is not a number or a step not an integer.

    References:
      The ramp: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> strength = sdp_jax.target_sparsity(0.5, begin_step=0, end_step=1)
      >>> state = strength.init({"hidden": 4}, {"hidden": 1})
      >>> norms = {"hidden": jnp.array([1., 4., 2., 3.])}
      >>> thresholds, state = strength.update(state, norms, {"hidden": 1})
      >>> print(thresholds["hidden"])
      [inf  2. inf  2.]
    """
    check_number("fraction", fraction, low=0, rule="a number in [0, 1)")
    if isinstance(fraction, jax.Array) or fraction >= 1:
        raise ValueError(f"fraction must be a number in [0, 1); got {fraction!r}")
    check_number("power", power, low=1e-6, rule="a positive number")
    _check_steps(begin_step, end_step)

    def wanted(size: int) -> int:
        return round(fraction * size)

    def init(sizes: Sizes, floors: prox.Floors) -> TargetState:
        blocks = [[name] for name in sizes] if per_dimension else [list(sizes)]
        for names in blocks:
            size = sum(sizes[name] for name in names)
            held = [floors.get(name, 0) for name in names]
            if any(isinstance(f, jax.Array) for f in held):
                continue
            if size - wanted(size) < sum(held):
                what = f"dimension {names[0]!r}" if per_dimension else "the model"
                raise ValueError(
                    f"target_sparsity({fraction}) wants {wanted(size)} of the {size} "
                    f"channels of {what} to be zero, but the floors keep {sum(held)}; "
                    "lower the fraction or the floor"
                )
        zeros = jnp.zeros((sum(sizes.values()),), jnp.result_type(float))
        return TargetState(jnp.zeros((), jnp.int32), PerChannel(zeros))

    def update(
        state: TargetState, norms: Norms, floors: prox.Floors
    ) -> tuple[Thresholds, TargetState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        done = jnp.clip((count - begin_step) / (end_step - begin_step), 0, 1)
        # Division may round: at the end the share is exact.
        final = count >= end_step
        share = jnp.where(final, 1, 1 - (1 - done) ** power)
        rise = jnp.where(final, 1, jnp.minimum(1, done / RISE))
        old = state.thresholds.per_channel

        def ranked() -> jax.Array:
            blocks = [[name] for name in norms] if per_dimension else [list(norms)]
            found: Thresholds = {}
            for names in blocks:
                size = sum(norms[name].shape[0] for name in names)
                block = {name: norms[name] for name in names}
                found |= _rank_block(block, floors, share * wanted(size), rise)
            return join_channels(found).astype(old.dtype)

        fixed = jax.lax.cond(count > end_step, lambda: old, ranked)
        flat = join_channels(norms)
        held = prox.keep_alive(flat, fixed.astype(flat.dtype))
        flat = jnp.where(jnp.isinf(fixed), jnp.inf, held)
        thresholds = split_channels(flat, {k: v.shape[0] for k, v in norms.items()})
        return thresholds, TargetState(count, PerChannel(fixed))

    return Strength(init, update)


def _rank_block(
    norms: Norms, floors: prox.Floors, wanted: jax.Array, rise: jax.Array
) -> Thresholds:
    """Thresholds that zero the ``⌊wanted⌋`` smallest channels that floors permit.

    While ``rise`` is below 1, they are that share of these thresholds.
    """
    protected = {k: prox.largest(v, floors.get(k, 0)) for k, v in norms.items()}
    free = jnp.concatenate(
        [jnp.where(protected[k], jnp.inf, v) for k, v in norms.items()]
    )
    order = jnp.argsort(free, stable=True)
    size = free.shape[0]
    rank = jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size, dtype=jnp.int32))
    # float32 may put a whole number a hair below itself.
    count = jnp.floor(wanted + 1e-3).astype(jnp.int32)
    ascending = free[order]
    below = jnp.where(count > 0, ascending[jnp.maximum(count - 1, 0)], 0)
    above = ascending[jnp.minimum(count, size - 1)]
    part = jnp.clip(wanted - count, 0, 1)
    level = below + jnp.where(jnp.isinf(above), 0, part * (above - below))
    # Floors that are arrays were not checked against the target: the floor wins.
    keep = join_channels(protected)
    pruned = (rank < count) & ~keep & (rise >= 1)
    thresholds, start = {}, 0
    for name, v in norms.items():
        stop = start + v.shape[0]
        gone = pruned[start:stop]
        held = prox.hold_floor(v, rise * level, floors.get(name, 0))
        thresholds[name] = jnp.where(gone, jnp.inf, held)
        start = stop
    return thresholds


def _follow(schedule: optax.Schedule) -> Strength:
    """The strength ``schedule(count)``, the same for all channels."""

    def init(sizes: Sizes, floors: prox.Floors) -> ScheduleState:
        del sizes, floors
        return ScheduleState(jnp.zeros((), jnp.int32))

    def update(
        state: ScheduleState, norms: Norms, floors: prox.Floors
    ) -> tuple[Thresholds, ScheduleState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        value = jnp.maximum(schedule(state.count), 0)
        thresholds = _same_for_all(value, norms, floors)
        return thresholds, ScheduleState(count)

    return Strength(init, update)


def _same_for_all(value: Any, norms: Norms, floors: prox.Floors) -> Thresholds:
    return {
        name: prox.hold_floor(v, value, floors.get(name, 0))
        for name, v in norms.items()
    }


def _check_steps(begin_step: Any, end_step: Any) -> None:
    for name, step in (("begin_step", begin_step), ("end_step", end_step)):
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(
                f"{name} must be an integer number of updates; got {step!r}"
            )
    if not 0 <= begin_step < end_step < 2**31:
        raise ValueError(
            "steps must satisfy 0 <= begin_step < end_step < 2**31; got "
            f"begin_step={begin_step}, end_step={end_step}"
        )
