"""Structured pruning for JAX, one Optax transformation.

Groups: :func:`groups_from_axes`, :class:`Groups`. Training: :func:`altsdp` and its
pieces. Strengths: :func:`valley_strength`, :func:`target_sparsity`. Cutting:
:func:`plan_cut`, :class:`Cut`.
"""

# Groups
# Training
from sdp_jax.altsdp import altsdp, grda, prox_sgd
from sdp_jax.groups import (
    Dimension,
    Groups,
    Leaf,
    Member,
    PerChannel,
    channel_norms,
    channel_weights,
    channels_alive,
    consumer,
    groups_from_axes,
    producer,
    running_state,
    scale_channels,
)

# Cutting
from sdp_jax.narrow import Cut, plan_cut

# Strengths
from sdp_jax.strength import (
    Strength,
    ramp_strength,
    target_sparsity,
    valley_strength,
)
from sdp_jax.transforms import (
    DualAveragingState,
    GroupSoftThresholdState,
    ProjectOntoValleyState,
    SoftThresholdState,
    check_zeros,
    dual_averaging,
    group_soft_threshold,
    project_onto_valley,
    soft_threshold,
)

__version__ = "0.1.0"

__all__ = [
    "Cut",
    "Dimension",
    "DualAveragingState",
    "GroupSoftThresholdState",
    "Groups",
    "Leaf",
    "Member",
    "PerChannel",
    "ProjectOntoValleyState",
    "SoftThresholdState",
    "Strength",
    "altsdp",
    "channel_norms",
    "channel_weights",
    "channels_alive",
    "check_zeros",
    "consumer",
    "dual_averaging",
    "grda",
    "group_soft_threshold",
    "groups_from_axes",
    "plan_cut",
    "producer",
    "project_onto_valley",
    "prox_sgd",
    "ramp_strength",
    "running_state",
    "scale_channels",
    "soft_threshold",
    "target_sparsity",
    "valley_strength",
]
