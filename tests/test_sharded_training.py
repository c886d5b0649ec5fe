"""Training on eight devices in every layout: the parameters of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sdp_jax

STEPS = 6
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32)
WORDS = jnp.asarray(RNG.integers(0, 16, (8, 6)))
LABELS = jnp.asarray(RNG.integers(0, 4, 8))


def convolutional(p, x):
    for name in ("first", "second"):
        x = lax.conv_general_dilated(
            x, p[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x - x.mean((0, 1, 2))
        x = x * lax.rsqrt((x * x).mean((0, 1, 2)) + 1e-5) * p[f"{name}_scale"]
        x = jax.nn.relu(x + p[f"{name}_bias"])
    return x.mean((1, 2)) @ p["out"]


def transformer(p, words):
    x = p["embed"][words]
    y = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["norm"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])
    x = x + jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"]
    return x.mean(1) @ p["out"]


MODELS = {
    "convolutional": (
        convolutional,
        IMAGES,
        {"first": (3, 3, 3, 16), "second": (3, 3, 16, 8), "out": (8, 4)}
        | {
            f"{n}_{k}": (c,)
            for n, c in (("first", 16), ("second", 8))
            for k in ("scale", "bias")
        },
    ),
    "transformer": (
        transformer,
        WORDS,
        {"embed": (16, 8), "norm": (8,), "o": (4, 4, 8), "out": (8, 4)}
        | {n: (8, 4, 4) for n in "qkv"}
        | {"up": (8, 16), "up_bias": (16,), "down": (16, 8)},
    ),
}
LAYOUTS = {
    "fsdp": ("data",),
    "both": ("data", "model"),
}


@functools.cache
def made(name):
    """Groups, initial parameters and a step, the same for all layouts."""
    model, inputs, sizes = MODELS[name]
    rng = np.random.default_rng(1)
    params = {
        k: jnp.asarray(rng.normal(size=s) * np.prod(s[:-1]) ** -0.5, jnp.float32)
        if len(s) > 1
        else jnp.ones(s)
        for k, s in sizes.items()
    }
    groups = sdp_jax.find_groups(model, params, inputs)
    tx = sdp_jax.altsdp(
        optax.adam(0.01),
        groups,
        strength=sdp_jax.target_sparsity(0.4, 0, STEPS - 2, target="params"),
    )

    def step(params, state, x, labels):
        def loss(p):
            logits = model(p, x)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return groups, params, tx, jax.jit(step)


def trained(name, place, batch):
    _, params, tx, step = made(name)
    params = place(params)
    state = tx.init(params)
    inputs = batch(MODELS[name][1]), batch(LABELS)
    for _ in range(STEPS):
        params, state = step(params, state, *inputs)
    return jax.tree.map(np.asarray, params)


@functools.cache
def alone(name):
    return trained(name, lambda x: x, lambda x: x)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(name, layout):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(params):
        """One axis of each leaf for each of the mesh's that shall share it."""

        def spec(leaf):
            left, parts = list(LAYOUTS[layout]), [None] * leaf.ndim
            for axis in reversed(range(leaf.ndim)):
                if left and leaf.shape[axis] % mesh.shape[left[-1]] == 0:
                    parts[axis] = left.pop()
            return NamedSharding(mesh, P(*parts))

        return jax.device_put(params, jax.tree.map(spec, params))

    def batch(x):
        return jax.device_put(x, NamedSharding(mesh, P("data")))

    with jax.set_mesh(mesh):
        found = trained(name, place, batch)
    groups, *_ = made(name)
    alive = np.asarray(sdp_jax.channels_alive(groups, alone(name)))
    assert 0 < alive.sum() < alive.size
    np.testing.assert_array_equal(sdp_jax.channels_alive(groups, found), alive)
    for key, leaf in found.items():
        np.testing.assert_allclose(leaf, alone(name)[key], rtol=1e-3, atol=1e-4)
