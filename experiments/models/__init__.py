"""Networks in Flax, with their widths as arguments; none knows of pruning."""

from experiments.models.airbench import Airbench
from experiments.models.convnet import ConvNet
from experiments.models.decoder import Decoder
from experiments.models.depthwise import Depthwise
from experiments.models.dnn import Dnn
from experiments.models.feature_maps import feature_maps
from experiments.models.lenet import LeNet
from experiments.models.mixer import Mixer
from experiments.models.resnet import ResNet
from experiments.models.table import MODELS, Model, Name, make_model
from experiments.models.vgg import Vgg
from experiments.models.vit import Vit
from experiments.models.wrn import WideResNet

__all__ = [
    "MODELS",
    "Airbench",
    "ConvNet",
    "Decoder",
    "Depthwise",
    "Dnn",
    "LeNet",
    "Mixer",
    "Model",
    "Name",
    "ResNet",
    "Vgg",
    "Vit",
    "WideResNet",
    "feature_maps",
    "make_model",
]
