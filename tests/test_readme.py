"""The example of the README runs as it stands."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sdp_jax
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent


def blocks():
    return re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )


def test_example():
    params = toy.mlp_params(widths=(4, 20, 3))
    x, _ = toy.batch()
    names = {"params": params, "loss": toy.loss, "apply": toy.mlp_apply, "x": x}
    names["batches"] = [toy.batch(seed=i % 7) for i in range(700)]
    exec(blocks()[0], names)
    dense, small, cut = names["params"], names["small"], names["cut"]
    assert cut.widths == {"layer0": 20 - round(0.7 * 20)}
    np.testing.assert_allclose(
        names["small_apply"](small, x), toy.mlp_apply(dense, x), rtol=1e-4, atol=1e-6
    )
    start = toy.loss(params, toy.batch())
    assert float(toy.loss(small, toy.batch())) < float(start)
    assert isinstance(names["groups"], sdp_jax.Groups)
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(small))
    exec(next(b for b in blocks() if "scores=scores" in b), names)
    assert names["cut"].widths["layer0"] < 20


def test_methods_example(capsys):
    params = toy.mlp_params(widths=(4, 20, 3))
    groups = sdp_jax.find_groups(toy.mlp_apply, params, toy.batch()[0])
    names = {"params": params, "groups": groups, "optax": optax, "sdp_jax": sdp_jax}
    exec(next(b for b in blocks() if "decay_pruning(" in b), names)
    index = float(capsys.readouterr().out.split()[0])
    flat = np.concatenate([np.abs(x).ravel() for x in jax.tree.leaves(params)])
    assert index == pytest.approx(1 - np.sqrt(flat).mean() ** 2 / flat.mean(), rel=1e-5)
    tx, state = names["tx"], names["tx"].init(params)
    step = jax.jit(lambda p, s: tx.update(jax.grad(toy.loss)(p, toy.batch()), s, p))
    for _ in range(340):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert sdp_jax.plan_cut(groups, params).widths == {"layer0": 10}


def test_valley_examples(tmp_path, monkeypatch, capsys):
    params = toy.mlp_params(widths=(4, 12, 3))
    batches = [toy.batch(seed=i) for i in range(3)]
    names = {"sdp_jax": sdp_jax, "loss": toy.loss, "batches": batches}
    step = jax.jit(
        lambda p, b: jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(toy.loss)(p, b))
    )
    for i in range(300):
        params = step(params, batches[i % 3])
    names["twin"] = params
    names["params"] = jax.tree.map(lambda p: 0.99 * p, params)
    names["groups"] = sdp_jax.find_groups(toy.mlp_apply, params, batches[0][0])
    monkeypatch.chdir(tmp_path)
    exec(next(b for b in blocks() if "certify(" in b), names)
    assert names["certificate"].verdict in capsys.readouterr().out
    assert (tmp_path / "certificate.png").exists()
    exec(next(b for b in blocks() if "top_eigenpairs" in b), names)
    alive = sdp_jax.channels_alive(names["groups"], names["pruned"])["layer0"]
    assert int(alive.sum()) == 12 - round(0.3 * 12)
    sdp_jax.plan_cut(names["groups"], params, scores=names["scores"], sparsity=0.5)


def test_modules_are_taken_apart():
    block = next(b for b in blocks() if "nnx.split" in b)
    names = {"sdp_jax": sdp_jax, "nnx": nnx, "eqx": eqx, "x": jnp.ones(4)}
    names["nnx_model"] = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    )
    names["eqx_model"] = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    first, second = block.split("\n\n")
    for part in (first, second):
        exec(part, names)
        assert list(names["groups"].sizes.values()) == [8]


def test_saving_example(tmp_path, monkeypatch, capsys):
    block = next(b for b in blocks() if "sdp_jax.save" in b)
    params = toy.mlp_params()
    x, _ = toy.batch()
    groups = sdp_jax.find_groups(toy.mlp_apply, params, x)
    cut = sdp_jax.Cut(groups, ((0, 1), (0, 4)))
    names = {
        "sdp_jax": sdp_jax,
        "apply": toy.mlp_apply,
        "params": params,
        "x": x,
        "cut": cut,
        "small": cut.take(params),
        "small_apply": sdp_jax.narrow(toy.mlp_apply, cut),
    }
    monkeypatch.chdir(tmp_path)
    exec(block, names)
    assert names["cut"] == cut
    assert "FLOPs" in capsys.readouterr().out


def test_export_example(tmp_path, monkeypatch):
    block = next(b for b in blocks() if "export_stablehlo" in b)
    params = toy.mlp_params()
    x, _ = toy.batch()
    names = {"small_apply": jax.jit(toy.mlp_apply), "small": params, "x": x}
    monkeypatch.chdir(tmp_path)
    exec("import pathlib, jax, jax.export, sdp_jax\n" + block, names)
    found = names["model"].call(x[:3])
    np.testing.assert_allclose(found, toy.mlp_apply(params, x[:3]), rtol=1e-5)


def test_what_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"sdp_jax\.(\w+)", text):
        assert hasattr(sdp_jax, name), name
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
