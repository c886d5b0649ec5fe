"""Wide residual networks, after Zagoruyko and Komodakis, 2016."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import conv, head, norm


class WideResNet(nn.Module):
    """Three stages of residual blocks with batch norm and relu before convolutions.

    The first block of the second and of the third stage halves the map.

    Attributes:
      widths: channels of the stages.
      depth: layers with weights, 4 and 6 for each block of all three stages.
      stem: channels of the first convolution.
      classes: outputs.
      dtype: what the layers compute in; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (160, 320, 640)
    depth: int = 28
    stem: int = 16
    classes: int = 10
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the depth."""
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(
                "depth of a wide ResNet must be 4 and a multiple of 6 (10, 16, 22, 28, "
                f"…); got {self.depth}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        x = conv(self.stem, 3, dtype=self.dtype, name="conv")(x)
        for i, width in enumerate(self.widths):
            for j in range((self.depth - 4) // 6):
                stride = 2 if i and not j else 1
                x = Block(width, stride, self.dtype, name=f"block{i}_{j}")(x, train)
        x = nn.relu(norm(train, dtype=self.dtype, name="norm")(x))
        return head(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Block(nn.Module):
    """Two 3×3 convolutions, each behind batch norm and relu, and a shortcut.

    Where the shape changes, the shortcut is a 1×1 convolution of what the first
    convolution sees.

    Attributes:
      width: channels.
      stride: of the first convolution and of the shortcut.
      dtype: what the layers compute in.
    """

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Feature maps to feature maps."""
        dtype, stride = self.dtype, self.stride
        y = active = nn.relu(norm(train, dtype=dtype, name="norm0")(x))
        y = conv(self.width, 3, stride=stride, dtype=dtype, name="conv0")(y)
        y = nn.relu(norm(train, dtype=dtype, name="norm1")(y))
        y = conv(self.width, 3, dtype=dtype, name="conv1")(y)
        if x.shape != y.shape:
            x = conv(self.width, 1, stride=stride, dtype=dtype, name="shortcut")(active)
        return x + y
