"""Random scores: uniform, told by the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy

KEY = jax.random.key(3)


def test_one_draw_for_each_channel_told_by_the_key():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    score = methods.random_score(KEY)
    found = score(groups, params)
    assert found.shape == (11,)
    assert len(set(found.tolist())) == 11
    # The parameters have no say, nor has the step at which it is asked.
    other = methods.random_score(KEY)(groups, toy.mlp_params(seed=9))
    np.testing.assert_array_equal(found, other)
    np.testing.assert_array_equal(found, score(groups, params))
    different = methods.random_score(jax.random.key(4))(groups, params)
    assert np.all(found != different)


def test_uniform():
    params = {"w": jnp.ones((1, 4000))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    draws = np.sort(methods.random_score(KEY)(groups, params))
    assert 0 <= draws[0] and draws[-1] < 1
    # Kolmogorov and Smirnov: beyond 1.63/√n with a probability of 1 %.
    grid = np.arange(1, 4001) / 4000
    assert np.max(np.abs(draws - grid)) < 1.63 / 4000**0.5


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
def test_both_kinds_of_keys_and_bfloat16(key):
    params = toy.mlp_params(dtype=jnp.bfloat16)
    scores = methods.random_score(key)(toy.mlp_groups(params), params)
    assert scores.dtype == jnp.float32


def test_prunes_the_same_channels_at_every_step():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    score = methods.random_score(KEY)
    host = methods.remove_lowest(groups, sdp_jax.target_sparsity(0.5, 0, 1), score)
    update = jax.jit(host.update)
    state, now = host.init(params), params
    order = np.argsort(score(groups, params))
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.ones_like, now), state, now)
        now = jax.tree.map(jnp.add, now, updates)
        dead = ~np.asarray(sdp_jax.channels_alive(groups, now))
        # round(11 / 2) = 6 channels; the floor of 1 stands in nobody's way here.
        assert set(np.flatnonzero(dead)) == set(order[:6])
    assert update._cache_size() == 1


@pytest.mark.parametrize("key", [0, None, jnp.ones(2), jax.random.split(KEY, 2)])
def test_refuses_what_is_no_key(key):
    with pytest.raises(TypeError, match="key must be one key"):
        methods.random_score(key)
