"""The other published methods of structured pruning, one file each.

Scores, one signature ``score(groups, params, grads=None, activations=None)``:
:func:`l1_norm`, :func:`l2_norm`, :func:`taylor`. Hosts, which stand behind a base
optimizer: :func:`remove_lowest`. :func:`hosted` joins the two, :func:`decay_pruning`
does so with smooth pruning.
"""

from sdp_jax.methods.dpm import DecayPruningState, decay_pruning
from sdp_jax.methods.filter_norm import l1_norm, l2_norm
from sdp_jax.methods.hosted import HostedState, Score, hosted
from sdp_jax.methods.remove import RemoveLowestState, remove_lowest, set_scores
from sdp_jax.methods.taylor import taylor

__all__ = [
    "DecayPruningState",
    "HostedState",
    "RemoveLowestState",
    "Score",
    "decay_pruning",
    "hosted",
    "l1_norm",
    "l2_norm",
    "remove_lowest",
    "set_scores",
    "taylor",
]
