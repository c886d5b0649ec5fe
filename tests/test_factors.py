"""Channels that are removed, and the steps of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdp_jax
from sdp_jax.factors import remove_channels
from sdp_jax.tree import leaf_table
from tests import toy

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]


@given(
    keep=st.lists(st.integers(0, 1), min_size=11, max_size=11),
    param=st.sampled_from(DTYPES),
    step=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 99),
)
def test_what_goes_is_zero_and_what_stays_takes_its_own_step(keep, param, step, seed):
    params = toy.mlp_params(seed=seed, dtype=param)
    groups = toy.mlp_groups(params)
    steps = jax.tree.map(lambda x: 0.1 * jnp.cos(x).real.astype(step), params)
    found = remove_channels(groups, steps, params, jnp.asarray(keep, jnp.float32))
    gone = groups.split(np.asarray(keep) == 0)
    masks = {k: np.zeros(v.shape, bool) for k, v in leaf_table(params).items()}
    for name, m, _ in groups.producers:
        at = [slice(None)] * masks[m.path].ndim
        at[m.axis] = gone[name]
        masks[m.path][tuple(at)] = True
    for path, mask in masks.items():
        p, u, new = (leaf_table(tree)[path] for tree in (params, steps, found))
        after = np.asarray(jnp.asarray(p + new).astype(p.dtype))
        assert (after[mask] == 0).all()
        # Bit for bit what the base optimizer alone would have done.
        alone = np.asarray(jnp.asarray(p + u).astype(p.dtype))
        np.testing.assert_array_equal(after[~mask], alone[~mask])


def test_a_step_that_is_no_number_does_not_bring_channels_back():
    params = {"w": jnp.ones((2, 3))}
    groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
    steps = {"w": jnp.full((2, 3), jnp.nan)}
    found = remove_channels(groups, steps, params, jnp.array([1.0, 0.0, 1.0]))
    assert np.isnan((params["w"] + found["w"])[:, ::2]).all()
    np.testing.assert_array_equal((params["w"] + found["w"])[:, 1], 0)


def test_a_factor_for_each_channel_is_needed():
    params = {"w": jnp.ones((2, 3))}
    groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
    with pytest.raises(ValueError, match="one number for each of 3 channels"):
        remove_channels(groups, params, params, jnp.ones(2))
