"""Structured pruning for JAX, one Optax transformation.

Groups: :func:`find_groups`, :func:`groups_from_axes`, :class:`Groups`. Training:
:func:`altsdp` and its pieces. Strengths: :func:`valley_strength`,
:func:`target_sparsity`. Cutting: :func:`plan_cut`, :class:`Cut`, :func:`narrow`.
The valley: :func:`top_eigenpairs`, :func:`sdp`, :func:`certify`. Measuring:
:func:`cost`, :func:`latency`. Keeping: :func:`save`, :func:`load`,
:func:`export_stablehlo`. Other published methods: :mod:`sdp_jax.methods`.
"""

from sdp_jax import methods
from sdp_jax.altsdp import altsdp, grda, prox_sgd
from sdp_jax.cut import Cut
from sdp_jax.export import export_stablehlo
from sdp_jax.files import load, save
from sdp_jax.groups import (
    Dimension,
    Frozen,
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
from sdp_jax.measure import Cost, EquationCost, cost, latency
from sdp_jax.narrow import narrow
from sdp_jax.plan import plan_cut
from sdp_jax.strength import (
    Strength,
    adaptive_strength,
    ramp_strength,
    target_sparsity,
    valley_strength,
)
from sdp_jax.tracing.find import find_groups
from sdp_jax.transforms import (
    DualAveragingState,
    GroupSoftThresholdState,
    SoftThresholdState,
    check_zeros,
    dual_averaging,
    group_soft_threshold,
    radial_dual_averaging,
    soft_threshold,
)
from sdp_jax.valley.certificate import Certificate, Displacement
from sdp_jax.valley.certify import certify
from sdp_jax.valley.curvature import (
    Eigenpairs,
    SpectralDensity,
    curvature_product,
    spectral_density,
    top_eigenpairs,
)
from sdp_jax.valley.path import PathLoss
from sdp_jax.valley.project import (
    ProjectOntoValleyState,
    project_onto_valley,
    set_basis,
)
from sdp_jax.valley.sdp import (
    SdpResult,
    directional_importance,
    directional_scores,
    sdp,
)
from sdp_jax.valley.statistics import reestimate_statistics

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Cost",
    "Cut",
    "Dimension",
    "Displacement",
    "DualAveragingState",
    "Eigenpairs",
    "EquationCost",
    "Frozen",
    "GroupSoftThresholdState",
    "Groups",
    "Leaf",
    "Member",
    "PathLoss",
    "PerChannel",
    "ProjectOntoValleyState",
    "SdpResult",
    "SoftThresholdState",
    "SpectralDensity",
    "Strength",
    "adaptive_strength",
    "altsdp",
    "certify",
    "channel_norms",
    "channel_weights",
    "channels_alive",
    "check_zeros",
    "consumer",
    "cost",
    "curvature_product",
    "directional_importance",
    "directional_scores",
    "dual_averaging",
    "export_stablehlo",
    "find_groups",
    "grda",
    "group_soft_threshold",
    "groups_from_axes",
    "latency",
    "load",
    "methods",
    "narrow",
    "plan_cut",
    "producer",
    "project_onto_valley",
    "prox_sgd",
    "radial_dual_averaging",
    "ramp_strength",
    "reestimate_statistics",
    "running_state",
    "save",
    "scale_channels",
    "sdp",
    "set_basis",
    "soft_threshold",
    "spectral_density",
    "target_sparsity",
    "top_eigenpairs",
    "valley_strength",
]
