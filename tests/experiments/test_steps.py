import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, steps
from experiments.config import Config
from experiments.train import make_setup

SIZE, STEPS = 16, 12
CONFIG = Config(
    **{"model": "conv", "widths": (4, 4, 8), "augment": "crop_flip", "seed": 1},
    **{"sparsity": 0.5, "end": 0.5},
    **{"momentum": 0.9, "weight_decay": 1e-3, "learning_rate": 0.05},
    **{"batch_size": SIZE, "epochs": 3},
)


class Done(NamedTuple):
    """A short training.

    Attributes:
      first: of the state before it, sharding and type of every array.
      state: the state after it.
      losses: of all steps.
      jitted: the compiled function.
    """

    first: Any
    state: steps.State
    losses: np.ndarray
    jitted: Any


@functools.cache
def dataset():
    whole = data.load("digits")
    return whole._replace(train=data.Split(*(x[:64] for x in whole.train)))


@functools.cache
def setup(compute="float32"):
    config = dataclasses.replace(CONFIG, compute=compute)
    return make_setup(config, dataset(), STEPS)


def kind(array):
    return array.sharding, array.dtype, array.weak_type


@functools.cache
def trained(devices=1, scan=False, compute="float32"):
    made, mesh = setup(compute), steps.make_mesh(devices, SIZE)
    jitted = []
    with pytest.MonkeyPatch.context() as patch:
        make = steps.make_jitted

        def keep(*args, **options):
            jitted.append(make(*args, **options))
            return jitted[-1]

        patch.setattr(steps, "make_jitted", keep)
        advance = steps.make_advance(
            made.model, made.tx, augment="crop_flip", seed=1, scan=scan, mesh=mesh
        )
    split = steps.on_devices(dataset().train, mesh)
    order = data.order_of(dataset().train, SIZE, seed=1, epoch=1)
    order = steps.on_devices(np.concatenate([order] * 3), mesh)
    # A copy, because a step takes the buffers of its state.
    state = steps.on_devices(jax.tree.map(jnp.copy, made.state), mesh)
    first = jax.tree.map(kind, state)
    # In two pieces, because the numbers of the steps go on.
    state, early = advance(state, split, order, 0, 0, STEPS // 2)
    state, late = advance(state, split, order, STEPS // 2, STEPS // 2, STEPS // 2)
    return Done(first, state, np.concatenate([early, late]), jitted[0])


def check(done, devices=1):
    """Exact zeros where channels went; compiled once; every array where it was."""
    params = jax.device_get(done.state.params)
    for name, left in {"conv0": 2, "conv1": 2, "dense": 4}.items():
        kernel = params[name]["kernel"]
        alive = kernel.reshape(-1, kernel.shape[-1]).any(0)
        assert alive.sum() == left
        others = params[name.replace("conv", "norm")]
        assert not others["bias"][~alive].any()
        if name != "dense":
            assert not others["scale"][~alive].any() and others["scale"].any()
    assert done.jitted._cache_size() == 1
    same = jax.tree.map(lambda x, before: kind(x) == before, done.state, done.first)
    assert jax.tree.all(same)
    for leaf in jax.tree.leaves(done.state):
        assert leaf.is_fully_replicated
        assert len(leaf.sharding.device_set) == devices


def test_on_one_device():
    one = trained()
    check(one)
    assert one.losses.shape == (STEPS,)
    assert one.losses[-4:].mean() < one.losses[:4].mean()


@pytest.mark.parametrize(
    "way", [{"devices": 8}, {"scan": True}, {"devices": 8, "scan": True}], ids=str
)
def test_devices_and_scan_change_nothing_but_roundings(way):
    one, other = trained(), trained(**way)
    check(other, way.get("devices", 1))
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-4)
    ours, theirs = jax.device_get((other.state, one.state))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-5)
    zeros = [jax.tree.map(lambda x: x == 0, s.params) for s in (ours, theirs)]
    chex.assert_trees_all_equal(*zeros)


def test_bfloat16_is_close_and_keeps_a_float32_state():
    one, half = trained(), trained(compute="bfloat16")
    check(half)
    difference = np.abs(half.losses - one.losses)
    assert 1e-5 < difference.max() < 0.05
    kinds = {str(x.dtype) for x in jax.tree.leaves(half.state)}
    assert "bfloat16" not in kinds and "float32" in kinds
    for leaf in jax.tree.leaves((half.state.params, half.state.batch_stats)):
        assert leaf.dtype == jnp.float32


def test_other_numbers_of_the_steps_make_other_crops():
    jitted, done = trained().jitted, []
    split = steps.on_devices(dataset().train, None)
    order = data.order_of(dataset().train, SIZE, seed=1, epoch=1)
    order = steps.on_devices(np.concatenate([order] * 3), None)
    for number in (0, 0, 7):
        state = jax.tree.map(jnp.copy, setup().state)
        _, loss = jitted(state, split, order, np.int32(0), np.int32(number))
        done.append(float(loss))
    assert done[0] == done[1] != done[2]


def test_devices_share_each_batch():
    """The program of one of eight devices: two of sixteen examples, and sums of all."""
    config = Config(method="sgd", widths=(12,))
    made = make_setup(config, dataset(), STEPS)
    mesh = steps.make_mesh(8, SIZE)
    jitted = steps.make_jitted(made.model, made.tx, mesh=mesh)
    state, split = steps.on_devices((made.state, dataset().train), mesh)
    order = steps.on_devices(np.zeros((4, SIZE), np.int32), mesh)
    lowered = jitted.lower(state, split, order, np.int32(0), np.int32(0))
    text = lowered.compile().as_text()
    assert "f32[2,12]" in text and "f32[16,12]" not in text
    assert "all-reduce" in text


def test_one_device_on_the_cpu_by_default():
    assert steps.make_mesh(None, 7) is None
    assert steps.make_mesh(1, 7) is None


def test_a_mesh_takes_the_first_devices():
    mesh = steps.make_mesh(4, 12)
    assert mesh is not None and mesh.axis_names == ("data",)
    assert list(mesh.devices) == jax.local_devices()[:4]


@pytest.mark.parametrize("count", [0, -1, 9])
def test_no_more_devices_than_there_are(count):
    with pytest.raises(ValueError, match=rf"between 1 and the 8 local .*got {count}"):
        steps.make_mesh(count, 360)


def test_a_batch_is_shared_evenly():
    with pytest.raises(
        ValueError, match="multiple of the number of devices, 8; got 12"
    ):
        steps.make_mesh(8, 12)


def test_evaluation_is_the_mean_over_all_examples():
    n = 4100  # Three parts, the last one smaller.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, 1, 1, 3)).astype(np.float32)
    labels = rng.integers(3, size=n).astype(np.int32)

    def apply(variables, images):
        return variables["scale"] * images[:, 0, 0]

    evaluate = steps.make_evaluate(apply)
    loss, accuracy = evaluate({"scale": jnp.float32(2)}, data.Split(logits, labels))
    exact = 2 * logits[:, 0, 0].astype(np.float64)
    rows = np.log(np.exp(exact).sum(-1)) - exact[np.arange(n), labels]
    np.testing.assert_allclose(loss, rows.mean(), rtol=1e-5)
    assert accuracy == np.mean(exact.argmax(-1) == labels)


def test_evaluation_of_a_text_is_the_mean_over_all_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 3)).astype(np.float32)
    labels = rng.integers(3, size=(5, 7)).astype(np.int32)
    evaluate = steps.make_evaluate(lambda variables, images: images)
    loss, accuracy = evaluate({}, data.Split(logits, labels))
    exact = logits.astype(np.float64)
    right = np.take_along_axis(exact, labels[..., None], -1)[..., 0]
    expected = np.log(np.exp(exact).sum(-1)) - right
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(exact.argmax(-1) == labels))
