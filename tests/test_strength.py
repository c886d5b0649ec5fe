"""Strengths: closed forms, and increments under schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import prox
from tests import toy


@pytest.mark.parametrize(("c", "mu", "rate"), [(0.1, 0.51, 0.01), (2.0, 0.9, 0.5)])
def test_valley_strength_is_the_tuning_function(c, mu, rate):
    strength = sdp_jax.valley_strength(c, mu, rate)
    out, _ = toy.run_strength(strength, 200, {"d": jnp.ones(2)})
    n = np.arange(1, 201)
    expected = c * np.sqrt(rate) * (n * rate) ** mu
    np.testing.assert_allclose([t["d"][0] for t in out], expected, rtol=1e-6)


def test_valley_strength_keeps_growing_after_a_million_steps():
    strength = sdp_jax.valley_strength(0.1, 0.51, 0.01)
    groups = toy.line_groups(d=1)
    state = strength.init(groups, [0])

    def step(state, _):
        _, state = strength.update(state, jnp.ones(1), groups, [0])
        return state, None

    state, _ = jax.lax.scan(step, state, None, length=2_000_000)
    expected = 0.1 * np.sqrt(0.01) * (2_000_000 * 0.01) ** 0.51
    np.testing.assert_allclose(float(state.total), expected, rtol=1e-5)


def test_valley_strength_grows_by_increments_under_a_schedule():
    schedule = optax.linear_schedule(0.1, 0.01, 50)
    strength = sdp_jax.valley_strength(0.3, 0.6, schedule)
    out, _ = toy.run_strength(strength, 60, {"d": jnp.ones(1)})
    total = 0.0
    for n in range(1, 61):
        rate = float(schedule(n - 1))
        total += 0.3 * rate ** (0.6 + 0.5) * (n**0.6 - (n - 1) ** 0.6)
        np.testing.assert_allclose(out[n - 1]["d"][0], total, rtol=1e-5)


def test_momentum_counts_through_the_effective_rate():
    a, _ = toy.run_strength(
        sdp_jax.valley_strength(0.3, 0.6, 0.1), 20, {"d": jnp.ones(1)}
    )
    b, _ = toy.run_strength(
        sdp_jax.valley_strength(0.3, 0.6, 0.01, momentum=0.9), 20, {"d": jnp.ones(1)}
    )
    np.testing.assert_allclose([t["d"] for t in a], [t["d"] for t in b], rtol=1e-5)


def test_zero_c_and_a_rate_that_starts_at_zero():
    out, _ = toy.run_strength(
        sdp_jax.valley_strength(0, 0.6, 0.1), 5, {"d": jnp.ones(3)}
    )
    assert all((t["d"] == 0).all() for t in out)
    warm = optax.linear_schedule(0.0, 0.1, 3)
    out, _ = toy.run_strength(
        sdp_jax.valley_strength(1.0, 0.6, warm), 5, {"d": jnp.full(3, 9.0)}
    )
    values = [t["d"][0] for t in out]
    assert values[0] == 0
    assert np.all(np.diff(values) > 0)


def test_constant_schedule_and_ramp():
    norms = {"d": jnp.full(2, 9.0)}
    out, _ = toy.run_strength(sdp_jax.ramp_strength(2.0, 2, 6), 8, norms)
    np.testing.assert_allclose([t["d"][0] for t in out], [0, 0, 0.5, 1, 1.5, 2, 2, 2])
    params = {"w": jnp.full((1, 2), 9.0)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
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
