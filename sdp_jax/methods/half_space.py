"""The half-space projection, which tells the channels that turn round from the rest."""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from sdp_jax import prox
from sdp_jax.channels import channel_norms, channel_products
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.tree import PyTree


def half_space_factor(
    groups: Groups,
    candidate: PyTree,
    params: PyTree,
    *,
    epsilon: chex.Numeric = 0.0,
    where: chex.Array | bool = True,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> jax.Array:
    """Which channels the half-space projection sets to zero, as factors 0 and 1.

    A channel ``x`` whose step leads to ``x̂`` goes to zero if it has left the half space
    around itself, ``⟨x̂, x⟩ < ε ‖x‖²``; a channel that is zero stays zero. Unlike the
    soft threshold this leaves what stays where the step has led it.

    Where fewer than ``min_channels`` living channels of a dimension would be left,
    those of largest norm ``‖x‖`` among the leaving ones stay as well, on the far side.

    Args:
      groups: the channel dimensions.
      candidate: where the step leads to, ``x̂``.
      params: the parameters before the step, ``x``.
      epsilon: ``ε`` in [0, 1): 0 zeroes what has turned by more than a right angle, a
        value near 1 almost everything that shrinks.
      where: a Boolean, or one for each channel ``(num_channels,)``: which are
        projected. The others get 1.
      min_channels: living channels that stay in each dimension; a number, or one for
        each name.

    Returns:
      A vector ``(num_channels,)`` of 0 and 1, for
      ``sdp_jax.scale_channels(groups, candidate, factors)``.

    Raises:
      ValueError: if ``epsilon`` or ``min_channels`` is out of range, or the trees do
        not fit the groups.
      TypeError: if one is of another kind.

    References:
      Chen et al., "Half-Space Proximal Stochastic Gradient Method for Group-Sparsity
      Regularized Problem", arXiv 2009.12078; Chen et al., "Only Train Once", NeurIPS
      2021, arXiv 2107.07467.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> candidate = {"w": jnp.array([[2., -1.], [2., 0.5]])}
      >>> print(methods.half_space_factor(groups, candidate, params))
      [1. 0.]
    """
    check_epsilon(epsilon)
    floors = prox.resolve_floors(groups, min_channels)
    norms = channel_norms(groups, params)
    products = channel_products(groups, candidate, params)
    return project(groups, norms, products, epsilon, where, floors)


def project(
    groups: Groups,
    norms: jax.Array,
    products: jax.Array,
    epsilon: chex.Numeric,
    where: chex.Array | bool,
    floors: prox.Floors,
) -> jax.Array:
    """The factors of :func:`half_space_factor`, from ``‖x‖`` and ``⟨x̂, x⟩``."""
    alive = norms > 0
    leaving = products < jnp.asarray(epsilon, norms.dtype) * jnp.square(norms)
    leaving &= alive & where
    # First those that stay anyhow, then the leaving ones by norm, last the dead.
    key = jnp.where(leaving, norms, jnp.where(alive, jnp.inf, -jnp.inf))
    held = prox.largest_each(groups, key, prox.floor_counts(floors))
    gone = (leaving & ~held) | ((norms == 0) & where)
    return jnp.where(gone, 0, 1).astype(norms.dtype)


def check_epsilon(epsilon: Any) -> None:
    """Refuses a Python number outside ``[0, 1)``; arrays pass unchecked."""
    high = math.nextafter(1, 0)
    check_number("epsilon", epsilon, low=0, high=high, rule="a number in [0, 1)")
