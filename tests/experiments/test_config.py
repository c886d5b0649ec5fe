import dataclasses
import json
import pathlib

import pytest

from experiments.config import OUTSIDE, PRUNING, Config

# A value that is not the default, for every option.
CHANGED = Config(
    **{"dataset": "cifar10", "downscale": 2, "augment": "crop_flip", "model": "conv"},
    **{
        "compute": "bfloat16",
        "method": "depgraph_steps",
        "widths": (4, 4),
        "epochs": 7,
    },
    **{"batch_size": 64, "learning_rate": 0.2, "schedule": "step", "warmup": 1.0},
    **{"base": "adamw", "widths_left": (3, 4), "examples": 99},
    **{"momentum": 0.9, "weight_decay": 1e-4, "c": 0.3, "mu": 0.7, "sparsity": 0.5},
    **{"target": "flops", "begin": 0.2, "end": 0.7},
    **{"stop_rise": 0.1, "penalty": 1e-2, "decay_steps": 3},
    **{"release_rate": 0.5, "release_length": 2.0, "valley": "svd"},
    **{"valley_rank": 3, "valley_decay": 0.9, "valley_every": 2, "weights": "size"},
    **{
        "min_channels": 2,
        "shrink": (0.5,),
        "validation": 9,
        "evaluate_every": 3,
        "seed": 4,
        "loop": "scan",
    },
    **{"devices": 2, "twin": True, "timed": True, "data_dir": pathlib.Path("data")},
    out=pathlib.Path("somewhere"),
)
FIELDS = [field.name for field in dataclasses.fields(Config)]
# What a run keeps without pruning.
KEPT = {
    *("dataset", "downscale", "augment", "model", "compute", "widths", "epochs"),
    *("batch_size", "learning_rate", "schedule", "warmup", "momentum", "weight_decay"),
    *("base", "examples"),
    *("validation", "evaluate_every", "seed", "loop", "devices", "timed", "data_dir"),
}


def test_every_option_is_changed_here():
    for name in FIELDS:
        assert getattr(CHANGED, name) != getattr(Config(), name), name


def test_the_twin_keeps_all_but_the_pruning():
    twin, default = CHANGED.twin_of(), Config()
    assert {*KEPT, *PRUNING, "method", "twin", "out"} == set(FIELDS)
    for name in KEPT:
        assert getattr(twin, name) == getattr(CHANGED, name), name
    for name in PRUNING:
        assert getattr(twin, name) == getattr(default, name), name
    assert twin.method == "sgd" and not twin.twin
    assert twin.out == pathlib.Path("somewhere/twin")


def test_the_twin_without_a_directory_is_beside_the_run():
    config = Config(sparsity=0.5)
    assert config.twin_of().directory() == config.directory() / "twin"


def test_runs_that_differ_in_pruning_alone_have_the_same_twin():
    for name in PRUNING:
        other = dataclasses.replace(CHANGED, **{name: getattr(Config(), name)})
        assert other.key() != CHANGED.key()
        assert other.twin_of().key() == CHANGED.twin_of().key()
    for name in KEPT - set(OUTSIDE):
        other = dataclasses.replace(CHANGED, **{name: getattr(Config(), name)})
        assert other.twin_of().key() != CHANGED.twin_of().key()


def test_the_key_is_json_and_leaves_out_where_and_how():
    key = CHANGED.key()
    assert key.keys() == set(FIELDS) - set(OUTSIDE)
    assert json.loads(json.dumps(key)) == key and key["widths"] == [4, 4]
    for name in OUTSIDE:
        other = dataclasses.replace(CHANGED, **{name: getattr(Config(), name)})
        assert other != CHANGED and other.key() == key


def test_directories_of_different_runs_differ():
    configs = [
        Config(),
        Config(c=0.2),
        Config(sparsity=0.5),
        Config(sparsity=0.5, valley="svd"),
        Config(method="sgd"),
        Config(method="prox_sgd"),
        Config(seed=1),
    ]
    assert len({c.directory() for c in configs}) == len(configs)
    assert CHANGED.directory() == pathlib.Path("somewhere")


def test_a_run_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
