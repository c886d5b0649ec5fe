"""Norms of filters as scores."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sdp_jax.channels import (
    Term,
    Weighting,
    channel_norms,
    channel_sums,
    channel_weights,
    magnitude,
)
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score, of_params
from sdp_jax.tree import PyTree


def l2_norm(*, weights: Weighting | Mapping[str, float] = "plain") -> Score:
    """The Euclidean norm of all producers of a channel.

    Args:
      weights: the weighting, see :func:`sdp_jax.channel_weights`; ``"size"`` gives the
        root mean square of the entries, comparable over layers.

    Returns:
      A score; it needs neither gradients nor activations.

    References:
      He, Kang, Dong, Fu, Yang, "Soft Filter Pruning", arXiv 1808.06866 (the L2 norm).

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(methods.l2_norm()(groups, params))
      [5. 1.]
    """
    return of_params(functools.partial(channel_norms, weights=weights))


def l1_norm(*, weights: Weighting | Mapping[str, float] = "plain") -> Score:
    """The sum of the magnitudes of all producers of a channel.

    Args:
      weights: the weighting, see :func:`sdp_jax.channel_weights`; the sum is divided by
        its square for ``"size"`` (the mean magnitude).

    Returns:
      A score; it needs neither gradients nor activations.

    References:
      Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets",
      ICLR 2017, arXiv 1608.08710.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.], [-4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(methods.l1_norm()(groups, params))
      [7. 1.]
    """

    def norms(groups: Groups, params: PyTree) -> jax.Array:
        power = 2 if weights == "size" else 1
        factors = channel_weights(groups, weights) ** power
        sums = channel_sums(groups, Term(magnitude, (params,)))[0]
        return sums / jnp.asarray(factors, sums.dtype)

    return of_params(norms)
