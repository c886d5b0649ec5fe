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
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import (
    add_step,
    as_base,
    check_kind,
    check_params,
    check_rule,
    need_params,
    step_to,
)
from sdp_jax.channels import PerChannel, channel_norms, channel_products, scale_channels
from sdp_jax.checks import check_number, check_whole
from sdp_jax.groups import Groups
from sdp_jax.methods.half_space import check_epsilon, project
from sdp_jax.methods.hosted import hosted
from sdp_jax.methods.score import Score, need_gradients, unit
from sdp_jax.strength import StrengthLike
from sdp_jax.tree import PyTree


class HSPGState(NamedTuple):
    """State of :func:`hspg_host`.

    Attributes:
      count: number of updates so far, int32 scalar.
    """

    count: jax.Array


class DHSPGState(NamedTuple):
    """State of :func:`dhspg_host`.

    Attributes:
      strength: state of the strength.
      count: number of updates so far, int32 scalar.
      redundant: which channels are in the redundant set.
    """

    strength: Any
    count: jax.Array
    redundant: PerChannel


def hspg_host(
    groups: Groups,
    *,
    learning_rate: optax.ScalarOrSchedule,
    penalty: chex.Numeric = 1e-3,
    epsilon: chex.Numeric = 0.0,
    begin: int,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """What :func:`hspg` puts behind its base optimizer.

    Args:
      groups: the channel dimensions.
      learning_rate: the rate ``α`` of the base, or its schedule; it scales the penalty.
      penalty: see :func:`hspg`.
      epsilon: see :func:`hspg`.
      begin: see :func:`hspg`.
      min_channels: see :func:`hspg`.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      See :func:`hspg`.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.hspg_host(groups, learning_rate=1.0, penalty=1.0, begin=0)
      >>> tx = optax.chain(optax.sgd(1.0), host)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[2.4 0. ]
       [3.2 0. ]]
    """
    check_kind(groups)
    floors = prox.resolve_floors(groups, floor)
    _check_rate(learning_rate)
    check_number("penalty", penalty, low=0, rule="a non-negative number")
    check_epsilon(epsilon)
    check_whole("begin", begin)

    def init_fn(params: optax.Params) -> HSPGState:
        check_params(groups, params)
        return HSPGState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HSPGState]:
        del extra_args
        params = need_params(params, updates, "hspg_host")
        count = jnp.asarray(optax.safe_increment(state.count))
        norms = channel_norms(groups, params)
        rate = _rate_at(learning_rate, state.count, norms.dtype)
        candidate = shortened(groups, params, updates, norms, rate * penalty)
        products = channel_products(groups, candidate, params)
        where = count > begin
        factors = project(groups, norms, products, epsilon, where, floors)
        point = scale_channels(groups, candidate, factors)
        return step_to(point, params), HSPGState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hspg(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    *,
    penalty: chex.Numeric = 1e-3,
    learning_rate: optax.ScalarOrSchedule | None = None,
    epsilon: chex.Numeric = 0.0,
    begin: int,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """Half-Space Stochastic Projected Gradient, the optimizer of Only Train Once.

    It minimises ``f + λ Σ ‖x_g‖`` over the channels ``x_g``. Every update is a
    subgradient step ::

        x̂ = x + u − α λ x_g / ‖x_g‖        (the last term only where x_g ≠ 0)

    with the step ``u`` of ``base``. After ``begin`` of them the half-space projection
    follows, :func:`sdp_jax.methods.half_space_factor`: a channel with
    ``⟨x̂_g, x_g⟩ < ε ‖x_g‖²`` becomes zero, and one that is zero stays zero.

    The papers take plain SGD steps. With another base the penalty stays outside of it,
    as decoupled weight decay does: momentum and preconditioning see ``f`` alone.
    How many channels go follows from ``penalty``; :func:`dhspg` hits a target.

    Args:
      base: a learning rate, a schedule or an Optax transformation.
      groups: the channel dimensions.
      penalty: ``λ``.
      learning_rate: the rate ``α`` that scales the penalty, or its schedule; ``None``
        takes that of ``base``, which then must be a rate or a schedule.
      epsilon: ``ε`` of the half space, in [0, 1).
      begin: number of updates without projection. Published code leaves it to the user.
      momentum: momentum of the SGD that a learning rate stands for.
      nesterov: whether it is Nesterov's.
      min_channels: channels that stay in each dimension; a number, or one for each name.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, the learning rate is missing, or the
        parameters do not fit the groups.
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
      >>> tx = methods.hspg(1.0, groups, penalty=1.0, begin=0)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[2.4 0. ]
       [3.2 0. ]]
    """
    host = hspg_host(
        groups,
        learning_rate=_rate_of(base, learning_rate, "hspg"),
        penalty=penalty,
        epsilon=epsilon,
        begin=begin,
        min_channels=min_channels,
    )
    return hosted(as_base(base, momentum, nesterov), host)


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
      >>> score = methods.dhspg_score()(groups, params, grads)["hidden"]
      >>> print(score.round(4))  # The step shortens the second one.
      [0.7071 0.    ]
    """

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> dict[str, jax.Array]:
        del activations
        grads = need_gradients(grads, "dhspg_score")
        found = _redundancy(
            groups,
            channel_norms(groups, params),
            channel_norms(groups, grads),
            channel_products(groups, params, grads),
        )
        return found

    return score


def dhspg_host(
    groups: Groups,
    strength: StrengthLike,
    *,
    learning_rate: optax.ScalarOrSchedule,
    penalty: chex.Numeric = 1e-3,
    amplification: chex.Numeric = 2.0,
    ceiling: chex.Numeric = 10.0,
    epsilon: chex.Numeric = 0.95,
    begin: int = 0,
    project_from: int | None = None,
    warm_up: int = 0,
    enough: chex.Numeric | None = None,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
) -> optax.GradientTransformationExtraArgs:
    """What :func:`dhspg` puts behind its base optimizer.

    Args:
      groups: the channel dimensions.
      strength: see :func:`dhspg`.
      learning_rate: the rate ``α`` of the base, or its schedule; it scales the penalty.
      penalty: see :func:`dhspg`.
      amplification: see :func:`dhspg`.
      ceiling: see :func:`dhspg`.
      epsilon: see :func:`dhspg`.
      begin: see :func:`dhspg`.
      project_from: see :func:`dhspg`.
      warm_up: see :func:`dhspg`.
      enough: see :func:`dhspg`.
      min_channels: see :func:`dhspg`.

    Returns:
      A transformation for behind the base optimizer; its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      See :func:`dhspg`.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.dhspg_host(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), learning_rate=1., penalty=1.)
      >>> tx = methods.decay_pruning(optax.sgd(1.0), host, groups, steps=2)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[3.   0.15]
       [4.   0.2 ]]
    """
    rule, floors = check_rule(groups, strength, min_channels)
    _check_rate(learning_rate)
    check_number("penalty", penalty, low=0, rule="a non-negative number")
    check_number("amplification", amplification, low=1, rule="a number of at least 1")
    check_number("ceiling", ceiling, low=1, rule="a number of at least 1")
    check_epsilon(epsilon)
    check_whole("begin", begin)
    check_whole("warm_up", warm_up)
    project_from = begin if project_from is None else project_from
    check_whole("project_from", project_from)
    if enough is not None:
        check_number("enough", enough, low=0, high=1, rule="a share in [0, 1] or None")

    def init_fn(params: optax.Params) -> DHSPGState:
        check_params(groups, params)
        return DHSPGState(
            rule.init(groups, floors),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros((groups.num_channels,), bool)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        released: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DHSPGState]:
        del extra_args
        params = need_params(params, updates, "dhspg_host")
        count = jnp.asarray(optax.safe_increment(state.count))
        norms = channel_norms(groups, params)
        steps = channel_norms(groups, updates).astype(norms.dtype)
        products = channel_products(groups, params, updates)
        products = products.astype(norms.dtype)

        redundant = state.redundant.per_channel
        if released is not None:
            redundant &= ~released
        # What was chosen before comes first, so that it counts towards the target.
        ranked = _redundancy(groups, norms, steps, -products)
        ranked = jnp.where(redundant, -1, ranked)
        thresholds, strength_state = rule.update(state.strength, ranked, floors)
        redundant |= ranked < thresholds
        if released is not None:
            redundant &= ~released

        plain = _rate_at(learning_rate, state.count, norms.dtype) * penalty
        lengths = penalty_lengths(products, norms, steps, plain, amplification, ceiling)
        lengths = jnp.where(count > warm_up, lengths, plain)
        shrinking = redundant & (count > begin)
        if enough is not None:
            shrinking &= jnp.mean(norms == 0) < enough
        lengths = jnp.where(shrinking, lengths, 0)
        candidate = shortened(groups, params, updates, norms, lengths)
        products = channel_products(groups, candidate, params)
        where = redundant & ((count > project_from) | (norms == 0))
        factors = project(groups, norms, products, epsilon, where, floors)
        point = scale_channels(groups, candidate, factors)
        new_state = DHSPGState(strength_state, count, PerChannel(redundant))
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dhspg(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    groups: Groups,
    strength: StrengthLike,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    penalty: chex.Numeric = 1e-3,
    amplification: chex.Numeric = 2.0,
    ceiling: chex.Numeric = 10.0,
    epsilon: chex.Numeric = 0.95,
    begin: int = 0,
    project_from: int | None = None,
    warm_up: int = 0,
    enough: chex.Numeric | None = None,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
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
    zeroes a random part of them; here ``floor`` takes its place.

    Args:
      base: a learning rate, a schedule or an Optax transformation.
      groups: the channel dimensions.
      strength: how much is redundant. The paper chooses once, after ``begin`` updates:
        ``sdp_jax.target_sparsity(fraction, begin, begin + 1)``, with 0.05 more than
        the share of channels that is wanted.
      learning_rate: the rate ``α`` that scales the penalty, or its schedule; ``None``
        takes that of ``base``, which then must be a rate or a schedule.
      penalty: ``λ``.
      amplification: the multiple of the lower bound, at least 1.
      ceiling: how far above ``λ`` this may lie, at least 1.
      epsilon: ``ε`` of the half space, in [0, 1).
      begin: number of updates before channels are shortened.
      project_from: number of updates before the projection; ``None`` for ``begin``.
      warm_up: number of updates during which ``λ_g = λ``.
      enough: share of all channels that, when it is exactly zero, ends the shortening
        (in the paper the wanted share, 0.05 below that of the redundant set); ``None``
        shortens until the whole set is zero.
      momentum: momentum of the SGD that a learning rate stands for.
      nesterov: whether it is Nesterov's.
      min_channels: channels that stay in each dimension; a number, or one for each name.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, the learning rate is missing, or the
        parameters do not fit the groups.
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
      >>> tx = methods.dhspg(
      ...     1.0, groups, sdp_jax.target_sparsity(0.5, 0, 1), penalty=1.0)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[3. 0.]
       [4. 0.]]
    """
    host = dhspg_host(
        groups,
        strength,
        learning_rate=_rate_of(base, learning_rate, "dhspg"),
        penalty=penalty,
        amplification=amplification,
        ceiling=ceiling,
        epsilon=epsilon,
        begin=begin,
        project_from=project_from,
        warm_up=warm_up,
        enough=enough,
        min_channels=min_channels,
    )
    return hosted(as_base(base, momentum, nesterov), host)


def penalty_lengths(
    products: jax.Array,
    norms: jax.Array,
    steps: jax.Array,
    plain: chex.Numeric,
    amplification: chex.Numeric,
    ceiling: chex.Numeric,
) -> jax.Array:
    """By how much each channel is shortened, ``α λ_g`` of :func:`dhspg`.

    Args:
      products: ``⟨x_g, u_g⟩`` with the step ``u``.
      norms: ``‖x_g‖``.
      steps: ``‖u_g‖``.
      plain: ``α λ``.
      amplification: multiple of the lower bound.
      ceiling: how far above ``plain`` this may lie.

    Returns:
      Lengths, in the shape and dtype of ``norms``.
    """
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
    groups: Groups,
    params: PyTree,
    updates: optax.Updates,
    norms: jax.Array,
    lengths: jax.Array,
) -> PyTree:
    """The candidate ``x + u − length · x_g / ‖x_g‖``, at least float32.

    Args:
      groups: the channel dimensions.
      params: the parameters ``x``.
      updates: the step ``u`` of the base.
      norms: the norms of the channels of ``params``, ``(num_channels,)``.
      lengths: a number, or one for each channel.

    Returns:
      The candidate; channels of norm 0 take the step of the base.
    """
    share = jnp.where(norms > 0, lengths / jnp.where(norms > 0, norms, 1), 0)
    wide = jax.tree.map(
        lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params
    )
    factors = 1 - share
    return add_step(scale_channels(groups, wide, factors), updates)


def _redundancy(
    groups: Groups, norms: jax.Array, grads: jax.Array, products: jax.Array
) -> jax.Array:
    """The largest saliency minus that of each channel, from norms and products."""
    entries = np.repeat(
        [groups.entries(d, roles=("producer",)) for d in groups],
        [d.size for d in groups],
    ).astype(np.float32)
    alive = norms > 0
    turned = alive & (grads > 0)
    lengths = jnp.where(turned, norms * grads, 1)
    cosine = jnp.where(turned, products / jnp.where(lengths > 0, lengths, 1), 0)
    inverse = jnp.where(alive, 1 / (norms / entries + 1e-6), 0)
    saliency = (unit(cosine) + unit(inverse)) / 2
    saliency = jnp.where(alive, saliency, 1)
    return jnp.max(saliency) - saliency


def _check_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        check_number(
            "learning_rate",
            learning_rate,
            low=0,
            rule="a non-negative number or a schedule",
        )


def _rate_at(rate: optax.ScalarOrSchedule, count: jax.Array, dtype: Any) -> jax.Array:
    """The rate of the update after ``count`` others."""
    return jnp.asarray(rate(count) if callable(rate) else rate, dtype)


def _rate_of(base: Any, learning_rate: Any, name: str) -> Any:
    """The learning rate that scales the penalty."""
    if learning_rate is not None:
        return learning_rate
    if isinstance(base, optax.GradientTransformation):
        raise ValueError(
            f"{name} scales its penalty by the learning rate, which an Optax "
            "transformation does not tell; give learning_rate= (a number, or the "
            "schedule of the base)"
        )
    return base
