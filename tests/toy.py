"""Small parameter trees with groups, for the tests."""

import math

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


def channel_vectors(params, hidden=2):
    """One float64 vector per channel, dimension after dimension, and the rest."""
    channels = []
    for i in range(hidden):
        kernel = np.asarray(params[f"layer{i}"]["kernel"], np.float64)
        bias = np.asarray(params[f"layer{i}"]["bias"], np.float64)
        channels += [np.append(kernel[:, c], bias[c]) for c in range(len(bias))]
    rest = jax.tree.leaves(params[f"layer{hidden}"])
    return channels, [np.asarray(v, np.float64) for v in rest]


def living_entries(params, channels):
    """For each channel 0 where an entry reads a channel that is zero, else 1."""
    ones = jax.tree.map(lambda p: np.ones(p.shape), params)
    first = ones["layer0"]["bias"].size
    ones["layer1"]["kernel"][[not x.any() for x in channels[:first]]] = 0
    return channel_vectors(ones)[0]


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


def wide(tree):
    """A copy of a tree by NumPy, in float64."""
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def channel_entries(tree):
    """For each channel of the two hidden layers its kernel column and its bias."""
    for i in (0, 1):
        layer = tree[f"layer{i}"]
        for c in range(layer["bias"].shape[0]):
            yield i, c, [layer["kernel"][:, c], layer["bias"][c : c + 1]]


def channel_l1(tree):
    """For the two hidden layers the L1 norms of their channels."""
    norms = [[], []]
    for i, _, parts in channel_entries(tree):
        norms[i].append(sum(np.abs(x).sum() for x in parts))
    return norms


def increment(r, n, a=0.05, u=0.25):
    """The ranking increment as the paper of SPP writes it."""
    alpha = math.log(2 / u) / n
    n1 = -math.log(u) / alpha
    if r < n1:
        return a * math.exp(-alpha * r)
    return 2 * u * a - a * math.exp(-alpha * (2 * n1 - r))


def assert_close(a, b, **tolerance):
    """Two trees agree, leaf by leaf."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def pq_reference(w, p, q):
    """The PQ Index by its definition, number by number."""
    w = [abs(float(x)) for x in np.ravel(w)]
    d = len(w)
    if d == 0 or max(w) == 0:
        return 0.0
    w = [x / max(w) for x in w]
    first = sum(x**p for x in w) ** (1 / p)
    second = sum(x**q for x in w) ** (1 / q)
    return 1 - d ** (1 / q - 1 / p) * first / second
