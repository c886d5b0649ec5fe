"""A network for short runs on CIFAR-10, after Jordan, arXiv 2404.00498."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import check_side, conv, head, norm, pool


class Airbench(nn.Module):
    """A 2×2 convolution, then stages of two 3×3 ones, pooled 2×2 between the two.

    gelu follows every convolution, in the stages behind batch norm. What is left of
    the feature map is reduced to its maximum, and one dense layer follows, whose
    outputs are scaled down.

    Attributes:
      widths: channels of the stages.
      stem: channels of the 2×2 convolution.
      scale: of the logits.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    stem: int = 24
    scale: float = 1 / 9
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        least = 2 ** len(self.widths) + 1
        check_side(x, least, f"airbench with {len(self.widths)} stages")
        stem = nn.Conv(
            self.stem, (2, 2), padding="VALID", dtype=self.dtype, name="conv"
        )
        x = nn.gelu(stem(x))
        for i, width in enumerate(self.widths):
            for j in range(2):
                x = conv(width, 3, dtype=self.dtype, name=f"conv{i}_{j}")(x)
                x = x if j else pool(x)
                x = nn.gelu(norm(train, dtype=self.dtype, name=f"norm{i}_{j}")(x))
        x = x.max((1, 2))
        return self.scale * head(self.classes, dtype=self.dtype)(x)
