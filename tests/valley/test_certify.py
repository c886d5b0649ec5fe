"""Certifying: where the answer is known, and on trained networks."""

import dataclasses
import math
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from experiments import data
from experiments.certify import make_task
from experiments.config import Config
from experiments.train import train
from tests import toy

FAST = {"rank": 2, "curve_steps": 20, "points": 5}


def quadratic_problem(flat=6, sharp=3):
    """A loss with a known valley: ``sharp`` of the directions count."""
    rng = np.random.default_rng(0)
    size = flat + sharp
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    H = jnp.asarray((basis[:, :sharp] * [9.0, 4.0, 1.0][:sharp]) @ basis[:, :sharp].T)
    centre = jnp.asarray(rng.normal(size=size))

    def loss(params, scales):
        w = params["w"].reshape(-1) - centre
        return jnp.mean(scales) * w @ H @ w / 2

    data = [jnp.asarray([0.5, 1.0]), jnp.asarray([1.5, 1.0])]
    return loss, {"w": centre.reshape(-1, 3)}, data, basis, H


def test_numbers_of_a_quadratic(x64):
    loss, reference, data, basis, H = quadratic_problem()
    sharp, flat = basis[:, 0], basis[:, 5]
    move = 0.3 * sharp + 0.4 * flat
    params = {"w": reference["w"] + jnp.asarray(move.reshape(-1, 3))}
    found = sdp_jax.valley.certify(
        loss,
        reference,
        params,
        data,
        test_data=data[:1],
        points=5,
        rank=3,
        curve_steps=0,
        tol=1e-9,
    )
    np.testing.assert_allclose(found.eigenvalues, [9, 4, 1], rtol=1e-8)
    # The batches have scales of 0.75 and 1.25 in the mean.
    assert found.gap == pytest.approx(9 * 0.09 / 2)
    assert found.pruned["test"]["loss"] == pytest.approx(0.75 * 9 * 0.09 / 2)
    moved = found.displacements["pruned"]
    assert moved.length == pytest.approx(0.5)
    assert moved.sharp_share == pytest.approx(0.6)
    assert moved.curvature == pytest.approx(9 * 0.36)
    np.testing.assert_allclose(
        found.line.train["loss"], found.gap * np.linspace(0, 1, 5) ** 2, atol=1e-12
    )
    # An untrained curve is the line, at places of its own.
    np.testing.assert_allclose(found.curve.train["loss"], found.line.train["loss"])
    zero = loss({"w": 0 * reference["w"]}, jnp.ones(2))
    assert found.tolerance == pytest.approx(0.02 * float(zero))
    assert not found.in_valley and not found.connected
    assert "Not in the valley" in found.verdict
    random = found.displacements["random"]
    assert random.length == pytest.approx(0.5)
    assert 0 < random.sharp_share < 1


def test_a_move_along_the_valley_is_in_it(x64):
    loss, reference, data, basis, _ = quadratic_problem()
    params = {"w": reference["w"] + jnp.asarray(basis[:, 5].reshape(-1, 3))}
    found = sdp_jax.valley.certify(loss, reference, params, data, **FAST)
    assert found.in_valley and found.connected
    assert found.displacements["pruned"].sharp_share < 1e-8
    assert found.verdict.startswith("In the valley")
    assert found.sparsity is None


def test_a_wall_on_the_straight_way_is_seen():
    def ring(params, batch):
        return (jnp.sum(params["w"] ** 2) - 1) ** 2 + 0 * batch.sum()

    first, last = {"w": jnp.asarray([1.0, 0.0])}, {"w": jnp.asarray([0.0, 1.0])}
    data = [jnp.zeros(3)]
    found = sdp_jax.valley.certify(ring, first, last, data, rank=1, curve_steps=1500)
    assert found.line.barrier > 0.2
    assert found.connected and not found.in_valley
    assert "a curve leads around" in found.verdict
    opposite = {"w": jnp.asarray([-1.0, 0.0])}
    found = sdp_jax.valley.certify(
        ring, first, opposite, data, rank=1, curve_steps=0, same_seed=False
    )
    assert not found.connected
    assert "on the curve" in found.verdict
    assert "do not share a seed" in found.summary()


@pytest.fixture(scope="module")
def trained():
    """A network trained twice, pruned on the way, and from another seed."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changed in {
            "sgd": {"method": "sgd"},
            "altsdp": {"method": "altsdp", "sparsity": 0.4},
            "other": {"method": "sgd", "seed": 1},
        }.items():
            config = Config(
                widths=(100, 40),
                epochs=30,
                batch_size=64,
                learning_rate=0.05,
                momentum=0.9,
                evaluate_every=30,
            )
            out = pathlib.Path(folder) / name
            runs[name] = train(dataclasses.replace(config, out=out, **changed))
    return runs, data.load("digits")


@pytest.mark.study
def test_on_a_network(trained):
    runs, dataset = trained
    task = make_task(runs["sgd"], dataset, examples=500, curvature_examples=200)
    groups = runs["sgd"].groups.at("params")
    reference = runs["sgd"].state.params
    pairs = sdp_jax.valley.top_eigenpairs(task.loss_fn, reference, task.curvature, 5)
    keywords = dict(
        eigenpairs=pairs,
        groups=groups,
        test_data=task.test,
        points=7,
        curve_steps=50,
        curvature_data=task.curvature,
        **task.keywords,
    )
    good, other = (
        sdp_jax.valley.certify(
            task.loss_fn,
            reference,
            runs[name].state.params,
            task.training,
            same_seed=name == "altsdp",
            **keywords,
        )
        for name in ("altsdp", "other")
    )
    assert good.in_valley, good.summary()
    assert good.sparsity == pytest.approx(0.4)
    # Another seed is another valley.
    assert not other.in_valley and other.line.barrier > 0.3
    assert other.sparsity == 0 and "magnitude" not in other.displacements
    # So is pruning far past the limit.
    far = sdp_jax.valley.sdp(
        reference, groups, None, pairs.vectors, sparsity=0.9
    ).params
    bad = sdp_jax.valley.certify(
        task.loss_fn, reference, far, task.training, **keywords
    )
    assert not bad.in_valley and bad.gap > 0.5
    assert set(good.displacements) == {"pruned", "random", "magnitude"}
    assert good.reference["train"]["accuracy"] > 0.99
    # Magnitude pruning: the smallest go, as many of each dimension as AltSDP lost.
    alive = groups.split(sdp_jax.channels_alive(groups, runs["altsdp"].state.params))
    norms = groups.split(sdp_jax.channel_norms(groups, reference))
    keep = {
        n: jnp.zeros(len(v)).at[jnp.argsort(-v)[: int(alive[n].sum())]].set(1)
        for n, v in norms.items()
    }
    straw = sdp_jax.scale_channels(groups, reference, groups.join(keep))
    length = float(optax.tree.norm(jax.tree.map(jnp.subtract, straw, reference)))
    assert good.displacements["magnitude"].length == pytest.approx(length, rel=1e-5)
    shares = [d.sharp_share for d in good.displacements.values()]
    assert all(0 < s < 1 for s in shares)
    assert good.tolerance == pytest.approx(0.02 * math.log(10), rel=1e-5)


def test_batch_normalisation_gets_its_statistics_anew():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(not train)(nn.Dense(8)(x))
            return nn.Dense(3)(nn.relu(x))

    net = Net()
    rng = np.random.default_rng(0)
    batches = [
        (jnp.asarray(rng.normal(size=(64, 4)), jnp.float32), rng.integers(3, size=64))
        for _ in range(3)
    ]
    variables = net.init(jax.random.key(0), batches[0][0], True)
    stats = variables["batch_stats"]

    def apply(params, stats, x, train):
        inputs = {"params": params, "batch_stats": stats}
        return net.apply(inputs, x, train, mutable=["batch_stats"])

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss(params, batch):
        return cross_entropy(apply(params, stats, batch[0], True)[0], batch[1])

    def evaluate(params, stats, batch):
        return {
            "loss": cross_entropy(apply(params, stats, batch[0], False)[0], batch[1])
        }

    def update(params, stats, batch):
        return apply(params, stats, batch[0], True)[1]["batch_stats"]

    reference = variables["params"]
    # Batch normalisation undoes a scale in front of it, if its statistics follow.
    scaled = dict(reference)
    scaled["Dense_0"] = jax.tree.map(lambda p: 7 * p, reference["Dense_0"])
    keywords = dict(scale=math.log(3), **FAST)
    found = sdp_jax.valley.certify(
        loss,
        reference,
        scaled,
        batches,
        evaluate=evaluate,
        update_stats=update,
        stats=stats,
        **keywords,
    )
    assert abs(found.gap) < 1e-3 and found.in_valley
    old = sdp_jax.valley.certify(
        loss,
        reference,
        scaled,
        batches,
        evaluate=lambda p, batch: evaluate(p, stats, batch),
        **keywords,
    )
    assert old.gap > 0.05


def test_parameters_in_bf16():
    params = toy.mlp_params(dtype=jnp.bfloat16)
    small = jax.tree.map(lambda p: 0.9 * p, params)
    data = [toy.batch(dtype=jnp.bfloat16)]
    found = sdp_jax.valley.certify(toy.loss, params, small, data, scale=1.0, **FAST)
    assert math.isfinite(found.gap)


def test_density_and_progress_are_there_if_asked_for(x64):
    loss, reference, data, basis, _ = quadratic_problem()
    params = {"w": reference["w"] + jnp.asarray(basis[:, 5].reshape(-1, 3))}
    seen = set()
    found = sdp_jax.valley.certify(
        loss,
        reference,
        params,
        data,
        density_steps=4,
        progress=lambda stage, done, total: seen.add(stage),
        **FAST,
    )
    assert found.density.nodes.shape == (1, 4)
    assert seen == {"eigenpairs", "density", "line", "curve", "along the curve"}


def test_an_unpruned_copy_is_in_the_valley(x64):
    loss, reference, data, *_ = quadratic_problem()
    found = sdp_jax.valley.certify(loss, reference, reference, data, **FAST)
    assert found.in_valley and found.gap == 0
    assert found.displacements["pruned"].length == 0
