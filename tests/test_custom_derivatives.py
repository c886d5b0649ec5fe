"""Constants along channels, where functions with their own derivatives read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import promise

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
SHAPES = {"a": (3, 8), "b": (8, 2)}


def table():
    return jnp.cos(jnp.arange(8.0))


def own_vjp(f):
    """The rule that anybody would write: forward and backward of ``f`` itself."""
    g = jax.custom_vjp(lambda *args: f(*args))
    g.defvjp(lambda *args: jax.vjp(f, *args), lambda back, t: back(t))
    return g


def own_jvp(f):
    g = jax.custom_jvp(lambda *args: f(*args))
    g.defjvp(lambda args, tangents: jax.jvp(f, args, tangents))
    return g


def residuals(f):
    """Residuals are the arguments; the backward rule multiplies with them."""
    g = jax.custom_vjp(lambda a, c: f(a, c))
    g.defvjp(lambda a, c: (a * c, (a, c)), lambda r, t: (t * r[1], t * r[0]))
    return g


def made_within(f):
    """A residual that the forward rule makes of nothing."""
    g = jax.custom_vjp(lambda a: f(a, table()))
    g.defvjp(
        lambda a: (a * table(), jnp.broadcast_to(table(), a.shape)),
        lambda r, t: (t * r,),
    )
    return g


def product(a, c):
    return a * c


def wide(c):
    return jnp.broadcast_to(c, (5, 8))


FUNCTIONS = {
    "argument": lambda p, x: residuals(product)(x @ p["a"], wide(table())) @ p["b"],
    "made within": lambda p, x: made_within(product)(x @ p["a"]) @ p["b"],
    "inside": lambda p, x: own_vjp(lambda a: a * table())(x @ p["a"]) @ p["b"],
    "inside, jvp": lambda p, x: own_jvp(lambda a: a * table())(x @ p["a"]) @ p["b"],
    "argument, jvp": lambda p, x: own_jvp(product)(x @ p["a"], table()) @ p["b"],
    "whole": own_vjp(lambda p, x: ((x @ p["a"]) * table()) @ p["b"]),
    "whole, jvp": own_jvp(lambda p, x: ((x @ p["a"]) * table()) @ p["b"]),
    "weights": own_vjp(lambda p, x: (x @ (p["a"] * jnp.arange(8.0))) @ p["b"]),
    "array": own_vjp(lambda p, x: (x @ (p["a"] * np.linspace(0.5, 2, 8))) @ p["b"]),
    "array, jvp": own_jvp(lambda p, x: (x @ p["a"] * np.linspace(0.5, 2, 8)) @ p["b"]),
}


def check(fn, shapes=SHAPES, *, sizes=(8,)):
    params = promise.randomise(
        {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in shapes.items()}
    )
    groups = promise.check(fn, params, (X,), shares=(0.5, 0.8), seeds=(0, 1))
    assert tuple(groups.sizes.values()) == sizes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_alone(name, x64):
    check(FUNCTIONS[name])


@pytest.mark.parametrize("name", ["argument", "made within", "inside, jvp", "array"])
@pytest.mark.parametrize("around", ["jit", "vmap", "scan", "remat"])
def test_inside_of_calls_and_loops(name, around, x64):
    fn = FUNCTIONS[name]
    if around == "vmap":
        check(lambda p, x: jax.vmap(lambda y: fn(p, y))(jnp.stack([x, 2 * x])))
    elif around == "scan":
        check(lambda p, x: jax.lax.scan(lambda c, y: (c, fn(p, y)), 0.0, x[None])[1])
    else:
        check({"jit": jax.jit, "remat": jax.checkpoint}[around](fn))


def test_nested(x64):
    inner = own_vjp(lambda a: a * table())
    outer = own_vjp(lambda a: inner(a) + table() * a)
    check(lambda p, x: outer(x @ p["a"]) @ p["b"])


def test_a_constant_that_a_call_reads_and_returns(x64):
    """Two dimensions read one table, which comes out as well."""

    @jax.jit
    def inner(a, c):
        return a * c

    @jax.jit
    def call(a, b, c):
        d = jnp.sin(c)
        return inner(a, d) + a * d, inner(b, c), c, d

    def fn(p, x):
        a, b, c, d = call(x @ p["a"], x @ p["c"], table())
        return (a * c) @ p["b"] + (jnp.tanh(b) * d) @ p["d"]

    check(fn, SHAPES | {"c": (3, 8), "d": (8, 2)}, sizes=(8, 8))


def test_a_table_that_many_layers_share_does_not_couple_them(x64):
    apply = jax.jit(lambda a, c: a * c)

    def fn(p, x):
        c = table()
        y = apply(x @ p["a"], c) @ p["b"]
        return y + apply(x @ p["c"], c) @ p["d"]

    check(fn, SHAPES | {"c": (3, 8), "d": (8, 2)}, sizes=(8, 8))
    check(jax.jit(fn), SHAPES | {"c": (3, 8), "d": (8, 2)}, sizes=(8, 8))


def test_flash_like_attention(x64):
    """A position table and a mask as residuals of a fused operation."""

    def attend(q, k, decay):
        scores = jnp.einsum("qc,kc->qk", q * decay, k)
        return jax.nn.softmax(scores, axis=-1)

    fused = own_vjp(attend)

    def fn(p, x):
        decay = jnp.broadcast_to(0.9 ** jnp.arange(8.0), (5, 8))
        return fused(x @ p["q"], x @ p["k"], decay) @ (x @ p["v"]) @ p["o"]

    shapes = {"q": (3, 8), "k": (3, 8), "v": (3, 6), "o": (6, 2)}
    check(fn, shapes, sizes=(8, 6))


@pytest.mark.parametrize("own", [own_vjp, own_jvp])
def test_closed_over_tracers_freeze(own, x64):
    """JAX itself cannot differentiate such a function once it is traced."""

    def fn(p, x):
        shift = jnp.tanh(x[:, :1])

        @own
        def shifted(a):
            return a * shift

        return shifted(x @ p["a"]) @ p["b"]

    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    groups = sdp_jax.find_groups(fn, params, X)
    assert not len(groups)
    assert any(
        "hand them over as arguments" in w for f in groups.frozen for w in f.reasons
    )
    cut = sdp_jax.plan_cut(groups, params)
    np.testing.assert_array_equal(sdp_jax.narrow(fn, cut)(params, X), fn(params, X))
