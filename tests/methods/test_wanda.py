"""Wanda per channel against loops over weights and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy

X = np.random.default_rng(0).normal(size=(9, 4))


def test_weights_times_the_root_mean_square(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    groups = toy.mlp_groups(params)
    batches = [jnp.asarray(X[:5]), jnp.asarray(X[5:])]
    found = sdp_jax.channel_activations(groups, toy.mlp_apply, params, batches)
    got = groups.split(methods.wanda_score()(groups, params, activations=found))
    h = X
    for i in range(2):
        layer, after = (
            params[f"layer{i}"],
            np.asarray(params[f"layer{i + 1}"]["kernel"]),
        )
        h = np.maximum(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
        want = [
            sum(abs(w) * np.sqrt(sum(a**2 for a in h[:, c]) / len(h)) for w in after[c])
            for c in range(h.shape[1])
        ]
        np.testing.assert_allclose(got[f"hidden{i}"], want, rtol=1e-10)


def test_each_layer_of_a_loop_has_its_own_norm(x64):
    rng = np.random.default_rng(1)
    params = {"in": rng.normal(size=(4, 6)), "up": rng.normal(size=(3, 6, 5))}
    params |= {"down": rng.normal(size=(3, 5, 6))}
    params = {k: jnp.asarray(v) for k, v in params.items()}

    def fn(p, x):
        def block(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return jax.lax.scan(block, x @ p["in"], (p["up"], p["down"]))[0].sum()

    groups = sdp_jax.find_groups(fn, params, jnp.asarray(X))
    found = sdp_jax.channel_activations(groups, fn, params, [jnp.asarray(X)])
    got = groups.split(methods.wanda_score()(groups, params, activations=found))
    x, want = X @ np.asarray(params["in"]), np.zeros(5)
    for up, down in zip(
        np.asarray(params["up"]), np.asarray(params["down"]), strict=True
    ):
        h = np.tanh(x @ up)
        want += abs(down).sum(1) * np.sqrt((h**2).mean(0))
        x = x + h @ down
    np.testing.assert_allclose(got["up"], want, rtol=1e-10)


def test_channels_that_no_weights_read_are_named():
    params = {k: jnp.ones((4, 2)) for k in "qk"}
    fn = lambda p, x: (x @ p["q"]) @ (x @ p["k"]).T  # noqa: E731
    groups = sdp_jax.find_groups(fn, params, jnp.asarray(X))
    found = sdp_jax.channel_activations(groups, fn, params, [jnp.asarray(X)])
    for score in (methods.wanda_score(), methods.flap_score()):
        with pytest.raises(ValueError, match=r"none read those of .*groups.without\('"):
            score(groups, params, activations=found)
