"""The valley of the training loss: its sharp directions, and pruning within it.

Sharp directions: :func:`top_eigenpairs`, :func:`spectral_density`,
:func:`curvature_product`. Pruning along the valley: :func:`sdp` in one shot,
:func:`directional_scores` and :func:`directional_importance`, and
:func:`project_onto_valley` (with :func:`set_basis`) as a piece of a chain. Whether a
pruned model is still in the valley: :func:`certify`, with
:func:`reestimate_statistics` for batch normalisation.
"""

from sdp_jax.valley._certify import certify
from sdp_jax.valley._sdp import (
    SdpResult,
    directional_importance,
    directional_scores,
    sdp,
)
from sdp_jax.valley.certificate import Certificate, Displacement
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
from sdp_jax.valley.statistics import reestimate_statistics

__all__ = [
    "Certificate",
    "Displacement",
    "Eigenpairs",
    "PathLoss",
    "ProjectOntoValleyState",
    "SdpResult",
    "SpectralDensity",
    "certify",
    "curvature_product",
    "directional_importance",
    "directional_scores",
    "project_onto_valley",
    "reestimate_statistics",
    "sdp",
    "set_basis",
    "spectral_density",
    "top_eigenpairs",
]
