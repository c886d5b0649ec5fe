"""Random scores, the baseline that every other score has to beat."""

import jax
import jax.numpy as jnp

from sdp_jax.methods.score import Score, of_params


def random_score(key: jax.Array) -> Score:
    """One uniform draw from [0, 1) for each channel.

    The draws depend on the key and the sizes of the dimensions only, so that a channel
    keeps its score from step to step; groups after a cut get other draws.

    Args:
      key: a key of ``jax.random``.

    Returns:
      A score; it needs neither gradients nor activations.

    Raises:
      TypeError: if ``key`` is not one key.

    References:
      Li, Qian, Jiang, Lin, Lin, Hong, Ding, "Revisiting Random Channel Pruning for
      Neural Network Compression", CVPR 2022, arXiv 2205.05676.

    Example:
      >>> import jax, jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.ones((2, 3))}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> methods.random_score(jax.random.key(0))(groups, params).shape
      (3,)
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    if not raw and not (typed and key.ndim == 0):
        raise TypeError(f"key must be one key, as jax.random.key(0) makes; got {key!r}")

    return of_params(
        lambda groups, _: jax.random.uniform(key, (groups.num_channels,), jnp.float32)
    )
