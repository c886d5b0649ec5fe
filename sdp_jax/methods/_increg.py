"""Incremental Regularization: weight decay that grows channel by channel."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import segments
from sdp_jax.base import (
    add_step,
    as_base,
    check_inexact,
    check_params,
    step_to,
    transformation,
)
from sdp_jax.channels import PerChannel, Term, channel_sums, magnitude
from sdp_jax.checks import check_number, check_whole
from sdp_jax.dimension import Dimension, Member
from sdp_jax.entries import add_decay, keep_channels
from sdp_jax.groups import Groups
from sdp_jax.methods.ranking import (
    check_increment,
    is_due,
    pruned_numbers,
    rank_changes,
)
from sdp_jax.tree import PyTree


class IncRegState(NamedTuple):
    """State of :func:`increg`.

    Attributes:
      base: state of the base optimizer.
      count: number of updates so far, int32 scalar.
      coefficients: the L2 coefficient of each channel.
      start: the L1 norm of each channel when the regularization began.
      gone: which channels are pruned.
    """

    base: Any
    count: jax.Array
    coefficients: PerChannel
    start: PerChannel
    gone: PerChannel


def increg(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    sparsity: float | Mapping[str, float],
    *,
    every: int,
    amplitude: chex.Numeric = 2.5e-4,
    ratio: chex.Numeric = 0.25,
    threshold: chex.Numeric = 1e-3,
    limit: chex.Numeric | None = None,
    begin_step: int = 0,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Trains as ``base`` does, with L2 regularization that rises on weak channels.

    Every ``every`` updates the coefficient of each channel changes by its rank ``r``
    among the channels of its dimension that are not pruned yet, by L1 norm::

        λ ← max(λ + Δ(r), 0)        Δ: ranking_increment for the n still to prune

    and the gradient of ``½ λ ‖w‖²`` is added in front of ``base`` at every update. The
    ``n`` weakest channels are thus shrunk more and more, while the others recover. A
    channel is pruned, exactly zero for good, as soon as its L1 norm is at most
    ``threshold`` times what it was when the regularization began, or ``λ`` has reached
    ``limit``; the weakest first, until its dimension has lost its number. From then on
    the ``λ`` of the others in the dimension are 0.

    Our choices: channels (all producers) in place of the columns of a filter matrix;
    the latest norms, where the authors' code averages ranks over time; a threshold
    relative to the initial norm; and ``λ = 0`` at the end. The authors' code prunes at
    a limit of ``λ`` alone. SGD is stable only while ``learning rate · λ`` stays below
    2: choose ``limit`` accordingly.

    Args:
      base: a learning rate or schedule (then SGD), or any Optax transformation.
      groups: the channel dimensions.
      sparsity: share of its channels that each dimension loses, in [0, 1), rounded to
        whole channels; a number, or one for each name (others lose none). It is one of
        the dense model: with the groups that a cut has left it goes on.
      every: updates from one change of the coefficients to the next (1 in the authors'
        code).
      amplitude: ``A`` of :func:`sdp_jax.methods.ranking_increment`, the largest change.
        The paper takes half the weight decay; the default is half of 5e-4.
      ratio: ``u`` of :func:`sdp_jax.methods.ranking_increment`.
      threshold: share of its initial norm at which a channel is pruned.
      limit: coefficient at which a channel is pruned; ``None`` for ``1e4 · amplitude``,
        as in the authors' code. A large number leaves it to the threshold.
      begin_step: number of updates before the regularization begins.
      min_channels: channels that stay in each dimension; a number, or one for each
        name.

    Returns:
      An Optax transformation, which must be the last piece of a chain; its ``update``
      needs ``params``.

    Raises:
      ValueError: if an argument is out of range, ``min_channels`` forbids the sparsity,
        or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Wang, Zhang, Wang, Yu, Hu, "Structured Pruning for Efficient ConvNets via
      Incremental Regularization", IJCNN 2019, arXiv 1811.08390.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = methods.increg(0.5, groups, 0.5, every=1, amplitude=0.5, threshold=0.3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"][0], state.coefficients.per_channel)
      [4.   0.75] [0.  0.5]
      [4.    0.375] [0. 1.]
      [4. 0.] [0. 0.]
    """
    numbers = pruned_numbers(groups, sparsity, min_channels)
    check_increment(amplitude, ratio)
    check_whole("every", every, low=1)
    check_whole("begin_step", begin_step)
    rule = "a number in [0, 1]"
    check_number("threshold", threshold, low=0, high=1, rule=rule)
    if limit is not None:
        check_number("limit", limit, low=0, rule="a non-negative number or None")
    highest = 1e4 * amplitude if limit is None else limit
    optimizer = optax.with_extra_args_support(as_base(base))

    def l1(tree: PyTree) -> jax.Array:
        return channel_sums(groups, Term(magnitude, (tree,)))[0]

    def is_producer(dimension: Dimension, member: Member) -> bool:
        return member.role == "producer"

    def init(params: optax.Params) -> IncRegState:
        check_inexact(params)
        check_params(groups, params)
        size = (groups.num_channels,)
        dtype = jnp.result_type(float)
        return IncRegState(
            optimizer.init(params),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros(size, dtype)),
            PerChannel(jnp.zeros(size, dtype)),
            PerChannel(jnp.zeros(size, bool)),
        )

    def update(
        updates: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        count = jnp.asarray(optax.safe_increment(state.count))
        old = state.coefficients.per_channel
        gone = state.gone.per_channel

        norms = l1(params)
        begun = state.count > begin_step
        start = jnp.where(begun, state.start.per_channel, norms.astype(old.dtype))
        left, change = rank_changes(groups, numbers, norms, gone, amplitude, ratio)
        raised = jnp.maximum(old + change.astype(old.dtype), 0)
        due = is_due(count, every, begin_step) & ~gone & (left > 0)
        raised = jnp.where(due, raised, old)

        grads = add_decay(groups, updates, params, raised, is_producer)
        grads = keep_channels(groups, grads, ~gone)
        steps, base_state = optimizer.update(grads, state.base, params, **extra_args)
        candidate = add_step(params, steps)

        after = l1(candidate)
        small = after <= jnp.asarray(threshold, start.dtype) * start
        ripe = (small | (raised >= highest)) & ~gone & (count > begin_step)
        weakest = jnp.where(ripe, after, jnp.inf)
        gone |= ripe & (segments.ranks(weakest, groups.owner) < left)
        complete = segments.sum_over(gone, groups.owner) >= numbers
        coefficients = jnp.where(gone | complete, 0, raised)
        point = keep_channels(groups, candidate, ~gone)
        vectors = map(PerChannel, (coefficients, start, gone))
        return step_to(point, params), IncRegState(base_state, count, *vectors)

    return transformation("increg", init, update)
