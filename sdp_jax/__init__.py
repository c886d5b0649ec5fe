"""Structured pruning for JAX, one Optax transformation.

Groups: :func:`find_groups`, :class:`Groups`. Training: :func:`altsdp`, its pieces and
its strengths, for example :func:`target_sparsity`. Cutting: :func:`prune`, which makes
a :class:`Pruned` (:func:`load` reads one), of :func:`plan_cut`, :class:`Cut` and
:func:`narrow`; :class:`Shrinker` cuts while a model trains. Measuring: :func:`cost`,
:func:`latency`, :func:`fast_multiple`. Calibrating: :func:`channel_activations`.

Behind doors of their own: :mod:`sdp_jax.methods`, the other published methods;
:mod:`sdp_jax.valley`, sharp directions and certificates; and for who writes a strength,
a score or a host, :mod:`sdp_jax.channels`, :mod:`sdp_jax.prox` and :mod:`sdp_jax.base`.
"""

from sdp_jax import base, channels, methods, prox, valley
from sdp_jax._altsdp import altsdp, grda, prox_sgd
from sdp_jax._narrow import narrow
from sdp_jax._prune import Pruned, load, prune
from sdp_jax.activations import ChannelActivations
from sdp_jax.axes import groups_from_axes
from sdp_jax.calibration import channel_activations
from sdp_jax.channels import (
    channel_norms,
    channel_products,
    channel_weights,
    channels_alive,
)
from sdp_jax.cut import Cut
from sdp_jax.dimension import Dimension, Member
from sdp_jax.export import export_stablehlo
from sdp_jax.factors import scale_channels
from sdp_jax.fast import fast_multiple
from sdp_jax.groups import Groups
from sdp_jax.layers import cut_layers, layer_influence
from sdp_jax.measure import cost, latency
from sdp_jax.plan import plan_cut
from sdp_jax.shrinking import Shrinker
from sdp_jax.strength import Strength, ramp_strength, valley_strength
from sdp_jax.target import target_sparsity
from sdp_jax.tracing.find import find_groups
from sdp_jax.tracing.flops import count_flops
from sdp_jax.transforms import (
    check_zeros,
    dual_averaging,
    group_soft_threshold,
    soft_threshold,
)

__version__ = "0.1.0"

__all__ = [
    "ChannelActivations",
    "Cut",
    "Dimension",
    "Groups",
    "Member",
    "Pruned",
    "Shrinker",
    "Strength",
    "altsdp",
    "base",
    "channel_activations",
    "channel_norms",
    "channel_products",
    "channel_weights",
    "channels",
    "channels_alive",
    "check_zeros",
    "cost",
    "count_flops",
    "cut_layers",
    "dual_averaging",
    "export_stablehlo",
    "fast_multiple",
    "find_groups",
    "grda",
    "group_soft_threshold",
    "groups_from_axes",
    "latency",
    "layer_influence",
    "load",
    "methods",
    "narrow",
    "plan_cut",
    "prox",
    "prox_sgd",
    "prune",
    "ramp_strength",
    "scale_channels",
    "soft_threshold",
    "target_sparsity",
    "valley",
    "valley_strength",
]
