"""Wanda, channel by channel: weights times the norm of what they read."""

import numpy as np

from sdp_jax.activations import ChannelActivations
from sdp_jax.methods.score import Score, of_activations, weighted_total


def wanda_score() -> Score:
    """The weights that read a channel, times the root mean square of what they read.

    The paper scores each weight, ``S_ij = |W_ij| · ‖X_j‖₂``, with the norm over all
    tokens of the calibration data. A channel scores the sum over the weights that read
    it, in all layers that do (our choice; the paper prunes single weights)::

        score_c = Σ_places Σ_j∈c Σ_i |W_ij| · rms(X_j)

    The root mean square stands for the norm: it does not depend on the number of
    tokens. Convolutions count the weights of their windows alike.

    Returns:
      A score; it needs activations. It raises ``ValueError`` where no weights read a
      channel, as between queries and keys.

    References:
      Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large
      Language Models", arXiv 2306.11695, eq. 1.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"in": jnp.array([[3., 2.]]),
      ...           "out": jnp.array([[1., 1.], [2., -2.]])}
      >>> fn = lambda params, x: x @ params["in"] @ params["out"]
      >>> batches = [jnp.array([[1.], [-1.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(groups, fn, params, batches)
      >>> print(methods.wanda_score()(groups, params, activations=found))
      [6. 8.]
    """

    def score(found: ChannelActivations) -> np.ndarray:
        return weighted_total(
            "wanda_score",
            found,
            lambda moments, weights: weights.magnitude * np.sqrt(moments.mean_square),
        )

    return of_activations("wanda_score", score)
