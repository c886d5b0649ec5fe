"""Zeros are followed through what functions of one channel do at zero."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sdp_jax
from tests import promise

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
SHAPES = {"a": (3, 8), "b": (8, 2)}
TINY = jnp.finfo(jnp.float32).eps


def quantised(x, bits=4):
    """Symmetric fake quantisation with a straight-through gradient."""
    top = 2.0 ** (bits - 1) - 1
    scale = jnp.maximum(jnp.max(jnp.abs(x)), TINY) / top
    rounded = jnp.clip(jnp.round(x / scale), -top, top) * scale
    return x + jax.lax.stop_gradient(rounded - x)


KEEPS = {
    "relu6": jax.nn.relu6,
    "clip": lambda y: jnp.clip(y, -1, 1),
    "clip of one side": lambda y: jnp.minimum(y, 0.3),
    "clamp": lambda y: jax.lax.clamp(-0.2, y, 0.3),
    "hard tanh": jax.nn.hard_tanh,
    "hard swish": jax.nn.hard_swish,
    "whole numbers and back": lambda y: jnp.round(3 * y).astype(jnp.int8) / 3.0,
    "sign above": lambda y: jnp.where(y > 0.1, jnp.sign(y), y),
    "the other case": lambda y: jnp.where(jnp.abs(y) > 0.1, 1.0, y),
    "full": lambda y: jnp.minimum(y, jnp.full(y.shape, 0.2)),
    "remainder": lambda y: jnp.floor(y * 4) / 4,
    "quantised": quantised,
}
LOSES = {
    "above": lambda y: jnp.maximum(y, 0.1),
    "clip above zero": lambda y: jnp.clip(y, 0.1, 1.0),
    "shift": lambda y: y + 0.1,
    "the other case": lambda y: jnp.where(y < 0.1, 1.0, y),
    "compare": lambda y: (y >= 0).astype(y.dtype),
}


def of(activation):
    return lambda p, x: activation(x @ p["a"]) @ p["b"]


def randoms():
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in SHAPES.items()}
    return promise.randomise(shapes)


@pytest.mark.parametrize("name", KEEPS)
def test_what_is_zero_at_zero_asks_for_producers_alone(name, x64):
    groups = promise.check(of(KEEPS[name]), randoms(), (X,), shares=(0.5, 0.8))
    roles = {m.path: m.role for m in groups["a"].members}
    assert roles == {"a": "producer", "b": "consumer"}
    # So a channel whose producer is zero is cut.
    params = randoms() | {"a": randoms()["a"].at[:, [1, 4]].set(0)}
    assert sdp_jax.plan_cut(groups, params).widths == {"a": 6}


@pytest.mark.parametrize("name", LOSES)
def test_what_is_not_asks_for_the_readers(name, x64):
    groups = promise.check(of(LOSES[name]), randoms(), (X,))
    roles = {m.path: m.role for d in groups for m in d.members}
    assert roles.get("b", "producer") == "producer"


def test_quantised_weights(x64):
    def fn(p, x):
        return jax.nn.relu6(x @ quantised(p["a"])) @ quantised(p["b"])

    groups = promise.check(fn, randoms(), (X,))
    assert groups.sizes == {"a": 8}


@pytest.mark.parametrize("kind", [AxisType.Auto])
@pytest.mark.parametrize("where", ["channels", "examples"])
def test_sharding_constraints_pass(kind, where, x64):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    spec = PartitionSpec(None, "x") if where == "channels" else PartitionSpec("x", None)
    sharding = NamedSharding(mesh, spec)
    x = jnp.concatenate([X, X[:1]])

    def fn(p, x):
        y = jax.lax.with_sharding_constraint(x @ p["a"], sharding)
        return jnp.tanh(y) @ p["b"]

    # Also where the mesh does not divide what is left: 5 of 8.
    for share in (0.5, 0.4):
        groups = promise.check(fn, randoms(), (x,), shares=(share,))
        assert groups.sizes == {"a": 8}


def test_means_over_a_named_axis_of_vmap(x64):
    """Batch normalisation as Equinox writes it."""

    def fn(p, x):
        def one(v):
            y = v @ p["a"]
            return jax.nn.relu(y - jax.lax.pmean(y, "batch")) @ p["b"]

        return jax.vmap(one, axis_name="batch")(x)

    assert promise.check(fn, randoms(), (X,)).sizes == {"a": 8}


def unit(y):
    return y / jnp.maximum(jnp.linalg.norm(y, axis=0), 1e-12)


def unless_zero(y):
    s = (y**2).sum(0)
    return y / jnp.sqrt(jnp.where(s > 0, s, 1.0))


@jax.custom_jvp
def safe_length(y):
    return jnp.sqrt((y**2).sum(0))


@safe_length.defjvp
def _(primals, tangents):
    (y,), (t,) = primals, tangents
    length = safe_length(y)
    return length, (y * t).sum(0) / jnp.maximum(length, 1e-9)


STEEP = {
    "root": jnp.sqrt,
    "cube root": jnp.cbrt,
    "power": lambda y: y**0.7,
    "length": unit,
    "spread": lambda y: y * jnp.std(y, axis=0),
    "angle": lambda y: y * jnp.atan2(y, 2 * y),
    "in a branch": lambda y: jnp.where(y == 0, 0.0, jnp.sqrt(y)),
}
FLAT = {
    "power above one": lambda y: y**1.7,
    "layer norm": lambda y: y * jax.lax.rsqrt(jnp.var(y, axis=0) + 1e-6),
    "length that is looked at": lambda y: jnp.where(
        jnp.linalg.norm(y, axis=0) > 1e-6, y, 0.0
    ),
    "length behind a branch": unless_zero,
    "length with its own derivative": lambda y: y * safe_length(y),
    "length that is held": lambda y: y * jax.lax.stop_gradient(unit(y)),
    "length of what is held": lambda y: y * unit(jax.lax.stop_gradient(y)),
}


def weighted(p, x):
    return x @ (p["a"] / (jnp.linalg.norm(p["a"], axis=0) + 1e-9)) @ p["b"]


@pytest.mark.parametrize("name", [*STEEP, *FLAT, "length of weights"])
def test_gradients_that_are_not_finite_are_told_of(name, x64):
    def fn(p, x):
        if name == "length of weights":
            return weighted(p, x)
        return (STEEP | FLAT)[name](jnp.abs(x @ p["a"])) @ p["b"]

    params = randoms()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        groups = sdp_jax.find_groups(fn, params, X)
    assert groups.sizes == {"a": 8}
    zero = promise.random_cut(groups, 0.5, 0).zero(params)
    slope = jax.grad(lambda p: fn(p, X).sum())(zero)
    assert bool(np.isfinite(slope["a"]).all()) == (name in FLAT)
    assert len(told) == (name not in FLAT)
    for one in told:
        assert one.category is UserWarning and "channels of 'a' are" in str(one.message)
        assert re.search(r"test_elementwise.py:\d+", str(one.message))
