"""The README and the pages of the docs run as they stand."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(20)(x))
        return nn.Dense(3)(nn.relu(x))


def check_half(cut):
    """Half of the FLOPs are gone, and not a channel more."""
    (width,) = cut.widths.values()
    flops = cut.dense.flops.at
    assert flops([width]) <= 0.5 * flops([20]) < flops([width + 1])


def test_the_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y = toy.batch()
    model = Model()
    variables = model.init(jax.random.key(0), x)

    def loss(params):
        return jnp.mean((model.apply({**variables, "params": params}, x) - y) ** 2)

    def train(state):
        """A ramp of 5,000 steps is over after as many of them."""

        def step(_, state):
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        return jax.jit(lambda s: jax.lax.fori_loop(0, 5_001, step, s))(state)

    names = {"model": model, "variables": variables, "x": x, "train": train}
    names["grads"] = jax.grad(loss)(variables["params"])
    training, scoring = blocks("README.md")
    exec(training, names)
    out = capsys.readouterr().out
    pruned = names["pruned"]
    assert "FLOPs" in out and "largest difference" in out
    np.testing.assert_allclose(
        names["logits"], model.apply(names["trained"], x), rtol=1e-4, atol=1e-5
    )
    check_half(pruned.cut)
    assert loss(names["state"].params) < loss(variables["params"])
    again = sdp_jax.load("pruned", model.apply, x)
    np.testing.assert_array_equal(again(x), names["logits"])
    assert pathlib.Path("model.bin").stat().st_size > 0
    exec(scoring, names)
    check_half(names["pruned"].cut)


@pytest.mark.parametrize("page", [p for p in PAGES if p != "README.md" and blocks(p)])
def test_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cuts = []

    def at_a_hundred(self, step, params):
        """In so short a training no cut pays."""
        if step == 100:
            cuts.append(self.now(step, params))
            return cuts[-1]

    monkeypatch.setattr(sdp_jax.Shrinker, "__call__", at_a_hundred)
    names = {}
    for block in blocks(page):
        exec(block, names)
    # A loop by hand, with a train state, with nnx.
    assert len(cuts) == (3 if page == "docs/shrinking.md" else 0) and all(cuts)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / path).exists(), path
    for name in re.findall(r"(?<!/)\bsdp_jax\.(\w+)", text):
        assert hasattr(sdp_jax, name), name
    for door in ("methods", "valley", "channels", "prox", "base"):
        for name in re.findall(rf"`(?:sdp_jax\.)?{door}\.(\w+)", text):
            assert hasattr(getattr(sdp_jax, door), name), name
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
