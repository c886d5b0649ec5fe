"""What all scores have in common."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.methods.score import (
    check_score,
    check_scores,
    need_gradients,
    producer_entries,
    unit,
)
from tests import toy


def test_scores_are_a_vector_or_one_for_each_name():
    groups = toy.mlp_groups()
    parts = {"hidden1": np.arange(5), "hidden0": np.arange(6) + 10}
    vector = check_scores(groups, parts)
    assert vector.dtype == jnp.float32
    assert vector.tolist() == [10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(check_scores(groups, vector), vector)
    with pytest.raises(ValueError, match=r"each of the 11 channels.* shape \(6,\)"):
        check_scores(groups, np.ones(6))
    with pytest.raises(ValueError, match=r"no use for \['more'\].*'more': \(1,\)"):
        check_scores(groups, parts | {"more": np.ones(1)})
    with pytest.raises(ValueError, match=r"'hidden1' has 5 channels.*shape \(4,\)"):
        check_scores(groups, parts | {"hidden1": np.ones(4)})


def test_what_is_refused():
    with pytest.raises(TypeError, match="score must be a function .* got 3"):
        check_score(3)
    with pytest.raises(ValueError, match="mine needs gradients"):
        need_gradients(None, "mine")
    assert need_gradients({}, "mine") == {}


def test_producer_entries():
    assert producer_entries(toy.mlp_groups()).tolist() == [5] * 6 + [7] * 5


def test_unit_of_extremes():
    np.testing.assert_allclose(unit(jnp.array([3.0, -4.0])), [0.6, -0.8], rtol=1e-6)
    # Squares of small numbers vanish.
    tiny = unit(jnp.array([3e-30, 4e-30]))
    np.testing.assert_allclose(tiny, [0.6, 0.8], rtol=1e-6)
    assert not unit(jnp.zeros(3)).any()
    found = unit(jnp.array([3.0, jnp.nan, 4.0]))
    np.testing.assert_allclose(found, [0.6, np.nan, 0.8], rtol=1e-6)
