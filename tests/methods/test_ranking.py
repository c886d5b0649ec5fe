"""The increment by ranks against the paper's equation, and how many have to go."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.methods import ranking_increment
from sdp_jax.methods.ranking import pruned_numbers, rank_changes
from tests.toy import increment, mlp_groups


@hypothesis.given(
    st.integers(0, 60), st.integers(1, 40), st.floats(0.01, 1), st.floats(0.05, 0.9)
)
def test_increment_is_the_papers(r, n, a, u):
    hypothesis.assume(r < 5 * n)
    with jax.enable_x64(True):
        found = float(ranking_increment(r, n, a, u))
    assert found == pytest.approx(increment(r, n, a, u), rel=1e-9, abs=1e-12)


def test_increment_falls_through_its_symmetry_point_to_zero(x64):
    n, a, u = 40, 0.05, 0.25
    values = np.asarray(ranking_increment(np.arange(60), n))
    assert values[0] == a and values[n] == 0
    assert (np.diff(values) < 0).all() and (values[n + 1 :] < 0).all()
    middle = -math.log(u) / math.log(2 / u) * n
    assert float(ranking_increment(middle, n)) == pytest.approx(u * a)
    off = np.array([0.5, 3.0, 11.0])
    pair = ranking_increment(middle - off, n) + ranking_increment(middle + off, n)
    np.testing.assert_allclose(pair, 2 * u * a)


def test_increment_is_finite_far_beyond_and_zero_without_a_number():
    far = ranking_increment(jnp.array([500, 10**6]), 1)
    assert np.isfinite(far).all() and (far < -1e9).all()
    assert (ranking_increment(jnp.arange(3), jnp.array([0, -1, 0])) == 0).all()


def test_numbers_of_the_dimensions_stand_at_each_channel():
    groups = mlp_groups()
    numbers = pruned_numbers(groups, {"hidden1": 0.4}, 1)
    np.testing.assert_array_equal(numbers, [0] * 6 + [2] * 5)
    traced = jax.jit(lambda n: pruned_numbers(groups, 0.5, n))(jnp.array(4))
    np.testing.assert_array_equal(traced, [2] * 6 + [1] * 5)


def test_ranks_are_those_of_the_living_of_a_dimension():
    groups = mlp_groups()
    norms = jnp.array([3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    gone = jnp.zeros(11, bool).at[3].set(True)
    numbers = pruned_numbers(groups, 0.5, 1)
    left, change = rank_changes(groups, numbers, norms, gone, 0.3, 0.2)
    np.testing.assert_array_equal(left, [2] * 6 + [2] * 5)
    ranks = [2, 0, 1, None, 4, 3, 4, 3, 2, 1, 0]
    for found, r in zip(change, ranks, strict=True):
        if r is not None:
            assert float(found) == pytest.approx(increment(r, 2, 0.3, 0.2), abs=1e-6)
