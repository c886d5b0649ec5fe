"""Structured Probabilistic Pruning: channels that exist with a probability."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import (
    as_base,
    check_inexact,
    check_kind,
    check_params,
    need_params,
    step_to,
    wide_copy,
)
from sdp_jax.channels import PerChannel
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.methods.dpm import channel_entries
from sdp_jax.methods.filter_norm import l1_norm
from sdp_jax.tree import PyTree

# How many channels of each dimension have to go.
Numbers: TypeAlias = dict[str, int | jax.Array]

# Far beyond the n-th rank the increment grows exponentially; it is cut off at e to this
# power, which is finite in float32.
MAX_EXPONENT = 60.0


class SPPState(NamedTuple):
    """State of :func:`spp`.

    Attributes:
      base: state of the base optimizer, which trains the dense weights.
      shadow: the dense weights, shaped like the parameters, at least float32.
      probabilities: with which probability each channel exists; 0 is for good.
      mask: which channels exist in the parameters that were emitted last.
      count: number of updates so far, int32 scalar.
      key: the random key of the next update.
    """

    base: Any
    shadow: optax.Params
    probabilities: PerChannel
    mask: PerChannel
    count: jax.Array
    key: jax.Array


def ranking_increment(
    rank: chex.Numeric,
    count: chex.Numeric,
    amplitude: chex.Numeric = 0.05,
    ratio: chex.Numeric = 0.25,
) -> jax.Array:
    """How much the pruning probability of the channel of a rank rises, ``Δ(r)``.

    With ``α = ln(2/u) / n`` and ``N₁ = −ln(u) / α``::

        Δ(r) = A exp(−α r)                      for r < N₁
        Δ(r) = 2uA − A exp(−α (2 N₁ − r))       otherwise

    It falls from ``A`` at rank 0 over ``uA`` at ``N₁``, around which it is
    point-symmetric, to exactly 0 at rank ``n``. Beyond it is negative: channels that
    are not among the ``n`` to be pruned recover. (Beyond ``e^60`` it grows no further.)

    Args:
      rank: ``r``, ranks from 0 (the least important channel) on, any shape.
      count: ``n``, how many channels are to be pruned, broadcastable to ``rank``; where
        it is not positive, the increment is 0.
      amplitude: ``A``, the increment of rank 0.
      ratio: ``u``, the increment at ``N₁`` as a share of ``A``, in (0, 1); the smaller,
        the more the increments differ.

    Returns:
      Increments of the shape of ``rank``, floating-point.

    Raises:
      ValueError: if ``amplitude`` is not positive or ``ratio`` is outside (0, 1).

    References:
      Wang, Zhang, Wang, Hu, "Structured Probabilistic Pruning for Convolutional Neural
      Network Acceleration", BMVC 2018, arXiv 1709.06994.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> print(methods.ranking_increment(jnp.array([0, 39, 48]), 40).round(4))
      [ 0.05    0.0013 -0.0129]
    """
    check_ranking(amplitude, ratio)
    dtype = jnp.result_type(float)
    n = jnp.asarray(count, dtype)
    share = jnp.asarray(rank, dtype) / jnp.where(n > 0, n, 1)
    # In r/n the border N₁/n is a constant, and the second piece is −2uA (e^x − 1).
    size, u = jnp.asarray(amplitude, dtype), jnp.asarray(ratio, dtype)
    rate = jnp.log(2 / u)
    first = size * jnp.exp(-rate * share)
    second = -2 * u * size * jnp.expm1(jnp.minimum(rate * (share - 1), MAX_EXPONENT))
    found = jnp.where(rate * share < -jnp.log(u), first, second)
    return jnp.where(n > 0, found, 0)


def spp(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    sparsity: float | Mapping[str, float],
    key: jax.Array,
    *,
    every: int,
    amplitude: chex.Numeric = 0.05,
    ratio: chex.Numeric = 0.25,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
    begin: int = 0,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Trains as ``base`` does, while channels are dropped with rising probability.

    Dense weights ``v`` are kept beside the parameters ``w``. Each channel has a
    probability of existence ``π``, at first 1, and each update is ::

        v ← v + base step at (mask ⊙ gradient)        a dropped channel gets none
        π ← clip(π − Δ(r), 0, 1)                      every ``every`` updates
        w ← mask ⊙ v,  mask ~ Bernoulli(π)            a new mask for each update

    Here ``r`` is the channel's rank by the L1 norm of ``v`` among those of its
    dimension that are not pruned yet, and ``Δ`` is :func:`ranking_increment` for the
    ``n`` channels that the dimension has still to lose. A channel whose ``π`` has
    reached 0 is pruned for good; until then it may recover. Once a dimension has lost
    its number of channels, the ``π`` of the others are set to 1, so nothing random is
    left in it; when this is so in all dimensions, the parameters are final in form.
    Before that, :func:`spp_params` gives parameters without random masks.

    Our choices: channels (all producers) in place of the columns of a filter matrix;
    the latest norms, without a history; the masked gradient, which the paper's masked
    weights imply; and that a dropped channel still moves by what ``base`` does without
    a gradient (momentum, weight decay).

    Args:
      base: a learning rate or schedule (then SGD), or any Optax transformation; it
        trains ``v``, so its state is at least float32.
      groups: the channel dimensions.
      sparsity: share of its channels that each dimension loses, in [0, 1), rounded to
        whole channels; a number, or one for each name (others lose none). After a cut
        it counts the channels of the small model: 0 prunes no further.
      key: a key of ``jax.random``.
      every: updates from one change of the probabilities to the next.
      amplitude: ``A`` of :func:`ranking_increment`, the largest change.
      ratio: ``u`` of :func:`ranking_increment`.
      momentum: momentum of the SGD, if ``base`` is a learning rate.
      nesterov: Nesterov momentum, likewise.
      begin: number of updates before the probabilities begin to change.
      min_channels: channels that are not pruned in each dimension; a number, or one for each
        name. The masks of single updates may drop more.

    Returns:
      An Optax transformation, which must be the last piece of a chain; its ``update``
      needs ``params``. Dropped channels are exactly zero.

    Raises:
      ValueError: if an argument is out of range, the floor forbids the sparsity, or the
        parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Wang, Zhang, Wang, Hu, "Structured Probabilistic Pruning for Convolutional Neural
      Network Acceleration", BMVC 2018, arXiv 1709.06994.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> tx = methods.spp(0.1, groups, 0.5, jax.random.key(0), every=1, amplitude=0.5)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(state.probabilities.per_channel)
      [1.  0.5]
      [1. 0.]
      >>> print(params["w"])
      [[3. 0.]
       [4. 0.]]
    """
    numbers = pruned_numbers(groups, sparsity, floor)
    check_ranking(amplitude, ratio)
    check_interval(every, begin)
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"key must be a key of jax.random, as jax.random.key(0) makes; got {key!r}"
        )
    optimizer = optax.with_extra_args_support(as_base(base, momentum, nesterov))
    score = l1_norm()

    def init_fn(params: optax.Params) -> SPPState:
        check_inexact(params)
        check_params(groups, params)
        size = (groups.num_channels,)
        return SPPState(
            optimizer.init(jax.tree.map(wide_copy, params)),
            jax.tree.map(wide_copy, params),
            PerChannel(jnp.ones(size, jnp.result_type(float))),
            PerChannel(jnp.ones(size, bool)),
            jnp.zeros((), jnp.int32),
            jnp.array(key, copy=True),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SPPState]:
        params = need_params(params, updates, "spp")
        count = jnp.asarray(optax.safe_increment(state.count))
        grads = keep_channels(groups, updates, state.mask.per_channel)
        grads = jax.tree.map(lambda g, v: g.astype(v.dtype), grads, state.shadow)
        steps, base_state = optimizer.update(
            grads, state.base, state.shadow, **extra_args
        )
        shadow = jax.tree.map(lambda v, u: v + u.astype(v.dtype), state.shadow, steps)

        norms = score(groups, shadow)
        old = state.probabilities.per_channel
        due = is_due(count, every, begin)
        new = {}
        for name, chance in old.items():
            gone = chance == 0
            left = numbers[name] - jnp.sum(gone)
            rank = prox.ranks(jnp.where(gone, jnp.inf, norms[name]))
            change = ranking_increment(rank, left, amplitude, ratio)
            lowered = jnp.clip(chance - change.astype(chance.dtype), 0, 1)
            lowered = jnp.where(gone | ~due, chance, lowered)
            complete = jnp.sum(lowered == 0) >= numbers[name]
            new[name] = jnp.where(complete & (lowered > 0), 1, lowered)
        chances = new

        next_key, draw = jax.random.split(state.key)
        mask = jax.random.uniform(draw, chances.shape, chances.dtype) < chances
        point = keep_channels(groups, shadow, mask)
        new_state = SPPState(
            base_state, shadow, PerChannel(chances), PerChannel(mask), count, next_key
        )
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def spp_params(
    opt_state: optax.OptState, groups: Groups, params: optax.Params
) -> optax.Params:
    """The parameters of :func:`spp` without random masks.

    These are the dense weights, with only those channels zero that are pruned for good.
    Use them to evaluate or to cut while some probabilities still lie between 0 and 1;
    after that they are the parameters themselves, up to rounding.

    Args:
      opt_state: an optimizer state with one :class:`SPPState` in it.
      groups: the channel dimensions.
      params: the current parameters; the result takes their dtypes.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if there is not exactly one such state, or the trees do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((1, 2))}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> tx = methods.spp(0.1, groups, 0.5, jax.random.key(0), every=1)
      >>> print(methods.spp_params(tx.init(params), groups, params)["w"])
      [[1. 1.]]
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, SPPState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"expected one state of spp in this tree, found {len(found)}; pass the "
            "optimizer state that spp made"
        )
    params = need_params(params, found[0].shadow, "spp_params")
    alive = found[0].probabilities.per_channel > 0
    point = keep_channels(groups, found[0].shadow, alive)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), point, params)


def pruned_numbers(
    groups: Groups,
    sparsity: float | Mapping[str, float],
    min_channels: int | jax.Array | Mapping[str, int],
) -> Numbers:
    """How many channels each dimension loses at a share of them.

    Args:
      groups: the channel dimensions.
      sparsity: the share, a number or one for each name (others lose none).
      min_channels: channels that stay, a number or one for each name. Where an array forbids
        the share, it wins.

    Returns:
      A number for each dimension.

    Raises:
      ValueError: if a share is outside [0, 1), a name is unknown, or the floor forbids
        the share.
      TypeError: if one is of another kind.
    """
    check_kind(groups)
    floors = prox.resolve_floors(groups, floor)
    shares: Mapping[str, float] = (
        sparsity
        if isinstance(sparsity, Mapping)
        else dict.fromkeys(groups.sizes, sparsity)
    )
    unknown = sorted(set(shares) - set(groups.sizes))
    if unknown:
        raise ValueError(
            f"sparsity names dimensions that do not exist: {unknown}; there are "
            f"{list(groups.sizes)}"
        )
    numbers: Numbers = {}
    for name, size in groups.sizes.items():
        share, held = shares.get(name, 0), floors[name]
        rule = "a number in [0, 1), or one for each dimension"
        if isinstance(share, jax.Array):
            raise TypeError(f"sparsity must be {rule}, not an array; got {share!r}")
        high = math.nextafter(1, 0)
        check_number("sparsity", share, low=0, high=high, rule=rule)
        number = round(share * size)
        if isinstance(held, jax.Array):
            numbers[name] = jnp.minimum(number, size - held)
        elif number > size - held:
            raise ValueError(
                f"sparsity {share} wants {number} of the {size} channels of dimension "
                f"{name!r} to be zero, but the floor keeps {held}; lower the sparsity "
                "or the floor"
            )
        else:
            numbers[name] = number
    return numbers


def check_ranking(amplitude: Any, ratio: Any) -> None:
    """Refuses parameters of :func:`ranking_increment` that are out of range.

    Args:
      amplitude: ``A``.
      ratio: ``u``.

    Raises:
      ValueError: if ``amplitude`` is not positive or ``ratio`` outside (0, 1).
      TypeError: if one is not a number.
    """
    rule = "a positive number"
    check_number("amplitude", amplitude, low=math.nextafter(0, 1), rule=rule)
    low, high = math.nextafter(0, 1), math.nextafter(1, 0)
    check_number("ratio", ratio, low=low, high=high, rule="a number in (0, 1)")


def check_interval(every: Any, begin: Any) -> None:
    """Refuses numbers of updates that are none.

    Args:
      every: updates from one change to the next.
      begin: updates before the first.

    Raises:
      ValueError: if ``every`` is below 1 or ``begin`` below 0.
      TypeError: if one is not an integer.
    """
    for name, value, low in (("every", every, 1), ("begin", begin, 0)):
        rule = f"an integer number of updates, at least {low}"
        if isinstance(value, float | np.floating):
            raise TypeError(f"{name} must be {rule}; got {value!r}")
        check_number(name, value, low=low, rule=rule)


def is_due(count: jax.Array, every: int, begin: int) -> jax.Array:
    """Whether something happens at this update, counted from 1."""
    return (count > begin) & ((count - begin) % every == 0)


def keep_channels(groups: Groups, tree: PyTree, keep: jax.Array) -> PyTree:
    """Exact zeros in the producers of the other channels, also where they are NaN.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      keep: which channels to keep, a Boolean vector ``(num_channels,)``.

    Returns:
      A tree of the same structure, shapes and dtypes.
    """
    gone = channel_entries(groups, tree, ~keep)
    return jax.tree.map(lambda x, g: jnp.where(g, 0, x).astype(x.dtype), tree, gone)
