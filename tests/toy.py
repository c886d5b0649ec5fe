"""Small parameter trees with groups, for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdp_jax


def mlp_params(seed=0, dtype=jnp.float32, widths=(4, 6, 5, 3)):
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=(a, b)) / a**0.5, dtype),
            "bias": jnp.asarray(0.1 * rng.normal(size=b), dtype),
        }
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }


def mlp_axes(hidden=2, prefix=""):
    return {
        f"hidden{i}": [
            sdp_jax.Member(f"{prefix}layer{i}/kernel", 1),
            sdp_jax.Member(f"{prefix}layer{i}/bias", 0),
            sdp_jax.Member(f"{prefix}layer{i + 1}/kernel", 0, "consumer"),
        ]
        for i in range(hidden)
    }


def mlp_groups(params=None, hidden=2):
    params = mlp_params() if params is None else params
    return sdp_jax.groups_from_axes(params, mlp_axes(hidden))


def mlp_apply(params, x):
    for i in range(len(params)):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
        if i < len(params) - 1:
            x = jax.nn.relu(x)
    return x


def mlp_grads(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )


def channel_vectors(params, hidden=2):
    """One float64 vector per channel, dimension after dimension, and the rest."""
    channels = []
    for i in range(hidden):
        kernel = np.asarray(params[f"layer{i}"]["kernel"], np.float64)
        bias = np.asarray(params[f"layer{i}"]["bias"], np.float64)
        channels += [np.append(kernel[:, c], bias[c]) for c in range(len(bias))]
    rest = jax.tree.leaves(params[f"layer{hidden}"])
    return channels, [np.asarray(v, np.float64) for v in rest]


def make_step(tx):
    """``(params, state, grads) -> (params, state)``."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def loss(params, batch):
    x, y = batch
    return jnp.mean((mlp_apply(params, x) - y) ** 2)


def batch(seed=2, size=16, inputs=4, outputs=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, inputs)), dtype)
    y = jnp.asarray(rng.normal(size=(size, outputs)), dtype)
    return x, y
