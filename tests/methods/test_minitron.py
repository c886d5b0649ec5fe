"""Minitron's importance against sums over all activations of all examples."""

import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy

X = np.random.default_rng(0).normal(size=(5, 7, 4))  # Examples, tokens, features.


def activations(dtype=jnp.float64, **options):
    params = toy.mlp_params(dtype=dtype)
    groups = toy.mlp_groups(params)
    batches = [jnp.asarray(X[:2], dtype), jnp.asarray(X[2:], dtype)]
    found = sdp_jax.channel_activations(
        groups, toy.mlp_apply, params, batches, **options
    )
    h, hidden = X, {}
    for i in range(2):
        layer = params[f"layer{i}"]
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        h = np.maximum(h, 0)
        hidden[f"hidden{i}"] = h
    return groups, params, found, hidden


AGGREGATE = {
    "mean": lambda x, axis: abs(x).mean(axis),
    "l2": lambda x, axis: np.sqrt((x**2).mean(axis)),
    "variance": lambda x, axis: x.var(axis),
}


@pytest.mark.parametrize("batch", AGGREGATE)
@pytest.mark.parametrize("positions", AGGREGATE)
def test_aggregation(x64, batch, positions):
    groups, params, found, hidden = activations(per_example=True)
    score = methods.minitron_score(over_batch=batch, over_positions=positions)
    got = groups.split(score(groups, params, activations=found))
    for name, h in hidden.items():
        if batch == positions:
            want = AGGREGATE[batch](h, (0, 1))
        else:
            want = AGGREGATE[batch](AGGREGATE[positions](h, 1), 0)
        np.testing.assert_allclose(got[name], want, rtol=1e-10)


def test_heads_have_the_norm_of_their_output(x64):
    rng = np.random.default_rng(1)
    params = {"v": rng.normal(size=(4, 3, 2)), "o": rng.normal(size=(3, 2, 4))}
    params = {k: jnp.asarray(v) for k, v in params.items()}

    def fn(p, x):
        heads = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["v"]))
        return jnp.einsum("bthk,hkd->btd", heads, p["o"])

    groups = sdp_jax.find_groups(fn, params, jnp.asarray(X))
    found = sdp_jax.channel_activations(groups, fn, params, [jnp.asarray(X)])
    score = methods.minitron_score(over_batch="l2", over_positions="l2")
    heads = np.tanh(np.einsum("btd,dhk->bthk", X, params["v"]))
    # ‖head‖₂, squared, over all tokens; each of its two values counts.
    norm = np.sqrt((heads**2).sum(3).mean((0, 1)) / 2)
    (name,) = [d.name for d in groups if d.size == 3]
    rest = groups.without(*(d.name for d in groups if d.size != 3))
    np.testing.assert_allclose(score(rest, params, activations=found), norm, rtol=1e-10)
    assert list(rest.sizes) == [name]


def test_bad_input():
    with pytest.raises(ValueError, match="over_batch is 'max'; use one of"):
        methods.minitron_score(over_batch="max")
    with pytest.raises(ValueError, match="over_positions is 2"):
        methods.minitron_score(over_positions=2)
    groups, params, found, _ = activations(jnp.float32)
    with pytest.raises(ValueError, match="per_example=True"):
        methods.minitron_score()(groups, params, activations=found)
    with pytest.raises(ValueError, match="minitron_score needs activations.*NoneType"):
        methods.minitron_score()(groups, params)
    other = toy.line_groups(hidden0=6, other=2)
    with pytest.raises(ValueError, match="of 0 channels of dimension 'other'.* have 2"):
        methods.minitron_score()(other, params, activations=found)
