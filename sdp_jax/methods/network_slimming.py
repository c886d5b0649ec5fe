"""Network slimming: a penalty on the scales of normalisations, and their size."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import check_kind
from sdp_jax.channels import channel_norms, producer_leaves
from sdp_jax.groups import Groups
from sdp_jax.methods.penalty import penalty_in_front
from sdp_jax.methods.scales import (
    DEFAULT_SCALES,
    check_scales,
    find_scales,
    put_entries,
    take_entries,
)
from sdp_jax.methods.score import Score, of_params
from sdp_jax.tree import PyTree, replace_leaves


def scale_score(
    *,
    scales: Sequence[str] = DEFAULT_SCALES,
    missing: Literal["error", "rms"] = "error",
) -> Score:
    """The magnitude of a channel's scales, ``Σ |γ|`` over the normalisations behind it.

    The paper trains with :func:`scale_penalty`, prunes a share of all channels at once,
    the smallest scales of the whole network, and trains on without the penalty.
    Channels of a residual stream have a scale in each branch; that these are added is
    our choice.

    Args:
      scales: patterns for the last key of a scale's path: a vector among the producers
        that matches is a scale.
      missing: what becomes of a dimension without a scale: ``"error"`` refuses it,
        ``"rms"`` scores it by the root mean square of its producers.

    Returns:
      A score; it needs neither gradients nor activations. It raises ``ValueError``
      where a dimension has no scale and ``missing`` is ``"error"``.

    Raises:
      ValueError: if ``missing`` is neither of these.
      TypeError: if ``scales`` is not a list or tuple of strings.

    References:
      Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks
      through Network Slimming", ICCV 2017, arXiv 1708.06519, section 3.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"conv": {"kernel": jnp.ones((3, 2))},
      ...           "norm": {"scale": jnp.array([-2., 1.]), "bias": jnp.ones(2)}}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("conv/kernel", 1), sdp_jax.Member("norm/scale", 0),
      ...     sdp_jax.Member("norm/bias", 0)]})
      >>> print(methods.scale_score()(groups, params))
      [2. 1.]
    """
    check_scales(scales)
    if missing not in ("error", "rms"):
        raise ValueError(f"missing is {missing!r}; use 'error' or 'rms'")

    def score(groups: Groups, params: PyTree) -> jax.Array:
        found = find_scales(groups, scales)
        bare = [name for name, members in found.items() if not members]
        if bare and missing == "error":
            raise ValueError(
                f"the dimensions {bare} have no scale among their producers (a vector "
                f"with a name like {tuple(scales)}); give scales= patterns that match "
                "its name, or missing='rms' to score them by the root mean square of "
                "their producers"
            )
        table = producer_leaves(groups, params)
        norms = {}
        if bare:
            norms = groups.split(channel_norms(groups, params, weights="size"))
        out = {}
        for d in groups:
            parts = [
                jnp.sum(jnp.abs(take_entries(table[m.path], m, d.size)), axis=(0, 2))
                for m in found[d.name]
            ]
            out[d.name] = sum(parts[1:], parts[0]) if parts else norms[d.name]
        return groups.join(out)

    return of_params(score)


def scale_penalty(
    groups: Groups,
    penalty: optax.ScalarOrSchedule = 1e-4,
    *,
    group: bool = False,
    scales: Sequence[str] = DEFAULT_SCALES,
) -> optax.GradientTransformationExtraArgs:
    """Adds the subgradient of ``λ Σ |γ|`` to the gradients of the scales.

    It stands in front of the base optimizer: ``optax.chain(scale_penalty(groups),
    optax.sgd(0.1))``. What it adds is ``λ sign(γ)``, or with ``group=True``, for the
    penalty ``λ Σ_c ‖γ_c‖``, ``λ γ / ‖γ_c‖`` with the norm over all scales of channel
    ``c`` in its dimension; 0 where these are 0. Scales outside the groups and
    dimensions without a scale are not penalised.

    Args:
      groups: the channel dimensions.
      penalty: ``λ``, or a schedule of it. The paper takes 1e-4 for VGG and 1e-5 for
        ResNet and DenseNet, and starts the scales at 0.5.
      group: penalise the norm of all scales of a channel, instead of each alone.
      scales: patterns for the last key of a scale's path, see :func:`scale_score`.

    Returns:
      A transformation for in front of the base optimizer; its ``update`` needs
      ``params``.

    Raises:
      ValueError: if ``penalty`` is negative, or no dimension has a scale.
      TypeError: if an argument is of another kind.

    References:
      Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks
      through Network Slimming", ICCV 2017, arXiv 1708.06519, eq. 1. The variant
      ``group``: Fang, Ma, Song, Mi, Wang, "DepGraph", arXiv 2301.12900, its code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"kernel": jnp.ones((3, 2)), "scale": jnp.array([-2., 1.])}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("kernel", 1), sdp_jax.Member("scale", 0)]})
      >>> tx = methods.scale_penalty(groups, 0.5)
      >>> grads = {"kernel": jnp.zeros((3, 2)), "scale": jnp.array([1., 1.])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["scale"])
      [0.5 1.5]
    """
    check_kind(groups)
    found = find_scales(groups, scales)
    if not any(found.values()):
        raise ValueError(
            f"no dimension of the groups has a scale (a vector with a name like "
            f"{tuple(scales)}) to penalise; give scales= patterns that match its name"
        )

    def add(updates: optax.Updates, params: optax.Params, factor: Any) -> optax.Updates:
        table = producer_leaves(groups, params)
        gradients = producer_leaves(groups, updates)
        changed = {}
        for d in groups:
            values = [take_entries(table[m.path], m, d.size) for m in found[d.name]]
            sizes = [jnp.abs(value) for value in values]
            if group and values:
                squares = [jnp.sum(s**2, axis=(0, 2)) for s in sizes]
                norm = jnp.sqrt(sum(squares[1:], squares[0]))[None, :, None]
                sizes = [jnp.broadcast_to(norm, s.shape) for s in sizes]
            for m, value, size in zip(found[d.name], values, sizes, strict=True):
                slope = jnp.where(size > 0, value / jnp.where(size > 0, size, 1), 0)
                # From the gradient itself: dimensions that share a scale count once.
                entries = take_entries(gradients[m.path], m, d.size)
                new = entries + jnp.asarray(factor, entries.dtype) * slope
                old = changed.get(m.path, gradients[m.path])
                changed[m.path] = put_entries(old, m, d.size, new)
        return replace_leaves(updates, changed)

    return penalty_in_front("scale_penalty", groups, penalty, add)
