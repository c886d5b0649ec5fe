"""LeNet."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import check_side, head, pool


class LeNet(nn.Module):
    """LeNet with the widths of Caffe's example: 431,080 parameters on MNIST.

    Two 5×5 convolutions without padding, each pooled 2×2, and a dense layer; relu
    after each of the three.

    Attributes:
      widths: channels of the two convolutions, then neurons of the dense layer.
      classes: outputs.
      dtype: what the layers compute in; the parameters are float32.
    """

    widths: tuple[int, ...] = (20, 50, 500)
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        check_side(x, 16, "LeNet")
        init = nn.initializers.he_normal()
        for i, width in enumerate(self.widths[:2]):
            conv = nn.Conv(
                width,
                (5, 5),
                padding="VALID",
                dtype=self.dtype,
                kernel_init=init,
                name=f"conv{i}",
            )
            x = pool(nn.relu(conv(x)))
        x = x.reshape(x.shape[0], -1)
        dense = nn.Dense(
            self.widths[2], dtype=self.dtype, kernel_init=init, name="dense"
        )
        return head(self.classes, dtype=self.dtype)(nn.relu(dense(x)))
