"""The runs behind the tables, by name: ``python -m experiments.train NAME``.

A name is a row and a method, ``vgg16-cifar10-altsdp``. All methods of a row share data,
seed, budget, schedule and target; ``sgd`` is their unpruned twin. The paper of
Structured Directional Pruning (arXiv 2107.05328) names networks and data sets of its
rows, and no hyper-parameters: those are the usual ones of the networks, and targets are
what others publish for the same row.
"""

from collections.abc import Mapping
from typing import Any

from experiments.config import Config

_CIFAR: dict[str, Any] = {
    "dataset": "cifar10",
    "augment": "crop_flip",
    "compute": "bfloat16",
    "epochs": 200,
    "batch_size": 128,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "warmup": 2.0,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "target": "flops",
    "evaluate_every": 10,
    "validation": 0,
    "timed": True,
}
# What finishes on two cores of a CPU in less than half an hour: images of 16×16, so few
# epochs that augmentation would only slow them down.
_SMALL = _CIFAR | {
    "augment": "none",
    "compute": "float32",
    "evaluate_every": 5,
    "downscale": 2,
    "learning_rate": 0.05,
    "warmup": 0.0,
    "sparsity": 0.5,
}

ROWS: Mapping[str, dict[str, Any]] = {
    # The paper's.
    "dnn-mnist": {
        **{"dataset": "mnist", "model": "dnn", "epochs": 30, "sparsity": 0.5},
        **{"learning_rate": 0.1, "evaluate_every": 10, "timed": True},
    },
    # FLOPs left: 26.6 % (OTOv2).
    "vgg16-cifar10": _CIFAR | {"model": "vgg16", "sparsity": 0.734},
    # 11.2 % (DepGraph).
    "vgg19-cifar100": _CIFAR
    | {"dataset": "cifar100", "model": "vgg19", "sparsity": 0.888},
    # 45.8 % (DPM on DepGraph).
    "resnet56-cifar10": _CIFAR | {"model": "resnet56", "sparsity": 0.542},
    # 10.0 % (OTOv2).
    "resnet50-cifar10": _CIFAR | {"model": "resnet50", "sparsity": 0.9},
    "wrn28_10-cifar10": _CIFAR | {"model": "wrn28_10", "sparsity": 0.5},
    "wrn28_10-cifar100": _CIFAR
    | {"dataset": "cifar100", "model": "wrn28_10", "sparsity": 0.5},
    # Small ones.
    "lenet-mnist": {
        **{"dataset": "mnist", "model": "lenet", "epochs": 8, "sparsity": 0.5},
        **{"target": "flops", "learning_rate": 0.01, "schedule": "cosine"},
        **{"momentum": 0.9, "weight_decay": 5e-4, "evaluate_every": 8, "timed": True},
    },
    # Meant for 91 % of the images on two cores of a CPU.
    "airbench-cifar10": _CIFAR
    | {
        **{"model": "airbench", "compute": "float32", "epochs": 16, "sparsity": 0.5},
        **{"evaluate_every": 16, "learning_rate": 0.1},
    },
    "vgg_small-cifar10": _SMALL | {"model": "vgg_small", "epochs": 20},
    "resnet20_narrow-cifar10": _SMALL
    | {"model": "resnet20", "widths": (8, 16, 32), "epochs": 15},
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "altsdp": {"method": "altsdp", "end": 0.5},
    "sgd": {"method": "sgd"},
    "l2": {"method": "l2", "end": 0.5},
    "depgraph": {"method": "depgraph", "end": 0.5},
    "gradual": {"method": "gradual", "end": 0.5},
    "otov2": {"method": "dhspg", "end": 0.5},
}


def _config(row: Mapping[str, Any], variant: Mapping[str, Any]) -> Config:
    both = {**row, **variant}
    if variant["method"] == "sgd":
        for name in ("sparsity", "target"):
            both.pop(name, None)
    return Config(**both)


CONFIGS: Mapping[str, Config] = {
    f"{row}-{variant}": _config(ROWS[row], VARIANTS[variant])
    for row in ROWS
    for variant in VARIANTS
}
