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


def refuse(*args):
    raise ZeroDivisionError("has no derivative")


def refuses_forward(f):
    g = jax.custom_vjp(f)
    g.defvjp(refuse, refuse)
    return g


def refuses_backward(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda a: (f(a), None), refuse)
    return g


def refuses_tangents(f):
    g = jax.custom_jvp(f)
    g.defjvp(refuse)
    return g


def recurses(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda args, tangents: jax.jvp(g, args, tangents))
    return g


def recurses_backward(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda a: jax.vjp(g, a), lambda back, c: back(c))
    return g


def largest_of_all(f):
    """JAX knows no derivative of pmax."""

    def of_all(a, name):
        return f(a) / jax.lax.pmax(1 + (a * a).max(), name)

    g = jax.custom_vjp(of_all, nondiff_argnums=(1,))
    g.defvjp(lambda a, n: jax.vjp(lambda a: of_all(a, n), a), lambda n, b, c: b(c))
    return lambda a: jax.vmap(lambda row: g(row, "rows"), axis_name="rows")(a)


def slope_of_small(fn):
    """The gradient of a small function of eight channels, and its parameters.

    The function itself has been checked.
    """
    params = promise.randomise(
        {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in SHAPES.items()}
    )
    groups = promise.check(fn, params, (X,), grads=False)
    assert groups.sizes == {"a": 8}
    cut = promise.random_cut(groups, 0.5, 0)
    small = sdp_jax.narrow(fn, cut)
    return jax.grad(lambda p: small(p, X).sum()), cut.take(params)


def closes_over(own):
    def make(f):
        return lambda a: jax.vmap(lambda row: own(lambda r: f(r) * row.sum())(row))(a)

    return make


@pytest.mark.parametrize(
    ("own", "error"),
    [
        (refuses_forward, ZeroDivisionError),
        (refuses_backward, ZeroDivisionError),
        (refuses_tangents, ZeroDivisionError),
        (recurses, RecursionError),
        (recurses_backward, RecursionError),
        (largest_of_all, NotImplementedError),
        (closes_over(own_vjp), jax.errors.UnexpectedTracerError),
        (closes_over(own_jvp), jax.errors.UnexpectedTracerError),
    ],
)
def test_without_a_derivative_the_function_is_cut_all_the_same(own, error, x64):
    def fn(p, x):
        return own(jnp.tanh)(x @ p["a"]) @ p["b"]

    slope, params = slope_of_small(fn)
    with pytest.raises(error):
        slope(params)


@pytest.mark.parametrize("own", [own_vjp, own_jvp])
def test_rules_that_close_over_values(own, x64):
    """JAX itself cannot differentiate such a function once it is traced."""

    def fn(p, x):
        shift = jnp.tanh(x[:, :1])
        return own(lambda a: a * shift)(x @ p["a"]) @ p["b"]

    slope, params = slope_of_small(fn)
    with pytest.raises(ValueError, match="hand them over as arguments"):
        slope(params)


def rows(a, i):
    return jnp.tanh(a)[i]


def both(a):
    """A result without a derivative beside one that has it."""
    return jnp.tanh(a), jnp.argmax(a, 0)


def own_vjp_of_first(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *a: (f(*a), a[0]), lambda r, c: (2 * c[0] * jnp.cos(r),))
    return g


def symbolic(f):
    """Such a rule is told which tangents are zero."""
    g = jax.custom_jvp(f)

    def rule(args, tangents):
        slope = jnp.cos(args[0]) * tangents[0]
        assert not isinstance(tangents[1], jax.Array)
        return f(*args), slope[args[1]]

    g.defjvp(rule, symbolic_zeros=True)
    return g


WHERE = jnp.array([0, 2, 1])
INTEGERS = {
    "operand": lambda p, x: own_jvp(rows)(x @ p["a"], WHERE) @ p["b"],
    "operand, vjp": lambda p, x: own_vjp(rows)(x @ p["a"], WHERE) @ p["b"],
    "operand, symbolic": lambda p, x: symbolic(rows)(x @ p["a"], WHERE) @ p["b"],
    "operand of parameters": lambda p, x: (
        x @ own_jvp(lambda p, i: p["a"][i])(p, WHERE) @ p["b"]
    ),
    "result": lambda p, x: (lambda y, i: (y * (1 + i)) @ p["b"])(
        *own_jvp(both)(x @ p["a"])
    ),
    "result, vjp": lambda p, x: (lambda y, i: (y * (1 + i)) @ p["b"])(
        *own_vjp_of_first(both)(x @ p["a"])
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, x64):
    check(INTEGERS[name])


def test_arguments_without_a_derivative(x64):
    g = jax.custom_vjp(lambda a, k: jnp.tanh(a) * k, nondiff_argnums=(1,))
    g.defvjp(lambda a, k: (jnp.tanh(a) * k, a), lambda k, r, c: (c * k * jnp.cos(r),))
    check(lambda p, x: g(x @ p["a"], 3) @ p["b"])


def test_derivatives_of_jax_ask_for_nothing_new(x64):
    """Position by position, narrow needs of ``c`` no more than find_groups does."""

    def fn(p, x):
        h = jnp.logaddexp(jax.nn.softmax(x @ p["a"]), p["c"])
        return h.min(0, keepdims=True) @ p["b"]

    check(fn, SHAPES | {"c": (8,)})


@pytest.mark.parametrize("around", ["remat", "scan", "cond", "custom_jvp"])
def test_what_a_body_leaves_unused_is_not_used(around, x64):
    def half(w):
        return w[:, :4]

    bodies = {
        "remat": jax.checkpoint(half),
        "scan": lambda w: jax.lax.scan(lambda c, x: (c, half(w)), 0.0, X[:1])[1][0],
        "cond": lambda w: jax.lax.cond(X[0, 0] > 0, half, lambda w: 2 * half(w), w),
        "custom_jvp": own_jvp(half),
    }
    body = bodies[around]
    shapes = {"a": (3, 8), "b": (4, 2)}
    check(lambda p, x: jnp.tanh(x @ body(p["a"])) @ p["b"], shapes, sizes=(4,))
