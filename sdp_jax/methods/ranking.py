"""Channels that are pruned little by little, by their rank in their dimension.

What :func:`sdp_jax.methods.spp` raises is a probability, and what
:func:`sdp_jax.methods.increg` raises a regularization; who gets how much is the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax import prox, segments
from sdp_jax.base import check_kind
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups

# Far beyond the n-th rank the increment grows exponentially; it is cut off at e to this
# power, which is finite in float32.
MAX_EXPONENT = 60.0


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
    check_increment(amplitude, ratio)
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


def rank_changes(
    groups: Groups,
    numbers: Any,
    norms: jax.Array,
    gone: jax.Array,
    amplitude: chex.Numeric,
    ratio: chex.Numeric,
) -> tuple[jax.Array, jax.Array]:
    """For each channel how many its dimension has still to lose, and the increment."""
    left = numbers - segments.sum_over(gone, groups.owner)
    free = jnp.where(gone, jnp.inf, norms)
    rank = segments.ranks(free, groups.owner)
    return left, ranking_increment(rank, left, amplitude, ratio)


def pruned_numbers(
    groups: Groups,
    sparsity: float | Mapping[str, float],
    min_channels: int | jax.Array | Mapping[str, int],
) -> Any:
    """How many each channel's dimension loses; a minimum that is an array wins."""
    check_kind(groups)
    floors = prox.resolve_floors(groups, min_channels)
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
    numbers: list[int | jax.Array] = []
    for (name, left), held in zip(groups.sizes.items(), floors, strict=True):
        size = groups.dense.sizes[name]
        share = shares.get(name, 0)
        rule = "a number in [0, 1), or one for each dimension"
        if isinstance(share, jax.Array):
            raise TypeError(f"sparsity must be {rule}, not an array; got {share!r}")
        high = math.nextafter(1, 0)
        check_number("sparsity", share, low=0, high=high, rule=rule)
        number = round(share * size)
        if isinstance(held, jax.Array):
            number = jnp.minimum(number, size - held)
        elif number > size - held:
            raise ValueError(
                f"sparsity {share} wants {number} of the {size} channels of dimension "
                f"{name!r} to be zero, but min_channels keeps {held}; lower the "
                "sparsity or min_channels"
            )
        # A cut has taken some of them.
        numbers.append(number - (size - left))
    xp = jnp if any(isinstance(n, jax.Array) for n in numbers) else np
    return xp.asarray(numbers)[groups.owner]


def check_increment(amplitude: Any, ratio: Any) -> None:
    """Refuses parameters of :func:`ranking_increment` that are out of range."""
    rule = "a positive number"
    check_number("amplitude", amplitude, low=math.nextafter(0, 1), rule=rule)
    low, high = math.nextafter(0, 1), math.nextafter(1, 0)
    check_number("ratio", ratio, low=low, high=high, rule="a number in (0, 1)")


def is_due(count: jax.Array, every: int, begin_step: int) -> jax.Array:
    """Whether something happens at this update, counted from 1."""
    return (count > begin_step) & ((count - begin_step) % every == 0)
