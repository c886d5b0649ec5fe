"""VGG for small images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import check_side, conv, head, norm, pool


class Vgg(nn.Module):
    """Stages of 3×3 convolutions with batch norm and relu, each pooled 2×2.

    What is left of the feature map is averaged, and one dense layer follows. With s
    stages the images must have at least 2ˢ pixels on each side: 32 for VGG-16 and
    VGG-19. Where a map has an odd side, pooling leaves its last row out.

    Attributes:
      widths: channels of the stages.
      depths: convolutions in each stage.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        check_side(x, 2 ** len(self.widths), f"VGG with {len(self.widths)} stages")
        stages = zip(self.widths, self.depths, strict=True)
        for i, (width, depth) in enumerate(stages):
            for j in range(depth):
                x = conv(width, 3, dtype=self.dtype, name=f"conv{i}_{j}")(x)
                x = nn.relu(norm(train, dtype=self.dtype, name=f"norm{i}_{j}")(x))
            x = pool(x)
        return head(self.classes, dtype=self.dtype)(x.mean((1, 2)))
