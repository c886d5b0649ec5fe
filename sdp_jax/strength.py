"""How strong to prune when: tuning functions, ramps, and controllers that hit a target.

A :class:`Strength` turns the channel norms of a step into one threshold per channel.
Step ``n`` counts updates: the first update is ``n = 1``. All thresholds are in the
units of the parameters (divided by the channel weight ``k``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.counts import Polynomial, flop_counts, parameter_counts
from sdp_jax.groups import Groups, PerChannel, PyTree, join_channels, split_channels

Sizes: TypeAlias = Mapping[str, int]
Norms: TypeAlias = Mapping[str, jax.Array]
Thresholds: TypeAlias = dict[str, jax.Array]
# The share that is left of a target when this many channels of each dimension are.
ShareLeft: TypeAlias = Callable[[jax.Array], jax.Array]


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


def check_whole(name: str, value: Any, *, low: int = 0) -> None:
    """Refuses what is not an integer of at least ``low``.

    Args:
      name: name of the argument.
      value: what was given.
      low: smallest allowed value.

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is smaller, or beyond 32 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer number of updates; got {value!r}")
    if not low <= value < 2**31:
        raise ValueError(
            f"{name} must be a number of updates, at least {low} and below 2**31; got "
            f"{value!r}"
        )


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

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> strength = sdp_jax.ramp_strength(1.0, begin_step=0, end_step=2, power=1.0)
      >>> state = strength.init({"hidden": 1}, {"hidden": 0})
      >>> norms = {"hidden": jnp.array([9.])}
      >>> for _ in range(3):
      ...     thresholds, state = strength.update(state, norms, {"hidden": 0})
      >>> print(thresholds["hidden"])
      [1.]
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
    target: Literal["channels", "params", "flops"] = "channels",
    groups: Groups | None = None,
    fn: Callable[..., Any] | None = None,
    params: PyTree = None,
    inputs: Sequence[Any] = (),
    per_dimension: bool = False,
    power: float = 3.0,
) -> Strength:
    """Prunes exactly the asked-for share of channels, parameters or FLOPs.

    At step ``n`` the threshold is the norm below which those channels lie that make up
    the share ``fraction · (1 − (1 − (n − begin) / (end − begin))^power)`` of the
    target; over the first 30 % of the ramp it rises to there from zero, linearly. Until
    ``end_step`` channels may return; after it the set stays fixed and the thresholds
    too, while training goes on. A share of channels is rounded to whole channels; of
    parameters or FLOPs goes at least the share, and less than one channel more.

    Args:
      fraction: share of the target that is gone from ``end_step`` on, in [0, 1). After
        a cut it counts the channels of the small model: 0 prunes no further.
      begin_step: last step without pruning.
      end_step: number of updates after which the share is reached.
      target: what the share is of: ``"channels"``; ``"params"``, all entries of all
        leaves of the groups; ``"flops"`` of ``fn(params, *inputs)``, counted as
        :func:`sdp_jax.cost` counts those of the narrowed function.
      groups: the groups that are pruned, for ``"params"`` and ``"flops"``.
      fn: the function, for ``"flops"``.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``, likewise.
      inputs: its other arguments, likewise.
      per_dimension: rank the channels within each dimension (every layer loses the
        same share of its channels) instead of all together.
      power: exponent of the rise; 3 is the cubic ramp of Zhu and Gupta 2017.

    Returns:
      A :class:`Strength`. Its ``init`` raises ``ValueError`` if the floors leave fewer
      channels to prune than asked for. Floors that are arrays cannot be checked there:
      where they forbid the share, they win.

    Raises:
      ValueError: if ``fraction`` is outside [0, 1), ``power`` not positive, the steps
        are not in order, or the target lacks what it is counted on.
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
    counts = _count_target(target, groups, fn, params, inputs)

    def init(sizes: Sizes, floors: prox.Floors) -> TargetState:
        if counts is None:
            _check_channels(fraction, sizes, floors, per_dimension)
        else:
            assert groups is not None
            _check_counts(fraction, target, groups, counts, sizes, floors)
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
            sizes = [sum(norms[name].shape[0] for name in names) for names in blocks]
            if counts is None:
                wanted = [share * round(fraction * size) for size in sizes]
            else:
                assert groups is not None
                left = counts.share(list(groups.sizes.values()))
                goal = (1 - share * fraction) * (1 + 1e-6)  # rounding
                # Dictionaries that pass through jit come back in another order.
                order = np.asarray([list(norms).index(name) for name in groups.sizes])
                wanted = _wanted(
                    norms,
                    floors,
                    lambda widths: left(widths[order]),
                    goal,
                    final,
                    per_dimension,
                )
            found: Thresholds = {}
            for names, number in zip(blocks, wanted, strict=True):
                block = {name: norms[name] for name in names}
                found |= _rank_block(block, floors, number, rise)
            return join_channels(found).astype(old.dtype)

        fixed = jax.lax.cond(count > end_step, lambda: old, ranked)
        flat = join_channels(norms)
        held = prox.keep_alive(flat, fixed.astype(flat.dtype))
        flat = jnp.where(jnp.isinf(fixed), jnp.inf, held)
        thresholds = split_channels(flat, {k: v.shape[0] for k, v in norms.items()})
        return thresholds, TargetState(count, PerChannel(fixed))

    return Strength(init, update)


def adaptive_strength(strength: StrengthLike, power: float = 4.0) -> Strength:
    """Spares large channels: the same channels go, but those that stay shrink less.

    The threshold ``t`` of ``strength`` becomes ``t (t / ‖v_c‖)^(power − 1)`` for each
    channel, so that the group soft-threshold multiplies it by ::

        max(0, 1 − (t / ‖v_c‖)^power)

    With ``power=1`` nothing changes. With 2 it is the non-negative garrote, or one step
    of the adaptive group lasso; the larger it is, the nearer to a hard threshold. The
    factor is 0 at ``‖v_c‖ = t`` and rises from there without a jump, whatever the
    power.

    Args:
      strength: a :class:`Strength`, a number or a schedule.
      power: exponent, at least 1.

    Returns:
      A :class:`Strength`.

    Raises:
      ValueError: if ``power`` is below 1.
      TypeError: if an argument is of another kind.

    References:
      Breiman, "Better Subset Regression Using the Nonnegative Garrote", Technometrics
      1995; Zou, "The Adaptive Lasso and Its Oracle Properties", JASA 2006.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> strength = sdp_jax.adaptive_strength(1.0, power=2.0)
      >>> norms = {"hidden": jnp.array([0.5, 2., 4.])}
      >>> state = strength.init({"hidden": 3}, {"hidden": 1})
      >>> thresholds, _ = strength.update(state, norms, {"hidden": 1})
      >>> print(thresholds["hidden"])
      [1.   0.5  0.25]
    """
    inner = as_strength(strength)
    check_number("power", power, low=1, rule="a number of at least 1")

    def bind(rate: Any, momentum: Any) -> Strength:
        assert inner.bind is not None
        return adaptive_strength(inner.bind(rate, momentum), power)

    def update(state: Any, norms: Norms, floors: prox.Floors) -> tuple[Thresholds, Any]:
        thresholds, state = inner.update(state, norms, floors)
        return {
            name: _spare(norms[name], value, power)
            for name, value in thresholds.items()
        }, state

    return Strength(inner.init, update, None if inner.bind is None else bind)


def _spare(norms: jax.Array, thresholds: jax.Array, power: float) -> jax.Array:
    """``t (t / norm)^(power − 1)``, and ``t`` where that would be undefined."""
    usual = jnp.isfinite(thresholds) & (norms > 0)
    ratio = jnp.where(usual, thresholds, 0) / jnp.where(usual, norms, 1)
    # Below the threshold the channel is zero anyway; the power must not overflow.
    return jnp.where(
        usual, thresholds * jnp.minimum(ratio, 1) ** (power - 1), thresholds
    )


def _count_target(
    target: str,
    groups: Groups | None,
    fn: Callable[..., Any] | None,
    params: PyTree,
    inputs: Sequence[Any],
) -> Polynomial | None:
    """What a target counts, in the widths; ``None`` for channels."""
    given = {
        name
        for name, value in (("groups", groups), ("fn", fn), ("params", params))
        if value is not None
    }
    needs = {
        "channels": set(),
        "params": {"groups"},
        "flops": {"groups", "fn", "params"},
    }
    if target not in needs:
        raise ValueError(f"target is {target!r}; use 'channels', 'params' or 'flops'")
    if given != needs[target] or (len(inputs) > 0 and target != "flops"):
        raise ValueError(
            f"target={target!r} needs {sorted(needs[target]) or 'nothing more'}"
            f"{' and inputs' if target == 'flops' else ''}; got {sorted(given)}"
            f"{' and inputs' if len(inputs) > 0 else ''}"
        )
    if groups is None:
        return None
    if fn is None:
        return parameter_counts(groups)
    return flop_counts(groups, fn, params, *inputs)


def _check_channels(
    fraction: float, sizes: Sizes, floors: prox.Floors, per_dimension: bool
) -> None:
    for names in [[name] for name in sizes] if per_dimension else [list(sizes)]:
        size = sum(sizes[name] for name in names)
        held = [floors.get(name, 0) for name in names]
        wanted = round(fraction * size)
        if any(isinstance(f, jax.Array) for f in held) or size - wanted >= sum(held):
            continue
        what = f"dimension {names[0]!r}" if per_dimension else "the model"
        raise ValueError(
            f"target_sparsity({fraction}) wants {wanted} of the {size} channels of "
            f"{what} to be zero, but the floors keep {sum(held)}; lower the fraction "
            "or the floor"
        )


def _check_counts(
    fraction: float,
    target: str,
    groups: Groups,
    counts: Polynomial,
    sizes: Sizes,
    floors: prox.Floors,
) -> None:
    if dict(sizes) != groups.sizes:
        raise ValueError(
            f"the groups of target_sparsity have the dimensions {groups.sizes}, those "
            f"of the optimizer {dict(sizes)}; give both the same"
        )
    held = [floors.get(name, 0) for name in sizes]
    if any(isinstance(f, jax.Array) for f in held):
        return
    dense = counts.at(list(sizes.values()))
    least = counts.at([int(f) for f in held]) / max(dense, 1e-300)
    if least > 1 - fraction:
        raise ValueError(
            f"target_sparsity({fraction}, target={target!r}) cannot be met: where only "
            f"the floors are left, so are {least:.1%}; lower the fraction or the floor"
        )


def _wanted(
    norms: Norms,
    floors: prox.Floors,
    share_left: ShareLeft,
    goal: jax.Array,
    final: jax.Array,
    per_dimension: bool,
) -> list[jax.Array]:
    """How many channels of each block must go until ``goal`` of a count is left.

    Channels go in the order of their norms, or of their ranks within their dimensions
    as shares of these. While the target rises a part of a channel counts.
    """
    keys = []
    for name, v in norms.items():
        free = jnp.where(prox.largest(v, floors.get(name, 0)), jnp.inf, v)
        if per_dimension:
            rank = prox.ranks(free)
            share = (rank + 1) / jnp.maximum(jnp.isfinite(free).sum(), 1)
            free = jnp.where(jnp.isinf(free), jnp.inf, share)
        keys.append(free)
    sizes = [len(key) for key in keys]
    flat = jnp.concatenate(keys)
    place = prox.ranks(flat)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    most = jnp.isfinite(flat).sum()

    def gone(number: jax.Array) -> jax.Array:
        """Channels of each dimension among the first ``number``, parts included."""
        part = jnp.clip(number - place, 0, 1)
        return jax.ops.segment_sum(part, owner, len(sizes), indices_are_sorted=True)

    def left(number: jax.Array) -> jax.Array:
        widths = jnp.asarray(sizes) - gone(number.astype(flat.dtype))
        return share_left(widths)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> Any:
        low, high = between
        middle = (low + high) // 2
        enough = left(middle) <= goal
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = (jnp.zeros((), most.dtype), most)
    number, _ = jax.lax.fori_loop(0, len(flat).bit_length(), halve, start)
    before = left(jnp.maximum(number - 1, 0))
    part = (before - goal) / jnp.maximum(before - left(number), 1e-30)
    exact = jnp.where(number > 0, number - 1 + jnp.clip(part, 0, 1), 0)
    amount = jnp.where(final, number, exact)
    shares = gone(amount)
    return list(shares) if per_dimension else [amount]


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
    size = free.shape[0]
    rank = prox.ranks(free)
    # float32 may put a whole number a hair below itself.
    count = jnp.floor(wanted + 1e-3).astype(jnp.int32)
    ascending = jnp.sort(free)
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
