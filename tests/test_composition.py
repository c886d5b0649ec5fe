"""AltSDP inside other transformations and training states."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sdp_jax
from sdp_jax.channels import Term, channel_sums, square
from sdp_jax.entries import gone_lines
from tests import toy

STRENGTH = sdp_jax.valley_strength(c=4.0, mu=0.6, learning_rate=0.1)
RATE = 0.1


def altsdp(groups, **keywords):
    return sdp_jax.altsdp(RATE, groups, strength=STRENGTH, **keywords)


def run(tx, params, steps=6):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, toy.mlp_grads(params, seed=i))
    return params, state


def assert_pruned(groups, params):
    alive = sdp_jax.channels_alive(groups, params)
    flat = np.asarray(alive)
    assert 0 < flat.sum() < flat.size
    return flat


def test_chain_behind_clipping_and_weight_decay():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    front = [optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01)]
    chained, state = run(optax.chain(*front, altsdp(groups)), params)
    inside = sdp_jax.altsdp(
        optax.chain(*front, optax.sgd(RATE)), groups, strength=STRENGTH
    )
    expected, _ = run(inside, params)
    chex.assert_trees_all_close(chained, expected, rtol=1e-6, atol=1e-7)
    sdp_jax.check_zeros(state)
    assert not assert_pruned(groups, chained).all()


def test_clipping_in_front_limits_the_step_of_the_dual():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = optax.chain(optax.clip_by_global_norm(0.5), altsdp(groups))
    state = tx.init(params)
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    _, state = tx.update(huge, state, params)
    moved = jax.tree.map(jnp.subtract, state[1][1].dual, params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5 * RATE, rtol=1e-4)


def test_named_chain():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = optax.named_chain(("clip", optax.clip(10.0)), ("altsdp", altsdp(groups)))
    new, state = run(tx, params)
    assert set(state) == {"clip", "altsdp"}
    expected, _ = run(altsdp(groups), params)
    chex.assert_trees_all_close(new, expected, rtol=1e-6, atol=1e-7)
    sdp_jax.check_zeros(state)


def test_inject_hyperparams_changes_rate_and_strength_while_training():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)

    @optax.inject_hyperparams
    def make(learning_rate, c):
        strength = sdp_jax.valley_strength(c=c, mu=0.6)
        return sdp_jax.altsdp(learning_rate, groups, strength=strength)

    tx = make(learning_rate=RATE, c=4.0)
    new, state = run(tx, params)
    expected, _ = run(altsdp(groups), params)
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    assert float(state.hyperparams["c"]) == 4.0

    # A strength that is switched off thresholds no further than it already does.
    state.hyperparams["c"] = jnp.asarray(0.0)
    before = float(state.inner_state[-1].strength.total)
    _, state = tx.update(toy.mlp_grads(new), state, new)
    assert float(state.inner_state[-1].strength.total) == before

    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    dual = state.inner_state[1].dual
    _, state = tx.update(toy.mlp_grads(new), state, new)
    chex.assert_trees_all_equal(state.inner_state[1].dual, dual)


def test_inject_hyperparams_around_altsdp_itself():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = optax.inject_hyperparams(sdp_jax.altsdp, static_args=("groups", "weights"))(
        optax.cosine_decay_schedule(RATE, 10),
        groups=groups,
        strength=0.3,
        min_channels=2,
    )
    new, state = run(tx, params)
    plain = sdp_jax.altsdp(
        optax.cosine_decay_schedule(RATE, 10), groups, strength=0.3, min_channels=2
    )
    expected, _ = run(plain, params)
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    assert {"base", "strength", "min_channels"} <= set(state.hyperparams)


def test_masked_leaves_the_rest_alone():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params, hidden=1)
    mask = {"layer0": True, "layer1": False, "layer2": False}
    tx = optax.chain(
        optax.masked(altsdp(groups), mask),
        optax.masked(optax.sgd(0.5), {k: not v for k, v in mask.items()}),
    )
    new, state = run(tx, params)
    assert_pruned(groups, new)
    expected, _ = run(optax.sgd(0.5), params)
    chex.assert_trees_all_close(new["layer2"], expected["layer2"])
    sdp_jax.check_zeros(state)


def test_a_mask_that_splits_a_group_is_refused():
    params = toy.mlp_params()
    tx = optax.masked(
        altsdp(toy.mlp_groups(params)),
        {k: {"kernel": True, "bias": False} for k in params},
    )
    with pytest.raises(ValueError, match="must keep or hide a group as a whole"):
        tx.init(params)


def test_partition_by_label():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params, hidden=1)
    labels = {"layer0": "prune", "layer1": "rest", "layer2": "rest"}
    tx = optax.partition({"prune": altsdp(groups), "rest": optax.adam(0.01)}, labels)
    new, state = run(tx, params)
    assert_pruned(groups, new)
    sdp_jax.check_zeros(state)
    expected, _ = run(optax.adam(0.01), params)
    chex.assert_trees_all_close(new["layer1"], expected["layer1"], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multi_steps(dtype):
    params = toy.mlp_params(dtype=dtype)
    groups = toy.mlp_groups(params)
    accumulated = optax.MultiSteps(altsdp(groups), every_k_schedule=2)
    state = accumulated.init(params)
    step = jax.jit(accumulated.update)
    new = params
    for i in range(12):
        old = new
        updates, state = step(toy.mlp_grads(params, seed=i // 2), state, new)
        new = optax.apply_updates(new, updates)
        if i % 2 == 0:
            chex.assert_trees_all_equal(new, old)
    chex.assert_trees_all_equal_dtypes(new, params)
    # Two equal gradients have themselves as mean: six steps of plain AltSDP.
    expected, _ = run(altsdp(groups), params)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    chex.assert_trees_all_close(new, expected, rtol=tolerance, atol=tolerance)
    assert_pruned(groups, new)
    sdp_jax.check_zeros(state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_if_finite_skips_a_bad_step(dtype):
    params = toy.mlp_params(dtype=dtype)
    groups = toy.mlp_groups(params)
    tx = optax.apply_if_finite(altsdp(groups), max_consecutive_errors=5)
    state = tx.init(params)
    step = jax.jit(tx.update)
    new = params
    for i in range(6):
        nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        bad, state = step(nan, state, new)
        chex.assert_trees_all_equal(optax.apply_updates(new, bad), new)
        updates, state = step(toy.mlp_grads(params, seed=i), state, new)
        new = optax.apply_updates(new, updates)
    expected, _ = run(altsdp(groups), params)
    chex.assert_trees_all_close(new, expected, rtol=1e-6, atol=1e-6)
    assert int(state.total_notfinite) == 6
    assert_pruned(groups, new)
    sdp_jax.check_zeros(state)


def test_schedules_for_rate_and_threshold():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 20),
        groups,
        strength=optax.linear_schedule(0.0, 1.0, 6),
    )
    new, state = run(tx, params, steps=7)
    assert_pruned(groups, new)
    before, _ = run(tx, params, steps=6)
    gone = gone_lines(groups, sdp_jax.channels_alive(groups, before))
    (squares,) = channel_sums(groups, Term(square, (state[1].dual,), gone=gone))
    norms = groups.split(jnp.sqrt(squares))
    alive = groups.split(sdp_jax.channels_alive(groups, new))
    for name, value in norms.items():
        # The seventh update is at schedule(6) = 1; the largest is kept by the floor.
        expected = np.asarray(value) > 1.0
        expected[np.argmax(value)] = True
        np.testing.assert_array_equal(alive[name], expected)


def test_ema_of_the_parameters_can_be_cut_with_them():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = altsdp(groups)
    ema = optax.ema(0.9)
    state, ema_state = tx.init(params), ema.init(params)
    for i in range(6):
        updates, state = tx.update(toy.mlp_grads(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
        average, ema_state = ema.update(params, ema_state)
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(average)
    chex.assert_trees_all_equal_shapes(small, cut.take(params))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="layer0")(x))
        x = nn.relu(nn.Dense(5, name="layer1")(x))
        return nn.Dense(3, name="layer2")(x)


def test_flax_train_state():
    model = Mlp()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    groups = sdp_jax.groups_from_axes(variables, toy.mlp_axes(prefix="params/"))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=sdp_jax.altsdp(
            RATE, groups.at("params"), strength=sdp_jax.target_sparsity(0.5, 0, 5)
        ),
    )

    @jax.jit
    def step(state, batch):
        def loss(params):
            return jnp.mean(
                (state.apply_fn({"params": params}, batch[0]) - batch[1]) ** 2
            )

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for i in range(8):
        state = step(state, toy.batch(seed=i))
    alive = assert_pruned(groups.at("params"), state.params)
    assert alive.sum() == 11 - round(5.5)
    sdp_jax.check_zeros(state)

    # The whole TrainState is cut, and training goes on with it.
    cut = sdp_jax.plan_cut(groups, {"params": state.params})
    small_tx = sdp_jax.altsdp(
        RATE, cut.groups.at("params"), strength=sdp_jax.target_sparsity(0.0, 0, 5)
    )
    small = cut.take(state).replace(tx=small_tx)
    chex.assert_trees_all_equal_shapes(
        small.opt_state, jax.eval_shape(small_tx.init, small.params)
    )

    @jax.jit
    def small_step(state, batch):
        def loss(params):
            return jnp.mean((toy.mlp_apply(params, batch[0]) - batch[1]) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    small = small_step(small, toy.batch(seed=99))
    chex.assert_tree_all_finite(small.params)
    assert small.params["layer0"]["kernel"].shape == (4, cut.widths["hidden0"])


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.layer0 = nnx.Linear(4, 6, rngs=rngs)
        self.layer1 = nnx.Linear(6, 5, rngs=rngs)
        self.layer2 = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.layer0(x))
        return self.layer2(nnx.relu(self.layer1(x)))


def test_nnx_optimizer():
    model = NnxMlp(nnx.Rngs(0))
    groups = sdp_jax.groups_from_axes(nnx.state(model, nnx.Param), toy.mlp_axes())
    optimizer = nnx.Optimizer(model, altsdp(groups), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return jnp.mean((model(batch[0]) - batch[1]) ** 2)

        optimizer.update(model, nnx.grad(loss)(model))

    for i in range(6):
        step(model, optimizer, toy.batch(seed=i))
    params = nnx.state(model, nnx.Param)
    alive = assert_pruned(groups, params)
    np.testing.assert_array_equal(optimizer.opt_state[-1].alive.per_channel[...], alive)
    sdp_jax.check_zeros(optimizer.opt_state)
    small = sdp_jax.plan_cut(groups, params).take(params)
    assert small["layer0"]["kernel"].shape == (4, int(alive[:6].sum()))


def test_what_rescales_behind_the_threshold_is_detected():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    _, state = run(optax.chain(altsdp(groups), optax.scale(0.9)), params)
    with pytest.raises(ValueError, match="Make it the last piece"):
        sdp_jax.check_zeros(state)


def test_lookahead_averages_the_zeros_away_and_is_detected():
    params = optax.LookaheadParams.init_synced(toy.mlp_params())
    tx = optax.lookahead(altsdp(toy.mlp_groups()), sync_period=2, slow_step_size=0.5)
    state = tx.init(params)
    for i in range(6):
        grads = toy.mlp_grads(params.fast, seed=i)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="Make it the last piece"):
        sdp_jax.check_zeros(state)
