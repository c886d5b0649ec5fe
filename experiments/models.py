"""Networks in Flax, with their widths as arguments."""

from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax

Name: TypeAlias = Literal["dnn", "conv"]


class Dnn(nn.Module):
    """Dense layers with relu; the paper's 784-300-100-10 on MNIST.

    Attributes:
      widths: neurons of the hidden layers.
      classes: outputs.
    """

    widths: tuple[int, ...] = (300, 100)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"dense{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


class ConvNet(nn.Module):
    """3×3 convolutions with batch norm and relu, pooled 2×2 after each second one.

    The last width is that of a dense layer on the flattened feature map.

    Attributes:
      widths: channels of the convolutions, then neurons of the dense layer.
      classes: outputs.
    """

    widths: tuple[int, ...] = (32, 32, 64, 64, 128)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        for i, width in enumerate(self.widths[:-1]):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"norm{i}")(x)
            x = nn.relu(x)
            if i % 2:
                x = _pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.widths[-1], name="dense")(x))
        return nn.Dense(self.classes, name="head")(x)


def _pool(x: jax.Array) -> jax.Array:
    """Maxima of 2×2 squares.

    On the CPU a training step is twice as fast as with a reduction over windows.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    # Pairs, because the derivative of a maximum over an axis divides by the number of
    # entries equal to it, which may be none where XLA computes them twice.
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


Model: TypeAlias = Dnn | ConvNet
MODELS: dict[str, type[Model]] = {"dnn": Dnn, "conv": ConvNet}


def feature_maps(
    model: Model, groups: sdp_jax.Groups, variables: Any, images: np.ndarray
) -> dict[str, jax.Array]:
    """What the channels of each dimension put out, behind the relu.

    Args:
      model: the network.
      groups: its channel dimensions, on the parameters.
      variables: its variables.
      images: images.

    Returns:
      For each dimension an array ``(batch, …, size)``.
    """
    _, found = model.apply(variables, images, capture_intermediates=True, mutable=True)
    maps = {}
    for d in groups:
        # The last producer is the bias of the layer that puts the channel out.
        layer = d.producers[-1].path.split("/")[0]
        norms = [m.path.split("/")[0] for m in d.producers if "norm" in m.path]
        output: Any
        (output,) = found["intermediates"][norms[0] if norms else layer]["__call__"]
        maps[d.name] = nn.relu(output)
    return maps
