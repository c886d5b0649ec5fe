"""Residual networks, after He et al., 2016."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import conv, head, norm


class ResNet(nn.Module):
    """Stages of residual blocks; the first block of each but the first halves the map.

    A block has two 3×3 convolutions, or, as a bottleneck, a 3×3 between two 1×1, the
    last of them four times as wide. Its stride is in the first 3×3. Where the shape
    changes, the shortcut is a 1×1 convolution with batch norm.

    Attributes:
      widths: channels of the 3×3 convolutions in each stage; the first is that of the
        stem too.
      depths: blocks in each stage.
      bottleneck: whether the blocks are bottlenecks.
      imagenet: whether the stem is 7×7 with stride 2 and 3×3 max pooling with stride
        2, for large images; else it is a 3×3 convolution.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (3, 3, 3)
    bottleneck: bool = False
    imagenet: bool = False
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        size, stride = (7, 2) if self.imagenet else (3, 1)
        x = conv(self.widths[0], size, stride=stride, dtype=self.dtype, name="conv")(x)
        x = nn.relu(norm(train, dtype=self.dtype, name="norm")(x))
        if self.imagenet:
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), padding)
        stages = zip(self.widths, self.depths, strict=True)
        for i, (width, depth) in enumerate(stages):
            for j in range(depth):
                stride = 2 if i and not j else 1
                block = Block(
                    width, stride, self.bottleneck, self.dtype, name=f"block{i}_{j}"
                )
                x = block(x, train)
        return head(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Block(nn.Module):
    """A residual block.

    Attributes:
      width: channels of its 3×3 convolutions.
      stride: of the first of them, and of the shortcut.
      bottleneck: whether it is a bottleneck.
      dtype: what the layers compute in.
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Feature maps to feature maps."""
        width, stride = self.width, self.stride
        layers = [(width, 3, stride), (width, 3, 1)]
        if self.bottleneck:
            layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        y = x
        for i, (channels, size, step) in enumerate(layers):
            y = nn.relu(y) if i else y
            y = conv(channels, size, stride=step, dtype=self.dtype, name=f"conv{i}")(y)
            y = norm(train, dtype=self.dtype, name=f"norm{i}")(y)
        if x.shape != y.shape:
            x = conv(
                y.shape[-1], 1, stride=stride, dtype=self.dtype, name="shortcut_conv"
            )(x)
            x = norm(train, dtype=self.dtype, name="shortcut_norm")(x)
        return nn.relu(x + y)
