"""The half-space projection against loops over channels."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax.channels import (
    channels_alive,
)
from sdp_jax.factors import scale_channels
from sdp_jax.methods import half_space_factor
from tests import toy

WIDTHS = (3, 5, 4, 2)


def problem(seed, dead=()):
    """Parameters of which some channels turn round, and where they turn to."""
    rng = np.random.default_rng(seed)
    params = toy.mlp_params(seed, widths=WIDTHS)
    for c in dead:
        params["layer0"]["kernel"] = params["layer0"]["kernel"].at[:, c].set(0)
        params["layer0"]["bias"] = params["layer0"]["bias"].at[c].set(0)
    candidate = {}
    for name, layer in params.items():
        factor = jnp.asarray(rng.uniform(-1, 1.5, layer["bias"].shape), jnp.float32)
        noise = jnp.asarray(0.3 * rng.normal(size=layer["kernel"].shape), jnp.float32)
        candidate[name] = {
            "kernel": layer["kernel"] * factor + noise,
            "bias": layer["bias"] * factor,
        }
    return params, candidate, toy.mlp_groups(params)


def vectors(params):
    return toy.channel_vectors(params)[0]


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.95])
def test_it_zeroes_what_leaves_its_half_space(epsilon):
    params, candidate, groups = problem(3, dead=(2,))
    factors = half_space_factor(
        groups, candidate, params, epsilon=epsilon, min_channels=0
    )
    seen = set()
    for factor, x, y in zip(factors, vectors(params), vectors(candidate), strict=True):
        expected = float(x @ x > 0 and x @ y >= epsilon * (x @ x))
        assert factor == expected
        seen.add(expected)
    assert seen == {0.0, 1.0}
    assert factors[2] == 0 and factors.dtype == jnp.float32


def test_only_where_it_is_told():
    params, candidate, groups = problem(3, dead=(2,))
    opposite = {k: {n: -v for n, v in layer.items()} for k, layer in params.items()}
    where = jnp.array([1, 0, 0, 1, 1, 0, 1, 0, 0], bool)
    factors = half_space_factor(groups, opposite, params, where=where, min_channels=0)
    np.testing.assert_array_equal(factors, 1.0 - np.asarray(where))


def test_the_minimum_keeps_the_largest():
    params = {"w": jnp.array([[1.0, 4.0, 2.0, 3.0, 0.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})

    def kept(signs, floor):
        candidate = {"w": jnp.array([signs], jnp.float32)}
        factors = half_space_factor(groups, candidate, params, min_channels=floor)
        return factors.astype(int).tolist()

    assert kept([-1, -1, -1, -1, 1], 0) == [0, 0, 0, 0, 0]
    assert kept([-1, -1, -1, -1, 1], 1) == [0, 1, 0, 0, 0]
    assert kept([-1, -1, -1, -1, 1], 3) == [0, 1, 1, 1, 0]
    # Enough are left: the minimum does nothing. The dead channel never counts.
    assert kept([1, -1, -1, -1, 1], 1) == [1, 0, 0, 0, 0]
    assert kept([1, -1, -1, -1, 1], {"d": 2}) == [1, 1, 0, 0, 0]
    assert kept([-1, -1, -1, -1, 1], jnp.asarray(2)) == [0, 1, 0, 1, 0]


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(0, 0.99),
    floor=st.integers(0, 4),
    dead=st.sets(st.integers(0, 4), max_size=3),
)
def test_laws(seed, epsilon, floor, dead):
    params, candidate, groups = problem(seed, dead)
    factors = half_space_factor(
        groups, candidate, params, epsilon=epsilon, min_channels=floor
    )
    point = scale_channels(groups, candidate, factors)
    alive, after = channels_alive(groups, params), channels_alive(groups, point)
    assert not np.any(after & ~alive)
    kept = {name: int(part.sum()) for name, part in groups.split(after).items()}
    for name, part in groups.split(alive).items():
        assert kept[name] >= min(floor, int(part.sum()))
    free = np.repeat([n > floor for n in kept.values()], list(groups.sizes.values()))
    for enough, x, y in zip(free, vectors(params), vectors(point), strict=True):
        if enough and y.any():
            # Never on the far side.
            assert x @ y >= epsilon * (x @ x) - 1e-6
    assert jnp.array_equal(point["layer2"]["kernel"], candidate["layer2"]["kernel"])


def test_bad_input():
    params, candidate, groups = problem(0)
    with pytest.raises(ValueError, match=r"epsilon must be a number in \[0, 1\)"):
        half_space_factor(groups, candidate, params, epsilon=1.0)
    with pytest.raises(TypeError, match="epsilon must be a number"):
        half_space_factor(groups, candidate, params, epsilon="much")
    with pytest.raises(ValueError, match="min_channels of dimension 'hidden0' is 9"):
        half_space_factor(groups, candidate, params, min_channels=9)
    with pytest.raises(ValueError, match="hidden0"):
        half_space_factor(groups, {"layer0": candidate["layer0"]}, {})
