"""The explicit projection: against NumPy, and what it must survive."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.valley.vectors import orthonormal
from tests import toy

ESTIMATED = ["svd", "frequent_directions", "oja"]
RATE = 0.1
STRENGTH = sdp_jax.valley_strength(c=1.0, mu=0.6, learning_rate=RATE)


def chain(groups, strength=STRENGTH, rate=RATE, min_channels=1, **valley):
    return optax.chain(
        optax.sgd(rate),
        sdp_jax.dual_averaging(),
        sdp_jax.valley.project_onto_valley(
            groups, strength, min_channels=min_channels, **valley
        ),
        sdp_jax.group_soft_threshold(groups, strength, min_channels=min_channels),
    )


def train(tx, params, steps=8, dtype=None):
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(toy.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        batch = toy.batch(seed=i, dtype=jax.tree.leaves(params)[0].dtype)
        params, state = step(params, state, batch)
    return params, state


def random_basis(params, rank, seed=0):
    rng = np.random.default_rng(seed)
    return jax.jit(orthonormal)(
        jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=(rank, *p.shape)), p.dtype), params
        )
    )


def test_is_its_equations_in_numpy(x64):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 3))
    U = np.linalg.qr(rng.normal(size=(12, 2)))[0].T
    params = {"w": jnp.asarray(w)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 0)]})
    strengths = [0.3, 0.5, 0.6, 0.9]
    tx = chain(
        groups,
        lambda n: jnp.asarray(strengths)[n],
        rate=1.0,
        min_channels=0,
        basis={"w": jnp.asarray(U.reshape(2, 4, 3))},
    )
    state = tx.init(params)

    def shrinkage(v, g):
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        return v - np.maximum(0, 1 - g / norms) * v

    v, correction, before = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for g in strengths:
        grad = rng.normal(size=(4, 3)) / 5
        updates, state = tx.update({"w": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        v = v - grad
        point = v + correction
        growth, before = shrinkage(point, g) - before, shrinkage(point, g)
        correction = correction + (U.T @ (U @ growth.ravel())).reshape(4, 3)
        point = v + correction
        np.testing.assert_allclose(
            params["w"], point - shrinkage(point, g), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("estimator", [*ESTIMATED, None])
def test_shrinkage_stays_out_of_the_given_directions(estimator, x64):
    # With no gradient only the threshold moves the parameters.
    params = toy.mlp_params(dtype=jnp.float64)
    basis = random_basis(params, 3)
    tx = chain(
        toy.mlp_groups(params),
        sdp_jax.ramp_strength(0.2, 0, 200),
        basis=basis,
        estimator=estimator,
    )
    state, now = tx.init(params), params
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for _ in range(200):
        updates, state = update(zeros, state, now)
        now = optax.apply_updates(now, updates)
    moved = jax.tree.map(jnp.subtract, now, params)
    along = [
        sum(
            jnp.vdot(u[i], m)
            for u, m in zip(*map(jax.tree.leaves, (basis, moved)), strict=True)
        )
        for i in range(3)
    ]
    assert float(optax.tree.norm(moved)) > 0.3
    # To first order in the steps of the strength.
    assert np.linalg.norm(along) < 0.01 * float(optax.tree.norm(moved))


def test_a_basis_need_not_be_orthonormal_in_the_state(x64):
    # What a cut or low precision does to it: the same space, other vectors.
    params = toy.mlp_params(dtype=jnp.float64)
    groups, basis = toy.mlp_groups(params), random_basis(params, 2)
    skew = jax.tree.map(lambda u: jnp.stack([2 * u[0], u[0] + 0.1 * u[1]]), basis)
    found = [train(chain(groups, basis=b), params)[0] for b in (basis, skew)]
    chex.assert_trees_all_close(*found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATED)
def test_bf16_storage_halves_memory_and_changes_little(estimator):
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    found = {}
    for dtype in (None, jnp.bfloat16):
        tx = chain(groups, rank=3, estimator=estimator, storage_dtype=dtype)
        found[dtype], state = train(tx, params, 30)
        basis = state[-2].basis
        want = jnp.float32 if dtype is None else jnp.bfloat16
        assert {u.dtype for u in jax.tree.leaves(basis)} == {jnp.dtype(want)}
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, found[None], params))
    off = optax.tree.norm(jax.tree.map(jnp.subtract, *found.values()))
    assert 0 < off < 0.05 * moved


@pytest.mark.parametrize("estimator", ESTIMATED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_trains_in_every_precision_with_exact_zeros(estimator, dtype):
    params = toy.mlp_params(dtype=dtype)
    groups = toy.mlp_groups(params)
    strength = sdp_jax.target_sparsity(0.5, 5, 30)
    tx = chain(groups, strength, rate=0.05, rank=3, estimator=estimator)
    params, state = train(tx, params, 40)
    chex.assert_tree_all_finite((params, state[-2].basis))
    # Half of 11, rounded to even.
    assert sdp_jax.channels_alive(groups, params).sum() == 11 - round(0.5 * 11)
    sdp_jax.check_zeros(state)


def test_takes_in_only_each_nth_step():
    params = toy.mlp_params()
    tx = sdp_jax.valley.project_onto_valley(
        toy.mlp_groups(params), 0.1, rank=2, every=3
    )
    state, changed = tx.init(params), []
    update = jax.jit(lambda u, s: tx.update(u, s, params))
    for i in range(7):
        _, after = update(toy.mlp_grads(params, seed=i), state)
        changed.append(
            any(
                bool((a != b).any())
                for a, b in zip(
                    jax.tree.leaves(after.basis),
                    jax.tree.leaves(state.basis),
                    strict=True,
                )
            )
        )
        state = after
    assert changed == [True, False, False, True, False, False, True]
    assert int(state.count) == 7


def test_set_basis_reaches_into_any_state():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    inner = chain(groups, rank=2, estimator=None)
    tx = optax.apply_if_finite(optax.chain(optax.clip(1.0), inner), 3)
    state = tx.init(params)
    plain, _ = train(sdp_jax.altsdp(RATE, groups, strength=STRENGTH), params, 1)
    # Without directions it is plain AltSDP.
    grads = jax.grad(toy.loss)(params, toy.batch(seed=0))
    updates, _ = inner.update(grads, inner.init(params), params)
    chex.assert_trees_all_close(
        optax.apply_updates(params, updates), plain, rtol=1e-6, atol=1e-7
    )
    basis = random_basis(params, 2)
    twice = jax.tree.map(lambda u: 2 * u, basis)
    changed = sdp_jax.valley.set_basis({"opt": state}, twice)["opt"]
    chex.assert_trees_all_equal_shapes_and_dtypes(changed, state)
    found = changed.inner_state[1][-2].basis
    chex.assert_trees_all_close(found, basis, atol=1e-5)
    updates, _ = tx.update(grads, changed, params)
    chex.assert_tree_all_finite(updates)
    assert not np.asarray(state.inner_state[1][-2].energy).any()
    np.testing.assert_array_equal(changed.inner_state[1][-2].energy, [1, 1])
    traced = jax.jit(sdp_jax.valley.set_basis)(state, twice)
    chex.assert_trees_all_close(traced, changed, atol=1e-6)


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    # As in plain AltSDP: only its own entry is lost.
    params = toy.mlp_params()
    tx = chain(toy.mlp_groups(params), rank=2)
    state = tx.init(params)
    for i in range(4):
        grads = toy.mlp_grads(params, seed=i)
        if i == 2:
            bias = grads["layer2"]["bias"].at[0].set(jnp.nan)  # Outside the groups.
            grads["layer2"]["bias"] = bias
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    lost = [int(jnp.isnan(p).sum()) for p in jax.tree.leaves(params)]
    assert sum(lost) == 1
    chex.assert_tree_all_finite(state[-2].basis)


def test_state_keeps_its_dtypes(x64):
    params = toy.mlp_params(dtype=jnp.float32)
    basis = jax.tree.map(lambda u: u.astype(jnp.float64), random_basis(params, 2))
    tx = chain(toy.mlp_groups(params), basis=basis)
    state = tx.init(params)
    _, after = jax.eval_shape(tx.update, toy.mlp_grads(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_directions_are_sharded_like_the_parameters():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "m")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    params = {"w": jax.device_put(jnp.ones((4, 16)), sharding)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = chain(groups, 0.1, rank=2, estimator=None)
    state = tx.init(params)
    state = sdp_jax.valley.set_basis(
        state,
        {"w": np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)},
    )
    assert len(state[-2].basis["w"].sharding.device_set) == 8
    shard = state[-2].basis["w"].addressable_shards[0].data
    assert shard.shape == (2, 4, 2)
    _, after = jax.jit(tx.update)(params, state, params)
    assert after[-2].basis["w"].addressable_shards[0].data.shape == (2, 4, 2)


def test_set_basis_refuses_what_does_not_fit():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    basis = random_basis(params, 2)
    tx = chain(groups, 0.1, rank=2, estimator=None)
    state = tx.init(params)
    with pytest.raises(ValueError, match="no state of project_onto_valley"):
        sdp_jax.valley.set_basis(optax.sgd(0.1).init(params), basis)
    with pytest.raises(ValueError, match="3 directions, but the state was made for 2"):
        sdp_jax.valley.set_basis(state, random_basis(params, 3))
    with pytest.raises(ValueError, match="leaves of the parameters"):
        sdp_jax.valley.set_basis(state, {"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="not finite"):
        sdp_jax.valley.set_basis(state, jax.tree.map(lambda u: u * jnp.nan, basis))


def test_valley_estimate_finds_the_directions_of_the_stream(x64):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 2)))
    params = {"w": jnp.zeros((3, 4))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.valley.project_onto_valley(groups, 0.1, rank=3, decay=0.9)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(30):
        step = {"w": jnp.asarray((basis @ rng.normal(size=2)).reshape(3, 4))}
        updates, state = update(step, state, params)
        params = optax.apply_updates(params, updates)
    found = np.asarray(state.basis["w"]).reshape(3, 12)
    strong = found[np.asarray(state.energy) > 1e-6]
    assert strong.shape[0] == 2
    np.testing.assert_allclose(strong @ strong.T, np.eye(2), atol=1e-10)
    np.testing.assert_allclose(
        strong @ basis @ (strong @ basis).T, np.eye(2), atol=1e-8
    )
    before = state.basis
    for bad in (0.0, np.nan, np.inf):
        # The dual arrives by way of params + step: a zero, a NaN and an infinite step.
        point = jax.tree.map(lambda v, p, b=bad: v - p + b, state.dual, params)
        _, after = update(point, state, params)
        chex.assert_trees_all_equal(after.basis, before)


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_valley_energy_is_the_decayed_count_of_steps(decay, x64):
    # Every step counts as a unit vector, the earlier ones for decay, decay², ...
    params = {"w": jnp.zeros((3, 4))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.valley.project_onto_valley(groups, 0.0, rank=2, decay=decay)
    state = tx.init(params)
    direction = np.random.default_rng(0).normal(size=(3, 4))
    for n in range(8):
        step = {"w": jnp.asarray((n + 1) * direction)}
        updates, state = tx.update(step, state, params)
        params = optax.apply_updates(params, updates)
    count = sum(decay**n for n in range(8))
    np.testing.assert_allclose(state.energy, [count, 0], atol=1e-12)


def test_valley_basis_stays_orthonormal_in_float32():
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((8, 16))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.valley.project_onto_valley(groups, 0.01, rank=4, decay=0.99)

    @jax.jit
    def update(step, state):
        return tx.update(step, state, params)[1]

    state = tx.init(params)
    mixing = rng.normal(size=(6, 128)) * np.geomspace(1, 1e-4, 6)[:, None]
    point = np.zeros(128)
    for _ in range(1500):
        point = point + rng.normal(size=6) @ mixing
        state = update({"w": jnp.asarray(point.reshape(8, 16), jnp.float32)}, state)
    basis = np.asarray(state.basis["w"]).reshape(4, 128)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-4)
