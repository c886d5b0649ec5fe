"""Strengths: closed forms, increments under schedules, and the target."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sdp_jax
from sdp_jax import prox
from tests import toy


def run(strength, steps, norms, floors=None):
    floors = floors or dict.fromkeys(norms, 0)
    sizes = {k: len(v) for k, v in norms.items()}
    state = strength.init(sizes, floors)
    update = jax.jit(lambda s, n: strength.update(s, n, floors))
    out = []
    for _ in range(steps):
        thresholds, state = update(state, norms)
        out.append({k: np.asarray(v) for k, v in thresholds.items()})
    return out, state


@pytest.mark.parametrize(("c", "mu", "rate"), [(0.1, 0.51, 0.01), (2.0, 0.9, 0.5)])
def test_valley_strength_is_the_tuning_function(c, mu, rate):
    strength = sdp_jax.valley_strength(c, mu, rate)
    out, _ = run(strength, 200, {"d": jnp.ones(2)})
    n = np.arange(1, 201)
    expected = c * np.sqrt(rate) * (n * rate) ** mu
    np.testing.assert_allclose([t["d"][0] for t in out], expected, rtol=1e-6)


def test_valley_strength_keeps_growing_after_a_million_steps():
    strength = sdp_jax.valley_strength(0.1, 0.51, 0.01)
    state = strength.init({"d": 1}, {"d": 0})

    def step(state, _):
        _, state = strength.update(state, {"d": jnp.ones(1)}, {"d": 0})
        return state, None

    state, _ = jax.lax.scan(step, state, None, length=2_000_000)
    expected = 0.1 * np.sqrt(0.01) * (2_000_000 * 0.01) ** 0.51
    np.testing.assert_allclose(float(state.total), expected, rtol=1e-5)


def test_valley_strength_grows_by_increments_under_a_schedule():
    schedule = optax.linear_schedule(0.1, 0.01, 50)
    strength = sdp_jax.valley_strength(0.3, 0.6, schedule)
    out, _ = run(strength, 60, {"d": jnp.ones(1)})
    total = 0.0
    for n in range(1, 61):
        rate = float(schedule(n - 1))
        total += 0.3 * rate ** (0.6 + 0.5) * (n**0.6 - (n - 1) ** 0.6)
        np.testing.assert_allclose(out[n - 1]["d"][0], total, rtol=1e-5)


def test_momentum_counts_through_the_effective_rate():
    a, _ = run(sdp_jax.valley_strength(0.3, 0.6, 0.1), 20, {"d": jnp.ones(1)})
    b, _ = run(
        sdp_jax.valley_strength(0.3, 0.6, 0.01, momentum=0.9), 20, {"d": jnp.ones(1)}
    )
    np.testing.assert_allclose([t["d"] for t in a], [t["d"] for t in b], rtol=1e-5)


def test_zero_c_and_a_rate_that_starts_at_zero():
    out, _ = run(sdp_jax.valley_strength(0, 0.6, 0.1), 5, {"d": jnp.ones(3)})
    assert all((t["d"] == 0).all() for t in out)
    warm = optax.linear_schedule(0.0, 0.1, 3)
    out, _ = run(sdp_jax.valley_strength(1.0, 0.6, warm), 5, {"d": jnp.full(3, 9.0)})
    values = [t["d"][0] for t in out]
    assert values[0] == 0
    assert np.all(np.diff(values) > 0)


def test_constant_schedule_and_ramp():
    norms = {"d": jnp.full(2, 9.0)}
    out, _ = run(sdp_jax.ramp_strength(2.0, 2, 6), 8, norms)
    np.testing.assert_allclose([t["d"][0] for t in out], [0, 0, 0.5, 1, 1.5, 2, 2, 2])
    params = {"w": jnp.full((1, 2), 9.0)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.producer("w", 1)]})
    zero = {"w": jnp.zeros((1, 2))}
    for strength, expected in (
        (1.0, [8, 8]),
        (jnp.asarray(1.0), [8, 8]),
        (optax.linear_schedule(1.0, 0.0, 2), [8, 8.5]),
        (lambda count: -1.0, [9, 9]),
    ):
        tx = sdp_jax.group_soft_threshold(groups, strength)
        state = tx.init(params)
        seen = []
        for _ in range(2):
            updates, state = tx.update(zero, state, params)
            seen.append(float((params["w"] + updates["w"])[0, 0]))
        assert seen == expected


@given(
    a=hnp.arrays(np.float32, (7,), elements=st.integers(0, 6).map(float)),
    b=hnp.arrays(np.float32, (4,), elements=st.integers(0, 6).map(float)),
    wanted=st.integers(0, 9),
    floor=st.integers(0, 2),
)
def test_target_is_hit_exactly_also_under_ties(a, b, wanted, floor):
    norms = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    floors = {"a": floor, "b": floor}
    if 11 - wanted < 2 * floor:
        with pytest.raises(ValueError, match="lower the fraction or the floor"):
            sdp_jax.target_sparsity(wanted / 11, 0, 3).init({"a": 7, "b": 4}, floors)
        return
    strength = sdp_jax.target_sparsity(wanted / 11, 0, 3)
    with jax.disable_jit():
        state = strength.init({"a": 7, "b": 4}, floors)
        for _ in range(3):
            thresholds, state = strength.update(state, norms, floors)
    zero = {k: np.isinf(np.asarray(v)) for k, v in thresholds.items()}
    assert sum(z.sum() for z in zero.values()) == wanted
    for k, v in norms.items():
        assert (~zero[k]).sum() >= floor
        factor = np.asarray(prox.soft_threshold_factor(v, thresholds[k]))
        kept = ~zero[k] & (np.asarray(v) > 0)
        assert (factor[kept] > 0).all()
        assert (factor[zero[k]] == 0).all()


def test_target_rises_smoothly_and_then_stays_fixed():
    rng = np.random.default_rng(0)
    norms = {
        "a": jnp.asarray(rng.uniform(1, 2, 60)),
        "b": jnp.asarray(rng.uniform(1, 2, 40)),
    }
    strength = sdp_jax.target_sparsity(0.5, 10, 40)
    out, state = run(strength, 45, norms, {"a": 1, "b": 1})
    zeros = [sum(np.isinf(v).sum() for v in t.values()) for t in out]
    assert zeros[9] == 0
    assert all(x <= y for x, y in zip(zeros, zeros[1:], strict=False))
    n = np.arange(1, 41)
    done = np.clip((n - 10) / 30, 0, 1)
    ramp = 50 * (1 - (1 - done) ** 3)
    np.testing.assert_array_equal(zeros[20:40], np.floor(ramp + 1e-3)[20:])
    assert all(z <= r + 1 for z, r in zip(zeros[:20], ramp, strict=False))
    assert zeros[39] == zeros[44] == 50
    # The threshold starts at zero and never jumps, though all norms are above 1.
    level = [max(np.where(np.isinf(v), 0, v).max() for v in t.values()) for t in out]
    steps = np.diff(level[9:40])
    assert level[9] == 0 and level[39] > 1
    assert np.all(steps >= -1e-6) and np.all(steps < 0.25)
    # After the end other norms do not change the set.
    floors = {"a": 1, "b": 1}
    turned = {k: 3 - v for k, v in norms.items()}
    after, _ = strength.update(state, turned, floors)
    for k in norms:
        np.testing.assert_array_equal(np.isinf(after[k]), np.isinf(out[44][k]))
        factor = prox.soft_threshold_factor(turned[k], after[k])
        np.testing.assert_array_equal(factor == 0, np.isinf(after[k]))


def test_target_per_dimension():
    norms = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(101.0, 105.0)}
    strength = sdp_jax.target_sparsity(0.5, 0, 2, per_dimension=True)
    out, _ = run(strength, 2, norms, {"a": 1, "b": 1})
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [4, 2]
    everywhere = sdp_jax.target_sparsity(0.5, 0, 2)
    out, _ = run(everywhere, 2, norms, {"a": 1, "b": 1})
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [6, 0]


def test_floor_protects_a_whole_layer_from_a_global_target():
    norms = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(101.0, 109.0)}
    out, _ = run(sdp_jax.target_sparsity(0.5, 0, 2), 2, norms, {"a": 3, "b": 1})
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [5, 3]
    factor = prox.soft_threshold_factor(norms["a"], out[-1]["a"])
    assert (np.asarray(factor)[5:] >= prox.FLOOR_FACTOR - 1e-6).all()


def test_target_state_survives_the_checkpoint_types():
    strength = sdp_jax.target_sparsity(0.5, 0, 2)
    _, state = run(strength, 3, {"a": jnp.arange(1.0, 5.0)}, {"a": 1})
    leaves, treedef = jax.tree.flatten(state)
    again = treedef.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert isinstance(again.thresholds, sdp_jax.PerChannel)


@pytest.mark.parametrize("floor", [3, 5])
def test_floors_that_are_arrays_win_over_the_target(floor):
    strength = sdp_jax.target_sparsity(0.75, 0, 2)
    norms = {"a": jnp.arange(1.0, 9.0)}
    floors = {"a": jnp.asarray(floor)}
    state = strength.init({"a": 8}, floors)
    for _ in range(4):
        thresholds, state = strength.update(state, norms, floors)
    left = np.flatnonzero(~np.isinf(thresholds["a"]))
    assert left.tolist() == list(range(8 - floor, 8))


def test_momentum_counts_also_beside_a_given_rate():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    grads = toy.mlp_grads(params)
    totals = []
    for strength in (
        sdp_jax.valley_strength(0.1, 0.6),
        sdp_jax.valley_strength(0.1, 0.6, learning_rate=0.1),
        sdp_jax.valley_strength(0.1, 0.6, momentum=0.9),
        sdp_jax.valley_strength(0.1, 0.6, learning_rate=0.1, momentum=0.9),
    ):
        tx = sdp_jax.altsdp(0.1, groups, strength=strength, momentum=0.9)
        _, state = tx.update(grads, tx.init(params), params)
        totals.append(float(state[-1].strength.total))
    # g(1, 1) = c at the effective rate 0.1 / (1 - 0.9).
    np.testing.assert_allclose(totals, 0.1, rtol=1e-5)


ATTENTION = {n: (6, 32) for n in "qkv"} | {"o": (32, 20), "p": (20, 3)}


def attention(p, x):
    q, k, v = ((x @ p[n]).reshape(5, 4, 8).swapaxes(0, 1) for n in "qkv")
    out = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return jnp.tanh(out.swapaxes(0, 1).reshape(5, 32) @ p["o"]) @ p["p"]


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.75])
def test_target_counts_parameters_or_flops(target, per_dimension, fraction):
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in ATTENTION.items()
    }
    x = jnp.ones((5, 6))
    groups = sdp_jax.find_groups(attention, params, x)
    assert sorted(groups.sizes.values()) == [4, 8, 8, 20]
    more = {"fn": attention, "params": params, "inputs": (x,)}
    strength = sdp_jax.target_sparsity(
        fraction,
        1,
        5,
        target=target,
        groups=groups,
        per_dimension=per_dimension,
        **(more if target == "flops" else {}),
    )
    norms = {
        k: jnp.asarray(rng.uniform(1, 2, n), jnp.float32)
        for k, n in groups.sizes.items()
    }
    floors = dict.fromkeys(groups.sizes, 1)
    thresholds, _ = run(strength, 8, norms, floors)

    def left(kept):
        cut = sdp_jax.Cut(groups, tuple(kept[d.name] for d in groups))
        small = cut.take(params)
        count = sdp_jax.cost(sdp_jax.narrow(attention, cut), small, x)
        return count.parameters if target == "params" else count.flops

    # The oracle removes one channel after the other and counts the small function.
    order = []
    for name, v in norms.items():
        ranked = np.argsort(v)[:-1].tolist()
        for place, i in enumerate(ranked):
            key = (place + 1) / len(ranked) if per_dimension else float(v[i])
            order.append((key, name, i))
    kept = {k: tuple(range(n)) for k, n in groups.sizes.items()}
    goal = (1 - fraction) * left(kept) * (1 + 1e-6)
    for _, name, i in sorted(order, key=lambda item: item[0]):
        if left(kept) <= goal:
            break
        kept[name] = tuple(j for j in kept[name] if j != i)
    assert left(kept) <= goal
    found = {
        k: tuple(np.flatnonzero(np.asarray(norms[k]) > t).tolist())
        for k, t in thresholds[4].items()
    }
    assert found == kept
    assert all(
        np.array_equal(thresholds[-1][k] > norms[k], thresholds[4][k] > norms[k])
        for k in norms
    )
    # It rises: no more is gone earlier.
    for earlier, later in zip(thresholds[:4], thresholds[1:5], strict=True):
        for k in norms:
            assert (earlier[k] <= later[k] * (1 + 1e-6)).all()


def test_training_ends_at_the_share_of_flops():
    params = toy.mlp_params(widths=(4, 32, 24, 3))
    x, y = toy.batch(size=32)
    groups = sdp_jax.find_groups(toy.mlp_apply, params, x)
    strength = sdp_jax.target_sparsity(
        0.6, 5, 40, target="flops", groups=groups, fn=toy.mlp_apply, params=params,
        inputs=(x,),
    )  # fmt: skip
    tx = sdp_jax.altsdp(0.05, groups, strength=strength)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(toy.loss)(params, (x, y))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    dense = sdp_jax.cost(toy.mlp_apply, params, x).flops
    for _ in range(50):
        params, state = step(params, state)
    cut = sdp_jax.plan_cut(groups, params)
    small = sdp_jax.cost(sdp_jax.narrow(toy.mlp_apply, cut), cut.take(params), x).flops
    one_channel = 2 * 32 * (32 + 24 + 4 + 3 + 2)
    assert 0.4 * dense - one_channel < small <= 0.4 * dense


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": "bytes"}, "use 'channels', 'params' or 'flops'"),
        ({"target": "params"}, r"needs \['groups'\]; got \[\]"),
        ({"target": "flops", "groups": 1}, r"needs \['fn', 'groups', 'params'\]"),
        ({"groups": 1}, "'channels' needs nothing more"),
        ({"inputs": (1,)}, "got .* and inputs"),
    ],
)
def test_targets_say_what_they_need(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sdp_jax.target_sparsity(0.5, 0, 10, **kwargs)


def test_targets_that_cannot_be_met_say_so():
    groups = toy.mlp_groups()
    strength = sdp_jax.target_sparsity(0.9, 0, 9, target="params", groups=groups)
    with pytest.raises(ValueError, match=r"floors are left, so are \d\d\.\d%"):
        strength.init(groups.sizes, dict.fromkeys(groups.sizes, 4))
    with pytest.raises(ValueError, match="give both the same"):
        strength.init({"other": 3}, {"other": 1})


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0, 8.0])
def test_adaptive_factors_in_closed_form(power):
    norms = {"a": jnp.array([0.0, 0.5, 1.0, 1.5, 40.0]), "b": jnp.array([3.0, 1e-3])}
    strength = sdp_jax.adaptive_strength(1.0, power)
    state = strength.init({"a": 5, "b": 2}, {})
    thresholds, _ = strength.update(state, norms, {})
    for name, values in norms.items():
        found = prox.soft_threshold_factor(values, thresholds[name])
        v = np.asarray(values, np.float64)
        with np.errstate(divide="ignore"):
            expected = np.maximum(0, 1 - np.where(v > 0, 1 / v, np.inf) ** power)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found) == 0, v <= 1)


def test_adaptive_keeps_targets_floors_and_bindings():
    inner = sdp_jax.target_sparsity(0.5, 0, 2)
    strength = sdp_jax.adaptive_strength(inner, 8.0)
    sizes, floors = {"a": 4, "b": 4}, {"a": 1, "b": 1}
    norms = {"a": jnp.array([1e-30, 2.0, 3.0, 4.0]), "b": jnp.array([0.1, 0.2, 5, 6])}
    state, other = strength.init(sizes, floors), inner.init(sizes, floors)
    for _ in range(3):
        thresholds, state = strength.update(state, norms, floors)
        plain, other = inner.update(other, norms, floors)
    for name in sizes:
        np.testing.assert_array_equal(np.isinf(thresholds[name]), np.isinf(plain[name]))
        assert (thresholds[name] <= plain[name]).all()
    valley = sdp_jax.adaptive_strength(sdp_jax.valley_strength(1.0, 0.6), 2.0)
    bound = valley.bind(0.1, None)
    thresholds, _ = bound.update(bound.init({"a": 4}, {}), {"a": norms["a"]}, {})
    g = 0.1**1.1
    np.testing.assert_allclose(thresholds["a"][1:], g**2 / norms["a"][1:], rtol=1e-5)
    with pytest.raises(ValueError, match=r"power must be a number of at least 1"):
        sdp_jax.adaptive_strength(1.0, 0.5)
