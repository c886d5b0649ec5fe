"""Structured Probabilistic Pruning: channels that exist with a probability."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import segments
from sdp_jax.base import (
    as_base,
    check_inexact,
    check_params,
    need_params,
    step_to,
    transformation,
    wide_copy,
)
from sdp_jax.channels import PerChannel, Term, channel_sums, magnitude
from sdp_jax.checks import check_whole
from sdp_jax.entries import keep_channels
from sdp_jax.groups import Groups
from sdp_jax.methods.ranking import (
    check_increment,
    is_due,
    pruned_numbers,
    rank_changes,
)


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


def spp(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    sparsity: float | Mapping[str, float],
    key: jax.Array,
    *,
    every: int,
    amplitude: chex.Numeric = 0.05,
    ratio: chex.Numeric = 0.25,
    begin_step: int = 0,
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
        whole channels; a number, or one for each name (others lose none). It is one of
        the dense model: with the groups that a cut has left it goes on.
      key: a key of ``jax.random``.
      every: updates from one change of the probabilities to the next.
      amplitude: ``A`` of :func:`ranking_increment`, the largest change.
      ratio: ``u`` of :func:`ranking_increment`.
      begin_step: number of updates before the probabilities begin to change.
      min_channels: channels that are not pruned in each dimension; a number, or one for
        each name. The masks of single updates may drop more.

    Returns:
      An Optax transformation, which must be the last piece of a chain; its ``update``
      needs ``params``. Dropped channels are exactly zero: to cut only what is pruned
      for good, look for zeros in :func:`spp_params`.

    Raises:
      ValueError: if an argument is out of range, ``min_channels`` forbids the sparsity,
        or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Wang, Zhang, Wang, Hu, "Structured Probabilistic Pruning for Convolutional Neural
      Network Acceleration", BMVC 2018, arXiv 1709.06994.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
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
    numbers = pruned_numbers(groups, sparsity, min_channels)
    check_increment(amplitude, ratio)
    check_whole("every", every, low=1)
    check_whole("begin_step", begin_step)
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"key must be a key of jax.random, as jax.random.key(0) makes; got {key!r}"
        )
    optimizer = optax.with_extra_args_support(as_base(base))

    def init(params: optax.Params) -> SPPState:
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

    def update(
        updates: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        count = jnp.asarray(optax.safe_increment(state.count))
        grads = keep_channels(groups, updates, state.mask.per_channel)
        grads = jax.tree.map(lambda g, v: g.astype(v.dtype), grads, state.shadow)
        steps, base_state = optimizer.update(
            grads, state.base, state.shadow, **extra_args
        )
        shadow = jax.tree.map(lambda v, u: v + u.astype(v.dtype), state.shadow, steps)

        old = state.probabilities.per_channel
        gone = old == 0
        norms = channel_sums(groups, Term(magnitude, (shadow,)))[0]
        _, change = rank_changes(groups, numbers, norms, gone, amplitude, ratio)
        lowered = jnp.clip(old - change.astype(old.dtype), 0, 1)
        lowered = jnp.where(gone | ~is_due(count, every, begin_step), old, lowered)
        complete = segments.sum_over(lowered == 0, groups.owner) >= numbers
        chances = jnp.where(complete & (lowered > 0), 1, lowered)

        next_key, draw = jax.random.split(state.key)
        mask = jax.random.uniform(draw, chances.shape, chances.dtype) < chances
        point = keep_channels(groups, shadow, mask)
        new_state = SPPState(
            base_state, shadow, PerChannel(chances), PerChannel(mask), count, next_key
        )
        return step_to(point, params), new_state

    return transformation("spp", init, update)


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
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
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
