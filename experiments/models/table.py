"""All networks by name."""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from experiments.models.airbench import Airbench
from experiments.models.convnet import ConvNet
from experiments.models.decoder import Decoder
from experiments.models.depthwise import Depthwise
from experiments.models.dnn import Dnn
from experiments.models.lenet import LeNet
from experiments.models.mixer import Mixer
from experiments.models.resnet import ResNet
from experiments.models.vgg import Vgg
from experiments.models.vit import Vit
from experiments.models.wrn import WideResNet

Name: TypeAlias = Literal[
    "dnn",
    "conv",
    "lenet",
    "vgg_small",
    "vgg16",
    "vgg19",
    "resnet20",
    "resnet56",
    "resnet50",
    "resnet50_imagenet",
    "wrn28_10",
    "preact",
    "depthwise",
    "airbench",
    "mixer",
    "vit_s4",
    "decoder",
]


class Model(Protocol):
    """What training asks of a network; a Flax Linen module has it."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Its widths."""
        ...

    def init(self, key: jax.Array, images: Any, /) -> Any:
        """Random variables: ``params``, and ``batch_stats`` if there are any."""
        ...

    def apply(
        self, variables: Any, images: Any, /, *, train: bool = ..., mutable: Any = ...
    ) -> Any:
        """Logits; with ``mutable`` a pair of them and the collections named there."""
        ...


_wide = {"widths": (64, 128, 256, 512), "depths": (3, 4, 6, 3), "bottleneck": True}
MODELS: dict[Name, Callable[..., Model]] = {
    "dnn": Dnn,
    "conv": ConvNet,
    "lenet": LeNet,
    "vgg_small": functools.partial(Vgg, widths=(16, 32, 64), depths=(2, 2, 2)),
    "vgg16": functools.partial(Vgg, depths=(2, 2, 3, 3, 3)),
    "vgg19": functools.partial(Vgg, depths=(2, 2, 4, 4, 4)),
    "resnet20": functools.partial(ResNet, depths=(3, 3, 3)),
    "resnet56": functools.partial(ResNet, depths=(9, 9, 9)),
    "resnet50": functools.partial(ResNet, **_wide),
    "resnet50_imagenet": functools.partial(ResNet, **_wide, imagenet=True),
    "wrn28_10": WideResNet,
    "preact": functools.partial(WideResNet, widths=(12, 24, 48), depth=10, stem=12),
    "depthwise": Depthwise,
    "airbench": Airbench,
    "mixer": Mixer,
    "vit_s4": Vit,
    "decoder": Decoder,
}
# These have as many layers as widths.
_ANY_DEPTH = ("dnn", "conv")


def make_model(
    name: Name, classes: int, widths: tuple[int, ...] = (), dtype: Any = jnp.float32
) -> Model:
    """Makes a network.

    Args:
      name: which one.
      classes: outputs.
      widths: its widths; none for its own.
      dtype: what its layers compute in; its parameters are float32.

    Returns:
      The network.

    Raises:
      ValueError: if there is no such network, it cannot have these widths or so many
        classes, or the dtype is not a floating one.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; choose one of {list(MODELS)}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1; got {classes}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype must be a floating type, such as float32; got {jnp.dtype(dtype)}"
        )
    model = MODELS[name](classes=classes, dtype=dtype)
    if not widths:
        return model
    wrong = len(widths) != len(model.widths) and name not in _ANY_DEPTH
    if wrong or min(widths) < 1:
        count = "any number of" if name in _ANY_DEPTH else len(model.widths)
        raise ValueError(
            f"model {name!r} takes {count} widths of at least 1, such as "
            f"{model.widths}; got {widths}"
        )
    return MODELS[name](widths=widths, classes=classes, dtype=dtype)
