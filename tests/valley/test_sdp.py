"""One-shot SDP against ADMM, optimality conditions and closed forms in float64."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax.dimension import Leaf
from sdp_jax.valley.vectors import orthonormal, ravel
from tests import toy
from tests.test_altsdp import DIM, exact_sdp, quadratic


def flat_problem(rank, size, seed=0):
    """Minimizer, groups and sharp directions of a quadratic with a null space."""
    _, basis, _, _, minimizer = quadratic(rank, seed)
    params = {"w": jnp.asarray(minimizer.reshape(-1, size))}
    groups = sdp_jax.groups_from_axes(params, {"all": [sdp_jax.Member("w", 0)]})
    directions = {"w": jnp.asarray(basis.T.reshape(rank, DIM // size, size))}
    return params, groups, directions, basis, minimizer


def toy_problem(rank, seed=0, dtype=jnp.float64):
    params = toy.mlp_params(seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    basis = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(rank, *p.shape)), dtype), params
    )
    return params, toy.mlp_groups(params), jax.jit(orthonormal)(basis)


@pytest.mark.parametrize("strength", [0.5, 3.0])
@pytest.mark.parametrize("rank,size", [(10, 5), (40, 1), (1, 20)])
def test_exact_point_is_that_of_admm(rank, size, strength, x64):
    params, groups, directions, basis, minimizer = flat_problem(rank, size)
    found = sdp_jax.valley.sdp(params, groups, strength, directions, min_channels=0)
    want = exact_sdp(minimizer, basis, strength, size)
    w = np.asarray(found.params["w"])
    np.testing.assert_allclose(w.reshape(-1), want, atol=1e-9)
    zero = np.abs(want.reshape(-1, size)).max(axis=1) == 0
    np.testing.assert_array_equal(np.abs(w).max(axis=1) == 0, zero)
    assert found.sparsity == pytest.approx(zero.mean())
    assert found.residual < 1e-10
    assert found.iterations <= 30


@hypothesis.given(
    rank=st.sampled_from([1, 8]),
    strength=st.floats(1e-3, 3.0),
    seed=st.integers(0, 1000),
    weights=st.sampled_from(["plain", "size", "cost"]),
)
@hypothesis.settings(max_examples=5)
def test_optimality_conditions_hold(rank, strength, seed, weights):
    # w* + Uᵀ y − w = λ k_g w_g / ‖w_g‖ where alive, at most that where dead, 0 outside.
    with jax.enable_x64(True):
        params, groups, basis = toy_problem(rank, seed)
        found = sdp_jax.valley.sdp(
            params, groups, strength, basis, weights=weights, min_channels=0
        )
        w, start = ravel(found.params), ravel(params)
        U = np.concatenate(
            [np.asarray(u).reshape(rank, -1) for u in jax.tree.leaves(basis)], axis=1
        )
        np.testing.assert_allclose(U @ (w - start), 0, atol=1e-8)
        norms = sdp_jax.channel_norms(groups, found.params)
        # 0 outside the groups, else 1 + channel.
        ones = jax.tree.map(jnp.ones_like, params)
        index = ravel(sdp_jax.scale_channels(groups, ones, jnp.arange(1, 12)))
        outside = ravel(sdp_jax.scale_channels(groups, ones, jnp.zeros(11)))
        index = np.where(outside == 1, 0, index).astype(int)
        length = np.append(0, norms)
        pull = np.append(0, strength * sdp_jax.channel_weights(groups, weights))
        alive = (index == 0) | (length[index] > 0)
        unit = w / np.where(length[index] > 0, length[index], 1)
        rest = w - start + pull[index] * unit
        y = np.linalg.lstsq(U[:, alive].T, rest[alive], rcond=None)[0]
        np.testing.assert_allclose(U[:, alive].T @ y, rest[alive], atol=1e-7)
        for channel in np.unique(index[~alive]):
            inside = index == channel
            z = start[inside] + U[:, inside].T @ y
            assert np.linalg.norm(z) <= pull[channel] + 1e-7


def test_first_order_is_its_closed_form(x64):
    params, groups, directions, basis, minimizer = flat_problem(40, 5)
    w = minimizer.reshape(-1, 5)
    units = w / np.linalg.norm(w, axis=1, keepdims=True)
    flat = units.ravel() - basis @ (basis.T @ units.ravel())
    scores = np.sum(units * flat.reshape(-1, 5), axis=1)
    found = sdp_jax.valley.directional_scores(params, groups, directions)
    np.testing.assert_allclose(found, scores, rtol=1e-10)
    # Their sum is ‖P₀ ŵ‖².
    np.testing.assert_allclose(found.sum(), flat @ flat, rtol=1e-10)
    result = sdp_jax.valley.sdp(
        params, groups, 2.0, directions, method="first_order", min_channels=0
    )
    factor = np.maximum(0, 1 - 2.0 * scores / np.linalg.norm(w, axis=1))
    np.testing.assert_allclose(result.params["w"], factor[:, None] * w, atol=1e-12)
    # A weight of 2 pushes twice as hard.
    double = sdp_jax.valley.directional_scores(
        params, groups, directions, weights={"all": 2.0}
    )
    np.testing.assert_allclose(double, 2 * scores, rtol=1e-10)
    importance = sdp_jax.valley.directional_importance(params, groups, directions)
    np.testing.assert_allclose(importance, np.linalg.norm(w, axis=1) / scores)
    dead = np.abs(np.asarray(result.params["w"])).max(axis=1) == 0
    np.testing.assert_array_equal(dead, importance <= 2.0)


def test_groups_of_one_entry_are_directional_pruning(x64):
    # Chao et al.: argmin ½(w − w*)² + λ s |w|, by brute force, where s > 0.
    params, groups, directions, *_ = flat_problem(40, 1)
    scores = sdp_jax.valley.directional_scores(params, groups, directions)
    found = sdp_jax.valley.sdp(
        params, groups, 0.7, directions, method="first_order", min_channels=0
    )
    for w, s, got in zip(
        params["w"][:, 0], scores, found.params["w"][:, 0], strict=True
    ):
        grid = np.linspace(-5, 5, 200_001)
        cost = 0.5 * (grid - float(w)) ** 2 + 0.7 * float(s) * np.abs(grid)
        if s > 0:
            assert abs(grid[np.argmin(cost)] - got) < 1e-4
        else:
            np.testing.assert_allclose(got, w - 0.7 * s * np.sign(w), atol=1e-10)


@pytest.mark.parametrize("size", [1, 5])
def test_first_order_and_exact_agree_to_second_order(size, x64):
    params, groups, directions, *_ = flat_problem(30, size)
    gaps = []
    for strength in (0.02, 0.01, 0.005):
        a, b = (
            sdp_jax.valley.sdp(
                params, groups, strength, directions, method=method
            ).params["w"]
            for method in ("exact", "first_order")
        )
        # The norms of groups; with one entry that is all there is.
        gaps.append(np.abs(np.linalg.norm(a, axis=1) - np.linalg.norm(b, axis=1)).max())
    if size == 1:
        np.testing.assert_allclose(gaps, 0, atol=1e-10)  # No sign has changed yet.
    else:
        np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 4, rtol=0.05)


def test_loss_stays_where_it_was(x64):
    hessian, *_ = quadratic(40, 0)
    params, groups, directions, _, minimizer = flat_problem(40, 5)
    found = sdp_jax.valley.sdp(params, groups, 10.0, directions)
    assert found.sparsity > 0.1
    away = np.asarray(found.params["w"]).ravel() - minimizer
    straw = sdp_jax.valley.sdp(params, groups, 10.0, directions, method="first_order")
    off = np.asarray(straw.params["w"]).ravel() - minimizer
    assert away @ hessian @ away < 1e-15 * (off @ hessian @ off)


@pytest.mark.parametrize("method", ["exact", "first_order"])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_hits_a_sparsity(method, sparsity, x64):
    params, groups, basis = toy_problem(3)
    found = sdp_jax.valley.sdp(
        params, groups, None, basis, sparsity=sparsity, method=method
    )
    wanted = round(sparsity * groups.num_channels)
    alive = sdp_jax.channels_alive(groups, found.params)
    dead = int((~alive).sum())
    assert dead == wanted == round(found.sparsity * groups.num_channels)
    # A little less does not reach it.
    if wanted:
        less = sdp_jax.valley.sdp(
            params, groups, found.strength * 0.998, basis, method=method
        )
        assert less.sparsity < found.sparsity


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_floors_hold_the_largest_channels(method, x64):
    params, groups, basis = toy_problem(3)
    floors = {"hidden0": 4, "hidden1": 2}
    found = sdp_jax.valley.sdp(
        params, groups, 50.0, basis, min_channels=floors, method=method
    )
    alive = groups.split(sdp_jax.channels_alive(groups, found.params))
    assert int(alive["hidden0"].sum()) >= 4 and int(alive["hidden1"].sum()) >= 2
    # Those that go last by the method's own order stay.
    order = {
        "exact": lambda: sdp_jax.channel_norms(groups, params),
        "first_order": lambda: sdp_jax.valley.directional_importance(
            params, groups, basis
        ),
    }[method]()
    for name, count in floors.items():
        best = np.argsort(-np.asarray(groups.split(order)[name]), kind="stable")[:count]
        assert np.asarray(alive[name])[best].all()
    none = sdp_jax.valley.sdp(
        params, groups, 50.0, basis, min_channels=0, method=method
    )
    assert found.sparsity <= none.sparsity


def test_a_sparsity_out_of_reach_says_so(x64):
    params, groups, directions, *_ = flat_problem(60, 5)
    with pytest.raises(ValueError, match="no strength makes 19 of 20 channels zero"):
        sdp_jax.valley.sdp(params, groups, None, directions, sparsity=0.95)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lower_precisions(dtype, x64):
    params, groups, basis = toy_problem(3)
    want = sdp_jax.valley.sdp(params, groups, 0.8, basis)
    low = jax.tree.map(lambda p: p.astype(dtype), params)
    small = jax.tree.map(lambda u: u.astype(jnp.float32), basis)
    found = sdp_jax.valley.sdp(low, groups, 0.8, small)
    assert {p.dtype for p in jax.tree.leaves(found.params)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_close(
        jax.tree.map(lambda p: p.astype(jnp.float64), found.params),
        want.params,
        atol=1e-5 if dtype == jnp.float32 else 0.05,
    )
    if dtype == jnp.float32:
        chex.assert_trees_all_equal(
            sdp_jax.channels_alive(groups, found.params),
            sdp_jax.channels_alive(groups, want.params),
        )


def test_directions_need_not_be_orthonormal(x64):
    params, groups, basis = toy_problem(3)
    skew = jax.tree.map(lambda u: jnp.stack([3 * u[0], u[0] - u[1], u[2]]), basis)
    for method in ("exact", "first_order"):
        a, b = (
            sdp_jax.valley.sdp(params, groups, 0.5, u, method=method).params
            for u in (basis, skew)
        )
        chex.assert_trees_all_close(a, b, atol=1e-9)


def test_without_sharp_directions_it_is_the_soft_threshold(x64):
    params, groups, basis = toy_problem(3)
    nothing = jax.tree.map(jnp.zeros_like, basis)
    found = sdp_jax.valley.sdp(params, groups, 0.7, nothing, min_channels=0)
    norms = sdp_jax.channel_norms(groups, params)
    want = sdp_jax.scale_channels(groups, params, jnp.maximum(0, 1 - 0.7 / norms))
    chex.assert_trees_all_close(found.params, want, atol=1e-12)
    assert sdp_jax.valley.sdp(params, groups, 0.0, basis).strength == 0
    chex.assert_trees_all_equal(
        sdp_jax.valley.sdp(params, groups, 0.0, basis).params, params
    )


def test_channels_that_are_zero_already_stay_so(x64):
    params, groups, basis = toy_problem(3)
    keep = jnp.ones(11).at[jnp.array([1, 4])].set(0)
    params = sdp_jax.scale_channels(groups, params, keep)
    assert sdp_jax.valley.directional_scores(params, groups, basis)[1] == 0
    assert sdp_jax.valley.directional_importance(params, groups, basis)[1] == 0
    for method in ("exact", "first_order"):
        for restore in (False, True):
            found = sdp_jax.valley.sdp(
                params,
                groups,
                0.3,
                basis,
                method=method,
                restore=restore,
                min_channels=5,
            )
            alive = sdp_jax.channels_alive(groups, found.params)
            assert not alive[1] and not alive[4]


def test_cut_by_importance():
    params, groups, basis = toy_problem(3, dtype=jnp.float32)
    scores = sdp_jax.valley.directional_importance(params, groups, basis)
    cut = sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.5)
    assert sum(cut.widths.values()) == 11 - round(0.5 * 11)


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_restored_is_the_nearest_point_of_the_valley_with_these_zeros(method, x64):
    params, groups, basis = toy_problem(3)
    shrunk = sdp_jax.valley.sdp(
        params, groups, None, basis, sparsity=0.4, method=method
    )
    found = sdp_jax.valley.sdp(
        params, groups, None, basis, sparsity=0.4, method=method, restore=True
    )
    alive = sdp_jax.channels_alive(groups, found.params)
    chex.assert_trees_all_equal(alive, sdp_jax.channels_alive(groups, shrunk.params))
    # Least squares on the entries that may differ from zero.
    ones = jax.tree.map(jnp.ones_like, params)
    free = ravel(sdp_jax.scale_channels(groups, ones, alive)) > 0
    start = ravel(params)
    U = np.concatenate(
        [np.asarray(u).reshape(3, -1) for u in jax.tree.leaves(basis)], axis=1
    )
    want = np.where(free, start, 0)
    want[free] += np.linalg.pinv(U[:, free]) @ (U @ (start - want))
    np.testing.assert_allclose(ravel(found.params), want, atol=1e-9)
    assert found.residual < 1e-10
    near, far = (np.linalg.norm(ravel(r.params) - start) for r in (found, shrunk))
    assert near < far


def test_groups_that_share_entries(x64):
    # Rows and columns of one matrix, as heads and head dimensions have them.
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 4))
    params = {"w": jnp.asarray(w), "v": jnp.asarray(rng.normal(size=(4, 2)))}
    dimensions = (
        sdp_jax.Dimension("rows", 3, (sdp_jax.Member("w", 0),)),
        sdp_jax.Dimension("columns", 4, (sdp_jax.Member("w", 1),)),
    )
    leaves = (Leaf("w", (3, 4)), Leaf("v", (4, 2)))
    groups = sdp_jax.Groups(dimensions, leaves)
    U = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    basis = {
        "w": jnp.asarray(U[:, :12].reshape(2, 3, 4)),
        "v": jnp.asarray(U[:, 12:].reshape(2, 4, 2)),
    }
    rows = w / np.linalg.norm(w, axis=1, keepdims=True)
    columns = w / np.linalg.norm(w, axis=0, keepdims=True)
    pushed = np.concatenate([(rows + columns).ravel(), np.zeros(8)])
    flat = (pushed - U.T @ (U @ pushed))[:12].reshape(3, 4)
    scores = sdp_jax.valley.directional_scores(params, groups, basis)
    found = groups.split(scores)
    np.testing.assert_allclose(found["rows"], np.sum(rows * flat, axis=1))
    np.testing.assert_allclose(found["columns"], np.sum(columns * flat, axis=0))
    # The scale of the parameters does not matter.
    large = jax.tree.map(lambda p: 10 * p, params)
    again = sdp_jax.valley.directional_scores(large, groups, basis)
    np.testing.assert_allclose(again, scores, rtol=1e-10)
    with pytest.raises(ValueError, match="'rows' and 'columns' share entries of 'w'"):
        sdp_jax.valley.sdp(params, groups, 0.1, basis)
    result = sdp_jax.valley.sdp(params, groups, 0.1, basis, method="first_order")
    factors = [
        1 - 0.1 * np.asarray(found[n]) / np.linalg.norm(w, axis=axis)
        for n, axis in (("rows", 1), ("columns", 0))
    ]
    np.testing.assert_allclose(
        result.params["w"], factors[0][:, None] * w * factors[1], rtol=1e-10
    )


def test_what_is_reported_is_what_is_returned():
    params, groups, basis = toy_problem(3, dtype=jnp.float32)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    found = sdp_jax.valley.sdp(low, groups, 0.8, basis)
    # Rounding to bfloat16 leaves the valley by about its precision.
    assert 1e-5 < found.residual < 1e-2
