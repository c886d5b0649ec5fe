import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import pytest

import sdp_jax
from experiments import models
from experiments.config import Config
from experiments.shrink import Shrinking, Small
from tests import toy

IMAGES = jnp.ones((2, 8, 8, 1))


@pytest.fixture(scope="module")
def network():
    model = models.make_model("conv", 10, (3, 4, 6), jnp.dtype("float32"))
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    groups = sdp_jax.find_groups(model.apply, variables, IMAGES)
    return model, variables, groups


def test_a_small_network_is_a_network(network):
    model, variables, groups = network
    dead = toy.kill(groups, variables, {name: (0,) for name in groups.sizes})
    cut = sdp_jax.plan_cut(groups, dead)
    small = Small(model, cut)
    x = jax.random.normal(jax.random.key(1), IMAGES.shape)
    options = {"train": True, "mutable": ["batch_stats"]}
    logits, changed = small.apply(cut.take(dead), x, **options)
    dense_logits, dense_changed = model.apply(dead, x, **options)
    chex.assert_trees_all_close(logits, dense_logits, atol=1e-5)
    dense_changed = {"params": dead["params"], **dense_changed}
    chex.assert_trees_all_close(
        changed["batch_stats"], cut.take(dense_changed)["batch_stats"], atol=1e-5
    )
    made = small.init(jax.random.key(0), IMAGES)
    chex.assert_trees_all_equal(made, cut.take(variables))
    assert small.widths == model.widths


def test_when_a_run_cuts(network, tmp_path, monkeypatch):
    _, variables, groups = network
    monkeypatch.setattr("experiments.shrink.ROUND_TO", 1)
    dead = toy.kill(groups, variables, {list(groups.sizes)[0]: (0, 1)})

    def make(shrink):
        config = dataclasses.replace(Config(), shrink=shrink)
        return Shrinking(config, groups, 100, tmp_path)

    assert make(None).ask(50, dead) is None
    # At the first time it is asked behind the step.
    given = make((0.25, 0.5))
    assert [given.ask(n, dead) for n in (10, 24)] == [None, None]
    cut = given.ask(30, dead)
    assert cut is not None
    small = cut.take(dead)
    assert given.ask(60, small) is None and not (tmp_path / "cuts.json").exists()
    # It goes on from a checkpoint, and does not make up for what is done.
    again = make((0.25, 0.5))
    again.restore(30, json.loads(json.dumps(given.save())))
    assert again.shrinker.cut == given.shrinker.cut
    assert again.ask(40, small) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        make((0.2, 1.0))
    random = dataclasses.replace(Config(), shrink=(), method="spp")
    with pytest.raises(ValueError, match="spp drops channels at random"):
        Shrinking(random, groups, 100, tmp_path)

    # Where it pays is kept, and done again without asking.
    asked = []

    def pays(self, step, params):
        asked.append(step)
        return self.now(step, params) if step == 20 else None

    monkeypatch.setattr(sdp_jax.Shrinker, "__call__", pays)
    first = make(())
    assert [n for n in (10, 20) if first.ask(n, dead)] == [20] and asked == [10, 20]
    second = make(())
    assert [n for n in (10, 15, 20) if second.ask(n, dead)] == [20]
    assert asked == [10, 20]
    assert second.ask(30, small) is None and asked == [10, 20, 30]
