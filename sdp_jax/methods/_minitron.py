"""Minitron: the size of its activations as the importance of a channel."""

from typing import Literal, get_args

import numpy as np

from sdp_jax.activations import ChannelActivations, Moments
from sdp_jax.methods.score import Score, of_activations

Aggregation = Literal["mean", "l2", "variance"]


def minitron_score(
    *, over_batch: Aggregation = "l2", over_positions: Aggregation = "mean"
) -> Score:
    """How large the activations of a channel are, on calibration data.

    The paper adds up what heads, neurons and embedding channels put out, ::

        F_head = Σ ‖Attn(X W_Q, X W_K, X W_V)‖₂,  F_neuron = Σ X W₁ᵀ,  F_emb = Σ LN(X)

    over batch ``B`` and sequence ``S``, and compares ways to aggregate along either:
    the mean of the magnitudes, the Euclidean norm, the variance. Here channels of any
    function are seen where the next layer reads them: heads behind attention, neurons
    behind their activation function, embedding channels behind each norm.

    Our reading: the norm is the root of the mean of squares, which ranks alike, and
    does not depend on the number of examples; a channel of several values (a head, a
    filter with its image) and one that is read in several layers count all of them as
    positions. So the paper's norm of a head is ``over_positions="l2"``.

    Args:
      over_batch: how to aggregate over examples: ``"mean"``, ``"l2"`` or
        ``"variance"``. If both are the same, statistics of single examples are not
        needed, and all values count alike.
      over_positions: how to aggregate over all that one example has of a channel.

    Returns:
      A score; it needs activations, with ``per_example=True`` if the two differ.

    Raises:
      ValueError: if they are none of these.

    References:
      Muralidharan et al., "Compact Language Models via Pruning and Knowledge
      Distillation", arXiv 2407.14679, section 2.2. That the norm over the batch and
      the mean over the sequence, our default, is the paper's choice is from memory.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"in": jnp.array([[1., -2.]]), "out": jnp.ones((2, 3))}
      >>> fn = lambda params, x: x @ params["in"] @ params["out"]
      >>> batches = [jnp.array([[1.], [1.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(groups, fn, params, batches)
      >>> score = methods.minitron_score(over_batch="mean", over_positions="mean")
      >>> print(score(groups, params, activations=found))
      [1. 2.]
    """
    for name, value in (("over_batch", over_batch), ("over_positions", over_positions)):
        if value not in get_args(Aggregation):
            raise ValueError(f"{name} is {value!r}; use one of {get_args(Aggregation)}")

    def score(found: ChannelActivations) -> np.ndarray:
        if over_batch == over_positions:
            return _inside(found.moments, over_positions)
        if found.examples is None:
            raise ValueError(
                "minitron_score needs the statistics of single examples: call "
                "sdp_jax.channel_activations(..., per_example=True), or aggregate over "
                'the batch as over positions, minitron_score(over_batch="l2", '
                'over_positions="l2")'
            )
        values = _inside(found.examples, over_positions)
        if over_batch == "mean":
            return values.mean(axis=0)
        if over_batch == "l2":
            return np.sqrt(np.square(values).mean(axis=0))
        return values.var(axis=0)

    return of_activations("minitron_score", score)


def _inside(moments: Moments, aggregation: Aggregation) -> np.ndarray:
    if aggregation == "mean":
        return moments.mean_abs
    return np.sqrt(moments.mean_square) if aggregation == "l2" else moments.variance
