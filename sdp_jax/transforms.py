"""The Optax pieces that :func:`sdp_jax.altsdp` is a chain of.

Every piece passes updates on, as Optax transformations do: what arrives is a step from
the parameters, what leaves is a step from the parameters. With ``candidates=True`` a
piece passes the point itself, ``params + step``, to the next one. The numbers are the
same; one pass over the parameters and a temporary copy of them are saved, because XLA
on the CPU would otherwise store ``v' - params`` only to add ``params`` back. Pieces
that stand next to each other must agree on it, and a chain must end with a piece that
emits steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.groups import (
    Groups,
    Norm,
    PerChannel,
    PyTree,
    channel_norms,
    channel_products,
    channel_weights,
    join_channels,
    leaf_dtype,
    leaf_keys,
    leaf_table,
    probe_channels,
    producer_leaves,
    scale_channels,
    split_channels,
)
from sdp_jax.strength import (
    Strength,
    StrengthLike,
    as_strength,
    check_momentum,
    check_number,
)


class DualAveragingState(NamedTuple):
    """State of :func:`dual_averaging`.

    Attributes:
      dual: the dual variable ``v``, shaped like the parameters, at least float32.
    """

    dual: optax.Params


class GroupSoftThresholdState(NamedTuple):
    """State of :func:`group_soft_threshold`.

    Attributes:
      strength: state of the strength.
      alive: which channels the last update did not set to zero.
      intact: False once the zeros of an update were found changed at the next one.
    """

    strength: Any
    alive: PerChannel
    intact: jax.Array


class SoftThresholdState(NamedTuple):
    """State of :func:`soft_threshold`.

    Attributes:
      strength: state of the strength.
    """

    strength: Any


def dual_averaging(
    *, candidates: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Accumulates the incoming steps in a dual variable instead of in the parameters.

    Keeps ``v``, which starts at the parameters, adds each incoming step to it and
    emits ``v' - params``. The gradient is still taken at the parameters, which a
    later piece of the chain (the threshold) makes sparse, while ``v`` remembers what
    was cut off. Alone it changes nothing: ``chain(base, dual_averaging())`` takes the
    steps of ``base``.

    Args:
      candidates: emit ``v'`` itself (see the module's docstring).

    Returns:
      A transformation; its ``update`` needs ``params``. The dual variable and what is
      emitted have the dtype of the parameters, but at least float32.

    Raises:
      ValueError: in ``update``, if ``params`` is missing.
      TypeError: in ``init``, if a leaf is not floating-point or complex.

    References:
      Xiao, "Dual Averaging Methods for Regularized Stochastic Learning and Online
      Optimization", JMLR 2010; as in gRDA, arXiv 2006.09358.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> tx = optax.chain(optax.sgd(0.5), sdp_jax.dual_averaging())
      >>> params = jnp.array([1., 2.])
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.5 1.5]
    """

    def init_fn(params: optax.Params) -> DualAveragingState:
        check_inexact(params)
        return DualAveragingState(jax.tree.map(wide_copy, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DualAveragingState]:
        del extra_args
        params = need_params(params, updates, "dual_averaging")
        dual = jax.tree.map(lambda v, u: v + u.astype(v.dtype), state.dual, updates)
        return emit(dual, params, candidates), DualAveragingState(dual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def radial_dual_averaging(
    groups: Groups, *, candidates: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Dual averaging that remembers of a living channel only how much it shrank.

    In :func:`dual_averaging` a channel that the threshold has shrunk to the share ``s``
    of its dual variable also *turns* at only ``s`` times the rate of the base
    optimizer, because its direction is that of the larger ``v``. Here the step acts on
    the channel itself, and what the threshold took off is added to its norm::

        y = w + step,   v' = y + (‖v‖ − ‖w‖) (κ y/‖y‖ + (1 − κ) v/‖v‖)

    with ``κ = max(0, cos(y, v))``: the shrinkage follows the channel as it turns, and
    stays behind when a step reverses it, so that channels still get stuck at zero.
    Zero channels and parameters outside the groups are averaged as usual. Groups of one
    entry, and a threshold of zero, give :func:`dual_averaging` itself.

    Args:
      groups: the channel dimensions.
      candidates: emit ``v'`` itself (see the module's docstring).

    Returns:
      A transformation; its ``update`` needs ``params``. Its state is that of
      :func:`dual_averaging`.

    Raises:
      ValueError: if the parameters do not fit the groups, or ``params`` is missing in
        ``update``.
      TypeError: in ``init``, if a leaf is not floating-point or complex.

    References:
      Our own variant of dual averaging.
    """
    check_kind(groups)

    def init_fn(params: optax.Params) -> DualAveragingState:
        check_inexact(params)
        check_params(groups, params)
        return DualAveragingState(jax.tree.map(wide_copy, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DualAveragingState]:
        del extra_args
        params = need_params(params, updates, "radial_dual_averaging")
        old = state.dual

        def scaled(tree: optax.Params, factor: jax.Array) -> optax.Params:
            return scale_channels(groups, tree, split_channels(factor, groups.sizes))

        steps = jax.tree.map(lambda v, u: u.astype(v.dtype), old, updates)
        before = join_channels(channel_norms(groups, old))
        now = join_channels(channel_norms(groups, params)).astype(before.dtype)
        alive = (now > 0) & (before > 0)
        share = jnp.where(alive, now / jnp.where(alive, before, 1), 1)
        shrunk = jnp.where(alive, before - now, 0)
        # Norm of y = share · v + step, and its product with v, without forming it.
        across = join_channels(channel_products(groups, steps, old))
        size = join_channels(channel_norms(groups, steps))
        product = now * before + across
        square = now**2 + 2 * share * across + size**2
        # A step that all but undoes the channel leaves no direction to follow.
        turns = alive & (product > 0) & (square > 1e-4 * now**2)
        length = jnp.sqrt(jnp.where(turns, square, 1))
        cosine = jnp.where(turns, product / jnp.where(turns, length * before, 1), 0)
        cosine = jnp.minimum(cosine, 1)
        stretch = 1 + cosine * shrunk / length
        behind = (1 - cosine) * shrunk / jnp.where(alive, before, 1)
        # v' = stretch · y + behind · v, in one pass.
        dual = jax.tree.map(
            jnp.add, scaled(old, stretch * share + behind), scaled(steps, stretch)
        )
        return emit(dual, params, candidates), DualAveragingState(dual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def group_soft_threshold(
    groups: Groups,
    strength: StrengthLike,
    *,
    floor: int | jax.Array | Mapping[str, int] = 1,
    norm: Norm | Mapping[str, float] = "plain",
    candidates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Moves to the proximal point of the candidate ``params + updates``.

    Each channel ``v_c`` becomes ``max(0, 1 - t k_c / ‖v_c‖) v_c``, with the threshold
    ``t`` of ``strength`` and the weight ``k_c`` of ``norm``; parameters outside the
    groups stay at the candidate. A channel that falls below is exactly zero after
    ``optax.apply_updates``. At least ``floor`` channels of each dimension survive.

    It must be the last piece of a chain: anything behind it that rescales or adds to
    its updates (a learning rate, weight decay, clipping, ``optax.lookahead``) destroys
    the zeros. :func:`check_zeros` finds out.

    Not-a-number or infinite gradients pass into the parameters as they do in
    ``optax.sgd``; wrap the whole chain in ``optax.apply_if_finite`` to skip them.

    Args:
      groups: the channel dimensions.
      strength: a :class:`sdp_jax.Strength`, a constant threshold or a schedule, in
        parameter units.
      floor: channels that survive in each dimension; a number, or one for each name.
      norm: weighting of the channel norms, see :func:`sdp_jax.channel_norms`.
      candidates: ``updates`` are candidates, see the module's docstring.

    Returns:
      A transformation; its ``update`` needs ``params`` and emits their dtype.

    Raises:
      ValueError: if ``strength``, ``floor`` or ``norm`` does not fit the groups, or in
        ``init`` and ``update`` if the parameters do not.

    References:
      Yuan and Lin, "Model selection and estimation in regression with grouped
      variables", JRSS B 2006 (the group lasso and its proximal map).

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.3], [4., 0.4]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> tx = sdp_jax.group_soft_threshold(groups, 2.5)
      >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [[1.5 0. ]
       [2.  0. ]]
    """
    rule, floors = check_rule(groups, strength, floor, norm)

    def init_fn(params: optax.Params) -> GroupSoftThresholdState:
        check_params(groups, params)
        alive = PerChannel(jnp.ones((groups.num_channels,), bool))
        return GroupSoftThresholdState(
            rule.init(groups.sizes, floors), alive, jnp.ones((), bool)
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GroupSoftThresholdState]:
        del extra_args
        params = need_params(params, updates, "group_soft_threshold")
        candidate = updates if candidates else add_step(params, updates)
        point, factor, strength_state = proximal_point(
            groups, rule, floors, norm, candidate, state.strength
        )
        probe = join_channels(probe_channels(groups, params))
        intact = state.intact & ~jnp.any(~state.alive.per_channel & (probe != 0))
        alive = PerChannel(factor != 0)
        new_state = GroupSoftThresholdState(strength_state, alive, intact)
        return step_to(point, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_threshold(
    strength: StrengthLike, *, candidates: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The same with every entry a group of its own: ``sign(v) max(0, |v| - t)``.

    Unlike :func:`group_soft_threshold` it works on all parameters and holds no floor.

    Args:
      strength: a constant threshold, a schedule, or a :class:`sdp_jax.Strength` that
        does not depend on the norms.
      candidates: ``updates`` are candidates, see the module's docstring.

    Returns:
      A transformation; its ``update`` needs ``params`` and emits their dtype.

    Raises:
      ValueError: if ``strength`` is negative, or in ``update`` without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> tx = optax.chain(optax.sgd(1.0), sdp_jax.soft_threshold(0.5))
      >>> params = jnp.array([2., 0.2])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> print(params + updates)
      [1.5 0. ]
    """
    rule = as_strength(strength)

    def init_fn(params: optax.Params) -> SoftThresholdState:
        check_inexact(params)
        return SoftThresholdState(rule.init({}, {}))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SoftThresholdState]:
        del extra_args
        params = need_params(params, updates, "soft_threshold")
        candidate = updates if candidates else add_step(params, updates)
        leaves, treedef = jax.tree.flatten(candidate)
        norms = {str(i): jnp.abs(leaf) for i, leaf in enumerate(leaves)}
        thresholds, strength_state = rule.update(state.strength, norms, {})
        point = treedef.unflatten(
            leaf * prox.soft_threshold_factor(norms[name], thresholds[name])
            for leaf, name in zip(leaves, norms, strict=True)
        )
        return step_to(point, params), SoftThresholdState(strength_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_zeros(opt_state: PyTree) -> None:
    """Raises if a later transformation destroyed the zeros of the threshold.

    The threshold remembers which channels it set to zero and looks at the next update
    whether they still were, in the vectors (biases, scales) of each dimension, or in
    its smallest producer where it has none: what changes matrices alone is not seen.
    Call this now and then outside ``jit``, for example once an epoch.

    Args:
      opt_state: the optimizer state, or any tree that contains it.

    Raises:
      ValueError: if the zeros of an earlier update had been changed, or the state has
        no :func:`group_soft_threshold` in it.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((3, 2))}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> state = sdp_jax.altsdp(0.1, groups, strength=0.0).init(params)
      >>> sdp_jax.check_zeros(state)  # All is well.
    """
    # By name: nnx and checkpoints turn the state into dictionaries.
    found = [leaf for keys, leaf in leaf_keys(opt_state) if keys[-1:] == ("intact",)]
    if not found:
        raise ValueError(
            "no state of group_soft_threshold in this tree; pass the optimizer state "
            "of altsdp, prox_sgd or group_soft_threshold"
        )
    if not all(bool(jnp.all(jnp.asarray(intact))) for intact in found):
        raise ValueError(
            "channels that group_soft_threshold had set to zero were not zero at the "
            "next update: something behind it rescales or adds to its updates, or the "
            "parameters were changed from outside. Make it the last piece of the chain."
        )


def check_inexact(params: optax.Params) -> None:
    """Refuses leaves that cannot be trained.

    Args:
      params: the parameters.

    Raises:
      TypeError: if a leaf is not an array, or not floating-point or complex.
    """
    for path, leaf in leaf_table(params).items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"leaf {path!r} is {leaf!r}; parameters must be arrays, make it one "
                "with jnp.asarray"
            )
        dtype = leaf_dtype(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"leaf {path!r} has dtype {dtype}; only floating-point and complex "
                "parameters can be trained. Leave it out of the parameters or hide it "
                "with optax.masked"
            )


def check_params(groups: Groups, params: optax.Params) -> None:
    """Checks that the producers of the groups are leaves of ``params``.

    A tree without leaves passes: ``optax.tree.map_params`` initialises with one.

    Args:
      groups: the channel dimensions.
      params: the parameters.

    Raises:
      ValueError: if a producer is missing or has another shape.
    """
    if jax.tree.leaves(params):
        producer_leaves(groups, params)


def need_params(
    params: optax.Params | None, updates: optax.Updates, name: str
) -> optax.Params:
    """Returns ``params``, after checking that they are there and match the updates.

    Args:
      params: what ``update`` was given.
      updates: the steps, or candidates, that arrive.
      name: name of the transformation, for the message.

    Returns:
      ``params``.

    Raises:
      ValueError: if ``params`` is ``None``, or the updates have another structure or
        other shapes.
    """
    if params is None:
        raise ValueError(
            f"{name} needs the current parameters: call update(grads, state, params)"
        )
    have, want = jax.tree.structure(updates), jax.tree.structure(params)
    if have != want:
        raise ValueError(
            f"{name}: gradients and parameters are trees of different structure; "
            f"expected {want}, got {have}"
        )
    table = leaf_table(params)
    for (path, p), u in zip(table.items(), jax.tree.leaves(updates), strict=True):
        if jnp.shape(p) != jnp.shape(u):
            raise ValueError(
                f"{name}: the gradient of {path!r} has shape {jnp.shape(u)}, but the "
                f"parameter has {jnp.shape(p)}"
            )
    return params


def proximal_point(
    groups: Groups,
    rule: Strength,
    floors: prox.Floors,
    norm: Norm | Mapping[str, float],
    candidate: optax.Params,
    state: Any,
) -> tuple[optax.Params, jax.Array, Any]:
    """The group soft-threshold of a candidate, at the strength of this step.

    Args:
      groups: the channel dimensions.
      rule: the strength.
      floors: channels that survive, by dimension.
      norm: the weighting of the norms.
      candidate: where to threshold.
      state: state of the strength.

    Returns:
      The point, the factor of each channel ``(num_channels,)``, and the next state.
    """
    norms = channel_norms(groups, candidate, norm=norm)
    thresholds, state = rule.update(state, norms, floors)
    factor = prox.soft_threshold_factor(join_channels(norms), join_channels(thresholds))
    factors = split_channels(factor, groups.sizes)
    return scale_channels(groups, candidate, factors), factor, state


def step_to(point: optax.Params, params: optax.Params) -> optax.Updates:
    """The step from ``params`` to ``point``, in the dtype of ``params``.

    Args:
      point: where to go; its dtype may be wider.
      params: the parameters.

    Returns:
      Updates; ``params + updates`` is exactly 0 where ``point`` is 0.
    """
    return jax.tree.map(
        lambda x, p: (x - p.astype(x.dtype)).astype(p.dtype), point, params
    )


def as_base(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    momentum: chex.Numeric | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """The base optimizer: SGD where a learning rate is given.

    Args:
      base: a learning rate, a schedule or an Optax transformation.
      momentum: momentum of the SGD.
      nesterov: whether it is Nesterov's.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: if the rate is negative, the momentum outside [0, 1), or momentum is
        given beside a transformation.
      TypeError: if ``base`` is of another kind.
    """
    if isinstance(base, optax.GradientTransformation):
        if momentum is not None or nesterov:
            raise ValueError(
                "momentum and nesterov belong to the SGD that a learning rate stands "
                "for; base is a transformation and brings its own"
            )
        return base
    if not callable(base):
        check_number(
            "base",
            base,
            low=0,
            rule="a non-negative learning rate, a schedule or an Optax transformation",
        )
    if momentum is not None:
        check_momentum(momentum)
    rate: Any = base
    return optax.sgd(rate, momentum, nesterov)


def check_rule(
    groups: Groups, strength: StrengthLike, floor: Any, norm: Any
) -> tuple[Strength, prox.Floors]:
    """Checks what a threshold is made of.

    Args:
      groups: the channel dimensions.
      strength: a strength, a number or a schedule.
      floor: channels that survive, a number or one for each name.
      norm: the weighting of the norms.

    Returns:
      The strength as a :class:`sdp_jax.Strength`, and a floor for each dimension.

    Raises:
      ValueError: if they do not fit the groups.
      TypeError: if one is of another kind.
    """
    check_kind(groups)
    rule = as_strength(strength)
    floors = prox.resolve_floors(groups, floor)
    channel_weights(groups, norm)
    rule.init(groups.sizes, floors)
    return rule, floors


def check_kind(groups: Any) -> None:
    """Refuses what is not groups, or groups without a dimension.

    Args:
      groups: what was given.

    Raises:
      ValueError: if there is nothing to prune.
      TypeError: if it is not :class:`sdp_jax.Groups`.
    """
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups must be sdp_jax.Groups, as groups_from_axes makes; got {groups!r}"
        )
    if not len(groups):
        raise ValueError("groups has no channel dimension: there is nothing to prune")


def wide_copy(leaf: jax.Array) -> jax.Array:
    """A copy, at least float32: it must not share a buffer that may be donated."""
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)


def emit(point: optax.Params, params: optax.Params, candidates: bool) -> optax.Updates:
    """The point itself, or the step to it from the parameters, in the point's dtype."""
    if candidates:
        return point
    return jax.tree.map(lambda v, p: v - p.astype(v.dtype), point, params)


def add_step(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """The point that updates lead to, in the wider dtype and at least float32."""

    def add(p: jax.Array, u: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.promote_types(p.dtype, u.dtype), jnp.float32)
        return p.astype(dtype) + u.astype(dtype)

    return jax.tree.map(add, params, updates)
