"""The Taylor expansion in activations against removing channels by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3, 4))
PARAMS = {"a": RNG.normal(size=(4, 5)), "b": RNG.normal(size=(5, 2))}


def hidden(params, x):
    return jnp.tanh(x @ params["a"])


def head(params, h):
    return jnp.mean(jnp.square(h @ params["b"] - 1))


def loss(params, x):
    return head(params, hidden(params, x))


def activations(**options):
    params = {k: jnp.asarray(v) for k, v in PARAMS.items()}
    groups = sdp_jax.find_groups(loss, params, jnp.asarray(X))
    batches = [jnp.asarray(X[:4]), jnp.asarray(X[4:])]
    options = {"gradients": True, "per_example": True} | options
    found = sdp_jax.channel_activations(groups, loss, params, batches, **options)
    return groups, params, found


def oracle(params):
    """|Σ ∂L/∂z · z| example by example, feature map by feature map."""
    total = np.zeros(5)
    for x in X:
        z = hidden(params, jnp.asarray(x)[None])
        g = np.asarray(jax.grad(lambda z: head(params, z))(z))
        for c in range(5):
            total[c] += abs(sum(g[0, m, c] * float(z[0, m, c]) for m in range(3)))
    return total / len(X)


def test_gradient_times_activation(x64):
    groups, params, found = activations()
    want = oracle(params)
    score = methods.activation_taylor(normalize=False)
    got = groups.split(score(groups, params, activations=found))["a"]
    np.testing.assert_allclose(got, want, rtol=1e-10)
    score = methods.activation_taylor()
    got = groups.split(score(groups, params, activations=found))["a"]
    np.testing.assert_allclose(got, want / np.linalg.norm(want), rtol=1e-10)


def test_to_first_order_it_is_the_change_of_the_loss(x64):
    """A little of a channel goes, in one example."""
    groups, params, _ = activations()
    x = jnp.asarray(X[:1])
    found = sdp_jax.channel_activations(groups, loss, params, [x], gradients=True)
    h, step = hidden(params, x), 1e-6
    for c in range(5):
        less = head(params, h.at[..., c].mul(1 - step))
        change = abs(less - head(params, h)) / step
        got = groups.split(found.gradients)["a"][c]
        np.testing.assert_allclose(got, change, rtol=1e-4)


def test_bad_input():
    groups, params, found = activations(gradients=False)
    with pytest.raises(ValueError, match="needs gradients of a loss: .*gradients=True"):
        methods.activation_taylor()(groups, params, activations=found)
