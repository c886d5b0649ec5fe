"""What a number per channel does to the entries of its members."""

import jax.numpy as jnp
import numpy as np

import sdp_jax
from sdp_jax.entries import add_decay, entry_sums, keep_channels


def case():
    """Two channels along each axis of one matrix, and one column that is nobody's."""
    params = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "v": jnp.ones((2, 2))}
    rows = [sdp_jax.Member("w", 0), sdp_jax.Member("v", 0, "consumer")]
    columns = [sdp_jax.Member("w", 1, "consumer", offset=1, period=2)]
    columns += [sdp_jax.Member("v", 1)]
    axes = {"rows": rows, "columns": columns}
    return params, sdp_jax.groups_from_axes(params, axes, sizes={"columns": 2})


def test_sums_over_the_channels_of_an_entry():
    _, groups = case()
    values = jnp.array([1.0, 2.0, 10.0, 20.0])
    found = entry_sums(groups, values, lambda d, m: True)
    np.testing.assert_array_equal(
        jnp.broadcast_to(found["w"], (2, 3)), [[1, 11, 21], [2, 12, 22]]
    )
    found = entry_sums(groups, values, lambda d, m: m.role == "producer")
    np.testing.assert_array_equal(found["w"], [[1], [2]])
    np.testing.assert_array_equal(found["v"], [[10, 20]])


def test_zeros_are_exact_whatever_was_there():
    params, groups = case()
    params["w"] = params["w"].at[1, 0].set(jnp.nan)
    keep = jnp.array([True, False, True, False])
    found = keep_channels(groups, params, keep)
    np.testing.assert_array_equal(found["w"], [[1, 2, 3], [0, 0, 0]])
    np.testing.assert_array_equal(found["v"], [[1, 0], [1, 0]])
    found = keep_channels(groups, params, keep, "consumer")
    np.testing.assert_array_equal(found["w"], [[1, 2, 0], [np.nan, 5, 0]])
    np.testing.assert_array_equal(found["v"], [[1, 1], [0, 0]])
    mask = {k: np.ones(v.shape, bool) for k, v in params.items()}
    assert keep_channels(groups, mask, keep)["w"].dtype == bool


def test_decay_of_every_channel_of_an_entry():
    params, groups = case()
    grads = {k: jnp.ones(v.shape, jnp.bfloat16) for k, v in params.items()}
    params["v"] = params["v"].at[0, 0].set(jnp.inf)
    rates = jnp.array([1.0, 2.0, 0.0, 4.0])
    found = add_decay(groups, grads, params, rates, lambda d, m: d.name == "columns")
    np.testing.assert_array_equal(found["w"], [[1, 1, 13], [1, 1, 25]])
    np.testing.assert_array_equal(found["v"], [[1, 5], [1, 5]])
    assert found["w"].dtype == jnp.bfloat16
