"""Structured Probabilistic Pruning against its equations in NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.methods import spp, spp_params
from tests.toy import (
    assert_close,
    channel_entries,
    channel_l1,
    increment,
    mlp_grads,
    mlp_groups,
    mlp_params,
    wide,
)

KEY = jax.random.key(3)


def rank_alive(norms, gone):
    order = sorted(
        (j for j in range(len(norms)) if not gone[j]), key=lambda j: norms[j]
    )
    return {j: r for r, j in enumerate(order)}


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_steps_are_the_equations(x64, momentum):
    params = mlp_params(dtype=jnp.float64)
    groups = mlp_groups(params)
    share, lr, every, begin_step = {"hidden0": 0.5, "hidden1": 0.4}, 0.1, 2, 1
    numbers = [3, 2]
    base = optax.sgd(lr, momentum)
    options = dict(every=every, amplitude=0.4, ratio=0.3, begin_step=begin_step)
    tx = spp(base, groups, share, KEY, **options)
    state, update = tx.init(params), jax.jit(tx.update)
    shadow = wide(params)
    speed = jax.tree.map(np.zeros_like, shadow)
    chance = [np.ones(6), np.ones(5)]
    mask = [np.ones(6, bool), np.ones(5, bool)]
    for n in range(1, 26):
        grads = mlp_grads(params, seed=n)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        slope = wide(grads)
        for i, c, parts in channel_entries(slope):
            if not mask[i][c]:
                for part in parts:
                    part[:] = 0
        speed = jax.tree.map(lambda s, g: (momentum or 0) * s + g, speed, slope)
        shadow = jax.tree.map(lambda v, s: v - lr * s, shadow, speed)
        norms = channel_l1(shadow)
        if n > begin_step and (n - begin_step) % every == 0:
            for i in (0, 1):
                gone = chance[i] == 0
                left = numbers[i] - gone.sum()
                if left > 0:
                    for j, r in rank_alive(norms[i], gone).items():
                        change = increment(r, left, 0.4, 0.3)
                        chance[i][j] = min(max(chance[i][j] - change, 0), 1)
        for i in (0, 1):
            if (chance[i] == 0).sum() >= numbers[i]:
                chance[i][chance[i] > 0] = 1
        np.testing.assert_allclose(
            state.probabilities.per_channel, np.concatenate(chance), atol=1e-12
        )
        # The masks are random; what follows from them is not.
        drawn = np.asarray(state.mask.per_channel)
        mask = [drawn[:6], drawn[6:]]
        assert_close(state.shadow, shadow, atol=1e-12)
        expected = jax.tree.map(np.copy, shadow)
        for i, c, parts in channel_entries(expected):
            assert mask[i][c] or chance[i][c] < 1
            assert not (mask[i][c] and chance[i][c] == 0)
            if not mask[i][c]:
                for part in parts:
                    part[:] = 0
        assert_close(params, expected, atol=1e-12)
    assert update._cache_size() == 1
    # The test has seen recovery, randomness and the end.
    assert [(c == 0).sum() for c in chance] == numbers


def test_masks_are_bernoulli_and_new_each_time():
    params = {"w": jnp.ones((1, 4000))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = spp(0.1, groups, 0.5, KEY, every=10, amplitude=0.8, begin_step=0)
    state = tx.init(params)
    # Probabilities from elsewhere: the first 1000 at 0.3, the rest at 0.8.
    chance = jnp.where(jnp.arange(4000) < 1000, 0.3, 0.8)
    state = state._replace(
        probabilities=state.probabilities._replace(per_channel=chance)
    )
    zeros, masks = {"w": jnp.zeros((1, 4000))}, []
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        masks.append(np.asarray(state.mask.per_channel))
        np.testing.assert_array_equal(params["w"][0], masks[-1])
    for mask in masks:
        assert mask[:1000].mean() == pytest.approx(0.3, abs=4 * (0.21 / 1000) ** 0.5)
        assert mask[1000:].mean() == pytest.approx(0.8, abs=4 * (0.16 / 3000) ** 0.5)
    both = (masks[0] & masks[1])[1000:].mean()
    assert both == pytest.approx(0.64, abs=0.04)


@hypothesis.given(st.integers(0, 10**6))
@hypothesis.settings(max_examples=4)
def test_ends_with_the_number_and_nothing_random(seed):
    params = mlp_params()
    groups = mlp_groups(params)
    tx = spp(0.02, groups, 0.5, jax.random.key(seed), every=1, amplitude=0.3)
    update = jitted(tx, groups)
    state = tx.init(params)
    for n in range(40):
        updates, state = update(mlp_grads(params, seed + n), state, params)
        params = optax.apply_updates(params, updates)
    chance = np.asarray(state.probabilities.per_channel)
    assert set(chance) == {0.0, 1.0}
    assert ((chance[:6] == 0).sum(), (chance[6:] == 0).sum()) == (3, 2)
    alive = sdp_jax.channels_alive(groups, params)
    np.testing.assert_array_equal(alive, chance == 1)
    final = spp_params(state, groups, params)
    assert_close(params, final, atol=1e-5)


CACHE = {}


def jitted(tx, groups):
    """One compilation for all examples: the key is in the state."""
    return CACHE.setdefault(groups, jax.jit(tx.update))


def test_without_sparsity_it_is_the_base():
    params = other = mlp_params()
    groups = mlp_groups(params)
    base = optax.adamw(0.05, weight_decay=0.1)
    tx = spp(base, groups, 0.0, KEY, every=1)
    state, base_state = tx.init(params), base.init(params)
    update, base_update = jax.jit(tx.update), jax.jit(base.update)
    for n in range(4):
        updates, state = update(mlp_grads(params, n), state, params)
        params = optax.apply_updates(params, updates)
        updates, base_state = base_update(mlp_grads(params, n), base_state, other)
        other = optax.apply_updates(other, updates)
    assert_close(params, other, atol=1e-6)


def test_dropped_channels_get_no_gradient_not_even_a_broken_one():
    params = {"w": jnp.array([[1.0, 5.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = spp(0.1, groups, 0.5, KEY, every=1, amplitude=1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in ([[0.0, 1.0]], [[jnp.nan, 1.0]], [[jnp.inf, 1.0]]):
        updates, state = update({"w": jnp.array(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[0, 4.7]], rtol=1e-6)
    assert params["w"][0, 0] == 0
    np.testing.assert_allclose(state.shadow["w"], [[1, 4.7]], rtol=1e-6)


def test_jit_changes_nothing():
    params = mlp_params()
    groups = mlp_groups(params)
    tx = spp(0.1, groups, 0.5, KEY, every=1, amplitude=0.5)
    grads, state = mlp_grads(params), tx.init(params)
    eager = tx.update(grads, state, params)
    compiled = jax.jit(tx.update)(grads, state, params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_half_precision_keeps_dtypes_and_exact_zeros():
    params = mlp_params(dtype=jnp.bfloat16)
    groups = mlp_groups(params)
    tx = spp(optax.adamw(0.1), groups, 0.5, KEY, every=1, amplitude=0.6)
    state = tx.init(params)
    specs = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update)
    for n in range(5):
        updates, state = update(mlp_grads(params, n), state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        params = optax.apply_updates(params, updates)
        mask = sdp_jax.channels_alive(groups, params)
        np.testing.assert_array_equal(mask, state.mask.per_channel)
    assert update._cache_size() == 1 and not mask.all()
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
    assert state.shadow["layer0"]["bias"].dtype == jnp.float32
    final = spp_params(state, groups, params)
    assert final["layer0"]["bias"].dtype == jnp.bfloat16


def test_cut_takes_the_state_and_training_goes_on():
    key = jax.random.PRNGKey(1)  # Keys of the old kind are arrays.
    params = mlp_params()
    groups = mlp_groups(params)
    tx = spp(optax.sgd(0.1, 0.9), groups, 0.5, key, every=1, amplitude=1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for n in range(6):
        updates, state = update(mlp_grads(params, n), state, params)
        params = optax.apply_updates(params, updates)
    cut = sdp_jax.plan_cut(groups, params)
    assert {d.name: d.size for d in cut.groups} == {"hidden0": 3, "hidden1": 3}
    small, small_state = cut.take(params), cut.take(state)
    tx2 = spp(optax.sgd(0.1, 0.9), cut.groups, 0.0, key, every=1)
    grads = mlp_grads(params, 9)
    updates, small_state = jax.jit(tx2.update)(cut.take(grads), small_state, small)
    dense, _ = update(grads, state, params)
    assert_close(updates, cut.take(dense), atol=1e-6)


def test_initialises_without_leaves_and_in_a_masked_tree():
    params = mlp_params()
    groups = mlp_groups(params)
    tx = spp(0.1, groups, 0.5, KEY, every=1)
    assert tx.init({}).probabilities.per_channel.shape == (11,)
    state = optax.tree.map_params(tx, lambda x: x * 0, tx.init(params))
    assert not any(jnp.any(x) for x in jax.tree.leaves(state.shadow))


def test_floor_of_an_array_wins():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = spp(0.1, groups, 0.75, KEY, every=1, amplitude=1.0, min_channels=jnp.array(3))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update({"w": jnp.zeros((1, 4))}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], [[0, 2, 3, 4]])


def test_spp_params_hides_only_what_is_pruned():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    state = spp(0.1, groups, 0.5, KEY, every=1).init(params)
    chance = jnp.array([0.0, 0.01, 1.0, 1.0])
    state = state._replace(
        probabilities=state.probabilities._replace(per_channel=chance)
    )
    found = spp_params((state, optax.EmptyState()), groups, params)
    np.testing.assert_array_equal(found["w"], [[0, 2, 3, 4]])
    with pytest.raises(ValueError, match="expected one state of spp"):
        spp_params(optax.sgd(0.1).init(params), groups, params)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": {"nope": 0.5}}, ValueError, "do not exist"),
        ({"sparsity": "half"}, TypeError, "sparsity must be"),
        ({"sparsity": jnp.array(0.5)}, TypeError, "not an array"),
        ({"sparsity": 0.9, "min_channels": 3}, ValueError, "lower the sparsity"),
        ({"every": 0}, ValueError, "every must be a number of updates"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"begin_step": -1}, ValueError, "begin_step must be"),
        ({"amplitude": 0}, ValueError, "amplitude must be a positive"),
        ({"ratio": 1.0}, ValueError, "ratio must be"),
        ({"key": 0}, TypeError, "jax.random.key"),
        ({"base": -0.1}, ValueError, "learning rate"),
    ],
)
def test_bad_input_is_refused(kwargs, error, message):
    given = {"base": 0.1, "sparsity": 0.5, "key": KEY, "every": 1} | kwargs
    with pytest.raises(error, match=message):
        spp(groups=mlp_groups(), **given)


def test_updates_need_params():
    params = mlp_params()
    tx = spp(0.1, mlp_groups(params), 0.5, KEY, every=1)
    with pytest.raises(ValueError, match="spp needs the current parameters"):
        tx.update(params, tx.init(params))
