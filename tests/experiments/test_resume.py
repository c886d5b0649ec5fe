import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from experiments import data, optimizers
from experiments import train as training
from experiments.config import Config
from experiments.interrupt import Interrupted
from experiments.log import read_lines
from experiments.train import train

# Five steps an epoch, of a network with batch statistics.
EPOCHS, PER_EPOCH = 4, 5
CONFIG = Config(
    **{"model": "conv", "widths": (3, 4, 6), "augment": "crop_flip"},
    **{"epochs": EPOCHS, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.9},
    **{"schedule": "cosine", "warmup": 1.0, "evaluate_every": 3, "validation": 7},
    seed=2,
)
METHODS = {
    "sgd": {"method": "sgd"},
    "altsdp": {"sparsity": 0.4},
}


@pytest.fixture(scope="module")
def dataset():
    train, test, classes = data.load("digits")
    train, test = (data.Split(*(x[:170] for x in split)) for split in (train, test))
    return data.Dataset(train, test, classes)


@pytest.fixture(scope="module", autouse=True)
def shared():
    """Runs of one configuration share what they compile, and the cut is left out."""
    made, patch = {}, pytest.MonkeyPatch()

    def once(name, key):
        make = getattr(training, name)

        def wrapped(*args, **options):
            where = name, *key(*args, **options)
            if where not in made:
                made[where] = make(*args, **options)
            return made[where]

        return wrapped

    setups = once("make_setup", lambda config, *_: [json.dumps(config.key())])

    def make_setup(*args):
        setup = setups(*args)
        # A step takes the buffers of its state.
        return setup._replace(state=jax.tree.map(jnp.copy, setup.state))

    def outcome(config, model, groups, variables, dataset):
        total = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(variables))
        times = {"milliseconds": 1.0} if config.timed else {}
        return {"test_accuracy": total, **times}

    patch.setattr(training, "make_setup", make_setup)
    for name in ("make_watch", "make_evaluate"):
        patch.setattr(training, name, once(name, lambda what: [what]))
    advance = once("make_advance", lambda model, tx, **kw: [tx, *kw.values()])
    patch.setattr(training, "make_advance", advance)
    patch.setattr(training, "outcome", outcome)
    yield
    patch.undo()


@pytest.fixture
def go(tmp_path, dataset):
    """Trains until some step, or to the end."""

    def go(name, until=None, **changed):
        done = 0

        def on_step(step, steps):
            nonlocal done
            assert step > done and steps == EPOCHS * PER_EPOCH
            done = step

        config = dataclasses.replace(CONFIG, out=tmp_path / name, **changed)
        if until is None:
            return train(config, dataset=dataset, on_step=on_step)
        with pytest.raises(Interrupted) as error:
            train(config, dataset=dataset, on_step=on_step, stop=lambda: done >= until)
        return str(error.value)

    return go


def without_seconds(epochs):
    assert all(record["seconds"] > 0 for record in epochs)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in epochs]


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(a.state, b.state)
    assert without_seconds(a.epochs) == without_seconds(b.epochs)
    assert a.result == b.result


# A wish to stop after so many steps, and what comes of it.
STOPS = {
    "step": {3: "3 steps", 4: "4 steps", 5: "epoch 1", 12: "12 steps", 15: "epoch 3"},
    "scan": {3: "epoch 1", 15: "epoch 3"},
}


@pytest.mark.parametrize(
    ("method", "loop"), [("altsdp", "step"), ("altsdp", "scan"), ("sgd", "step")]
)
def test_stopped_and_gone_on_it_ends_with_the_same_bits(method, loop, go, tmp_path):
    whole = go("whole", loop=loop, **METHODS[method])
    for until, said in STOPS[loop].items():
        found = go("part", until, loop=loop, **METHODS[method])
        assert found == f"stopped after {said}"
    part = go("part", loop=loop, **METHODS[method])
    assert_same_bits(part, whole)
    assert whole.epochs[-1]["batch_loss"] < whole.epochs[0]["batch_loss"]
    left = {"sgd": 13, "altsdp": 8}[method]
    assert sum(whole.epochs[-1]["channels"].values()) == left
    header, *records = read_lines(tmp_path / "part/metrics.jsonl")
    assert records == [*part.epochs, part.result]
    assert [record["epoch"] for record in part.epochs] == [1, 2, 3, 4]


def test_it_shrinks_at_the_same_steps_whenever_it_was_stopped(go, monkeypatch):
    monkeypatch.setattr("experiments.shrink.ROUND_TO", 1)
    # Cuts behind steps 6 and 14; the first channels go behind step 3.
    options = {"shrink": (0.3, 0.7), "loop": "step", **METHODS["altsdp"]}
    whole = go("whole", **options)
    for until in (5, 6, 7, 14):
        go("part", until, **options)
    part = go("part", **options)
    assert_same_bits(part, whole)
    flops = [record["step_flops"] for record in whole.epochs]
    assert flops[0] == 1 > flops[1] > flops[2] == flops[3]
    # Up to rounding it is the run that does not shrink.
    plain = go("plain", loop="step", **METHODS["altsdp"])
    for ours, theirs in zip(whole.epochs, plain.epochs, strict=True):
        assert ours["channels"] == theirs["channels"]
        assert ours["batch_loss"] == pytest.approx(theirs["batch_loss"], rel=1e-4)
    a, b = (run.state.variables for run in (whole, plain))
    a, b = (sdp_jax.plan_cut(plain.groups, v).take(v) for v in (a, b))
    chex.assert_trees_all_close(a, b, rtol=1e-3, atol=1e-4)


def test_it_shrinks_on_several_devices_in_a_scan(go, monkeypatch):
    monkeypatch.setattr("experiments.shrink.ROUND_TO", 1)
    options = {"shrink": (0.4,), **METHODS["altsdp"]}
    one = go("one", loop="step", **options)
    many = go("many", loop="scan", devices=8, **options)
    # A scan is asked at the end of an epoch, here behind step 10 instead of 8.
    assert [r["step_flops"] < 1 for r in many.epochs] == [False, True, True, True]
    for a, b in zip(one.epochs, many.epochs, strict=True):
        assert a["channels"] == b["channels"]
    chex.assert_trees_all_close(
        one.state.params, jax.device_get(many.state.params), rtol=1e-2, atol=1e-3
    )


@pytest.mark.study
@pytest.mark.parametrize("method", optimizers.METHODS)
def test_every_method_goes_on_and_runs_on_eight_devices(method, go):
    options = {"method": method, "sparsity": 0.5, "loop": "step"}
    whole = go("whole", **options)
    go("part", 7, **options)
    part = go("part", **options)
    chex.assert_trees_all_equal(part.state.params, whole.state.params)
    assert without_seconds(part.epochs) == without_seconds(whole.epochs)
    spread = go("spread", **options | {"loop": "scan", "devices": 8})
    ours, theirs = jax.device_get((spread.state.params, whole.state.params))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_it_goes_on_on_another_number_of_devices(go):
    whole = go("whole", loop="step", **METHODS["altsdp"])
    for until, devices in [(7, 1), (9, 8), (None, 1)]:
        part = go("part", until, loop="step", devices=devices, **METHODS["altsdp"])
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(part.state)} == {1}
    chex.assert_trees_all_close(part.state, whole.state, rtol=1e-3, atol=1e-5)
    zeros = [jax.tree.map(lambda x: x == 0, r.state.params) for r in (part, whole)]
    chex.assert_trees_all_equal(*zeros)
    for a, b in zip(part.epochs, whole.epochs, strict=True):
        assert a["channels"] == b["channels"]
        assert a["batch_loss"] == pytest.approx(b["batch_loss"], rel=1e-4)


@pytest.mark.parametrize("loop", ["step", "scan"])
def test_what_comes_from_outside_comes_before_the_same_steps(
    loop, go, dataset, monkeypatch
):
    done, given, due = [0], [], range(1, EPOCHS * PER_EPOCH, 3)
    kept, _ = data.hold_out(dataset.train, CONFIG.validation)

    def refresh(state):
        given.append(done[-1])
        return state

    def advance(state, split, order, first, number, count):
        # A stand-in, because a scan of every length would be compiled.
        assert first == number % PER_EPOCH and number == done[-1]
        expected = data.order_of(kept, 32, seed=2, epoch=number // PER_EPOCH + 1)
        np.testing.assert_array_equal(order, expected)
        done.append(number + count)
        return state, jnp.full(count, float(number))

    outside = refresh, due
    monkeypatch.setattr(training, "make_from_outside", lambda *_: outside)
    monkeypatch.setattr(training, "make_advance", lambda *_, **__: advance)
    whole = go("whole", loop=loop, method="sgd")
    assert given == list(due)
    steps = list(done)
    done[:], given[:] = [0], []
    # Between two of them a scan may stop amid an epoch, too.
    assert go("part", 7, loop=loop, method="sgd") == "stopped after 7 steps"
    assert go("part", 10, loop=loop, method="sgd") == "stopped after epoch 2"
    part = go("part", loop=loop, method="sgd")
    assert given == list(due) and done == steps
    assert without_seconds(part.epochs) == without_seconds(whole.epochs)
    if loop == "scan":
        assert set(due) | {5, 10, 15, 20} == set(steps[1:])


def test_a_finished_run_is_not_trained_again_but_timed(go, tmp_path):
    first = go("run", loop="step", method="sgd")
    before = read_lines(tmp_path / "run/metrics.jsonl")
    again = go("run", loop="step", method="sgd", until=None)
    assert_same_bits(again, first)
    assert read_lines(tmp_path / "run/metrics.jsonl") == before
    timed = go("run", loop="step", method="sgd", timed=True)
    assert timed.result == first.result | {"milliseconds": 1.0}
    # Once timed, it is not timed again.
    count = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert count == len(before) + 1
    again = go("run", loop="step", method="sgd", timed=True)
    assert again.result == timed.result
    assert read_lines(tmp_path / "run/metrics.jsonl")[-1] == timed.result
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == len(before)
