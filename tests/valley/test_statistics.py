"""Running statistics: exact means, whatever the momentum."""

import chex
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax


class Net(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(not train, momentum=self.momentum)(x)
        return nn.Dense(2)(nn.relu(x))


def batches(sizes=(32, 32, 7)):
    rng = np.random.default_rng(0)
    return [jnp.asarray(3 + rng.normal(size=(n, 4)), jnp.float32) for n in sizes]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_is_the_mean_over_batches(momentum):
    net, data = Net(momentum), batches()
    variables = net.init(jax.random.key(0), data[0], True)

    def update(params, stats, batch):
        inputs = {"params": params, "batch_stats": stats}
        return net.apply(inputs, batch, True, mutable=["batch_stats"])[1]["batch_stats"]

    found = sdp_jax.reestimate_statistics(
        update, variables["params"], variables["batch_stats"], data
    )
    layer = variables["params"]["Dense_0"]
    inner = [np.asarray(x @ layer["kernel"] + layer["bias"], np.float64) for x in data]
    sizes = [len(x) for x in data]
    mean = np.average([x.mean(0) for x in inner], axis=0, weights=sizes)
    var = np.average([x.var(0) for x in inner], axis=0, weights=sizes)
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], mean, rtol=2e-3)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], var, rtol=2e-3)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, variables["batch_stats"])


def test_counters_are_carried_on():
    def forward(x):
        return hk.BatchNorm(True, True, 0.9)(x, is_training=True)

    net, data = hk.without_apply_rng(hk.transform_with_state(forward)), batches()
    params, state = net.init(None, data[0])
    for _ in range(200):  # Haiku corrects the bias of the first updates.
        _, state = net.apply(params, state, data[0])
    found = sdp_jax.reestimate_statistics(
        lambda p, s, batch: net.apply(p, s, batch)[1], params, state, data[:2]
    )
    mean = np.mean([x.mean(0) for x in data[:2]], axis=0)
    for name in ("average", "hidden"):
        got = found["batch_norm/~/mean_ema"][name]
        np.testing.assert_allclose(np.ravel(got), mean, rtol=1e-3)
    assert int(found["batch_norm/~/mean_ema"]["counter"]) == 201


@pytest.mark.parametrize(
    "update",
    [
        lambda params, stats, batch: stats,  # Inference mode: nothing is taken in.
        lambda params, stats, batch: stats + batch.mean(0),  # A sum.
        lambda params, stats, batch: stats**2 / 4 + batch.mean(0),
    ],
)
def test_what_is_no_moving_average_is_refused(update):
    with pytest.raises(ValueError, match="not an exponential moving average"):
        sdp_jax.reestimate_statistics(update, {}, jnp.zeros(4), batches())
