import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import sdp_jax
from sdp_jax import shrinking
from tests import shrunk, toy


def target(base):
    strength = sdp_jax.target_sparsity(0.5, 1, 9, target="flops")
    return lambda groups: sdp_jax.altsdp(base(), groups, strength=strength)


BASES = {
    "momentum": functools.partial(optax.sgd, 0.05, 0.9),
    "adamw": functools.partial(optax.adamw, 1e-2),
}


@pytest.mark.parametrize(
    ("network", "base"),
    [
        ("convolutional", "momentum"),
        ("transformer", "adamw"),
        ("scanned", "momentum"),
    ],
)
def test_a_run_that_shrinks_is_the_run_that_does_not(x64, network, base):
    shrunk.assert_shrinks_exactly(shrunk.NETWORKS[network](), target(BASES[base]))


def mlp(dtype=jnp.float32):
    params = toy.mlp_params(dtype=dtype)
    x = jnp.ones((2, 4), dtype)
    return params, sdp_jax.find_groups(toy.mlp_apply, params, x)


def test_it_cuts_where_zeros_have_cost_half_of_what_compiling_did(monkeypatch):
    params, groups = mlp()
    clock, compiled = [0.0], [5.0]
    monkeypatch.setattr(shrinking.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(shrinking, "_compiled", compiled)
    flops = groups.need_flops().at
    dead = toy.kill(groups, params, {"layer0": (1, 4), "layer1": (0,)})

    def first_cut(steps, params, seconds=1.0, compiling=10.0):
        """The step of the first cut, when a step takes so long; each tenth is one."""
        compiled[0] = 5.0
        shrinker = sdp_jax.Shrinker(groups, steps, every=10)
        compiled[0] += compiling
        clock[0] += 1000.0  # Whatever lies before the first look does not count.
        for n in range(1, steps + 1):
            clock[0] += seconds
            if shrinker(n, params) is not None:
                return n, shrinker
        return None, shrinker

    share = 1 - flops([4, 4]) / flops([6, 5])
    # Half of 10 seconds have gone into zeros since step 10.
    due = 10 + 10 * math.ceil(5 / (10 * share))
    n, shrinker = first_cut(400, dead)
    assert n == due and shrinker.groups.sizes == {"layer0": 4, "layer1": 4}
    assert shrinker.flops == pytest.approx(1 - share)
    # As much is left to be saved as it costs, or less.
    last = math.ceil(10 / share)
    assert first_cut(due + last + 1, dead)[0] == due
    assert first_cut(due + last - 1, dead)[0] is None
    assert first_cut(400, params)[0] is None
    assert first_cut(400, dead, compiling=1000.0)[0] is None
    # What is compiled between two looks is no part of a step.
    compiled[0] = 0.0
    shrinker = sdp_jax.Shrinker(groups, 400, every=10)
    compiled[0] = 10.0
    for n in range(1, 101):
        clock[0] += 0.01
        if n == 55:
            clock[0], compiled[0] = clock[0] + 30, compiled[0] + 30
        assert shrinker(n, dead) is None


def test_compiling_is_noticed(monkeypatch):
    # Another test may have taken all listeners away.
    monkeypatch.setattr(shrinking, "_listening", [])
    sdp_jax.Shrinker(mlp()[1], 10)
    before = shrinking._compiled[0]
    jax.jit(lambda x: jnp.sin(x) * before)(jnp.ones(3))
    assert shrinking._compiled[0] > before


def test_patience_and_what_comes_back():
    params, groups = mlp()
    dead = toy.kill(groups, params, {"layer0": (1, 4)})
    some = toy.kill(groups, params, {"layer0": (1,)})
    shrinker = sdp_jax.Shrinker(groups, 100, patience=5)
    assert shrinker.now(10, dead) is None
    assert shrinker.now(14, some) is None  # Channel 4 is back.
    cut = shrinker.now(15, dead)
    assert cut.kept[0] == (0, 2, 3, 4, 5)
    small = cut.take(dead)
    assert shrinker.now(19, small) is None
    assert shrinker.now(20, small).kept[0] == (0, 1, 2, 4)
    assert shrinker.cut.kept[0] == (0, 2, 3, 5) and shrinker.cut.dense is groups


def test_widths_are_rounded():
    params, groups = mlp()
    dead = toy.kill(groups, params, {"layer0": (0, 1, 2), "layer1": range(5)})
    shrinker = sdp_jax.Shrinker(groups, 100, round_to=2)
    shrinker.now(1, dead)
    assert shrinker.groups.sizes == {"layer0": 4, "layer1": 2}


def test_it_goes_on_after_a_restart(x64):
    network = shrunk.convolutional()
    groups = shrunk.groups_of(network)
    make_tx = target(BASES["momentum"])
    whole, variables, _, losses, _ = shrunk.train(network, make_tx, (5, 8), groups)
    short = network._replace(batches=network.batches[:6])
    first, part, state, _, _ = shrunk.train(short, make_tx, (5,), groups)
    again = sdp_jax.Shrinker(shrunk.groups_of(network), shrunk.STEPS)
    again.restore(first.to_json())
    assert again.cut == first.cut and again.groups == first.groups

    def step():
        loss = sdp_jax.narrow(network.loss, again.cut)
        return shrunk.make_step(loss, make_tx(again.groups.at("params")))

    update = step()
    for n in range(7, shrunk.STEPS + 1):
        part, state, loss = update(part, state, network.batches[n - 1])
        assert float(loss) == losses[n - 1]
        cut = again.now(n, part) if n == 8 else None
        if cut is not None:
            part, state = cut.take((part, state))
            update = step()
    assert again.cut == whole.cut
    chex.assert_trees_all_equal(part, variables)


def test_a_train_state_and_what_wraps_the_transformation():
    params, groups = mlp()
    strength = sdp_jax.target_sparsity(0.5, 0, 4)

    def make_tx(groups):
        inner = sdp_jax.altsdp(optax.adam(1e-2), groups, strength=strength)
        return optax.MultiSteps(optax.chain(optax.clip(1.0), inner), 2)

    @jax.jit
    def step(state, batch):
        def loss(params):
            x, y = batch
            return jnp.mean((state.apply_fn(params, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def train(cuts):
        state = train_state.TrainState.create(
            apply_fn=toy.mlp_apply, params=params, tx=make_tx(groups)
        )
        ema, shrinker = state.params, sdp_jax.Shrinker(groups, 14)
        for n in range(1, 15):
            state = step(state, toy.batch(seed=n))
            ema = optax.incremental_update(state.params, ema, 0.1)
            cut = shrinker.now(n, state.params) if n in cuts else None
            if cut is not None:
                state, ema = cut.take((state, ema))
                small = sdp_jax.narrow(toy.mlp_apply, shrinker.cut)
                state = state.replace(apply_fn=small, tx=make_tx(shrinker.groups))
        return shrinker.cut, state, ema

    cut, state, ema = train((5, 9, 11))
    _, dense, dense_ema = train(())
    assert sum(cut.widths.values()) == 5
    chex.assert_trees_all_close(state.params, cut.take(dense.params), atol=1e-6)
    chex.assert_trees_all_close(ema, cut.take(dense_ema), atol=1e-6)
    x, _ = toy.batch()
    y = state.apply_fn(state.params, x)
    np.testing.assert_allclose(y, toy.mlp_apply(dense.params, x), atol=1e-6)


def test_a_cut_of_ones_own():
    params, groups = mlp()
    shrinker = sdp_jax.Shrinker(groups, 10)
    scores = sdp_jax.channel_norms(groups, params)
    cut = sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.3)
    with pytest.raises(ValueError, match=r"not zero, by dimension .* nonzero=True"):
        shrinker.now(1, params, cut=cut)
    assert shrinker.cut.groups is groups
    assert shrinker.now(1, params, cut=cut, nonzero=True) is cut
    assert shrinker.groups == cut.groups
    other = sdp_jax.Shrinker(groups, 10)
    assert other.now(1, cut.zero(params), cut=cut) is cut
    with pytest.raises(ValueError, match="later is not a cut of what this one leaves"):
        other.now(2, cut.take(params), cut=cut)


def test_bad_input():
    params, groups = mlp()
    shrinker = sdp_jax.Shrinker(groups, 10)
    with pytest.raises(ValueError, match="outside jit, between two steps"):
        jax.jit(lambda p: shrinker.now(1, p))(params)
    with pytest.raises(ValueError, match="outside jit, between two steps"):
        jax.jit(lambda p: shrinker(1, p))(params)
    with pytest.raises(ValueError, match="the groups were built for"):
        shrinker.now(1, toy.mlp_params(widths=(4, 7, 5, 3)))
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="traced or shapes and have no values"):
        shrinker.now(1, shapes)
    with pytest.raises(ValueError, match="no leaf 'layer2/bias' in the tree; .* needs"):
        shrinker.now(1, params | {"layer2": {}})
    with pytest.raises(TypeError, match=r"cut must be a sdp_jax\.Cut.*; got Groups"):
        shrinker.now(1, params, cut=groups)
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="contains NaN"):
        shrinker.now(1, broken)
    for words, options in (
        ("steps", {"steps": 0}),
        ("every", {"steps": 3, "every": 0}),
        ("patience", {"steps": 3, "patience": -1}),
        ("round_to", {"steps": 3, "round_to": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            sdp_jax.Shrinker(groups, **options)
    with pytest.raises(TypeError, match="groups must be"):
        sdp_jax.Shrinker(params, 3)
    with pytest.raises(ValueError, match="know no FLOPs"):
        sdp_jax.Shrinker(toy.mlp_groups(params), 10)(1, params)
    damaged = shrinker.to_json().replace("[-1", '["a"')
    for text in ("{}", damaged, damaged.replace('"a"', "[1, 2]")):
        with pytest.raises(ValueError, match="not a shrinker in JSON"):
            shrinker.restore(text)
    other = sdp_jax.Shrinker(toy.mlp_groups(params), 10)
    with pytest.raises(ValueError, match="another model"):
        shrinker.restore(other.to_json())
    # A state that is not the optimizer's.
    tx = sdp_jax.altsdp(
        0.1, groups, strength=sdp_jax.target_sparsity(0.5, 0, 1, target="channels")
    )
    cut = shrinker.now(1, toy.kill(groups, params, {"layer0": (0,)}))
    small = cut.take(tx.init(params))
    with pytest.raises(ValueError, match="It was cut already, or belongs"):
        cut.take(small)
