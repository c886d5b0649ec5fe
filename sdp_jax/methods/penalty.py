"""What stands in front of a base optimizer and adds the slope of a penalty."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import check_kind, check_params, transformation
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups

# ``add(gradients, params, factor) -> gradients``
AddSlope = Callable[[optax.Updates, optax.Params, chex.Numeric], optax.Updates]


class PenaltyState(NamedTuple):
    """State of a penalty, which only counts for its schedule.

    Attributes:
      count: number of updates so far, int32 scalar.
    """

    count: jax.Array


def penalty_in_front(
    name: str, groups: Groups, penalty: optax.ScalarOrSchedule, add: AddSlope
) -> optax.GradientTransformationExtraArgs:
    """A transformation on gradients, made of what it adds to them."""
    check_kind(groups)
    if not callable(penalty):
        rule = "a non-negative number or a schedule"
        check_number("penalty", penalty, low=0, rule=rule)

    def init(params: optax.Params) -> PenaltyState:
        check_params(groups, params)
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        factor: Any = penalty(state.count) if callable(penalty) else penalty
        count = jnp.asarray(optax.safe_increment(state.count))
        return add(updates, params, factor), PenaltyState(count)

    return transformation(name, init, update)
