"""First-order Taylor expansion of the loss as a score."""

import jax
import jax.numpy as jnp

from sdp_jax.channels import channel_products
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score, of_gradients
from sdp_jax.tree import PyTree


def taylor() -> Score:
    """The change of the loss when a channel goes, ``|Σ g w|`` to first order.

    Returns:
      A score; it needs gradients of the shapes of the parameters.

    References:
      Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network
      Pruning", CVPR 2019, arXiv 1906.10771, eq. 8 (its square root, which ranks alike).

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 1.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> grads = {"w": jnp.array([[4., 1.], [-3., 0.]])}
      >>> print(methods.taylor()(groups, params, grads))
      [0. 1.]
    """

    def score(groups: Groups, params: PyTree, grads: PyTree) -> jax.Array:
        return jnp.abs(channel_products(groups, params, grads))

    return of_gradients("taylor", score)
