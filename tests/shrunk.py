"""Three small networks, trained with and without cuts on the way."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdp_jax
from sdp_jax.channels import channels_alive

STEPS = 14
CUTS = (5, 8, 12)


class Network(NamedTuple):
    """``loss(variables, batch) -> (loss, statistics)``, and where it starts."""

    loss: Any
    params: Any
    stats: Any
    batches: list[Any]


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))


def convolutional(seed=0):
    """Two convolutions with batch normalisation."""
    rng = np.random.default_rng(seed)
    widths = (3, 8, 6)
    params, stats = {"head": _normal(rng, 6, 4)}, {}
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        params[f"conv{i}"] = _normal(rng, 3, 3, a, b)
        params[f"scale{i}"] = jnp.asarray(1 + 0.3 * rng.normal(size=b))
        params[f"shift{i}"] = jnp.asarray(0.1 * rng.normal(size=b))
        stats[f"mean{i}"], stats[f"var{i}"] = jnp.zeros(b), jnp.ones(b)

    def loss(variables, batch):
        (x, y), p, old = batch, variables["params"], variables["batch_stats"]
        new = {}
        for i in range(2):
            form = ("NHWC", "HWIO", "NHWC")
            kernel = p[f"conv{i}"]
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=form
            )
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            for name, value in (("mean", mean), ("var", var)):
                key = f"{name}{i}"
                new[key] = 0.9 * old[key] + 0.1 * value
            x = (x - mean) / jnp.sqrt(var + 1e-5) * p[f"scale{i}"] + p[f"shift{i}"]
            x = jax.nn.relu(x)
        logits = x.mean((1, 2)) @ p["head"]
        return jnp.mean((logits - y) ** 2), {"batch_stats": new}

    batches = [
        (jnp.asarray(rng.normal(size=(4, 5, 5, 3))), _normal(rng, 4, 4))
        for _ in range(STEPS)
    ]
    return Network(loss, params, stats, batches)


def transformer(seed=0):
    """A block of two heads and a multi-layer perceptron behind layer norms."""
    rng = np.random.default_rng(seed)
    width, heads, inner = 8, 2, 4
    params = {
        "embed": _normal(rng, 5, width),
        "qkv": _normal(rng, width, 3, heads, inner),
        "out": _normal(rng, heads, inner, width),
        "up": _normal(rng, width, 12),
        "bias": jnp.asarray(0.1 * rng.normal(size=12)),
        "down": _normal(rng, 12, width),
        "head": _normal(rng, width, 3),
    }
    for name in ("first", "second", "last"):
        params[f"{name}_scale"] = jnp.asarray(1 + 0.2 * rng.normal(size=width))

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def loss(variables, batch):
        (x, y), p = batch, variables["params"]
        x = x @ p["embed"]
        qkv = jnp.einsum("bnd,dkhe->kbnhe", norm(x, p["first_scale"]), p["qkv"])
        weights = jax.nn.softmax(jnp.einsum("bnhe,bmhe->bhnm", qkv[0], qkv[1]))
        x = x + jnp.einsum("bhnm,bmhe,hed->bnd", weights, qkv[2], p["out"])
        hidden = jax.nn.gelu(norm(x, p["second_scale"]) @ p["up"] + p["bias"])
        x = x + hidden @ p["down"]
        logits = norm(x, p["last_scale"]) @ p["head"]
        return jnp.mean((logits - y) ** 2), {"batch_stats": variables["batch_stats"]}

    batches = [
        (jnp.asarray(rng.normal(size=(3, 4, 5))), _normal(rng, 3, 4, 3))
        for _ in range(STEPS)
    ]
    return Network(loss, params, {}, batches)


def scanned(seed=0):
    """Three equal blocks, stacked in a scan."""
    rng = np.random.default_rng(seed)
    params = {
        "in": _normal(rng, 5, 8),
        "up": jnp.stack([_normal(rng, 8, 12) for _ in range(3)]),
        "down": jnp.stack([_normal(rng, 12, 8) for _ in range(3)]),
        "out": _normal(rng, 8, 3),
    }

    def loss(variables, batch):
        (x, y), p = batch, variables["params"]
        statistics = {"batch_stats": variables["batch_stats"]}

        def block(x, layer):
            return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

        layers = {k: p[k] for k in ("up", "down")}
        x, _ = jax.lax.scan(block, x @ p["in"], layers)
        return jnp.mean((x @ p["out"] - y) ** 2), statistics

    batches = [
        (jnp.asarray(rng.normal(size=(6, 5))), _normal(rng, 6, 3)) for _ in range(STEPS)
    ]
    return Network(loss, params, {}, batches)


NETWORKS = {
    "convolutional": convolutional,
    "transformer": transformer,
    "scanned": scanned,
}


def make_step(loss, tx):
    """``(variables, state, batch) -> (variables, state, loss)`` under jit."""

    def step(variables, state, batch):
        def of_params(params):
            return loss({**variables, "params": params}, batch)

        params = variables["params"]
        (value, stats), grads = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, **stats}, state, value

    return jax.jit(step)


def groups_of(network):
    variables = {"params": network.params, "batch_stats": network.stats}
    return sdp_jax.find_groups(network.loss, variables, network.batches[0])


def train(network, make_tx, cuts=(), groups=None, patience=0):
    """Trains, and cuts what is zero at some steps.

    Returns the shrinker, variables, state and losses, and for each cut its step and how
    many channels went.
    """
    groups = groups_of(network) if groups is None else groups
    shrinker = sdp_jax.Shrinker(groups, STEPS, patience=patience)
    variables = {"params": network.params, "batch_stats": network.stats}
    tx = make_tx(groups.at("params"))
    state, losses, made = tx.init(network.params), [], []
    step = make_step(network.loss, tx)
    for n, batch in enumerate(network.batches, start=1):
        variables, state, loss = step(variables, state, batch)
        losses.append(float(loss))
        cut = shrinker.now(n, variables) if n in cuts else None
        if cut is not None:
            made.append((n, cut.dense.num_channels - cut.groups.num_channels))
            variables, state = cut.take((variables, state))
            small = sdp_jax.narrow(network.loss, shrinker.cut)
            step = make_step(small, make_tx(shrinker.groups.at("params")))
    return shrinker, variables, state, losses, made


def assert_shrinks_exactly(network, make_tx, cuts=CUTS, patience=0, tolerance=1e-9):
    """A run that shrinks is the run that does not."""
    groups = groups_of(network)
    _, dense, dense_state, dense_losses, _ = train(network, make_tx, groups=groups)
    shrinker, small, state, losses, made = train(
        network, make_tx, cuts, groups, patience
    )
    assert sum(count for _, count in made) >= 3 and made[0][0] < STEPS - 1
    np.testing.assert_allclose(losses, dense_losses, rtol=tolerance, atol=tolerance)
    # What was cut stayed zero, and the rest is the same.
    gone = np.ones(groups.num_channels, bool)
    gone[shrinker.cut.kept_channels] = False
    assert not np.any(gone & np.asarray(channels_alive(groups, dense)))
    for have, want in ((small, dense), (state, dense_state)):
        want = shrinker.cut.take(want) if jax.tree.leaves(want) else want
        chex.assert_trees_all_equal_shapes_and_dtypes(have, want)
        chex.assert_trees_all_close(have, want, rtol=tolerance, atol=tolerance)
