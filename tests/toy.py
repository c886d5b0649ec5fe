"""Small parameter trees with groups, for the tests."""

import jax
import jax.numpy as jnp
import numpy as np

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


def line_groups(**sizes):
    """Groups whose dimensions are vectors of these sizes."""
    params = {name: jnp.ones(size) for name, size in sizes.items()}
    axes = {name: [sdp_jax.Member(name, 0)] for name in sizes}
    return sdp_jax.groups_from_axes(params, axes)


def run_strength(strength, steps, norms, floors=None, groups=None):
    """Thresholds by dimension name of so many updates, and the last state."""
    if groups is None:
        groups = line_groups(**{name: len(v) for name, v in norms.items()})
    floors = [(floors or {}).get(name, 0) for name in groups.sizes]
    vector, state = groups.join(norms), strength.init(groups, floors)
    update = jax.jit(lambda s, n: strength.update(s, n, groups, floors))
    out = []
    for _ in range(steps):
        thresholds, state = update(state, vector)
        out.append(groups.split(np.asarray(thresholds)))
    return out, state


def kill(groups, params, dead):
    """Sets whole channels to zero: numbers by dimension name."""
    alive = {name: np.ones(size) for name, size in groups.sizes.items()}
    for name, numbers in dead.items():
        alive[name][list(numbers)] = 0
    return sdp_jax.scale_channels(groups, params, groups.join(alive))


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


def loss(params, batch):
    x, y = batch
    return jnp.mean((mlp_apply(params, x) - y) ** 2)


def batch(seed=2, size=16, inputs=4, outputs=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, inputs)), dtype)
    y = jnp.asarray(rng.normal(size=(size, outputs)), dtype)
    return x, y
