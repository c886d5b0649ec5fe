"""AltSDP, the solver of Structured Directional Pruning, and its special cases."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import optax

from sdp_jax.base import as_base
from sdp_jax.channels import Weighting
from sdp_jax.groups import Groups
from sdp_jax.strength import Strength, StrengthLike, as_strength, valley_strength
from sdp_jax.transforms import (
    averaging,
    entry_threshold,
    group_soft_threshold,
    group_threshold,
)


def altsdp(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    *,
    strength: StrengthLike,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
    weights: Weighting | Mapping[str, float] = "plain",
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains as ``base`` does, while whole channels become exactly zero.

    What to use, whatever the network and the base: half of the FLOPs go between two
    steps, by importance, and the other channels take the steps of ``base``, bit for bit
    (:func:`sdp_jax.target_sparsity`)::

        altsdp(base, groups, strength=target_sparsity(0.5, 1000, 5000, target="flops"))

    The paper's form has a strength that shrinks, :func:`sdp_jax.valley_strength`. With
    the dual variable ``v`` (``v_0 = w_0``) and threshold ``g`` it alternates ::

        v_{n+1} = v_n + base step at the gradient of w_n
        w_{n+1} = prox_{g(n+1)}(v_{n+1})      group soft-threshold

    Gradients have no component along the valley of the loss, so along it the shrinkage
    of the threshold stays, while across it the gradient pulls it back. As training goes
    on, ``w`` tends to the minimiser of ``½‖w − w*‖² + g Σ ‖w_g‖`` *within the valley*
    of the solution ``w*`` of ``base``: pruned, at a training loss that the growing
    threshold keeps a little above that of ``base``.

    That is exactly this chain, and its state is the chain's::

        optax.chain(
            base,                                     # or optax.sgd(base, momentum)
            dual_averaging(),
            group_soft_threshold(groups, strength),
        )

    With :func:`sdp_jax.valley.project_onto_valley` between the last two, a chain made
    by hand keeps the shrinkage within an estimate of the valley.

    By a target the threshold of a channel is 0 or infinite. There ``v`` and ``w`` are
    one for what stays, and the dual variable is not kept.

    Nothing may follow it that rescales or adds to its updates; put gradient clipping
    and weight decay in front, or into ``base``. :func:`sdp_jax.check_zeros` finds
    violations.

    Args:
      base: a learning rate or schedule (then SGD), or any Optax transformation.
      groups: the channel dimensions of the parameters it is given.
      strength: a :class:`sdp_jax.Strength`, for example
        ``valley_strength(c=0.1, mu=0.6)`` or ``target_sparsity(0.5, 1000, 5000)``; or a
        constant or a schedule, the threshold in parameter units.
      min_channels: channels that survive in each dimension; a number, or one for each
        name.
      weights: with a strength that shrinks, the weighting of the channel norms:
        ``"plain"``, ``"size"``, ``"cost"`` or a number for each dimension; see
        :func:`sdp_jax.channel_weights`.
      momentum: momentum of the SGD, if ``base`` is a learning rate.
      nesterov: Nesterov momentum, likewise.

    Returns:
      An Optax transformation; its ``update`` needs ``params``. After
      ``optax.apply_updates`` a pruned channel is exactly zero.

    Raises:
      ValueError: if ``strength``, ``min_channels`` or ``weights`` does not fit the
        groups, ``valley_strength`` has no learning rate and ``base`` is none, momentum
        is given beside a transformation, or the learning rate is negative.
      TypeError: if ``base`` or ``groups`` is of another kind.

    References:
      Our reading of Li, Liu, Shao, Wang, Geng, "Structured Directional Pruning via
      Perturbation Orthogonal Projection", arXiv 2107.05328; groups of one entry are
      gRDA (Chao, Wang, Xing, Cheng, arXiv 2006.09358), see :func:`grda`.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.1], [4., 0.1]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = sdp_jax.altsdp(0.1, groups, strength=sdp_jax.valley_strength(1., 0.6))
      >>> updates, state = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> for _ in range(9):
      ...     params = optax.apply_updates(params, updates)
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      >>> print(optax.apply_updates(params, updates)["w"].round(2))
      [[2.81 0.  ]
       [3.75 0.  ]]
    """
    optimizer, rule = _base_and_strength(base, strength, momentum, nesterov)
    if as_strength(rule).score is not None:
        return optax.chain(
            optimizer,
            group_threshold(groups, rule, min_channels, weights, candidates=False),
        )
    return optax.chain(
        optimizer,
        averaging(candidates=True),
        group_threshold(groups, rule, min_channels, weights, candidates=True),
    )


def prox_sgd(
    learning_rate: optax.ScalarOrSchedule,
    groups: Groups,
    *,
    strength: StrengthLike,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
    weights: Weighting | Mapping[str, float] = "plain",
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Proximal SGD for the group lasso: :func:`altsdp` without the dual variable.

    ``w_{n+1} = prox_{γ λ}(w_n − γ ∇f(w_n))``: the shrinkage acts on the parameters
    themselves, so the minimum of ``f + λ Σ k_g ‖w_g‖`` is sought and the training loss
    rises.

    Args:
      learning_rate: the rate ``γ`` or its schedule.
      groups: the channel dimensions.
      strength: ``λ`` in units of loss per norm, a number or a schedule; the threshold
        is ``γ λ``. A :class:`sdp_jax.Strength` gives the threshold itself.
      min_channels: as for :func:`altsdp`.
      weights: as for :func:`altsdp`.
      momentum: momentum of the SGD.
      nesterov: Nesterov momentum.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: as for :func:`altsdp`.
      TypeError: as for :func:`altsdp`.

    References:
      Parikh and Boyd, "Proximal Algorithms", 2014, section 4.2; Yuan and Lin 2006.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.1], [4., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = sdp_jax.prox_sgd(1.0, groups, strength=2.5)
      >>> grads = {"w": jnp.zeros((2, 2))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])  # Half of norm 5 goes.
      [[1.5 0. ]
       [2.  0. ]]
    """
    if isinstance(learning_rate, optax.GradientTransformation):
        raise TypeError(
            "prox_sgd is SGD: its first argument is a learning rate or a schedule, not "
            "a transformation; use optax.chain(base, group_soft_threshold(...))"
        )
    optimizer, rule = _base_and_strength(learning_rate, strength, momentum, nesterov)
    if not isinstance(strength, Strength):
        as_strength(strength)

        def threshold(count: Any) -> Any:
            rate = learning_rate(count) if callable(learning_rate) else learning_rate
            return rate * (strength(count) if callable(strength) else strength)

        rule = as_strength(threshold)
    return optax.chain(
        optimizer,
        group_soft_threshold(groups, rule, min_channels=min_channels, weights=weights),
    )


def grda(
    learning_rate: optax.ScalarOrSchedule, *, c: chex.Numeric, mu: chex.Numeric
) -> optax.GradientTransformationExtraArgs:
    """Generalised regularised dual averaging: every entry is a group of its own.

    Args:
      learning_rate: the rate ``γ`` or its schedule.
      c: scale of the tuning function.
      mu: its exponent, strictly between ½ and 1.

    Returns:
      An Optax transformation; its ``update`` needs ``params``. All parameters are
      thresholded, as in the released code.

    Raises:
      ValueError: as for :func:`sdp_jax.valley_strength`.

    References:
      Chao, Wang, Xing, Cheng, "Directional Pruning of Deep Neural Networks", NeurIPS
      2020, arXiv 2006.09358.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> tx = sdp_jax.grda(0.01, c=1.0, mu=0.75)
      >>> params = jnp.array([0.003, 1.])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates) > 0)
      [False  True]
    """
    optimizer, rule = _base_and_strength(
        learning_rate, valley_strength(c, mu), None, False
    )
    return optax.chain(
        optimizer, averaging(candidates=True), entry_threshold(rule, candidates=True)
    )


def _base_and_strength(
    base: Any, strength: StrengthLike, momentum: Any, nesterov: bool
) -> tuple[optax.GradientTransformation, StrengthLike]:
    """The base optimizer, and the strength with its learning rate filled in."""
    optimizer = as_base(base, momentum, nesterov)
    if optimizer is not base and isinstance(strength, Strength) and strength.bind:
        strength = strength.bind(base, momentum)
    return optimizer, strength
