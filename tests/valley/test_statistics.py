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

    found = sdp_jax.valley.reestimate_statistics(
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


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("updates", [1, 50])
def test_haiku_corrects_for_its_first_updates_and_it_does_not_matter(decay, updates):
    def forward(x):
        return hk.BatchNorm(True, True, decay)(x, is_training=True)

    net, data = hk.without_apply_rng(hk.transform_with_state(forward)), batches()
    params, state = net.init(None, data[0])
    for _ in range(updates):
        _, state = net.apply(params, state, data[0])
    found = sdp_jax.valley.reestimate_statistics(
        lambda p, s, batch: net.apply(p, s, batch)[1], params, state, data[:2]
    )
    for name, want in {
        "mean_ema": np.mean([x.mean(0) for x in data[:2]], axis=0),
        "var_ema": np.mean([x.var(0) for x in data[:2]], axis=0),
    }.items():
        for part in ("average", "hidden"):
            got = found[f"batch_norm/~/{name}"][part]
            np.testing.assert_allclose(np.ravel(got), want, rtol=1e-3)
        assert int(found[f"batch_norm/~/{name}"]["counter"]) == updates


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_at_any_scale(scale, momentum):
    data = [scale * x for x in batches((64, 64))]

    def update(params, var, batch):
        return momentum * var + (1 - momentum) * batch.var(0)

    found = sdp_jax.valley.reestimate_statistics(update, {}, jnp.ones(4), data)
    want = np.mean([np.asarray(x, np.float64).var(0) for x in data], axis=0)
    np.testing.assert_allclose(found, want, rtol=2e-3)


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
        sdp_jax.valley.reestimate_statistics(update, {}, jnp.zeros(4), batches())


def test_half_precision_statistics_are_refused():
    with pytest.raises(ValueError, match="dtype bfloat16, too coarse"):
        sdp_jax.valley.reestimate_statistics(
            lambda params, stats, batch: stats,
            {},
            jnp.zeros(4, jnp.bfloat16),
            batches(),
        )
