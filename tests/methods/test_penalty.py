"""What stands in front of a base: its factor, its count and its checks."""

import jax
import pytest

from sdp_jax.methods.penalty import penalty_in_front
from tests.toy import assert_close, mlp_grads, mlp_groups, mlp_params


def decay(grads, params, factor):
    return jax.tree.map(lambda g, p: g + factor * p, grads, params)


def test_the_factor_follows_its_schedule():
    params = mlp_params()
    tx = penalty_in_front("decay", mlp_groups(), lambda step: 0.5 * step, decay)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        grads = mlp_grads(params, step)
        found, state = update(grads, state, params)
        want = decay(grads, params, 0.5 * step)
        assert_close(found, want, rtol=1e-6)
        assert state.count == step + 1
    assert update._cache_size() == 1
    tx.init({})


def test_bad_input():
    params, groups = mlp_params(), mlp_groups()
    with pytest.raises(TypeError, match="groups must be"):
        penalty_in_front("decay", {}, 1.0, decay)
    with pytest.raises(ValueError, match="penalty must be a non-negative number"):
        penalty_in_front("decay", groups, -1.0, decay)
    tx = penalty_in_front("decay", groups, 1.0, decay)
    with pytest.raises(ValueError, match="decay needs the current parameters"):
        tx.update(params, tx.init(params))
