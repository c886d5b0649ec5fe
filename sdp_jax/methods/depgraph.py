"""DepGraph: importance of all that goes with a channel, and its sparse learning.

The other scores look at the producers of a channel. Here its consumers count as well:
what is cut together is judged together.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.base import check_kind, check_params, transformation
from sdp_jax.channels import (
    PerChannel,
    channels_alive,
    magnitude,
    member_sums,
)
from sdp_jax.checks import check_number, check_whole
from sdp_jax.dimension import Dimension, Member
from sdp_jax.entries import add_decay
from sdp_jax.groups import Groups
from sdp_jax.importance import (
    ROLES,
    Normalizer,
    Reduce,
    channel_importance,
    check_importance,
    counted_members,
)
from sdp_jax.methods.score import Score, of_params
from sdp_jax.segments import max_over, min_over, sum_over
from sdp_jax.tree import PyTree


class GroupNormRegularizerState(NamedTuple):
    """State of :func:`group_norm_regularizer`.

    Attributes:
      count: number of updates so far, int32 scalar.
      reg: strength of each channel.
    """

    count: jax.Array
    reg: PerChannel


def group_importance(
    p: float = 2,
    *,
    bias: bool = False,
    normalizer: Normalizer | None = "mean",
    reduce: Reduce = "mean",
) -> Score:
    """The norm of all parameters that go with a channel, of those that read it as well.

    For channel ``k`` of a dimension with the members ``m``, producers and consumers::

        I_k = reduce_m Σ |w_m[k]|^p,    I_k ← I_k / normalizer_j I_j

    There is no root: with ``p=2`` these are squares. Scales of normalisations count as
    members; running statistics never do. Members that cover one axis of one leaf (such
    as query, key and value in one matrix) are one member together.

    It is the importance in the model as it would be after a cut: a channel whose
    producers are all zero scores 0, the normaliser leaves it out, and so do the
    channels beside it leave out the entries that read it.

    A bias is a producer whose last key is ``bias``, or a vector whose last key is
    ``beta``, ``offset``, ``shift`` or ``b``, or a vector beside a matrix that is a
    producer in the same module, unless its last key is ``scale``, ``gamma`` or
    ``weight``. Where a dimension has nothing else, its biases count.

    Args:
      p: the exponent.
      bias: whether biases count, each as a member of its own.
      normalizer: what the importances of a dimension are divided by, their ``"mean"``,
        ``"max"`` or ``"sum"``; ``None`` leaves them as they are. It makes dimensions
        comparable under one target for all of them.
      reduce: how the members are combined, by ``"mean"``, ``"sum"`` or ``"max"``.

    Returns:
      A score; it needs neither gradients nor activations.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if ``p`` is not a number.

    References:
      Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023,
      arXiv 2301.12900; the mean over members and the normaliser as in its code.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.]]), "v": jnp.array([[1.], [3.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {
      ...     "hidden": [sdp_jax.Member("w", 1), sdp_jax.Member("v", 0, "consumer")]})
      >>> score = methods.group_importance(normalizer=None)
      >>> print(score(groups, params))  # (9 + 1) / 2, (1 + 9) / 2
      [5. 5.]
    """
    check_importance(p, normalizer, reduce)

    def score(groups: Groups, params: PyTree) -> jax.Array:
        return channel_importance(
            groups, params, p=p, bias=bias, normalizer=normalizer, reduce=reduce
        )

    return of_params(score)


def group_norm_regularizer(
    groups: Groups,
    reg: chex.Numeric = 5e-4,
    *,
    alpha: chex.Numeric | None = None,
    growing: chex.Numeric | None = None,
    every: int = 1,
    bias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of DepGraph's sparsity regulariser: weak channels decay faster.

    It stands in *front* of the base optimizer. To the gradient of every producer and
    consumer of channel ``k`` it adds ::

        reg γ_k w[k],    γ_k = 2^(α (√I_max − √I_k) / (√I_max − √I_min))

    with the importances ``I`` of :func:`group_importance` with ``p=2``; largest and
    smallest are those of the dimension. The strongest channel decays at the rate
    ``reg``, the weakest at ``2^α`` times that. An entry that belongs to two dimensions
    gets both terms.

    The growing variant keeps a strength ``reg_k`` for each channel, which starts at
    ``reg`` and grows after every ``every`` updates::

        reg_k ← reg_k + growing (I_max − I_k) / (I_max − I_min)

    Where all channels of a dimension are equally important, ``γ_k = 1`` and nothing
    grows. While an importance of a dimension is not finite, its channels are left
    alone. So are channels whose producers are all zero: neither they nor what reads
    them decays, and they do not count for largest and smallest.

    Args:
      groups: the channel dimensions.
      reg: the strength.
      alpha: ``α``; ``None`` stands for 4, and for 0, that is ``γ_k = 1``, if
        ``growing`` is given: so are the two published forms.
      growing: by how much the strength of the weakest channel grows, for example 1e-4;
        ``None`` keeps all strengths.
      every: updates from one growth to the next.
      bias: whether biases count and decay, see :func:`group_importance`.

    Returns:
      An Optax transformation; its ``update`` needs ``params`` and emits the dtype of
      the gradients.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023,
      arXiv 2301.12900. Growing: Wang, Qin, Zhang, Fu, "Neural Pruning via Growing
      Regularization", ICLR 2021, arXiv 2012.09243, in the form that DepGraph's code
      gives it.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 2., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> tx = optax.chain(
      ...     methods.group_norm_regularizer(groups, reg=0.1), optax.sgd(1.0))
      >>> updates, _ = tx.update({"w": jnp.zeros((1, 3))}, tx.init(params), params)
      >>> print(-updates["w"] / params["w"])  # 0.1 · (1, 4, 16)
      [[0.1 0.4 1.6]]
    """
    check_kind(groups)
    check_number("reg", reg, low=0, rule="a non-negative number")
    check_whole("every", every, low=1)
    if growing is not None:
        check_number("growing", growing, low=0, rule="a non-negative number or None")
    elif every != 1:
        raise ValueError(
            f"every={every!r} is the pace of the growing variant; give growing= too"
        )
    if alpha is None:
        alpha = 4.0 if growing is None else 0.0
    check_number("alpha", alpha, low=0, rule="a non-negative number or None")
    importance = group_importance(bias=bias)
    counted = {d.name: counted_members(groups, d, bias) for d in groups}

    def decays(dimension: Dimension, member: Member) -> bool:
        return member in counted[dimension.name]

    def init(params: optax.Params) -> GroupNormRegularizerState:
        check_params(groups, params)
        if jax.tree.leaves(params):
            # It says which member is missing.
            member_sums(groups, params, magnitude, roles=ROLES)
        size, dtype = (groups.num_channels,), jnp.result_type(float)
        strengths = jnp.full(size, reg, dtype)
        return GroupNormRegularizerState(
            jnp.zeros((), jnp.int32), PerChannel(strengths)
        )

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        count = jnp.asarray(optax.safe_increment(state.count))
        strengths = state.reg.per_channel
        alive = channels_alive(groups, params)
        scores = importance(groups, params)
        unknown = alive & ~jnp.isfinite(scores)
        acts = alive & (sum_over(unknown, groups.owner) == 0)
        weak = _weakness(jnp.sqrt(scores), alive, groups.owner)
        rates = jnp.where(acts, strengths * 2 ** (alpha * weak), 0)
        if growing is not None:
            more = growing * _weakness(scores, alive, groups.owner)
            more = jnp.where((count % every == 0) & acts, more, 0)
            strengths = strengths + more.astype(strengths.dtype)
        out = add_decay(groups, updates, params, rates, decays)
        return out, GroupNormRegularizerState(count, PerChannel(strengths))

    return transformation("group_norm_regularizer", init, update)


def _weakness(values: jax.Array, alive: jax.Array, owner: np.ndarray) -> jax.Array:
    """0 for the largest of the living, 1 for the smallest; 0 where all are equal."""
    top = max_over(jnp.where(alive, values, -jnp.inf), owner)
    low = min_over(jnp.where(alive, values, jnp.inf), owner)
    spread = top > low
    return jnp.where(
        alive & spread, (top - values) / jnp.where(spread, top - low, 1), 0
    )
