"""Networks of depthwise and pointwise convolutions, after Howard et al., 2017."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import conv, head, norm


class Depthwise(nn.Module):
    """A 3×3 convolution, then 3×3 depthwise and 1×1 pointwise ones in turns.

    Batch norm and relu follow each. A depthwise convolution halves the map where its
    pointwise one has more channels than the layer before.

    Attributes:
      widths: channels of the first convolution, then of the pointwise ones.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""

        def active(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(norm(train, dtype=self.dtype, name=name)(x))

        x = conv(self.widths[0], 3, dtype=self.dtype, name="conv")(x)
        x = active(x, "norm")
        for i, width in enumerate(self.widths[1:]):
            channels = x.shape[-1]
            x = conv(
                channels,
                3,
                stride=2 if width > channels else 1,
                groups=channels,
                dtype=self.dtype,
                name=f"depthwise{i}",
            )(x)
            x = active(x, f"depthwise_norm{i}")
            x = conv(width, 1, dtype=self.dtype, name=f"pointwise{i}")(x)
            x = active(x, f"pointwise_norm{i}")
        return head(self.classes, dtype=self.dtype)(x.mean((1, 2)))
