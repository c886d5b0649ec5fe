"""Dense layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import head


class Dnn(nn.Module):
    """Dense layers with relu; the paper's 784-300-100-10 on MNIST.

    Attributes:
      widths: neurons of the hidden layers.
      classes: outputs.
      dtype: what the layers compute in; the parameters are float32.
    """

    widths: tuple[int, ...] = (300, 100)
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(x))
        return head(self.classes, dtype=self.dtype)(x)
