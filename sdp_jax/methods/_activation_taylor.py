"""First-order Taylor expansion of the loss in the activations."""

import jax.numpy as jnp
import numpy as np

from sdp_jax.activations import ChannelActivations
from sdp_jax.methods.score import Score, of_activations, unit


def activation_taylor(*, normalize: bool = True) -> Score:
    """The change of the loss when the activations of a channel become zero.

    To first order that is the sum of gradient times activation over all that an example
    has of the channel, ``z``::

        Θ_c = mean over examples of |Σ_m ∂L/∂z_m · z_m|

    The paper divides by the number of values ``M``; within a dimension all channels
    have as many, so that the normalised score is the same. Channels that several layers
    read sum over all of them before the magnitude is taken (our choice). Without
    ``per_example=True`` the magnitude is that of a whole batch, in which examples of
    opposite sign cancel.

    Args:
      normalize: whether to divide by the Euclidean norm over the dimension, as the
        paper does so that layers compare.

    Returns:
      A score; it needs activations, of a loss, with ``gradients=True``.

    References:
      Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for
      Resource Efficient Inference", ICLR 2017, arXiv 1611.06440, section 2.2.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"in": jnp.array([[3., 2.]]), "out": jnp.array([[1.], [-2.]])}
      >>> fn = lambda params, x: jnp.mean(x @ params["in"] @ params["out"])
      >>> batches = [jnp.array([[1.], [-1.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(
      ...     groups, fn, params, batches, per_example=True, gradients=True)
      >>> score = methods.activation_taylor(normalize=False)
      >>> print(score(groups, params, activations=found))
      [3. 4.]
    """

    def score(found: ChannelActivations) -> np.ndarray:
        if found.gradients is None:
            raise ValueError(
                "activation_taylor needs gradients of a loss: call "
                "sdp_jax.channel_activations(groups, loss, params, batches, "
                "gradients=True), where loss returns a scalar"
            )
        if not normalize:
            return found.gradients
        parts = found.groups.split(found.gradients).values()
        return np.concatenate([np.asarray(unit(jnp.asarray(v))) for v in parts])

    return of_activations("activation_taylor", score)
