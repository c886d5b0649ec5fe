"""What every transformation needs: checks of groups and parameters, candidates, steps.

A transformation of one's own is written with these, with :mod:`sdp_jax.channels` and
:mod:`sdp_jax.prox`; its state is a ``NamedTuple`` of arrays, and what it knows of
single channels stands in a :class:`sdp_jax.channels.PerChannel`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.channels import Weighting, channel_weights, producer_leaves
from sdp_jax.checks import check_momentum, check_number
from sdp_jax.groups import Groups, need_groups
from sdp_jax.strength import Strength, StrengthLike, as_strength
from sdp_jax.tree import leaf_dtype, leaf_table


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


def transformation(
    name: str, init: optax.TransformInitFn, update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that needs the parameters.

    Args:
      name: its name, for the message where these are missing or do not fit.
      init: ``init(params) -> state``.
      update: ``update(updates, state, params, **extra_args) -> (updates, state)``.

    Returns:
      The transformation.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        params = need_params(params, updates, name)
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_fn)


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
    groups: Groups,
    strength: StrengthLike,
    min_channels: int | jax.Array | Mapping[str, int] = 1,
    weights: Weighting | Mapping[str, float] = "plain",
) -> tuple[Strength, prox.Floors]:
    """Checks what a threshold is made of.

    Args:
      groups: the channel dimensions.
      strength: a strength, a number or a schedule.
      min_channels: channels that survive, a number or one for each name.
      weights: the weighting of the norms.

    Returns:
      The strength as a :class:`sdp_jax.Strength`, and for each dimension how many
      channels survive.

    Raises:
      ValueError: if they do not fit the groups.
      TypeError: if one is of another kind.
    """
    check_kind(groups)
    rule = as_strength(strength)
    floors = prox.resolve_floors(groups, min_channels)
    channel_weights(groups, weights)
    if rule.score is not None and weights != "plain":
        raise ValueError(
            f"weights={weights!r} is for strengths that shrink, whose thresholds it "
            "scales; a target ranks channels by their importance. Leave it out"
        )
    rule.init(groups, floors)
    return rule, floors


def check_kind(groups: Any) -> None:
    """Refuses what is not groups, or groups without a dimension.

    Args:
      groups: what was given.

    Raises:
      ValueError: if there is nothing to prune.
      TypeError: if it is not :class:`sdp_jax.Groups`.
    """
    need_groups(groups)
    if not len(groups):
        raise ValueError("groups has no channel dimension: there is nothing to prune")


def wide_copy(leaf: jax.Array) -> jax.Array:
    """A copy, at least float32: it must not share a buffer that may be donated.

    Args:
      leaf: an array of the parameters.

    Returns:
      The copy, in the dtype of the leaf or float32, whichever is wider.
    """
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)


def add_step(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """The point that updates lead to, in the wider dtype and at least float32.

    Args:
      params: the parameters.
      updates: a step from there.

    Returns:
      The candidate ``params + updates``.
    """

    def add(p: jax.Array, u: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.promote_types(p.dtype, u.dtype), jnp.float32)
        return p.astype(dtype) + u.astype(dtype)

    return jax.tree.map(add, params, updates)
