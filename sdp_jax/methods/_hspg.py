"""Only Train Once: group penalties with the half-space projection, HSPG and DHSPG.

Both work on the steps ``u`` of any base optimizer. Where the papers write the gradient,
it is read off the step, ``∇ = −u / α`` with the learning rate ``α``: for plain SGD that
is the gradient, with momentum, weight decay or Adam it is what the base makes of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.base import add_step, check_kind, check_rule
from sdp_jax.channels import (
    PerChannel,
    channel_norms,
    channel_products,
)
from sdp_jax.checks import check_number, check_whole
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.methods._hosted import HostStep, channel_host, no_channels
from sdp_jax.methods.half_space import check_epsilon, project
from sdp_jax.methods.score import Score, of_gradients, producer_entries, unit
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree


class DHSPGState(NamedTuple):
    """State of :func:`dhspg`.

    Attributes:
      strength: state of the strength.
      redundant: which channels are in the redundant set.
    """

    strength: Any
    redundant: PerChannel


def hspg(
    groups: Groups,
    *,
    learning_rate: optax.ScalarOrSchedule,
    penalty: chex.Numeric = 1e-3,
    epsilon: chex.Numeric = 0.0,
    begin_step: int,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Half-Space Stochastic Projected Gradient, the optimizer of Only Train Once.

    It minimises ``f + λ Σ ‖x_g‖`` over the channels ``x_g``. Every update is a
    subgradient step ::

        x̂ = x + u − α λ x_g / ‖x_g‖        (the last term only where x_g ≠ 0)

    with the step ``u`` of the base. After ``begin_step`` of them the half-space
    projection follows, :func:`sdp_jax.methods.half_space_factor`: a channel with
    ``⟨x̂_g, x_g⟩ < ε ‖x_g‖²`` becomes zero, and one that is zero stays zero.

    The papers take plain SGD steps. With another base the penalty stays outside of it,
    as decoupled weight decay does: momentum and preconditioning see ``f`` alone.
    How many channels go follows from ``penalty``; :func:`dhspg` hits a target.

    Args:
      groups: the channel dimensions.
      learning_rate: the rate ``α`` of the base, or its schedule; it scales the penalty.
      penalty: ``λ``.
      epsilon: ``ε`` of the half space, in [0, 1).
      begin_step: last update without projection. Published code leaves it to the user.
      min_channels: channels that stay in each dimension; a number, or one for each
        name.

    Returns:
      A transformation for behind the base optimizer (:func:`sdp_jax.methods.hosted`);
      its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit the
        groups.
      TypeError: if an argument is of another kind.

    References:
      Chen, Ji, Ding, Fang, Wang, Zhu, Liang, Shi, Yi, Tu, "Only Train Once: A One-Shot
      Neural Network Training And Pruning Framework", NeurIPS 2021, arXiv 2107.07467;
      Chen et al., arXiv 2009.12078.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.hspg(groups, learning_rate=1.0, penalty=1.0, begin_step=0)
      >>> tx = methods.hosted(1.0, host)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[2.4 0. ]
       [3.2 0. ]]
    """
    check_kind(groups)
    floors = prox.resolve_floors(groups, min_channels)
    _check_penalty(learning_rate, penalty, epsilon)
    check_whole("begin_step", begin_step)

    def decide(step: HostStep) -> tuple[jax.Array, tuple[()], PyTree]:
        norms = channel_norms(groups, step.living.params)
        lengths = _rate_at(learning_rate, step.count, norms.dtype) * penalty
        candidate = shortened(groups, step, norms, lengths)
        products = channel_products(groups, candidate, step.living.params)
        where = step.count > begin_step
        factors = project(groups, norms, products, epsilon, where, floors)
        return factors, (), candidate

    return channel_host(groups, lambda _: (), decide, name="hspg")


def dhspg_score() -> Score:
    """How little redundant a channel is in the eyes of :func:`dhspg`.

    The saliency of the paper is high for channels that the negative gradient shortens,
    and for small ones::

        ½ cos(x_g, ∇_g) + ½ / (‖x_g‖ / n_g + 1e-6)

    with the ``n_g`` entries of the channel, each of the two terms divided by its
    Euclidean norm over all channels. The score is the largest saliency minus that of
    the channel. Channels that are zero count as redundant altogether (saliency 1), and
    do not enter the norms, where they would drown all others.

    Returns:
      A score; it needs gradients, or any positive multiple of them.

    References:
      Chen, Liang, Ding, Zhu, Zharkov, "OTOv2: Automatic, Generic, User-Friendly", ICLR
      2023, arXiv 2303.06862; the constants are those of its published code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[1., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> grads = {"w": jnp.array([[-1., 1.]])}
      >>> score = methods.dhspg_score()(groups, params, grads)
      >>> print(score.round(4))  # The step shortens the second one.
      [0.7071 0.    ]
    """

    def score(groups: Groups, params: PyTree, grads: PyTree) -> jax.Array:
        return _redundancy(
            groups,
            channel_norms(groups, params),
            channel_norms(groups, grads),
            channel_products(groups, params, grads),
        )

    return of_gradients("dhspg_score", score)


def dhspg(
    groups: Groups,
    strength: StrengthLike,
    *,
    learning_rate: optax.ScalarOrSchedule,
    penalty: chex.Numeric = 1e-3,
    amplification: chex.Numeric = 2.0,
    ceiling: chex.Numeric = 10.0,
    epsilon: chex.Numeric = 0.95,
    begin_step: int = 0,
    project_begin_step: int | None = None,
    warm_up_steps: int = 0,
    enough: chex.Numeric | None = None,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Dual Half-Space Projected Gradient, the optimizer of OTOv2.

    ``strength`` chooses a set of redundant channels by :func:`dhspg_score`; once chosen
    a channel stays in it. Only these are shortened, each as much as it takes::

        x̂ = x + u − α λ_g x_g / ‖x_g‖

    If the step ``u = −α ∇`` lengthens the channel, ``⟨x_g, ∇_g⟩ < 0``, then ``λ_g`` is
    ``amplification`` times the lower bound ``−⟨x_g, ∇_g⟩ / ‖x_g‖``, above which the
    norm falls, clipped to ``[λ, ceiling · λ]``. Where that is not below the upper bound
    ``−‖∇_g‖² ‖x_g‖ / ⟨x_g, ∇_g⟩``, up to which the loss falls as well, it is the mean
    of the two bounds. Otherwise ``λ_g = λ``. The half-space projection
    (:func:`sdp_jax.methods.half_space_factor`) follows on the redundant channels, and
    those of them that are zero stay zero.

    The defaults are those of the published code for SGD; for Adam it has
    ``penalty=1e-2, amplification=20, ceiling=1e3``. Its limit on the zeros of a layer
    zeroes a random part of them; here ``min_channels`` takes its place.

    Args:
      groups: the channel dimensions.
      strength: how much is redundant. The paper chooses once, after ``begin_step``
        updates: ``sdp_jax.target_sparsity(sparsity, begin_step, begin_step + 1)``, with
        0.05 more than the sparsity that is wanted.
      learning_rate: the rate ``α`` of the base, or its schedule; it scales the penalty.
      penalty: ``λ``.
      amplification: the multiple of the lower bound, at least 1.
      ceiling: how far above ``λ`` this may lie, at least 1.
      epsilon: ``ε`` of the half space, in [0, 1).
      begin_step: last update at which no channel is shortened.
      project_begin_step: last update without the projection; ``None`` for
        ``begin_step``.
      warm_up_steps: number of updates during which ``λ_g = λ``.
      enough: share of all channels that, when it is exactly zero, ends the shortening
        (in the paper the wanted sparsity, 0.05 below that of the redundant set);
        ``None`` shortens until the whole set is zero.
      min_channels: channels that stay in each dimension; a number, or one for each
        name.

    Returns:
      A transformation for behind the base optimizer (:func:`sdp_jax.methods.hosted`);
      its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit the
        groups.
      TypeError: if an argument is of another kind.

    References:
      Chen, Liang, Ding, Zhu, Zharkov, "OTOv2: Automatic, Generic, User-Friendly", ICLR
      2023, arXiv 2303.06862.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.dhspg(groups, sdp_jax.target_sparsity(0.5, 0, 1),
      ...     learning_rate=1.0, penalty=1.0)
      >>> tx = methods.hosted(1.0, host)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[3. 0.]
       [4. 0.]]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    _check_penalty(learning_rate, penalty, epsilon)
    check_number("amplification", amplification, low=1, rule="a number of at least 1")
    check_number("ceiling", ceiling, low=1, rule="a number of at least 1")
    check_whole("begin_step", begin_step)
    check_whole("warm_up_steps", warm_up_steps)
    first = begin_step if project_begin_step is None else project_begin_step
    check_whole("project_begin_step", first)
    if enough is not None:
        check_number("enough", enough, low=0, high=1, rule="a share in [0, 1] or None")

    def init(groups: Groups) -> DHSPGState:
        return DHSPGState(rule.init(groups, floors), no_channels(groups))

    def decide(step: HostStep) -> tuple[jax.Array, DHSPGState, PyTree]:
        norms = channel_norms(groups, step.living.params)
        steps = channel_norms(groups, step.living.updates).astype(norms.dtype)
        products = channel_products(groups, step.living.params, step.updates)
        products = products.astype(norms.dtype)

        redundant = step.inner.redundant.per_channel & ~step.released
        # What was chosen before comes first, so that it counts towards the target.
        ranked = _redundancy(groups, norms, steps, -products)
        ranked = jnp.where(redundant, -1, ranked)
        thresholds, strength_state = rule.update(
            step.inner.strength, ranked, groups, floors
        )
        redundant = (redundant | (ranked < thresholds)) & ~step.released

        plain = _rate_at(learning_rate, step.count, norms.dtype) * penalty
        lengths = penalty_lengths(products, norms, steps, plain, amplification, ceiling)
        lengths = jnp.where(step.count > warm_up_steps, lengths, plain)
        shrinking = redundant & (step.count > begin_step)
        if enough is not None:
            zeros = groups.dense.num_channels - jnp.sum(norms > 0)
            shrinking &= zeros / groups.dense.num_channels < enough
        candidate = shortened(groups, step, norms, jnp.where(shrinking, lengths, 0))
        products = channel_products(groups, candidate, step.living.params)
        where = redundant & ((step.count > first) | (norms == 0))
        factors = project(groups, norms, products, epsilon, where, floors)
        return factors, DHSPGState(strength_state, PerChannel(redundant)), candidate

    return channel_host(groups, init, decide, name="dhspg")


def penalty_lengths(
    products: jax.Array,
    norms: jax.Array,
    steps: jax.Array,
    plain: chex.Numeric,
    amplification: chex.Numeric,
    ceiling: chex.Numeric,
) -> jax.Array:
    """``α λ_g`` of :func:`dhspg`, from ``⟨x, u⟩``, ``‖x‖``, ``‖u‖`` and ``α λ``."""
    plain = jnp.broadcast_to(jnp.asarray(plain, norms.dtype), norms.shape)
    grows = (products > 0) & (norms > 0)
    along = jnp.where(grows, products, 1)
    size = jnp.where(grows, norms, 1)
    # The two bounds, times α: between them the norm and the loss fall.
    lower = along / size
    upper = jnp.square(steps) / lower
    length = jnp.clip(amplification * lower, plain, ceiling * plain)
    length = jnp.where(length < upper, length, (lower + upper) / 2)
    return jnp.where(grows, length, plain).astype(norms.dtype)


def shortened(
    groups: Groups, step: HostStep, norms: jax.Array, lengths: chex.Numeric
) -> PyTree:
    """``x + u − length · x_g / ‖x_g‖``, at least float32; ``x + u`` at norm 0."""
    share = jnp.where(norms > 0, lengths / jnp.where(norms > 0, norms, 1), 0)
    wide = jax.tree.map(
        lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), step.params
    )
    return add_step(scale_channels(groups, wide, 1 - share), step.updates)


def _redundancy(
    groups: Groups, norms: jax.Array, grads: jax.Array, products: jax.Array
) -> jax.Array:
    """The largest saliency minus that of each channel, from norms and products."""
    alive = norms > 0
    turned = alive & (grads > 0)
    lengths = jnp.where(turned, norms * grads, 1)
    cosine = jnp.where(turned, products / jnp.where(lengths > 0, lengths, 1), 0)
    inverse = jnp.where(alive, 1 / (norms / producer_entries(groups) + 1e-6), 0)
    saliency = (unit(cosine) + unit(inverse)) / 2
    saliency = jnp.where(alive, saliency, 1)
    return jnp.max(saliency) - saliency


def _check_penalty(learning_rate: Any, penalty: Any, epsilon: Any) -> None:
    """Refuses what cannot scale a penalty, be one, or bound a half space."""
    if not callable(learning_rate):
        rule = "a non-negative number or a schedule"
        check_number("learning_rate", learning_rate, low=0, rule=rule)
    check_number("penalty", penalty, low=0, rule="a non-negative number")
    check_epsilon(epsilon)


def _rate_at(rate: optax.ScalarOrSchedule, count: jax.Array, dtype: Any) -> jax.Array:
    """The rate of update number ``count``; schedules count from 0."""
    return jnp.asarray(rate(count - 1) if callable(rate) else rate, dtype)
