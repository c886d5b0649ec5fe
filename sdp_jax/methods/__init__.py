"""The other published methods of structured pruning, one file each.

Scores, one signature ``score(groups, params, grads=None, activations=None)``:
:func:`l1_norm`, :func:`l2_norm`, :func:`taylor`, :func:`random_score`,
:func:`group_importance` (DepGraph), :func:`discriminant_score` (by
:func:`discriminant_information`). On what :func:`sdp_jax.channel_activations` returns:
:func:`minitron_score`, :func:`wanda_score`, :func:`flap_score` with
:func:`compensate_bias`, :func:`activation_taylor`. Hosts, which stand behind a base
optimizer: :func:`remove_lowest` and those below. :func:`hosted` joins the two,
:func:`decay_pruning` does so with smooth pruning, and :func:`channel_host` makes a host
from its equations.

Sparse learning of DepGraph: :func:`group_norm_regularizer`, in front of a base.

With a penalty or random masks: :func:`spp` and :func:`increg` are whole optimizers
around a base; :func:`perspective_regularizer` stands in front of one.

Only Train Once: the hosts :func:`hspg`, :func:`dhspg`, :func:`hesso`, their scores
:func:`dhspg_score`, :func:`hesso_score`, and :func:`half_space_factor`.

Sparsity: :func:`pq_index`, and :func:`until_compressed`, a strength that stops by it.
Iterative pruning: :func:`pruning_rounds` by the rule :func:`sap`,
:func:`lottery_ticket` or :func:`one_shot`.

Scales of normalisations (:data:`DEFAULT_SCALES` names them): network slimming with
:func:`scale_score` and :func:`scale_penalty`; the host :func:`gate_decorator`, its
score :func:`gate_taylor`, and gates by :func:`decorate` and :func:`apply_gates`.
"""

from sdp_jax.methods._activation_taylor import activation_taylor
from sdp_jax.methods._flap import compensate_bias, flap_score
from sdp_jax.methods._gate_decorator import (
    apply_gates,
    decorate,
    gate_decorator,
    gate_taylor,
)
from sdp_jax.methods._hesso import hesso, hesso_score
from sdp_jax.methods._hosted import (
    HostStep,
    Living,
    channel_host,
    hosted,
)
from sdp_jax.methods._hspg import dhspg, dhspg_score, hspg
from sdp_jax.methods._increg import increg
from sdp_jax.methods._minitron import minitron_score
from sdp_jax.methods._perspective import (
    perspective,
    perspective_penalty,
    perspective_regularizer,
)
from sdp_jax.methods._random_score import random_score
from sdp_jax.methods._sap import (
    PruningRound,
    PruningRule,
    apply_mask,
    keep_mask,
    lottery_ticket,
    one_shot,
    pruning_rounds,
    sap,
)
from sdp_jax.methods._spp import spp, spp_params
from sdp_jax.methods._taylor import taylor
from sdp_jax.methods._until_compressed import until_compressed
from sdp_jax.methods._wanda import wanda_score
from sdp_jax.methods.depgraph import (
    group_importance,
    group_norm_regularizer,
)
from sdp_jax.methods.discriminant import discriminant_information, discriminant_score
from sdp_jax.methods.dpm import decay_pruning
from sdp_jax.methods.filter_norm import l1_norm, l2_norm
from sdp_jax.methods.half_space import half_space_factor
from sdp_jax.methods.network_slimming import scale_penalty, scale_score
from sdp_jax.methods.pqi import pq_bound, pq_index, prune_count
from sdp_jax.methods.ranking import ranking_increment
from sdp_jax.methods.remove import remove_lowest, set_scores
from sdp_jax.methods.scales import DEFAULT_SCALES
from sdp_jax.methods.score import Score

__all__ = [
    "DEFAULT_SCALES",
    "HostStep",
    "Living",
    "PruningRound",
    "PruningRule",
    "Score",
    "activation_taylor",
    "apply_gates",
    "apply_mask",
    "channel_host",
    "compensate_bias",
    "decay_pruning",
    "decorate",
    "dhspg",
    "dhspg_score",
    "discriminant_information",
    "discriminant_score",
    "flap_score",
    "gate_decorator",
    "gate_taylor",
    "group_importance",
    "group_norm_regularizer",
    "half_space_factor",
    "hesso",
    "hesso_score",
    "hosted",
    "hspg",
    "increg",
    "keep_mask",
    "l1_norm",
    "l2_norm",
    "lottery_ticket",
    "minitron_score",
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
    "until_compressed",
    "wanda_score",
]
