"""A base optimizer followed by a transformation that prunes, its *host*.

Hosts stand behind the base optimizer, as :func:`sdp_jax.group_soft_threshold` does, and
set channels to zero. Many of them score channels by the raw gradient, which the base
has already turned into a step: :func:`hosted` hands it on beside the step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdp_jax.channels import scale_channels
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


def hosted(
    base: optax.GradientTransformation, host: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Runs ``host`` on the steps of ``base``, and hands it the gradients as well.

    It is ``optax.chain(base, host)``, except that the host's ``update`` gets what
    arrived here as the keyword argument ``gradients``.

    Args:
      base: the optimizer.
      host: what prunes, for example :func:`sdp_jax.methods.remove_lowest`.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.remove_lowest(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.taylor())
      >>> tx = methods.hosted(optax.sgd(0.1), host)
      >>> grads = {"w": jnp.array([[0., 1.], [0., 1.]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])  # No gradient: it goes.
      [[0.  0.9]
       [0.  0.9]]
    """
    base, host = (
        optax.with_extra_args_support(base),
        optax.with_extra_args_support(host),
    )

    def init_fn(params: optax.Params) -> HostedState:
        return HostedState(base.init(params), host.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HostedState]:
        steps, base_state = base.update(updates, state.base, params, **extra_args)
        extra_args = extra_args | {"gradients": updates}
        steps, host_state = host.update(steps, state.host, params, **extra_args)
        return steps, HostedState(base_state, host_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def channel_entries(groups: Groups, tree: PyTree, channels: jax.Array) -> PyTree:
    """Which entries are producers of one of these channels, leaf by leaf.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      channels: a Boolean vector ``(num_channels,)``.

    Returns:
      A tree of Boolean arrays of the same shapes.
    """
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), tree)
    others = jnp.where(channels, 0.0, 1.0).astype(jnp.float32)
    left = scale_channels(groups, ones, others)
    return jax.tree.map(lambda x: x == 0, left)
