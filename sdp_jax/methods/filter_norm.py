"""Norms of filters as scores."""

from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.channels import Weighting, channel_norms, channel_weights, member_sums
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score
from sdp_jax.tree import PyTree


def l2_norm(*, weights: Weighting = "plain") -> Score:
    """The Euclidean norm of all producers of a channel.

    Args:
      norm: weighting, see :func:`sdp_jax.channel_weights`; ``"size"`` gives the root
        mean square of the entries, comparable over layers.

    Returns:
      A score; it needs neither gradients nor activations.

    References:
      He, Kang, Dong, Fu, Yang, "Soft Filter Pruning", arXiv 1808.06866 (the L2 norm).

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> print(methods.l2_norm()(groups, params)["hidden"])
      [5. 1.]
    """

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> dict[str, jax.Array]:
        del grads, activations
        return channel_norms(groups, params, weights=weights)

    return score


def l1_norm(*, weights: Weighting = "plain") -> Score:
    """The sum of the magnitudes of all producers of a channel.

    Args:
      norm: weighting, see :func:`sdp_jax.channel_weights`; the sum is divided by its
        square for ``"size"`` (the mean magnitude).

    Returns:
      A score; it needs neither gradients nor activations.

    References:
      Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets",
      ICLR 2017, arXiv 1608.08710.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.], [-4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> print(methods.l1_norm()(groups, params)["hidden"])
      [7. 1.]
    """

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> dict[str, jax.Array]:
        del grads, activations
        weights = channel_weights(groups, norm)
        power = 2 if norm == "size" else 1
        sums = member_sums(groups, params, magnitude)
        return {
            name: sum_of(pairs) / weights[name] ** power for name, pairs in sums.items()
        }

    return score


def magnitude(leaf: jax.Array) -> jax.Array:
    """Magnitudes of a leaf, at least float32."""
    value = jnp.abs(leaf)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def sum_of(pairs: Any) -> jax.Array:
    """The sum over the members that :func:`sdp_jax.groups.member_sums` returned."""
    total, *rest = [value for _, value in pairs]
    for value in rest:
        total = total + value
    return total
