"""MLP-Mixer, after Tolstikhin et al., 2021."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import head


class Mixer(nn.Module):
    """Dense layers over the patches and over the features in turns.

    Each pair of them has a layer norm in front, a gelu inside and a shortcut beside it.

    Attributes:
      widths: features, neurons over the patches, neurons over the features.
      depth: blocks.
      patch: side of the patches.
      classes: outputs.
      dtype: what the layers compute in; the parameters are float32.
    """

    widths: tuple[int, ...] = (64, 32, 128)
    depth: int = 3
    patch: int = 4
    classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"a mixer with patches of {self.patch}×{self.patch} pixels needs images"
                f" whose sides are multiples of {self.patch}; got {height}×{width}"
            )
        features, tokens, channels = self.widths
        side = (self.patch, self.patch)
        x = nn.Conv(features, side, side, dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, features)
        for i in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype, name=f"norm{i}_0")(x).swapaxes(1, 2)
            x = x + self._dense(y, tokens, f"tokens{i}").swapaxes(1, 2)
            y = nn.LayerNorm(dtype=self.dtype, name=f"norm{i}_1")(x)
            x = x + self._dense(y, channels, f"channels{i}")
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return head(self.classes, dtype=self.dtype)(x.mean(1))

    def _dense(self, x: jax.Array, hidden: int, name: str) -> jax.Array:
        size = x.shape[-1]
        x = nn.gelu(nn.Dense(hidden, dtype=self.dtype, name=f"{name}_up")(x))
        return nn.Dense(size, dtype=self.dtype, name=f"{name}_down")(x)
