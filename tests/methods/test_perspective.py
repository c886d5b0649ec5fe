"""The perspective regularization against a numerical minimum over the mixture."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import sdp_jax
from sdp_jax.methods import (
    perspective,
    perspective_penalty,
    perspective_regularizer,
)
from tests.toy import mlp_grads, mlp_groups, mlp_params


def minimum(w, alpha, bound):
    """min over y of α ‖w‖² / y + (1 − α) y, with ‖w‖_∞ ≤ M y, 0 ≤ y ≤ 1."""
    square, least = float(np.sum(w**2)), float(np.max(np.abs(w))) / bound
    assert least <= 1
    found = scipy.optimize.minimize_scalar(
        lambda y: alpha * square / y + (1 - alpha) * y,
        bounds=(max(least, 1e-9), 1.0),
        method="bounded",
        options={"xatol": 1e-11},
    )
    ends = [alpha * square / y + (1 - alpha) * y for y in (max(least, 1e-9), 1.0)]
    return min(found.fun, *ends)


compiled = jax.jit(perspective)


def price(w, alpha, bound):
    return float(compiled(np.linalg.norm(w), np.max(np.abs(w)), alpha, bound))


@hypothesis.given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    st.floats(0.02, 0.98),
    st.floats(1, 4),
)
def test_is_the_minimum(values, alpha, bound):
    w = np.array(values)
    hypothesis.assume(np.abs(w).max() > 1e-6)
    with jax.enable_x64(True):
        found = price(w, alpha, bound)
    assert found == pytest.approx(minimum(w, alpha, bound), rel=1e-6, abs=1e-12)


def test_all_three_cases_and_their_borders(x64):
    alpha, bound = 0.2, 2.0
    # κ = 1/2: the free mixture is ‖w‖/2, the bound asks for ‖w‖_∞/2.
    whole = price(np.array([1.5, 1.5]), alpha, bound)
    np.testing.assert_allclose(whole, 0.2 * 4.5 + 0.8)
    inside = price(np.array([0.3, 0.4]), alpha, bound)
    np.testing.assert_allclose(inside, 2 * 0.4 * 0.5)
    bounded = price(np.array([0.3, 0.4]), alpha, 0.5)
    np.testing.assert_allclose(bounded, 0.2 * 0.5 * 0.25 / 0.4 + 0.8 * 0.4 / 0.5)
    assert perspective(0.0, 0.0, alpha, bound) == 0
    e = 1e-9
    for n2, top, m in ((2.0, 0.5, 2.0), (0.7, 0.35, 1.0), (1.0, 0.9, 0.9)):
        around = [
            float(perspective(n2 * (1 + a), top * (1 + b), alpha, m))
            for a in (-e, 0, e)
            for b in (-e, 0, e)
        ]
        assert np.ptp(around) < 1e-7


@hypothesis.given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0, 1))
def test_is_convex_within_the_bound(seed, alpha, part):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-1, 1, (2, 4)) * rng.uniform(0, 1, (2, 1))
    with jax.enable_x64(True):
        mixed = price(part * a + (1 - part) * b, alpha, 1.0)
        ends = part * price(a, alpha, 1.0) + (1 - part) * price(b, alpha, 1.0)
    assert mixed <= ends + 1e-9


def channel(params, i, c):
    layer = params[f"layer{i}"]
    column = np.asarray(layer["kernel"], np.float64)[:, c]
    return np.append(column, float(layer["bias"][c]))


@pytest.mark.parametrize("weights", ["size", "plain", {"hidden0": 2.0, "hidden1": 0.5}])
def test_penalty_is_the_weighted_sum(x64, weights):
    params = mlp_params(dtype=jnp.float64)
    groups = mlp_groups(params)
    bounds = {"hidden0": 3.0, "hidden1": 2.0}
    # A channel of hidden0 has 4 + 1 entries, of hidden1 6 + 1: 6·5 + 5·7 in all.
    factors = {"size": {"hidden0": 5 / 65, "hidden1": 7 / 65}}
    factors["plain"] = {"hidden0": 1.0, "hidden1": 1.0}
    factor = weights if isinstance(weights, dict) else factors[weights]
    expected = 0.0
    for i, size in ((0, 6), (1, 5)):
        name = f"hidden{i}"
        for c in range(size):
            w = channel(params, i, c)
            expected += factor[name] * minimum(w, 0.3, bounds[name])
    found = perspective_penalty(
        groups, params, alpha=0.3, bound=bounds, weights=weights
    )
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("bound", [0.9, 3.0])
def test_regularizer_adds_the_slope(x64, bound):
    params = mlp_params(dtype=jnp.float64)
    groups = mlp_groups(params)

    @jax.jit
    def penalty(tree):
        return perspective_penalty(groups, tree, alpha=0.3, bound=bound)

    tx = perspective_regularizer(groups, 2.0, alpha=0.3, bound=bound)
    grads = mlp_grads(params)
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    slopes = jax.tree.map(lambda x, g: np.asarray(x - g) / 2, found, grads)
    e = 1e-6
    for i, leaf in ((0, "kernel"), (0, "bias"), (1, "kernel"), (1, "bias")):
        value = params[f"layer{i}"][leaf]
        for at in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = jax.tree.map(lambda x: x, params)
                moved[f"layer{i}"] = dict(params[f"layer{i}"])
                moved[f"layer{i}"][leaf] = value.at[at].add(sign * e)
                ends.append(float(penalty(moved)))
            slope = (ends[0] - ends[1]) / (2 * e)
            assert slopes[f"layer{i}"][leaf][at] == pytest.approx(slope, abs=1e-7)
    # What no channel makes gets nothing.
    assert (slopes["layer2"]["kernel"] == 0).all()
    assert (slopes["layer2"]["bias"] == 0).all()


def test_zero_channels_have_no_slope():
    params = {"w": jnp.array([[0.3, 0.0, -0.4], [0.0, 0.0, 0.4]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    for bound in (0.5, 10.0):
        slope = jax.jit(
            jax.grad(
                lambda p, m=bound: perspective_penalty(groups, p, alpha=0.5, bound=m)
            )
        )(params)["w"]
        assert np.isfinite(slope).all() and (slope[:, 1] == 0).all()
        # Ties of the largest entry share its slope.
        np.testing.assert_allclose(slope[0, 2], -slope[1, 2], rtol=1e-6)


def test_near_zero_it_is_the_group_lasso_far_out_weight_decay(x64):
    params = {"w": jnp.array([[0.003, 30.0], [0.004, 40.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    slope = jax.grad(
        lambda p: perspective_penalty(
            groups, p, alpha=0.5, bound=100.0, weights="plain"
        )
    )(params)["w"]
    np.testing.assert_allclose(slope[:, 0], [0.6, 0.8])
    np.testing.assert_allclose(slope[:, 1], [30, 40])


def test_channels_in_several_pieces_of_a_leaf(x64):
    # Two halves of one axis, as in a gated layer: channel c is columns c and c + 2.
    params = {"w": jnp.array([[0.1, 0.2, -0.5, 0.3]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1, outer=2)]})
    found = perspective_penalty(groups, params, alpha=0.1, bound=1.0, weights="plain")
    pairs = np.array([[0.1, -0.5], [0.2, 0.3]])
    expected = sum(minimum(w, 0.1, 1.0) for w in pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_no_penalty_is_the_base_and_schedules_are_followed():
    params = mlp_params()
    groups = mlp_groups(params)
    grads = mlp_grads(params)
    same = perspective_regularizer(groups, 0.0, alpha=0.5, bound=2.0)
    found, _ = jax.jit(same.update)(grads, same.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, grads)

    rising = perspective_regularizer(groups, lambda n: 2.0 * n, alpha=0.5, bound=2.0)
    fixed = perspective_regularizer(groups, 4.0, alpha=0.5, bound=2.0)
    state, update = rising.init(params), jax.jit(rising.update)
    for _ in range(3):
        found, state = update(grads, state, params)
    expected, _ = jax.jit(fixed.update)(grads, fixed.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )
    assert update._cache_size() == 1 and state.count == 3


def test_half_precision_keeps_its_dtype():
    params = mlp_params(dtype=jnp.bfloat16)
    groups = mlp_groups(params)
    tx = optax.chain(
        perspective_regularizer(groups, 0.1, alpha=0.5, bound=2.0),
        optax.sgd(0.1, 0.9),
    )
    updates, _ = jax.jit(tx.update)(mlp_grads(params), tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    value = perspective_penalty(groups, params, alpha=0.5, bound=2.0)
    assert value.dtype == jnp.float32
    assert jax.eval_shape(tx.init, params) is not None and tx.init({}) is not None


def test_it_drives_useless_channels_down():
    params = {"w": jnp.array([[0.5, 0.5], [0.5, 0.5]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = optax.chain(
        perspective_regularizer(groups, 1.0, alpha=0.1, bound=2.0), optax.sgd(0.05)
    )

    @jax.jit
    def step(params, state):
        loss = jax.grad(lambda p: jnp.sum((p["w"][:, 0] - 1.0) ** 2))
        updates, state = tx.update(loss(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert np.abs(params["w"][:, 1]).max() < 0.05
    assert params["w"][:, 0].min() > 0.8


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"alpha": 1.0}, ValueError, r"alpha must be a number in \(0, 1\)"),
        ({"alpha": "half"}, TypeError, "alpha must be"),
        ({"bound": 0}, ValueError, "bound must be a positive"),
        ({"bound": {"hidden0": 1.0}}, ValueError, "it lacks"),
        ({"weights": "cost"}, ValueError, "weights is 'cost'"),
        ({"weights": {"hidden0": 1.0, "x": 1.0}}, ValueError, "weights must give"),
        ({"weights": {"hidden0": 1.0, "hidden1": -1}}, ValueError, "weights must be"),
        ({"penalty": -1.0}, ValueError, "penalty must be"),
    ],
)
def test_bad_input_is_refused(kwargs, error, message):
    given = {"penalty": 1.0, "alpha": 0.5, "bound": 1.0} | kwargs
    with pytest.raises(error, match=message):
        perspective_regularizer(mlp_groups(), **given)


def test_updates_need_params():
    params = mlp_params()
    tx = perspective_regularizer(mlp_groups(params), 1.0, alpha=0.5, bound=1.0)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(params, tx.init(params))
