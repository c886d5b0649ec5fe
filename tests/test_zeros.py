import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdp_jax.channels import channels_alive
from sdp_jax.tree import leaf_table
from sdp_jax.zeros import at_hand, look_along, zero_channels
from tests import toy


def sharded(x):
    mesh = jax.make_mesh((8,), ("data",))
    return jax.device_put(x, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_lines(near, dtype, monkeypatch):
    if not near:
        monkeypatch.setattr("sdp_jax.zeros.at_hand", lambda leaf: False)
    leaf = jnp.ones((3, 4), dtype).at[1].set(0).at[:, 2].set(0)
    leaf = leaf.at[0, 2].set(-0.0)
    rows, columns, broken = look_along(
        [leaf, leaf, leaf.at[0, 0].set(jnp.nan)], [0, 1, 1]
    )
    np.testing.assert_array_equal(rows.zero, [False, True, False])
    np.testing.assert_array_equal(columns.zero, [False, False, True, False])
    assert [bool(line.nan) for line in (rows, columns, broken)] == [False, False, True]


@pytest.mark.parametrize("near", [True, False])
def test_channels(near, monkeypatch):
    if not near:
        monkeypatch.setattr("sdp_jax.zeros.at_hand", lambda leaf: False)
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    dead = toy.kill(groups, params, {"hidden0": (1, 4), "hidden1": (0,)})
    found = zero_channels(groups, leaf_table(dead))
    np.testing.assert_array_equal(found, ~np.asarray(channels_alive(groups, dead)))
    dead["layer1"]["bias"] = dead["layer1"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="'layer1/bias' contains NaN"):
        zero_channels(groups, leaf_table(dead))


def test_what_is_at_hand():
    assert (
        at_hand(np.ones(3)) and at_hand(jnp.ones(3)) and at_hand(sharded(jnp.ones(8)))
    )
    assert not at_hand(jax.random.key(0)) and not at_hand(3.0)
    jax.jit(lambda x: pytest.fail("at hand") if at_hand(x) else x)(jnp.ones(3))
