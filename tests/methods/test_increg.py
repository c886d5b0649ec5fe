"""Incremental Regularization against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.methods import increg
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


@pytest.mark.parametrize(
    ("begin_step", "limit", "way_out"), [(0, 2.0, "small"), (3, 0.7, "strong")]
)
def test_steps_are_the_equations(x64, begin_step, limit, way_out):
    params = mlp_params(dtype=jnp.float64)
    groups = mlp_groups(params)
    a, u, threshold, lr, momentum, every = 0.3, 0.2, 0.5, 0.1, 0.5, 2
    numbers = [3, 2]
    tx = increg(
        optax.sgd(lr, momentum),
        groups,
        {"hidden0": 0.5, "hidden1": 0.4},
        every=every,
        amplitude=a,
        ratio=u,
        threshold=threshold,
        limit=limit,
        begin_step=begin_step,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    w = wide(params)
    speed = jax.tree.map(np.zeros_like, w)
    coefficient = [np.zeros(6), np.zeros(5)]
    gone = [np.zeros(6, bool), np.zeros(5, bool)]
    start, reasons, lowered = [None, None], set(), False
    for n in range(1, 26):
        scale = 2.0 if n < 8 else 0.1  # Ranks change at first.
        grads = jax.tree.map(lambda g, s=scale: s * g, mlp_grads(params, seed=n))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        g = wide(grads)
        for i, norms in enumerate(channel_l1(w)):
            if n <= begin_step + 1:
                start[i] = norms
            left = numbers[i] - gone[i].sum()
            if n > begin_step and (n - begin_step) % every == 0 and left > 0:
                alive = [c for c in range(len(norms)) if not gone[i][c]]
                for r, c in enumerate(sorted(alive, key=lambda c: norms[c])):
                    new = max(coefficient[i][c] + increment(r, left, a, u), 0)
                    lowered |= 0 < new < coefficient[i][c]
                    coefficient[i][c] = new
        for (i, c, slopes), (_, _, xs) in zip(
            channel_entries(g), channel_entries(w), strict=True
        ):
            for slope, x in zip(slopes, xs, strict=True):
                slope[:] = 0 if gone[i][c] else slope + coefficient[i][c] * x
        speed = jax.tree.map(lambda s, x: momentum * s + x, speed, g)
        w = jax.tree.map(lambda x, s: x - lr * s, w, speed)
        for i, norms in enumerate(channel_l1(w)):
            for c in sorted(range(len(norms)), key=lambda c: norms[c]):
                small = norms[c] <= threshold * start[i][c]
                strong = coefficient[i][c] >= limit
                full = gone[i].sum() >= numbers[i]
                if n > begin_step and (small or strong) and not gone[i][c] and not full:
                    gone[i][c] = True
                    reasons.add("small" if small else "strong")
            coefficient[i][gone[i]] = 0
            if gone[i].sum() >= numbers[i]:
                coefficient[i][:] = 0
        for i, c, xs in channel_entries(w):
            for x in xs if gone[i][c] else ():
                x[:] = 0
        np.testing.assert_array_equal(state.gone.per_channel, np.concatenate(gone))
        np.testing.assert_allclose(
            state.coefficients.per_channel, np.concatenate(coefficient), atol=1e-12
        )
        assert_close(params, w, atol=1e-12)
    assert update._cache_size() == 1
    # The run has seen this way out, coefficients that fall, and the end.
    assert way_out in reasons and lowered
    assert [x.sum() for x in gone] == numbers


def test_without_sparsity_it_is_the_base():
    params = other = mlp_params()
    base = optax.adam(0.05)
    tx = increg(base, mlp_groups(params), 0.0, every=1)
    state, base_state = tx.init(params), base.init(params)
    update, base_update = jax.jit(tx.update), jax.jit(base.update)
    for n in range(4):
        updates, state = update(mlp_grads(params, n), state, params)
        params = optax.apply_updates(params, updates)
        updates, base_state = base_update(mlp_grads(params, n), base_state, other)
        other = optax.apply_updates(other, updates)
    assert_close(params, other, atol=1e-6)


def test_the_limit_defaults_to_ten_thousand_increments():
    params = {"w": jnp.array([[1.0, 2.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = increg(0.0, groups, 0.5, every=1, amplitude=0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    for before, gone in ((4999.0, False), (4999.5, True)):
        value = state.coefficients._replace(per_channel=jnp.array([before, 0.0]))
        _, after = update(
            {"w": jnp.zeros((1, 2))}, state._replace(coefficients=value), params
        )
        np.testing.assert_array_equal(after.gone.per_channel, [gone, False])


def test_of_many_ripe_channels_only_the_weakest_go():
    params = {"w": jnp.array([[3.0, 1.0, 2.0, 4.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = increg(0.0, groups, 0.5, every=1, threshold=1.0)
    updates, state = tx.update({"w": jnp.zeros((1, 4))}, tx.init(params), params)
    np.testing.assert_array_equal(params["w"] + updates["w"], [[3, 0, 0, 4]])
    assert not state.coefficients.per_channel.any()


def test_pruned_channels_stay_whatever_their_gradient():
    params = {"w": jnp.array([[0.0, 5.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = increg(optax.sgd(0.1, 0.9), groups, 0.5, every=1)
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in (0.0, 1.0, jnp.nan):
        updates, state = update({"w": jnp.array([[grad, 0.0]])}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], [[0, 5]])


def test_half_precision_keeps_dtypes_and_exact_zeros():
    params = mlp_params(dtype=jnp.bfloat16)
    groups = mlp_groups(params)
    tx = increg(optax.adamw(0.05), groups, 0.5, every=1, amplitude=1.0, limit=3.0)
    state, specs = tx.init(params), jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update)
    for n in range(12):
        updates, state = update(mlp_grads(params, n), state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        params = optax.apply_updates(params, updates)
        alive = sdp_jax.channels_alive(groups, params)
        np.testing.assert_array_equal(alive, ~state.gone.per_channel)
    assert update._cache_size() == 1
    assert [int((~alive[:6]).sum()), int((~alive[6:]).sum())] == [3, 2]
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)


def test_only_the_channels_entries_are_regularized():
    # Columns 1 and 2 are channels; what lies beside them is nobody's.
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "other": jnp.ones(2)}
    member = sdp_jax.Member("w", 1, offset=1, period=2)
    groups = sdp_jax.groups_from_axes(params, {"d": [member]}, sizes={"d": 2})
    tx = increg(1.0, groups, 0.5, every=2, threshold=0.0)
    state = tx.init(params)
    value = state.coefficients._replace(per_channel=jnp.array([0.1, 0.2]))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, state._replace(coefficients=value), params)
    np.testing.assert_allclose(updates["w"], [[0, -0.2, -0.6, 0]], rtol=1e-6)
    np.testing.assert_array_equal(updates["other"], [0, 0])


def test_complex_weights_are_pulled_to_zero():
    params = {"w": jnp.array([[1 + 2j, 3 - 1j]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = increg(1.0, groups, 0.5, every=1, amplitude=0.25)
    updates, _ = tx.update({"w": params["w"] * 0}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-0.25 - 0.5j, 0]], atol=1e-6)


def test_cut_takes_the_state():
    params = mlp_params()
    groups = mlp_groups(params)
    tx = increg(optax.sgd(0.1, 0.9), groups, 0.5, every=1, limit=1.0, amplitude=1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for n in range(5):
        updates, state = update(mlp_grads(params, n), state, params)
        params = optax.apply_updates(params, updates)
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(params)
    again = increg(optax.sgd(0.1, 0.9), cut.groups, 0.0, every=1)
    small_state = cut.take(state, like=jax.eval_shape(again.init, small))
    grads = mlp_grads(params, 9)
    updates, _ = jax.jit(again.update)(cut.take(grads), small_state, small)
    dense, _ = update(grads, state, params)
    assert_close(updates, cut.take(dense), atol=1e-6)
    assert tx.init({}).gone.per_channel.shape == (11,)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sparsity": -0.1}, ValueError, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": 0.9, "min_channels": 2}, ValueError, "lower the sparsity"),
        ({"every": 0}, ValueError, "every must be a number of updates"),
        ({"begin_step": 0.5}, TypeError, "begin_step must be an integer"),
        ({"amplitude": -1}, ValueError, "amplitude must be a positive"),
        ({"ratio": 0}, ValueError, "ratio must be"),
        ({"threshold": 1.5}, ValueError, r"threshold must be a number in \[0, 1\]"),
        ({"limit": -1}, ValueError, "limit must be a non-negative"),
        ({"base": "sgd"}, TypeError, "base must be"),
    ],
)
def test_bad_input_is_refused(kwargs, error, message):
    given = {"base": 0.1, "sparsity": 0.5, "every": 1} | kwargs
    with pytest.raises(error, match=message):
        increg(groups=mlp_groups(), **given)


def test_updates_need_params():
    params = mlp_params()
    tx = increg(0.1, mlp_groups(params), 0.5, every=1)
    with pytest.raises(ValueError, match="increg needs the current parameters"):
        tx.update(params, tx.init(params))
