"""The half-space projection against loops over channels."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax.channels import channels_alive, scale_channels
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


def channel(params, layer, c):
    """All producers of a channel as one float64 vector."""
    layer = params[f"layer{layer}"]
    kernel = np.asarray(layer["kernel"], np.float64)[:, c]
    return np.append(kernel, np.float64(layer["bias"][c]))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.95])
def test_it_zeroes_what_leaves_its_half_space(epsilon):
    params, candidate, groups = problem(3, dead=(2,))
    factors = half_space_factor(groups, candidate, params, epsilon=epsilon, floor=0)
    seen = set()
    for i in range(2):
        for c in range(groups.sizes[f"hidden{i}"]):
            x, y = channel(params, i, c), channel(candidate, i, c)
            expected = float(x @ x > 0 and x @ y >= epsilon * (x @ x))
            assert factors[f"hidden{i}"][c] == expected
            seen.add(expected)
    assert seen == {0.0, 1.0}
    assert factors["hidden0"][2] == 0 and factors["hidden0"].dtype == jnp.float32


def test_only_where_it_is_told():
    params, candidate, groups = problem(3, dead=(2,))
    opposite = {k: {n: -v for n, v in layer.items()} for k, layer in params.items()}
    where = jnp.array([1, 0, 0, 1, 1, 0, 1, 0, 0], bool)
    factors = half_space_factor(groups, opposite, params, where=where, floor=0)
    joined = np.concatenate([factors["hidden0"], factors["hidden1"]])
    np.testing.assert_array_equal(joined, 1.0 - np.asarray(where))


def test_the_floor_keeps_the_largest():
    params = {"w": jnp.array([[1.0, 4.0, 2.0, 3.0, 0.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.producer("w", 1)]})

    def kept(signs, floor):
        candidate = {"w": jnp.array([signs], jnp.float32)}
        factors = half_space_factor(groups, candidate, params, floor=floor)
        return factors["d"].astype(int).tolist()

    assert kept([-1, -1, -1, -1, 1], 0) == [0, 0, 0, 0, 0]
    assert kept([-1, -1, -1, -1, 1], 1) == [0, 1, 0, 0, 0]
    assert kept([-1, -1, -1, -1, 1], 3) == [0, 1, 1, 1, 0]
    # Enough are left: the floor does nothing. The dead channel never counts.
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
    factors = half_space_factor(groups, candidate, params, epsilon=epsilon, floor=floor)
    point = scale_channels(groups, candidate, factors)
    alive = channels_alive(groups, params)
    after = channels_alive(groups, point)
    for i, name in enumerate(groups.sizes):
        kept = int(after[name].sum())
        assert kept >= min(floor, int(alive[name].sum()))
        assert not np.any(after[name] & ~alive[name])
        for c in range(groups.sizes[name]):
            x, y = channel(params, i, c), channel(point, i, c)
            if kept > floor and y.any():
                # Never on the far side.
                assert x @ y >= epsilon * (x @ x) - 1e-6
    assert jnp.array_equal(point["layer2"]["kernel"], candidate["layer2"]["kernel"])


def test_bad_input():
    params, candidate, groups = problem(0)
    with pytest.raises(ValueError, match=r"epsilon must be a number in \[0, 1\)"):
        half_space_factor(groups, candidate, params, epsilon=1.0)
    with pytest.raises(TypeError, match="epsilon must be a number"):
        half_space_factor(groups, candidate, params, epsilon="much")
    with pytest.raises(ValueError, match="floor of dimension 'hidden0' is 9"):
        half_space_factor(groups, candidate, params, floor=9)
    with pytest.raises(ValueError, match="hidden0"):
        half_space_factor(groups, {"layer0": candidate["layer0"]}, {})
