import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy

HALF = sdp_jax.target_sparsity(0.5, 1, 2)


def run(tx, params, steps, grads=None):
    state = tx.init(params)
    step = jax.jit(tx.update)
    for i in range(steps):
        g = toy.mlp_grads(params, seed=i) if grads is None else grads[i]
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def norms_in_numpy(params):
    found = []
    for i in range(2):
        layer = params[f"layer{i}"]
        both = np.vstack([np.asarray(layer["kernel"]), np.asarray(layer["bias"])])
        found.append(np.sqrt((both.astype(np.float64) ** 2).sum(0)))
    return np.concatenate(found)


def gone(params):
    return np.concatenate(
        [
            (np.asarray(params[f"layer{i}"]["kernel"], np.float32) == 0).all(0)
            & (np.asarray(params[f"layer{i}"]["bias"], np.float32) == 0)
            for i in range(2)
        ]
    )


def test_one_shot_takes_the_lowest_and_trains_the_rest():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    plain, _ = run(optax.sgd(0.1), params, 1)
    lowest = np.argsort(norms_in_numpy(plain))[:6]  # 5.5 of 11, rounded to even
    tx = methods.hosted(
        optax.sgd(0.1), methods.remove_lowest(groups, HALF, methods.l2_norm())
    )
    first, _ = run(tx, params, 1)
    chex.assert_trees_all_close(first, plain, rtol=1e-6)
    for steps in (2, 5):
        found, _ = run(tx, params, steps)
        assert set(np.flatnonzero(gone(found))) == set(lowest)
        sgd, _ = run(optax.sgd(0.1), params, steps)
        for i in range(2):
            stay = ~gone(found)[6 * i : 6 + 5 * i]
            a, b = (np.asarray(p[f"layer{i}"]["kernel"])[:, stay] for p in (found, sgd))
            # The gradients of the toy do not depend on the parameters.
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_scores_are_averaged_over_the_steps_between_removals():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    rule = sdp_jax.target_sparsity(0.4, 0, 1)
    host = methods.remove_lowest(
        groups, rule, methods.taylor(), every=3, accumulate=True
    )
    tx = methods.hosted(optax.sgd(0.05), host)
    state, total = tx.init(params), np.zeros(11)
    for i in range(3):
        assert not gone(params).any()
        grads = toy.mlp_grads(params, seed=i)
        parts = []
        for k in range(2):
            a, g = params[f"layer{k}"], grads[f"layer{k}"]
            products = [np.asarray(a[n] * g[n], np.float64) for n in ("kernel", "bias")]
            parts.append(np.abs(products[0].sum(0) + products[1]))
        total += np.concatenate(parts)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert set(np.flatnonzero(gone(params))) == set(np.argsort(total)[:4])
    np.testing.assert_array_equal(state.host.inner.total.per_channel, 0)


def test_gradual_removal_follows_the_ramp_and_never_takes_back():
    params = toy.mlp_params(widths=(4, 30, 20, 3))
    groups = toy.mlp_groups(params)
    rule = sdp_jax.target_sparsity(0.8, 2, 12)
    tx = methods.hosted(
        optax.sgd(0.1), methods.remove_lowest(groups, rule, methods.l2_norm(), every=2)
    )
    state, before, counts = tx.init(params), np.zeros(50, bool), []
    for i in range(14):
        updates, state = tx.update(toy.mlp_grads(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
        now = ~np.asarray(sdp_jax.channels_alive(groups, params))
        assert (now >= before).all()
        np.testing.assert_array_equal(now, state.host.inner.gone.per_channel)
        before = now
        counts.append(now.sum())
    # The cubic ramp, seen every second step: ⌈40 (1 − 0.8³)⌉ and so on.
    assert counts == [0, 0, 0, 20, 20, 32, 32, 38, 38, 40, 40, 40, 40, 40]


def test_released_channels_are_forgotten():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    host = methods.remove_lowest(
        groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.l2_norm(), every=2
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    state = host.init(params)
    for _ in range(2):
        _, state = host.update(zero, state, params)
    first = int(np.flatnonzero(state.inner.gone.per_channel)[0])
    released = jnp.arange(11) == first
    _, state = host.update(zero, state, params, released=released)
    assert not state.inner.gone.per_channel[first]
    assert state.inner.gone.per_channel.sum() == 5
    _, state = host.update(zero, state, params)  # It is due again.
    now = state.inner.gone.per_channel
    assert now[first] and now.sum() == 6


def test_a_decision_on_bad_scores_is_made_up_for_at_the_next_step():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    rule = HALF
    tx = methods.hosted(
        optax.chain(optax.zero_nans(), optax.sgd(0.01)),
        methods.remove_lowest(groups, rule, methods.taylor()),
    )
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    grads = [toy.mlp_grads(params), bad, toy.mlp_grads(params, seed=5)]
    state = tx.init(params)
    for i, gradient in enumerate(grads):
        if i == 2:
            assert not gone(params).any()
            scores = methods.taylor()(groups, params, gradient)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert set(np.flatnonzero(gone(params))) == set(np.argsort(scores)[:6])


def test_without_scores_from_outside_nothing_goes():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = methods.remove_lowest(groups, HALF)
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for _ in range(4):
        updates, state = tx.update(zero, state, params)
        assert not gone(optax.apply_updates(params, updates)).any()
    scores = {"hidden0": np.arange(6.0) + 10, "hidden1": np.arange(5.0)}
    state = methods.set_scores(state, groups, scores)
    updates, state = tx.update(zero, state, params)
    expected = [True] * 2 + [False] * 4 + [True] * 4 + [False]
    assert state.inner.gone.per_channel.tolist() == expected


def test_a_number_is_a_limit_of_the_score():
    params = {"w": jnp.array([[3.0, 1.0, 0.5], [4.0, 1.0, 0.5]])}
    groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
    host = methods.remove_lowest(groups, 1.2, methods.l2_norm())
    updates, _ = host.update({"w": jnp.zeros((2, 3))}, host.init(params), params)
    assert (params["w"] + updates["w"])[0].tolist() == [3.0, 1.0, 0.0]


def test_a_channel_that_is_dead_by_itself_is_not_counted_as_removed():
    params = {"w": jnp.array([[3.0, 0.0, 2.0, 1.0]])}
    groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
    host = methods.remove_lowest(
        groups, sdp_jax.target_sparsity(0.5, 1, 2), methods.l2_norm()
    )
    step = {"w": jnp.full((1, 4), 0.1)}
    state = host.init(params)
    updates, state = host.update(step, state, params)
    np.testing.assert_allclose(updates["w"], 0.1, rtol=1e-5)  # It may still grow.
    updates, state = host.update(step, state, params)
    assert state.inner.gone.per_channel.tolist() == [False, True, False, True]


def test_scores_from_outside():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = optax.chain(optax.sgd(0.1), methods.remove_lowest(groups, HALF))
    scores = {"hidden0": np.arange(6.0), "hidden1": np.arange(5.0) + 10}
    state = methods.set_scores(tx.init(params), groups, scores)
    for i in range(2):
        updates, state = tx.update(toy.mlp_grads(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
    # One of the first dimension always stays.
    assert gone(params).tolist() == [True] * 5 + [False, True] + [False] * 4


def test_bad_input():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    with pytest.raises(TypeError, match=r"score must be a function .* got 'l2'"):
        methods.remove_lowest(groups, HALF, "l2")
    with pytest.raises(
        ValueError, match=r"every must be a number of updates, at least 1"
    ):
        methods.remove_lowest(groups, HALF, methods.l2_norm(), every=0)
    with pytest.raises(TypeError, match=r"every must be an integer .* got 2\.0"):
        methods.remove_lowest(groups, HALF, methods.l2_norm(), every=2.0)
    with pytest.raises(ValueError, match=r"average them before set_scores"):
        methods.remove_lowest(groups, HALF, accumulate=True)
    with pytest.raises(ValueError, match=r"no state of remove_lowest"):
        methods.set_scores(
            optax.sgd(0.1).init(params), groups, sdp_jax.channel_norms(groups, params)
        )
    tx = methods.remove_lowest(groups, HALF)
    with pytest.raises(ValueError, match=r"hidden1.*got \{'hidden0': \(6,\)\}"):
        methods.set_scores(tx.init(params), groups, {"hidden0": np.ones(6)})
    for bad in (-1.0, np.nan, np.inf):
        scores = {"hidden0": np.arange(6.0), "hidden1": np.full(5, bad)}
        with pytest.raises(ValueError, match=r"finite and not negative.*minimum"):
            methods.set_scores(tx.init(params), groups, scores)
    host = methods.remove_lowest(groups, HALF, methods.taylor())
    with pytest.raises(ValueError, match=r"methods\.hosted\(base, host\)"):
        host.update(toy.mlp_grads(params), host.init(params), params)
