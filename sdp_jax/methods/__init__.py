"""The other published methods of structured pruning, one file each.

Scores, one signature ``score(groups, params, grads=None, activations=None)``:
:func:`l1_norm`, :func:`l2_norm`, :func:`taylor`, :func:`random_score`,
:func:`group_importance` (DepGraph), :func:`discriminant_score` (by
:func:`discriminant_information`). Hosts, which stand behind a base optimizer:
:func:`remove_lowest`. :func:`hosted` joins the two, :func:`decay_pruning` does so with
smooth pruning.

Sparse learning of DepGraph: :func:`group_norm_regularizer`, in front of a base.

With a penalty or random masks: :func:`spp` and :func:`increg` are whole optimizers
around a base; :func:`perspective_regularizer` stands in front of one.

Only Train Once: :func:`hspg`, :func:`dhspg`, :func:`hesso`; their hosts
:func:`hspg_host`, :func:`dhspg_host`, :func:`hesso_host`, scores :func:`dhspg_score`,
:func:`hesso_score`, and :func:`half_space_factor`.

Sparsity: :func:`pq_index`, and :func:`until_compressed`, a strength that stops by it.
Iterative pruning: :func:`pruning_rounds` by the rule :func:`sap`,
:func:`lottery_ticket` or :func:`one_shot`.

Scales of normalisations (:data:`DEFAULT_SCALES` names them): network slimming with
:func:`scale_score` and :func:`scale_penalty`; :func:`gate_decorator`, its host
:func:`tick_tock`, score :func:`gate_taylor`, and gates by :func:`decorate` and
:func:`apply_gates`.
"""

from sdp_jax.methods._gate_decorator import (
    TickTockState,
    apply_gates,
    decorate,
    gate_decorator,
    gate_taylor,
    tick_tock,
)
from sdp_jax.methods._hesso import HESSOState, hesso, hesso_host, hesso_score
from sdp_jax.methods._hspg import (
    DHSPGState,
    HSPGState,
    dhspg,
    dhspg_host,
    dhspg_score,
    hspg,
    hspg_host,
)
from sdp_jax.methods._increg import IncRegState, increg
from sdp_jax.methods._perspective import (
    perspective,
    perspective_penalty,
    perspective_regularizer,
)
from sdp_jax.methods._random_score import random_score
from sdp_jax.methods._sap import (
    KeepMaskState,
    PruningRound,
    PruningRule,
    apply_mask,
    keep_mask,
    lottery_ticket,
    one_shot,
    pruning_rounds,
    sap,
)
from sdp_jax.methods._spp import SPPState, spp, spp_params
from sdp_jax.methods._taylor import taylor
from sdp_jax.methods._until_compressed import (
    UntilCompressedState,
    until_compressed,
)
from sdp_jax.methods.depgraph import (
    GroupNormRegularizerState,
    group_importance,
    group_norm_regularizer,
)
from sdp_jax.methods.discriminant import (
    discriminant_information,
    discriminant_score,
)
from sdp_jax.methods.dpm import DecayPruningState, decay_pruning
from sdp_jax.methods.filter_norm import l1_norm, l2_norm
from sdp_jax.methods.half_space import half_space_factor
from sdp_jax.methods.hosted import HostedState, Score, hosted
from sdp_jax.methods.network_slimming import (
    scale_penalty,
    scale_score,
)
from sdp_jax.methods.penalty import PenaltyState
from sdp_jax.methods.pqi import pq_bound, pq_index, prune_count
from sdp_jax.methods.ranking import ranking_increment
from sdp_jax.methods.remove import RemoveLowestState, remove_lowest, set_scores
from sdp_jax.methods.scales import DEFAULT_SCALES

__all__ = [
    "DEFAULT_SCALES",
    "DHSPGState",
    "DecayPruningState",
    "GroupNormRegularizerState",
    "HESSOState",
    "HSPGState",
    "HostedState",
    "IncRegState",
    "KeepMaskState",
    "PenaltyState",
    "PruningRound",
    "PruningRule",
    "RemoveLowestState",
    "SPPState",
    "Score",
    "TickTockState",
    "UntilCompressedState",
    "apply_gates",
    "apply_mask",
    "decay_pruning",
    "decorate",
    "dhspg",
    "dhspg_host",
    "dhspg_score",
    "discriminant_information",
    "discriminant_score",
    "gate_decorator",
    "gate_taylor",
    "group_importance",
    "group_norm_regularizer",
    "half_space_factor",
    "hesso",
    "hesso_host",
    "hesso_score",
    "hosted",
    "hspg",
    "hspg_host",
    "increg",
    "keep_mask",
    "l1_norm",
    "l2_norm",
    "lottery_ticket",
    "one_shot",
    "perspective",
    "perspective_penalty",
    "perspective_regularizer",
    "pq_bound",
    "pq_index",
    "prune_count",
    "pruning_rounds",
    "random_score",
    "ranking_increment",
    "remove_lowest",
    "sap",
    "scale_penalty",
    "scale_score",
    "set_scores",
    "spp",
    "spp_params",
    "taylor",
    "tick_tock",
    "until_compressed",
]
