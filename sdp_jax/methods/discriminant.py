"""Discriminant information: how well the channels of a layer separate the classes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.activations import ChannelActivations
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score, need_activations
from sdp_jax.tree import PyTree

# The paper's value is not known to us.
RIDGE = 1e-2


def discriminant_information(
    features: chex.Array,
    labels: chex.Array,
    ridge: chex.Numeric = RIDGE,
    *,
    relative: bool = True,
) -> jax.Array:
    """The regularised ratio of between-class to total scatter, ``tr[(S̄ + ρI)⁻¹ S_B]``.

    With the mean ``μ`` of all samples, the mean ``μ_k`` and the number ``n_k`` of the
    samples of class ``k``::

        S̄ = Σ_i (x_i − μ)(x_i − μ)ᵀ,    S_B = Σ_k n_k (μ_k − μ)(μ_k − μ)ᵀ

    It lies between 0 and the number of classes minus 1, or the number of features if
    that is smaller. For a given ``ρ`` it never falls when a feature is added.

    Args:
      features: an array ``(samples, features)``.
      labels: the class of each sample, integers ``(samples,)``.
      ridge: the ridge. The paper's value and its units are not known to us; this
        default is our choice.
      relative: ``ρ`` is ``ridge`` times the mean of the diagonal of ``S̄``, so that the
        units of the features do not matter; otherwise ``ρ`` is ``ridge``.

    Returns:
      A scalar, at least float32; 0 if no feature varies.

    Raises:
      ValueError: if ``ridge`` is not positive, or the shapes do not fit.
      TypeError: if ``labels`` are not integers.

    References:
      Hou and Kung, "A Feature-map Discriminant Perspective for Pruning Deep Neural
      Networks", arXiv 2005.13796.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> features = jnp.array([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> di = methods.discriminant_information(features, labels, ridge=1e-3)
      >>> print(f"{di:.3f}")
      0.999
    """
    _check_ridge(ridge)
    labels = _check_labels(labels)
    _check_features("features", features, labels)
    between, inverse = _scatters(jnp.asarray(features), labels, ridge, relative)
    return jnp.sum(_product(between, inverse) * between)


def discriminant_score(
    labels: chex.Array,
    *,
    ridge: chex.Numeric = RIDGE,
    relative: bool = True,
    pool: bool = True,
) -> Score:
    """How much the discriminant information falls when one channel alone is left out.

    The channels of a dimension are the features of :func:`discriminant_information`.
    With ``B = (S̄ + ρI)⁻¹``, and ``ρ`` that of all channels, channel ``c`` scores ::

        (B S_B B)_cc / B_cc

    which is the exact fall, for all channels from one inverse. It is never negative.

    The score needs the activations of a batch: for each dimension an array ``(batch, …,
    size)``, channels last, such as the output of the layer; or what
    :func:`sdp_jax.channel_activations` returns with ``per_example=True``, of which it
    takes the mean of each example where a channel is read. The transformations that
    prune hand on parameters and gradients only; compute the scores outside, now and
    then, and give them to ``remove_lowest(groups, strength)`` with
    :func:`sdp_jax.methods.set_scores`, or to :func:`sdp_jax.plan_cut`.

    Args:
      labels: the class of each sample, integers ``(batch,)``.
      ridge: see :func:`discriminant_information`.
      relative: likewise.
      pool: average feature maps over the axes between batch and channels; otherwise
        each position is a sample of its own, with the class of its image.

    Returns:
      A score; it needs activations.

    Raises:
      ValueError: if ``ridge`` is not positive, or ``labels`` are not a vector.
      TypeError: if ``labels`` are not integers.

    References:
      Hou and Kung, "A Feature-map Discriminant Perspective for Pruning Deep Neural
      Networks", arXiv 2005.13796. The paper prunes the channels that matter least to
      the discriminant information; the closed form for one channel left out is ours.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((3, 2))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> score = methods.discriminant_score(jnp.array([0, 0, 1, 1]), ridge=1e-3)
      >>> maps = jnp.array([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
      >>> scores = score(groups, params, activations={"unit": maps})
      >>> [f"{s:.3f}" for s in scores]  # The first tells them apart.
      ['0.999', '0.000']
    """
    _check_ridge(ridge)
    labels = _check_labels(labels)

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> jax.Array:
        del params, grads
        if activations is None:
            raise ValueError(
                "discriminant_score needs activations: call score(groups, params, "
                "activations=...) outside of the step, with {dimension: array (batch, "
                "…, size)} or what sdp_jax.channel_activations returns, "
                "and give the result to remove_lowest(groups, strength) with set_scores"
            )
        if isinstance(activations, ChannelActivations):
            activations = _means(groups, activations, pool)
        missing = sorted(set(groups.sizes) - set(activations))
        if missing:
            raise ValueError(
                "activations must have an array for each dimension; they lack "
                f"{missing} and have {sorted(activations)}"
            )
        scores = {}
        for name, size in groups.sizes.items():
            maps = jnp.asarray(activations[name])
            _check_features(f"activations of dimension {name!r}", maps, labels, size)
            maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
            classes = labels
            if pool:
                maps = jnp.mean(maps, axis=tuple(range(1, maps.ndim - 1)))
            else:
                maps = maps.reshape(maps.shape[0], -1, size)
                classes = jnp.repeat(labels, maps.shape[1])
                maps = maps.reshape(-1, size)
            between, inverse = _scatters(maps, classes, ridge, relative)
            fall = jnp.sum(jnp.square(_product(between, inverse)), axis=0)
            scores[name] = fall / jnp.diagonal(inverse)
        return groups.join(scores)

    return score


def _means(
    groups: Groups, activations: ChannelActivations, pool: bool
) -> dict[str, np.ndarray]:
    """For each dimension the mean activations of each example."""
    found = need_activations(groups, activations, "discriminant_score")
    if found.examples is None or not pool:
        raise ValueError(
            "discriminant_score needs the means of single examples: call "
            "sdp_jax.channel_activations(..., per_example=True), and leave pool=True"
        )
    return found.groups.split(found.examples.mean)


def _scatters(
    features: jax.Array, labels: jax.Array, ridge: chex.Numeric, relative: bool
) -> tuple[jax.Array, jax.Array]:
    """``H`` with ``HᵀH = S_B``, one row for each class, and ``(S̄ + ρI)⁻¹``."""
    count, size = features.shape
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    x = x - jnp.mean(x, axis=0)
    # There are at most as many classes as samples; the other rows are zero.
    _, owner = jnp.unique(labels, return_inverse=True, size=count)
    numbers = jax.ops.segment_sum(jnp.ones((count,), x.dtype), owner, count)
    sums = jax.ops.segment_sum(x, owner, count)
    between = sums / jnp.sqrt(jnp.maximum(numbers, 1))[:, None]

    total = _product(x.T, x)
    rho = jnp.asarray(ridge, x.dtype)
    if relative:
        mean = jnp.trace(total) / size
        rho = rho * jnp.where(mean > 0, mean, 1)
    identity = jnp.eye(size, dtype=x.dtype)
    factor = jax.scipy.linalg.cho_factor(total + rho * identity)
    return between, jax.scipy.linalg.cho_solve(factor, identity)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _check_ridge(ridge: Any) -> None:
    check_number("ridge", ridge, low=1e-30, rule="a positive number")


def _check_labels(labels: Any) -> jax.Array:
    """The labels as an array, after checking dtype and shape."""
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise TypeError(
            "labels must be integers, the class of each sample; got dtype "
            f"{labels.dtype} and shape {labels.shape}. Turn one-hot labels into "
            "classes with jnp.argmax(labels, axis=-1)"
        )
    if labels.ndim != 1:
        raise ValueError(
            f"labels must be a vector (samples,); got shape {labels.shape}. Turn "
            "one-hot labels into classes with jnp.argmax(labels, axis=-1)"
        )
    return jnp.asarray(labels)


def _check_features(
    name: str, features: Any, labels: jax.Array, size: int | None = None
) -> None:
    """Refuses an array that does not fit the labels, or the size of a dimension."""
    shape = np.shape(features)
    if size is None:
        right = len(shape) == 2 and shape[0] == labels.shape[0]
        want = f"({labels.shape[0]}, features)"
    else:
        right = len(shape) >= 2 and (shape[0], shape[-1]) == (labels.shape[0], size)
        want = f"({labels.shape[0]}, …, {size}), channels last"
    if not right:
        raise ValueError(
            f"{name} must have the shape {want}, one entry for each of the "
            f"{labels.shape[0]} labels; got {shape}"
        )
