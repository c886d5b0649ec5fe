"""A small language model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Decoder(nn.Module):
    """A decoder with RMS norm, learned positions, causal heads and SwiGLU, no biases.

    It has as many positions as the text that its variables are made for.

    Attributes:
      widths: features, then neurons of the dense layers inside the blocks.
      depth: blocks.
      heads: attention heads of a block.
      classes: characters.
      dtype: what the layers compute in; the parameters are float32.
    """

    widths: tuple[int, ...] = (96, 256)
    depth: int = 2
    heads: int = 4
    classes: int = 65
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the widths."""
        if self.widths[0] % self.heads:
            raise ValueError(
                f"the first width of a decoder must be a multiple of its {self.heads} "
                f"heads; got {self.widths[0]}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Characters ``(batch, length)`` to logits ``(batch, length, classes)``."""
        features, hidden = self.widths
        embed = nn.Embed(self.classes, features, dtype=self.dtype, name="embed")
        normal = nn.initializers.normal(0.1)
        positions = self.param("positions", normal, (x.shape[1], features))
        y = embed(x) + positions.astype(self.dtype)
        for i in range(self.depth):
            y = Block(hidden, self.heads, self.dtype, name=f"block{i}")(y)
        y = nn.RMSNorm(dtype=self.dtype, name="norm")(y)
        # In float32 at least, so that logits are not coarse.
        full = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.classes, use_bias=False, dtype=full, name="head")(y)


class Block(nn.Module):
    """Attention and a gated layer, each behind RMS norm and beside a shortcut.

    Attributes:
      hidden: neurons of the gated layer.
      heads: attention heads.
      dtype: what the layers compute in.
    """

    hidden: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features to features."""
        features = x.shape[-1]

        def dense(shape: Any, name: str, axis: Any = -1) -> nn.DenseGeneral:
            options: Any = {"use_bias": False, "dtype": self.dtype}
            return nn.DenseGeneral(shape, axis, name=name, **options)

        each = (self.heads, features // self.heads)
        y = nn.RMSNorm(dtype=self.dtype, name="norm0")(x)
        y = jax.nn.dot_product_attention(
            *(dense(each, name)(y) for name in ("query", "key", "value")),
            is_causal=True,
        )
        x = x + dense(features, "out", (-2, -1))(y)
        y = nn.RMSNorm(dtype=self.dtype, name="norm1")(x)
        y = nn.silu(dense(self.hidden, "gate")(y)) * dense(self.hidden, "up")(y)
        return x + dense(features, "down")(y)
