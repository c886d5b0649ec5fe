import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sdp_jax
from experiments import data
from experiments.config import Config
from experiments.log import read_lines
from experiments.train import main, make_setup, train

ROOT = pathlib.Path(__file__).parents[2]
TINY = Config(widths=(12, 8), epochs=3, batch_size=256)


def run(tmp_path, name="run", **changed):
    return train(dataclasses.replace(TINY, out=tmp_path / name, **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "sgd"},
        {"method": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
        {"method": "altsdp", "c": 0.5},
        {"method": "altsdp", "sparsity": 0.5, "schedule": "cosine", "momentum": 0.9},
        {"method": "altsdp", "sparsity": 0.5, "min_channels": 2},
        {"method": "altsdp", "c": 0.2, "weights": "size"},
        {"method": "prox_sgd", "penalty": 0.1},
        {"model": "conv", "widths": (4, 4, 8), "sparsity": 0.5, "validation": 99},
    ],
    ids=str,
)
def test_every_method_trains_and_is_cut(tmp_path, changed):
    done = run(tmp_path, **changed)
    result, losses = done.result, [r["train_loss"] for r in done.epochs]
    assert losses[-1] < losses[0]
    left, size = sum(result["widths"].values()), sum(result["dense_widths"].values())
    if changed.get("sparsity"):
        assert left == size - round(0.5 * size)
        assert result["small_parameters"] < result["parameters"]
    if changed.get("method") == "sgd":
        assert left == size
    assert result["small_test_accuracy"] == result["test_accuracy"]
    assert done.epochs[-1]["channels"] == result["widths"]
    assert ("validation_accuracy" in done.epochs[0]) == ("validation" in changed)


def test_twins_of_one_seed_start_alike_and_a_run_repeats_itself(tmp_path):
    a = run(tmp_path, "a", epochs=1, c=0.0)
    b = run(tmp_path, "b", epochs=1, method="sgd")
    chex.assert_trees_all_close(a.state.params, b.state.params, rtol=1e-5, atol=1e-6)
    c = run(tmp_path, "c", epochs=1, method="sgd")
    chex.assert_trees_all_equal(c.state, b.state)
    d = run(tmp_path, "d", epochs=1, method="sgd", seed=1)
    assert not np.array_equal(
        d.state.params["head"]["kernel"], b.state.params["head"]["kernel"]
    )


def test_a_sketch_is_part_of_the_state(tmp_path):
    changed = {"sparsity": 0.5, "valley": "svd", "valley_rank": 2, "epochs": 2}
    done = run(tmp_path, valley_decay=0.9, **changed)
    kernel = done.state.opt_state[-2].basis["head"]["kernel"]
    assert kernel.shape == (2, 8, 10) and kernel.any()
    assert sum(done.result["widths"].values()) == 10
    other = run(tmp_path, "other", valley_decay=0.1, **changed)
    energies = [r.state.opt_state[-2].energy for r in (done, other)]
    assert not np.array_equal(*energies)


@pytest.mark.study
def test_directions_are_refreshed_as_often_as_asked_for(tmp_path, monkeypatch):
    found = []
    top_eigenpairs = sdp_jax.valley.top_eigenpairs

    def counted(*args, **keywords):
        found.append(top_eigenpairs(*args, **keywords))
        return found[-1]

    monkeypatch.setattr(sdp_jax.valley, "top_eigenpairs", counted)
    done = run(
        tmp_path,
        sparsity=0.5,
        valley="hessian",
        valley_rank=2,
        valley_every=6,
        epochs=2,
    )
    steps = 2 * (1437 // 256)
    assert len(found) == -(-steps // 6)
    last = done.state.opt_state[-2].basis["head"]["kernel"]
    np.testing.assert_allclose(last, found[-1].vectors["head"]["kernel"], atol=1e-4)


def test_metrics_are_json_lines(tmp_path):
    done = run(tmp_path)
    lines = [
        json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert lines[0]["config"]["widths"] == [12, 8]
    assert lines[0]["versions"]["jax"]
    assert [x["epoch"] for x in lines[1:-1]] == [1, 2, 3]
    assert lines[-1] == done.result


CONV = {"model": "conv", "widths": (4, 4, 8), "sparsity": 0.5}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, **CONV), folder / "run"


@pytest.mark.parametrize("when", ["before the checkpoint", "torn line"])
def test_what_a_crash_leaves_behind(tmp_path, when, monkeypatch, whole_run):
    whole, folder = whole_run
    if when == "before the checkpoint":
        save = ocp.CheckpointManager.save

        def crash(self, step, **keywords):
            if step == 10:  # Five an epoch.
                raise KeyboardInterrupt
            return save(self, step, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", crash)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, "part", **CONV)
    else:
        # The checkpoint of epoch 2 is there, its record is not complete.
        shutil.copytree(folder, tmp_path / "part")
        path = tmp_path / "part/metrics.jsonl"
        text = path.read_text().splitlines(keepends=True)
        path.write_text("".join(text[:2]) + text[2][:20])
    part = run(tmp_path, "part", **CONV)
    chex.assert_trees_all_equal(part.state, whole.state)
    assert part.result == whole.result
    epochs = [r["epoch"] for r in read_lines(tmp_path / "part/metrics.jsonl")[1:-1]]
    assert epochs == [1, 2, 3]


# Signals to a process, what it returns, and a line of what it says.
ENDS = [
    ([signal.SIGKILL], -signal.SIGKILL, None),
    ([signal.SIGINT], 130, r"stopped after .* and saved; the same command goes on"),
    # The second one does not wait for a step to end.
    ([signal.SIGINT, signal.SIGTERM], -signal.SIGINT, "KeyboardInterrupt"),
]


def test_killed_and_interrupted_it_ends_with_the_same_bits(tmp_path):
    changed = {"sparsity": 0.5, "momentum": 0.9, "epochs": 40, "batch_size": 64}
    changed |= {"augment": "crop_flip", "warmup": 1.0}
    whole = run(tmp_path, "whole", **changed)
    command = [sys.executable, "-m", "experiments.train", "--widths", "12", "8"]
    for key, value in changed.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    command += ["--out", str(tmp_path / "part")]
    metrics, log = tmp_path / "part/metrics.jsonl", tmp_path / "stderr"
    chance = random.Random(0)
    for signals, code, said in ENDS:
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file
            )
        begun = len(read_lines(metrics)) if metrics.exists() else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and len(read_lines(metrics)) > begun + 3:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        for number in signals:
            process.send_signal(number)
        assert process.wait(120) == code, log.read_text()
        if said is not None:
            assert re.search(rf"^{said}$", log.read_text(), re.MULTILINE)
            assert ("Traceback" in log.read_text()) == (code < 0)
        assert begun + 3 < len(read_lines(metrics)) < 41
    # The last process to go on is this one.
    part = train(dataclasses.replace(TINY, out=tmp_path / "part", **changed))
    chex.assert_trees_all_equal(part.state, whole.state)
    assert part.result == whole.result
    for a, b in zip(part.epochs, whole.epochs, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_a_diverged_run_stops_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="training loss is .* lower learning_rate"):
        run(tmp_path, method="sgd", learning_rate=1e30)


def test_no_epochs(tmp_path):
    with pytest.raises(ValueError, match="epochs.* must be at least 1; got 0"):
        run(tmp_path, epochs=0)


def test_the_command_reports_bad_input_in_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--dataset", "mnist"]
        + ["--data-dir", str(tmp_path), "--out", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no mnist.npz")
    assert "Traceback" not in result.stderr


def test_main_trains_the_twin_first_and_compares(tmp_path, capsys):
    out = tmp_path / "run"
    config = dataclasses.replace(TINY, sparsity=0.5, momentum=0.9, epochs=2, out=out)
    done = main(dataclasses.replace(config, twin=True))
    printed = capsys.readouterr().out
    twin = train(dataclasses.replace(config.twin_of(), out=tmp_path / "other"))
    header, *records = read_lines(out / "twin/metrics.jsonl")
    assert header["config"] == config.twin_of().key() and header["config"] != TINY.key()
    assert records[-1] == twin.result
    for a, b in zip(records[:-1], twin.epochs, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    # One is printed after the other, and then both.
    *_, last = lines = printed.strip().splitlines()
    begun = [i for i, line in enumerate(lines) if line.startswith("epoch   1")]
    ended = [i for i, line in enumerate(lines) if line.startswith("test accuracy")]
    assert begun[0] < ended[0] < begun[1] < ended[1] < len(lines) - 1
    losses = [r.epochs[-1]["train_loss"] for r in (done, twin)]
    rates = [r.result["small_test_accuracy"] for r in (done, twin)]
    assert last == (
        f"training loss {losses[0]:.4f}, of the twin {losses[1]:.4f}; "
        f"test accuracy {rates[0]:.2%}, of the twin {rates[1]:.2%}"
    )
    assert "dense0 12 of 12" in lines[ended[0]] + lines[ended[0] + 1]
    # They begin with the same weights.
    dataset = data.load("digits")
    setups = [make_setup(c, dataset, 10) for c in (config, config.twin_of())]
    chex.assert_trees_all_equal(*(setup.state.params for setup in setups))


@pytest.mark.study
def test_mnist_dnn_loses_half_of_its_neurons_and_no_accuracy(tmp_path):
    directory = os.environ.get("SDP_JAX_DATA_DIR")
    if directory is None:
        pytest.skip("set SDP_JAX_DATA_DIR to a directory with mnist.npz")
    config = Config(dataset="mnist", data_dir=pathlib.Path(directory))
    accuracy, left = {}, {}
    methods = {
        "sgd": {"method": "sgd"},
        "altsdp": {"c": 0.08},
        "target": {"sparsity": 0.5},
    }
    for name, changed in methods.items():
        results = [
            train(
                dataclasses.replace(
                    config, seed=seed, out=tmp_path / f"{name}{seed}", **changed
                )
            ).result
            for seed in range(3)
        ]
        accuracy[name] = np.mean([r["small_test_accuracy"] for r in results])
        left[name] = np.mean([sum(r["widths"].values()) for r in results])
    for name in ("altsdp", "target"):
        assert accuracy[name] > accuracy["sgd"] - 0.002
        assert left[name] <= 205
