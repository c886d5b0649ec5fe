"""A small convolutional network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import head, norm, pool


class ConvNet(nn.Module):
    """3×3 convolutions with batch norm and relu, pooled 2×2 after each second one.

    The last width is that of a dense layer on the flattened feature map.

    Attributes:
      widths: channels of the convolutions, then neurons of the dense layer.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (32, 32, 64, 64, 128)
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        for i, width in enumerate(self.widths[:-1]):
            x = nn.Conv(
                width, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}"
            )(x)
            x = nn.relu(norm(train, dtype=self.dtype, name=f"norm{i}")(x))
            if i % 2:
                x = pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.widths[-1], dtype=self.dtype, name="dense")(x))
        return head(self.classes, dtype=self.dtype)(x)
