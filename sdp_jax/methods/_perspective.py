"""Structured Perspective Regularization: a tight convex price for a channel."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import check_kind
from sdp_jax.channels import Term, channel_maxima, channel_sums, square
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.methods.penalty import penalty_in_front
from sdp_jax.tree import PyTree


def perspective(
    norm2: chex.Numeric,
    norm_inf: chex.Numeric,
    alpha: chex.Numeric,
    bound: chex.Numeric,
) -> jax.Array:
    """The price ``z`` of a structure: the best mixture of L2 and existence.

    A structure of weights ``w`` exists to the degree ``y``; the perspective relaxation
    of "``α ‖w‖² + (1 − α)`` if it exists, and 0 if not" is ::

        z(w) = min over y in [0, 1] with ‖w‖_∞ ≤ M y of  α ‖w‖² / y + (1 − α) y

    and with ``κ = √(α / (1 − α))`` it has the closed form ::

        α ‖w‖² + 1 − α                           where max(‖w‖_∞ / M, κ ‖w‖) ≥ 1
        2 √(α (1 − α)) ‖w‖                       where ‖w‖_∞ / M ≤ κ ‖w‖ otherwise
        α M ‖w‖² / ‖w‖_∞ + (1 − α) ‖w‖_∞ / M     elsewhere

    It is continuous and, for ``‖w‖_∞ ≤ M``, convex in ``w``. Near zero it acts as the
    group lasso, for large weights as weight decay. Where an entry exceeds ``M`` the
    minimum has no feasible ``y``, and the first case goes on.

    Args:
      norm2: Euclidean norms ``‖w‖``, any shape.
      norm_inf: the largest magnitudes ``‖w‖_∞``, of the same shape.
      alpha: ``α`` in (0, 1), the weight of the L2 term.
      bound: ``M > 0``, a bound on the magnitude of the weights.

    Returns:
      The prices, floating-point, in the shape of the norms.

    Raises:
      ValueError: if ``alpha`` or ``bound`` is out of range.
      TypeError: if one is not a number.

    References:
      Cacciola, Frangioni, Li, Lodi, "Deep Neural Networks Pruning via the Structured
      Perspective Regularization", SIAM J. Math. Data Sci. 2023, arXiv 2206.14056.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> norms = jnp.array([0., 0.5, 2.])
      >>> print(methods.perspective(norms, norms, alpha=0.5, bound=1.0))
      [0.  0.5 2.5]
    """
    _check_perspective(alpha, bound)
    dtype = jnp.promote_types(jnp.result_type(norm2, norm_inf), jnp.float32)
    n2, top = jnp.asarray(norm2, dtype), jnp.asarray(norm_inf, dtype)
    alpha, bound = jnp.asarray(alpha, dtype), jnp.asarray(bound, dtype)
    low = top / bound
    free = jnp.sqrt(alpha / (1 - alpha)) * n2
    whole = jnp.maximum(low, free) >= 1
    inside = low <= free
    safe = jnp.where(whole | inside, 1, low)
    squared = jnp.square(n2)
    return jnp.where(
        whole,
        alpha * squared + (1 - alpha),
        jnp.where(
            inside,
            2 * jnp.sqrt(alpha * (1 - alpha)) * n2,
            alpha * squared / safe + (1 - alpha) * low,
        ),
    )


def perspective_penalty(
    groups: Groups,
    params: PyTree,
    *,
    alpha: chex.Numeric,
    bound: chex.Numeric | Mapping[str, float],
    weights: Literal["size", "plain"] | Mapping[str, float] = "size",
) -> jax.Array:
    """The weighted sum of the prices of all channels, differentiable.

    The gradient of a channel that is exactly zero is zero. Where several entries are
    the largest of a channel, they share its slope.

    Args:
      groups: the channel dimensions; a structure is all producers of a channel.
      params: the parameters.
      alpha: ``α`` of :func:`perspective`. The paper searches it for each model.
      bound: ``M`` of :func:`perspective`, a number or one for each dimension name.
      weights: ``"size"`` for the share of a channel's producer entries among those of
        all channels, as in the authors' code; ``"plain"`` for 1; or a non-negative
        number for each dimension name.

    Returns:
      A real scalar, at least float32.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Cacciola, Frangioni, Li, Lodi, "Deep Neural Networks Pruning via the Structured
      Perspective Regularization", SIAM J. Math. Data Sci. 2023, arXiv 2206.14056.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[0.3, 0.], [0.4, 0.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> print(methods.perspective_penalty(groups, params, alpha=0.5, bound=1.0))
      0.25
    """
    bounds, factors = _check_penalty(groups, alpha, bound, weights)
    (squares,) = channel_sums(groups, Term(square, (params,)))
    top = channel_maxima(groups, params)
    # The square root has no slope at zero.
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    limits = groups.join({d.name: jnp.full(d.size, bounds[d.name]) for d in groups})
    prices = groups.split(perspective(norm, top, alpha, limits))
    total: Any = 0
    for name, price in prices.items():
        total = total + factors[name] * jnp.sum(price)
    return total


def perspective_regularizer(
    groups: Groups,
    penalty: optax.ScalarOrSchedule,
    *,
    alpha: chex.Numeric,
    bound: chex.Numeric | Mapping[str, float],
    weights: Literal["size", "plain"] | Mapping[str, float] = "size",
) -> optax.GradientTransformationExtraArgs:
    """Adds ``penalty`` times the gradient of :func:`perspective_penalty`.

    It stands in front of the base optimizer, as
    ``optax.chain(perspective_regularizer(…), optax.sgd(0.1, 0.9))``. Gradient steps
    make channels small, not exactly zero: a host behind the base, such as
    :func:`sdp_jax.methods.remove_lowest`, prunes them.

    Args:
      groups: the channel dimensions.
      penalty: ``λ``, a non-negative number or a schedule (``step -> number``).
      alpha: as for :func:`perspective_penalty`.
      bound: as for :func:`perspective_penalty`.
      weights: as for :func:`perspective_penalty`.

    Returns:
      An Optax transformation on gradients, which keep their dtypes; its ``update``
      needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Cacciola, Frangioni, Li, Lodi, "Deep Neural Networks Pruning via the Structured
      Perspective Regularization", SIAM J. Math. Data Sci. 2023, arXiv 2206.14056.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[0.3, 0.], [0.4, 0.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = optax.chain(
      ...     methods.perspective_regularizer(groups, 1.0, alpha=0.5, bound=1.0),
      ...     optax.sgd(1.0))
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(updates["w"].round(1))
      [[-0.3 -0. ]
       [-0.4 -0. ]]
    """
    _check_penalty(groups, alpha, bound, weights)

    def price(tree: PyTree) -> jax.Array:
        return perspective_penalty(
            groups, tree, alpha=alpha, bound=bound, weights=weights
        )

    def add(updates: optax.Updates, params: optax.Params, factor: Any) -> optax.Updates:
        wide = jax.tree.map(
            lambda p: jnp.asarray(p, jnp.promote_types(p.dtype, jnp.float32)), params
        )

        def add_slope(g: jax.Array, slope: jax.Array) -> jax.Array:
            # Of a complex leaf the direction of steepest ascent.
            slope = jnp.conj(slope) * jnp.asarray(factor, slope.real.dtype)
            return (g.astype(slope.dtype) + slope).astype(g.dtype)

        return jax.tree.map(add_slope, updates, jax.grad(price)(wide))

    return penalty_in_front("perspective_regularizer", groups, penalty, add)


def _check_perspective(alpha: Any, bound: Any) -> None:
    """Refuses parameters of :func:`perspective` that are out of range."""
    least, high = math.nextafter(0, 1), math.nextafter(1, 0)
    check_number("alpha", alpha, low=least, high=high, rule="a number in (0, 1)")
    check_number("bound", bound, low=least, rule="a positive number")


def _check_penalty(
    groups: Groups, alpha: Any, bound: Any, weights: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """A bound and a weight for each dimension, after checking them."""
    check_kind(groups)
    bounds = _by_name(groups, "bound", bound)
    for value in bounds.values():
        _check_perspective(alpha, value)
    if isinstance(weights, Mapping):
        factors = _by_name(groups, "weights", weights)
        for value in factors.values():
            check_number("weights", value, low=0, rule="non-negative numbers")
        return bounds, factors
    if weights == "plain":
        return bounds, dict.fromkeys(groups.sizes, 1.0)
    if weights == "size":
        sizes = {d.name: groups.entries(d, roles=("producer",)) for d in groups}
        total = sum(sizes[d.name] * d.size for d in groups)
        return bounds, {name: size / total for name, size in sizes.items()}
    raise ValueError(
        f"weights is {weights!r}; use 'size', 'plain' or a number for each dimension"
    )


def _by_name(groups: Groups, name: str, value: Any) -> dict[str, Any]:
    """One value for each dimension, from one for all or one for each name."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(groups.sizes, value)
    if set(value) != set(groups.sizes):
        raise ValueError(
            f"{name} must give a number for each dimension; it lacks "
            f"{sorted(set(groups.sizes) - set(value))} and has no use for "
            f"{sorted(set(value) - set(groups.sizes))}"
        )
    return {key: value[key] for key in groups.sizes}
