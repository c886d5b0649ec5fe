"""The pieces of the chain, each by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.transforms import DualAveragingState
from tests import toy

VALLEY = sdp_jax.valley_strength(c=4.0, mu=0.6, learning_rate=0.1)


def train(tx, params, steps=6):
    step, state = jax.jit(toy.make_step(tx)), tx.init(params)
    for i in range(steps):
        params, state = step(params, state, toy.mlp_grads(params, seed=i))
    return params, state


def test_dual_averaging_alone_changes_nothing():
    params = toy.mlp_params()
    plain = optax.sgd(0.1, momentum=0.9)
    dual = optax.chain(optax.sgd(0.1, momentum=0.9), sdp_jax.dual_averaging())
    a, _ = train(plain, params)
    b, _ = train(dual, params)
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-7)


def test_altsdp_is_the_chain_of_its_pieces(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    groups = toy.mlp_groups(params)
    keywords = {"min_channels": 2, "weights": "size"}
    strength = sdp_jax.valley_strength(4.0, 0.6, 0.1, momentum=0.9)
    pieces = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        sdp_jax.dual_averaging(),
        sdp_jax.group_soft_threshold(groups, strength, **keywords),
    )
    whole = sdp_jax.altsdp(0.1, groups, strength=VALLEY, momentum=0.9, **keywords)
    a, state_a = train(pieces, params)
    b, state_b = train(whole, params)
    chex.assert_trees_all_close((a, state_a), (b, state_b), rtol=1e-9, atol=1e-12)
    alive_a, alive_b = state_a[-1].alive.per_channel, state_b[-1].alive.per_channel
    np.testing.assert_array_equal(alive_a, alive_b)


def test_half_precision_dual_remembers_small_steps():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.altsdp(1e-4, groups, strength=0.0)
    state = tx.init(params)
    grads = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    step = jax.jit(toy.make_step(tx))
    for _ in range(1000):
        params, state = step(params, state, grads)
    # In bfloat16 alone 1 - 1e-4 rounds to 1 and nothing would ever move.
    np.testing.assert_allclose(np.asarray(params["w"], np.float32), 0.9, rtol=0.01)


def test_check_zeros_detects_what_comes_after_the_threshold():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    good = sdp_jax.altsdp(0.1, groups, strength=VALLEY)
    _, state = train(good, params)
    sdp_jax.check_zeros(state)
    for bad in (
        optax.chain(good, optax.scale(0.5)),
        optax.chain(good, optax.add_decayed_weights(0.1), optax.scale(0.9)),
        optax.chain(good, optax.clip(0.01)),
    ):
        _, state = train(bad, params)
        with pytest.raises(ValueError, match="Make it the last piece"):
            sdp_jax.check_zeros({"opt_state": state})
    with pytest.raises(ValueError, match="no state of group_soft_threshold"):
        sdp_jax.check_zeros(optax.sgd(0.1).init(params))


def test_nan_gradients_with_and_without_apply_if_finite():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    plain = sdp_jax.altsdp(0.1, groups, strength=VALLEY)
    updates, _ = plain.update(bad, plain.init(params), params)
    # As in optax.sgd the NaN is visible, not hidden as a pruned channel.
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))
    guarded = optax.apply_if_finite(plain, 3)
    state = guarded.init(params)
    updates, state = guarded.update(bad, state, params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    inner = plain.init(params)
    chex.assert_trees_all_equal(state.inner_state, inner)


@pytest.mark.parametrize(
    "strength",
    [0.5, 100.0, sdp_jax.target_sparsity(0.3, 0, 1)],
    ids=["weak", "strong", "target"],
)
@pytest.mark.parametrize("min_channels", [1, 2])
def test_one_nan_channel_does_not_spread(strength, min_channels):
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(0.1, groups, strength=strength, min_channels=min_channels)
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["layer0"]["kernel"] = grads["layer0"]["kernel"].at[0, 2].set(jnp.nan)
    updates, state = tx.update(grads, tx.init(params), params)
    bad = np.isnan(np.asarray(updates["layer0"]["kernel"])).any(axis=0)
    assert bad.tolist() == [False, False, True, False, False, False]
    assert np.isfinite(updates["layer1"]["kernel"]).all()
    params = optax.apply_updates(params, updates)
    alive = groups.split(np.asarray(sdp_jax.channels_alive(groups, params)))
    assert alive["hidden0"][[0, 1, 3, 4, 5]].sum() >= min_channels
    # Nobody destroyed the zeros: the NaN is not taken for that.
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zero, state, params)
    sdp_jax.check_zeros(state)


def test_channels_whose_squares_underflow_are_no_violation():
    params = {"w": jnp.full((2, 3), 1e-25).at[:, 0].set(1.0)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    for strength in (0.0, sdp_jax.target_sparsity(0.34, 0, 1)):
        tx = sdp_jax.altsdp(0.1, groups, strength=strength)
        state = tx.init(params)
        p = params
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, p), state, p)
            p = optax.apply_updates(p, updates)
        sdp_jax.check_zeros(state)


def test_a_strength_of_single_entries_looks_at_each(x64):
    params = {"w": jnp.array([[4.0, -2.0, 0.5]]), "b": jnp.array([1.5])}
    garrote = sdp_jax.Strength(
        lambda groups, floors: jnp.zeros((), jnp.int32),
        lambda state, norms, groups, floors: (1 / norms, state + 1),
    )
    tx = sdp_jax.soft_threshold(garrote)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    new = optax.apply_updates(params, updates)
    for name, value in params.items():
        v = np.asarray(value)
        expected = v * np.maximum(0, 1 - 1 / v**2)  # the non-negative garrote
        np.testing.assert_allclose(new[name], expected, rtol=1e-12)
    assert int(state.strength) == 2
