"""How strong to prune when: tuning functions and ramps.

A :class:`Strength` turns the channel norms of a step into one threshold per channel.
Step ``n`` counts updates: the first update is ``n = 1``. All thresholds are in the
units of the parameters (divided by the channel weight ``k``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.checks import check_momentum, check_number, check_steps
from sdp_jax.groups import Groups


class Strength(NamedTuple):
    """A rule that gives thresholds, as a pair of pure functions.

    Attributes:
      init: ``init(groups, floors) -> state``; raises ``ValueError`` if the rule cannot
        be met for these groups and floors. ``floors`` has for each dimension, in order,
        the number of channels that stay (see :func:`sdp_jax.prox.resolve_floors`).
      update: ``update(state, norms, groups, floors) -> (thresholds, state)``, with
        weighted norms and thresholds ``(num_channels,)``. The thresholds must leave so
        many channels alive (see :func:`sdp_jax.prox.hold_floors`).
      bind: for a rule that wants the learning rate and momentum of the base optimizer:
        ``bind(learning_rate, momentum) -> Strength``, which keeps those that the rule
        was given; otherwise ``None``.
      score: for a rule that removes channels and does not shrink the others, whose
        thresholds are 0 or infinite: ``score(state, groups, params)``, what it gets
        instead of norms where no host brings scores of its own; otherwise ``None``.
      is_due: with ``score``: ``is_due(state)``, whether the next update looks at it;
        where it does not, the norms are not numbers.
    """

    init: Callable[[Groups, prox.Floors], Any]
    update: Callable[[Any, jax.Array, Groups, prox.Floors], tuple[jax.Array, Any]]
    bind: Callable[[Any, Any], "Strength"] | None = None
    score: Callable[[Any, Groups, Any], jax.Array] | None = None
    is_due: Callable[[Any], jax.Array] | None = None


StrengthLike: TypeAlias = Strength | float | jax.Array | optax.Schedule


class ScheduleState(NamedTuple):
    """Number of updates so far of a strength that follows a schedule."""

    count: jax.Array


class ValleyState(NamedTuple):
    """Updates so far, ``g``, and what rounding has kept from it."""

    count: jax.Array
    total: jax.Array
    carry: jax.Array


def as_strength(strength: StrengthLike) -> Strength:
    """Reads a number or a schedule (counted from 0) as a :class:`Strength`."""
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

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 1))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> strength = sdp_jax.ramp_strength(1.0, begin_step=0, end_step=2, power=1.0)
      >>> state, norms = strength.init(groups, [0]), jnp.array([9.])
      >>> for _ in range(3):
      ...     thresholds, state = strength.update(state, norms, groups, [0])
      >>> print(thresholds)
      [1.]
    """
    check_number("value", value, low=0, rule="a non-negative number")
    check_number("power", power, low=0, rule="a non-negative number")
    check_steps(begin_step, end_step)

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
      >>> params = {"w": jnp.ones((2, 2))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> strength = sdp_jax.valley_strength(c=1.0, mu=0.75, learning_rate=0.01)
      >>> state, norms = strength.init(groups, [1]), jnp.array([3., 4.])
      >>> thresholds, state = strength.update(state, norms, groups, [1])
      >>> [f"{t:.4f}" for t in thresholds]  # 1 · 0.01^½ · 0.01^¾
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

    def init(groups: Groups, floors: prox.Floors) -> ValleyState:
        del groups, floors
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
        state: ValleyState, norms: jax.Array, groups: Groups, floors: prox.Floors
    ) -> tuple[jax.Array, ValleyState]:
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
        thresholds = prox.hold_floors(groups, norms, total, floors)
        return thresholds, ValleyState(count, total, carry)

    complete = learning_rate is not None and momentum is not None
    return Strength(init, update, None if complete else bind)


def _follow(schedule: optax.Schedule) -> Strength:
    """The strength ``schedule(count)``, the same for all channels."""

    def init(groups: Groups, floors: prox.Floors) -> ScheduleState:
        del groups, floors
        return ScheduleState(jnp.zeros((), jnp.int32))

    def update(
        state: ScheduleState, norms: jax.Array, groups: Groups, floors: prox.Floors
    ) -> tuple[jax.Array, ScheduleState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        value = jnp.maximum(schedule(state.count), 0)
        thresholds = prox.hold_floors(groups, norms, value, floors)
        return thresholds, ScheduleState(count)

    return Strength(init, update)
