"""What the networks are made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def conv(
    width: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    dtype: Any,
    name: str | None = None,
) -> nn.Conv:
    """A convolution without bias, He normal, padded by half its size on each side."""
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def norm(train: bool, *, dtype: Any, name: str | None = None) -> nn.BatchNorm:
    """Batch normalisation; its statistics are float32 whatever it computes in."""
    return nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=name)


def head(classes: int, *, dtype: Any) -> nn.Dense:
    """The last layer; in float32 at least, so that logits are not coarse."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return nn.Dense(classes, dtype=dtype, name="head")


def pool(x: jax.Array) -> jax.Array:
    """Maxima of 2×2 squares; a last odd row or column is left out.

    On the CPU a training step is twice as fast as with a reduction over windows.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    # Pairs, because the derivative of a maximum over an axis divides by the number of
    # entries equal to it, which may be none where XLA computes them twice.
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def check_side(images: jax.Array, least: int, model: str) -> None:
    """Refuses images of which pooling would leave nothing.

    Args:
      images: images ``(batch, height, width, channels)``.
      least: the smallest height and width that leave something.
      model: what the error calls the network.

    Raises:
      ValueError: if the images are smaller.
    """
    height, width = images.shape[1:3]
    if min(height, width) < least:
        raise ValueError(
            f"{model} needs images of at least {least}×{least} pixels, because of its "
            f"pooling; got {height}×{width}. Use larger images or another model"
        )
