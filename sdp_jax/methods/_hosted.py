"""A base optimizer followed by a transformation that prunes, its *host*.

Hosts stand behind the base optimizer, as :func:`sdp_jax.group_soft_threshold` does, and
set channels to zero. Many of them score channels by the raw gradient, which the base
has already turned into a step: :func:`hosted` hands it on beside the step.
:func:`channel_host` is what hosts have in common.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import (
    add_step,
    as_base,
    check_kind,
    check_params,
    need_params,
    step_to,
)
from sdp_jax.channels import PerChannel, channels_alive
from sdp_jax.entries import living
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.tree import PyTree


class HostedState(NamedTuple):
    """State of :func:`hosted`.

    Attributes:
      base: state of the base optimizer.
      host: state of the host.
    """

    base: Any
    host: Any


class ChannelHostState(NamedTuple):
    """State of :func:`channel_host`.

    Attributes:
      count: number of updates so far, int32 scalar.
      inner: the state of the method itself.
    """

    count: jax.Array
    inner: Any


class Living(NamedTuple):
    """What goes into an update, with zeros in all that belongs to no living channel.

    Where an entry makes or reads a channel that is zero it is zero. Norms and scores of
    these trees are the same before and after that channel is cut.

    Attributes:
      params: the parameters before the step.
      updates: the step of the base optimizer.
      gradients: the raw gradients, or ``None`` without :func:`hosted`.
    """

    params: PyTree
    updates: PyTree
    gradients: PyTree | None


class HostStep(NamedTuple):
    """What a host decides on, see :func:`channel_host`.

    Attributes:
      inner: the state of the method itself.
      count: number of this update, int32 scalar; the first one is 1.
      params: the parameters before the step.
      updates: the step of the base optimizer.
      gradients: the raw gradients, or ``None`` without :func:`hosted`.
      released: which channels a wrapper such as
        :func:`sdp_jax.methods.decay_pruning` has taken back, ``(num_channels,)``.
      living: the three trees as norms and scores should see them.
    """

    inner: Any
    count: jax.Array
    params: PyTree
    updates: PyTree
    gradients: PyTree | None
    released: jax.Array
    living: Living


def hosted(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    host: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``host`` on the steps of ``base``, and hands it the gradients as well.

    It is ``optax.chain(base, host)``, except that the host's ``update`` gets what
    arrived here as the keyword argument ``gradients``.

    Args:
      base: the optimizer; a learning rate or a schedule stands for plain SGD.
      host: what prunes, for example :func:`sdp_jax.methods.remove_lowest`.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: if the learning rate is negative.
      TypeError: if ``base`` is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.remove_lowest(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.taylor())
      >>> tx = methods.hosted(0.1, host)
      >>> grads = {"w": jnp.array([[0., 1.], [0., 1.]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])  # No gradient: it goes.
      [[0.  0.9]
       [0.  0.9]]
    """
    if not isinstance(host, optax.GradientTransformation):
        raise TypeError(
            f"host must be an Optax transformation, for example methods.hspg(...), and "
            f"stands behind the base: hosted(base, host); got {host!r}"
        )
    first = optax.with_extra_args_support(as_base(base))
    second = optax.with_extra_args_support(host)

    def init_fn(params: optax.Params) -> HostedState:
        return HostedState(first.init(params), second.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HostedState]:
        steps, base_state = first.update(updates, state.base, params, **extra_args)
        extra_args = extra_args | {"gradients": updates}
        steps, host_state = second.update(steps, state.host, params, **extra_args)
        return steps, HostedState(base_state, host_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def channel_host(
    groups: Groups,
    init: Callable[[Groups], Any],
    decide: Callable[[HostStep], tuple[Any, ...]],
    *,
    name: str = "channel_host",
) -> optax.GradientTransformationExtraArgs:
    """A host from its equations: by which factor is each channel multiplied?

    Every update leads from the parameters ``x`` to ``factor · (x + u)``, channel by
    channel, with the step ``u`` of the base; where the factor is 0 the channel is
    exactly zero. All sums are in float32 or wider.

    Args:
      groups: the channel dimensions.
      init: ``init(groups) -> state``: the method's own state before the first update.
        Vectors ``(num_channels,)`` in it stand in a
        :class:`sdp_jax.channels.PerChannel`, so that a cut takes them along.
      decide: ``decide(step) -> (factors, state)`` with a :class:`HostStep`, the factors
        ``(num_channels,)`` and the next state. If the factors apply to another point
        than ``x + u``, that point comes third.
      name: name of the transformation, for messages.

    Returns:
      A transformation for behind the base optimizer, see :func:`hosted`; its ``update``
      needs ``params``, and takes ``gradients=`` and ``released=``.

    Raises:
      ValueError: if ``groups`` has no dimension.
      TypeError: if it is of another kind.

    Example:
      The smallest living channel goes at each update:

      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> from sdp_jax.channels import PerChannel
      >>> params = {"w": jnp.array([[3., 1., 2.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> def init(groups):
      ...     return PerChannel(jnp.ones(groups.num_channels))  # Alive.
      >>> def decide(step):
      ...     norms = sdp_jax.channel_norms(groups, step.living.params)
      ...     alive, place = step.inner.per_channel, jnp.arange(groups.num_channels)
      ...     lowest = jnp.argmin(jnp.where(alive > 0, norms, jnp.inf))
      ...     alive = jnp.where(place == lowest, 0, alive)
      ...     return alive, PerChannel(alive)
      >>> tx = methods.hosted(0.1, methods.channel_host(groups, init, decide))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((1, 3))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"])
      [[3. 0. 2.]]
      [[3. 0. 0.]]
    """
    check_kind(groups)

    def init_fn(params: optax.Params) -> ChannelHostState:
        check_params(groups, params)
        return ChannelHostState(jnp.zeros((), jnp.int32), init(groups))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        gradients: optax.Updates | None = None,
        released: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ChannelHostState]:
        del extra_args
        params = need_params(params, updates, name)
        count = jnp.asarray(optax.safe_increment(state.count))
        if released is None:
            released = jnp.zeros((groups.num_channels,), bool)
        alive = channels_alive(groups, params)
        trees = params, updates, gradients
        seen = (t if t is None else living(groups, t, alive) for t in trees)
        decided = decide(HostStep(state.inner, count, *trees, released, Living(*seen)))
        if not isinstance(decided, tuple) or len(decided) not in (2, 3):
            raise TypeError(
                f"decide of {name} must return (factors, state) or (factors, state, "
                f"point); got {type(decided).__name__}"
                + (f" of {len(decided)}" if isinstance(decided, tuple) else "")
            )
        factors, inner, *other = decided
        if jnp.shape(factors) != (groups.num_channels,):
            raise ValueError(
                f"decide of {name} must return a factor for each of "
                f"{groups.num_channels} channels; got shape {jnp.shape(factors)}"
            )
        factors = jnp.asarray(factors)
        candidate = other[0] if other else add_step(params, updates)
        point = scale_channels(groups, candidate, factors)
        return step_to(point, params), ChannelHostState(count, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def no_channels(groups: Groups) -> PerChannel:
    """A set of channels, empty: a Boolean vector ``(num_channels,)``."""
    return PerChannel(jnp.zeros((groups.num_channels,), bool))
