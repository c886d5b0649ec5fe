"""Scalars made of parameters: padding, bounds, initial values, what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sdp_jax
from tests import promise

X = np.random.default_rng(0).normal(size=(5, 3))
SHAPES = {"a": (3, 8), "b": (8, 2)}


def size(p):
    """Reads all entries of a parameter; 0 where it is."""
    return (p["a"] * p["c"]).sum()


def padded(p, x):
    return lax.pad(x @ p["a"], size(p), [(0, 0, 0), (2, 2, 0)]) @ p["d"]


def padded_parameter(p, x):
    return x[:, :1] * (lax.pad(p["c"], 0.1 * p["c"].sum(), [(2, 2, 0)]) @ p["d"])


def shifted(p, x):
    return lax.pad(x @ p["a"], size(p), [(0, 0, 0), (-2, 2, 0)]) @ p["b"]


def filled(p, x):
    return (x @ p["a"] + jnp.full((8,), size(p))) @ p["b"]


def chosen(p, x):
    return jnp.where(x[:, :1] > 0, x @ p["a"], size(p)) @ p["b"]


def written(p, x):
    return (x @ p["a"]).at[1].set(size(p)) @ p["b"]


def block(p, x):
    h = lax.dynamic_update_slice(x @ p["a"], jnp.full((1, 8), size(p)), (1, 0))
    return h @ p["b"]


def subtracted(p, x):
    return (x @ p["a"]).at[1].subtract(x[0] @ p["a"] * p["c"]) @ p["b"]


def clamped(p, x):
    return lax.clamp(-jnp.abs(size(p)), x @ p["a"], 1 + size(p) ** 2) @ p["b"]


def pooled(p, x):
    window = ((2, 1), (1, 1), "SAME")
    return (
        lax.reduce_window(x @ p["a"], size(p), lambda a, b: a + b * b, *window) @ p["b"]
    )


@pytest.mark.parametrize(
    ("fn", "sizes"),
    [
        (padded, [2, 2, 8]),
        (padded_parameter, [2, 2, 8]),
        (shifted, [2, 2, 6]),
        (filled, [8]),
        (chosen, [8]),
        (written, [8]),
        (block, [8]),
        (subtracted, [8]),
        (clamped, [8]),
        (pooled, [8]),
    ],
)
def test_they_read_what_must_be_zero(fn, sizes, x64):
    leaves = SHAPES | {"c": (8,), "d": (12, 2)}
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in leaves.items()}
    # JAX knows no derivative with respect to bounds and initial values.
    grads = fn not in (clamped, pooled)
    params = promise.randomise(shapes)
    groups = promise.check(fn, params, (jnp.asarray(X),), shares=(0.5,), grads=grads)
    assert sorted(groups.sizes.values()) == sizes
    roles = {m.path: m.role for d in groups for m in d.members}
    assert roles.get("a", "producer") == "producer"


def test_constants_come_back_as_arrays():
    def fn(p, x):
        constant = jnp.asarray(2.0)
        return x @ p["a"] @ p["b"], constant, constant

    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    groups = sdp_jax.find_groups(fn, params, X)
    cut = promise.random_cut(groups, 0.5, 0)
    small, found = sdp_jax.narrow(fn, cut), cut.take(params)
    assert all(isinstance(y, jax.Array) for y in small(found, X))
    assert small(found, X)[1].weak_type == fn(params, X)[1].weak_type
    jax.grad(lambda p: sum(y.sum() for y in small(p, X)))(found)


def test_moves_are_no_operations():
    x, i = jnp.ones((4, 6)), jnp.array([0, 2])
    product = 2 * 4 * 6 * 6

    def flops(fn):
        return sdp_jax.cost(lambda p: fn(x @ p), jnp.ones((6, 6))).flops - product

    assert flops(lambda h: jnp.tile(h, (3, 2))) == 0
    assert flops(lambda h: jnp.stack([h, h])) == 0
    assert flops(lambda h: h.at[i].set(h[:2], mode="promise_in_bounds")) <= 3 * 2
    assert 12 <= flops(lambda h: h.at[i].add(h[:2])) <= 12 + 3 * 2
