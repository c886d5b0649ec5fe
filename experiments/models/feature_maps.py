"""What the channels of a network put out."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

import sdp_jax
from experiments.models.convnet import ConvNet
from experiments.models.dnn import Dnn
from experiments.models.lenet import LeNet
from experiments.models.table import Model
from experiments.models.vgg import Vgg


def feature_maps(
    model: Model, groups: sdp_jax.Groups, variables: Any, images: np.ndarray
) -> dict[str, jax.Array]:
    """What the channels of each dimension put out, behind the relu.

    Args:
      model: the network; one layer follows another in it.
      groups: its channel dimensions, on the parameters.
      variables: its variables.
      images: images.

    Returns:
      For each dimension an array ``(batch, …, size)``.

    Raises:
      ValueError: if the network has shortcuts, so that channels are put out by several
        layers.
    """
    if not isinstance(model, Dnn | ConvNet | LeNet | Vgg):
        raise ValueError(
            "feature maps belong to single layers, so the network must be one layer "
            "after another: dnn, conv, lenet, or a VGG; got "
            f"{type(model).__name__}. Choose one of those, or a method that needs none"
        )
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
