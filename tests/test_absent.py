"""What is absent need not be zero: statistics of weights, divisors, constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import promise

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))


def randoms(dtype=jnp.float64, **sizes):
    shapes = {k: jax.ShapeDtypeStruct(s, dtype) for k, s in sizes.items()}
    return promise.randomise(shapes)


def layers(weight):
    """Three layers, the middle one with a weight that is made of parameters."""
    return lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ weight(p)) @ p["b"]


def standardised(p, axis=0):
    w = p["v"] - p["v"].mean(axis)
    return w / jnp.sqrt((w**2).mean(axis) + 1e-9)


def centred(w):
    return w - w.mean(0)


def spread(p):
    """The variance is a call of its own."""
    w = centred(p["v"])
    return w / jnp.sqrt(jnp.var(w, axis=0) + 1e-9)


def called(call):
    def weight(p):
        w = call(centred)(p["v"])
        return w * jax.lax.rsqrt((w**2).sum(0) + 1e-9)

    return weight


def bounded(p):
    w = p["v"] - p["v"].mean()
    return w / (w.max() - w.min())


def scaled(p):
    """As normaliser-free networks write it."""
    mean, var = p["v"].mean(0), p["v"].var(0)
    scale = jax.lax.rsqrt(jnp.maximum(var * 8, 1e-4)) * p["g"]
    return p["v"] * scale - mean * scale


WIDTHS = {"a": (3, 8), "v": (8, 6), "b": (6, 2)}
SCALED = WIDTHS | {"g": (6,)}
# What each makes producers, beside the first layer's filters.
WEIGHTS = {
    "standardised": (standardised, WIDTHS, {("v", 0), ("v", 1)}),
    "centred before a call": (spread, WIDTHS, {("v", 0), ("v", 1)}),
    "centred in a call": (called(jax.jit), WIDTHS, {("v", 0), ("v", 1)}),
    "centred when needed": (called(jax.checkpoint), WIDTHS, {("v", 0), ("v", 1)}),
    "standardised as a whole": (
        lambda p: standardised(p, None),
        WIDTHS,
        {("v", 0), ("v", 1), ("b", 0)},
    ),
    "bounded": (bounded, WIDTHS, {("v", 0), ("v", 1), ("b", 0)}),
    "standardised and scaled": (scaled, SCALED, {("v", 0), ("g", 0)}),
    "normalised, then scaled": (
        lambda p: p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"],
        SCALED,
        {("v", 0), ("g", 0)},
    ),
    "scaled by the norm": (
        lambda p: p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0)),
        SCALED,
        {("v", 0), ("g", 0)},
    ),
    "scaled by the root": (
        lambda p: p["v"] * jax.lax.rsqrt((p["v"] ** 2).sum(0)) * p["g"],
        SCALED,
        {("v", 0), ("g", 0)},
    ),
    "an exact norm is not zero, but what it scales": (
        lambda p: p["v"] * jnp.exp(p["g"] - jnp.log(jnp.abs(p["h"]))),
        SCALED | {"h": (6,)},
        {("v", 1)},
    ),
}


def producers(groups):
    return {(m.path, m.axis) for d in groups for m in d.producers}


@pytest.mark.parametrize("name", WEIGHTS)
def test_statistics_of_weights_are_exact(name, x64):
    weight, sizes, expected = WEIGHTS[name]
    params = randoms(**sizes)
    groups = promise.check(layers(weight), params, (X,), shares=(0.5, 0.99))
    assert sorted(groups.sizes.values()) == [6, 8]
    assert producers(groups) == {("a", 1)} | expected
    # What was not asked to be zero may be anything.
    if ("g", 0) in expected:
        params |= {"g": params["g"].at[jnp.array([1, 4])].set(0)}
        assert sorted(sdp_jax.plan_cut(groups, params).widths.values()) == [4, 8]


def test_layer_norm_of_a_learned_array(x64):
    def norm(x, scale, shift):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-9)
        return x * scale + shift

    def fn(p, x):
        rows = norm(p["rows"], p["scale"], p["shift"]) @ p["k"]
        return jnp.tanh(x @ p["a"]) @ jnp.tanh(rows.T @ p["c"])

    sizes = {"rows": (5, 7), "scale": (7,), "shift": (7,)}
    sizes |= {"k": (7, 4), "a": (3, 4), "c": (5, 2)}
    groups = promise.check(fn, randoms(**sizes), (X,), shares=(0.5, 0.99))
    assert groups["rows"].size == 7
    asked = {(m.path, m.axis) for m in groups["rows"].producers}
    assert asked == {("rows", 1), ("scale", 0), ("shift", 0)}


TABLE = jnp.sin(jnp.arange(5)[:, None] / jnp.arange(1.0, 9))


def root_mean_square(h):
    return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-9)


def two_pass(h):
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(
        jnp.var(h, -1, keepdims=True) + 1e-9
    )


def looped(h):
    """It starts with zeros, and goes on with what differs, in rows that do, too."""

    def step(carry, row):
        total = two_pass(carry) + row + TABLE[1]
        return total, two_pass(total) + carry

    last, rows = jax.lax.scan(step, jnp.zeros(8), h)
    return root_mean_square(rows) + two_pass(last)


def even_loop(h):
    def step(carry, _):
        return root_mean_square(carry - carry.mean(-1, keepdims=True)), None

    return jax.lax.scan(step, h + TABLE, None, length=3)[0]


CONSTANTS = {
    "over rows": looped,
    "in a loop": even_loop,
    "root mean square": root_mean_square,
    "two passes": two_pass,
    "two passes in a call": jax.jit(two_pass),
    "again": lambda h: two_pass(jax.jit(root_mean_square)(h) + TABLE),
    "of a row": lambda h: two_pass(h[1]),
    "of a mean": lambda h: two_pass(h.mean(0) + h.min(0)),
    "of a mean of all": lambda h: two_pass(h - h[:, :, None].mean((0, 1))),
    "turned": lambda h: two_pass(h.T[:, ::2].T),
    "softmax": jax.nn.softmax,
    "largest": lambda h: h - h.max(-1, keepdims=True),
    "of all": lambda h: h / (1 + (h**2).sum()),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_differ_between_channels(name, x64):
    def fn(p, x):
        return CONSTANTS[name](x @ p["a"] + TABLE) @ p["b"]

    groups = promise.check(fn, randoms(a=(3, 8), b=(8, 2)), (X,), shares=(0.5, 0.99))
    assert groups.sizes == {"a": 8}
    assert producers(groups) == {("a", 1), ("b", 0)}


DIVIDED = {
    "by a parameter": lambda b, rate: b / rate[:, None],
    "by a power": lambda b, rate: b * rate[:, None] ** -2,
    "held between steps": lambda b, rate: ((jnp.exp(rate) - 1) / rate)[:, None] * b,
}


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_what_divides_is_cut_but_not_zeroed(name, dtype, x64):
    def fn(p, x):
        h = x @ DIVIDED[name](p["b"], p["rate"]).T
        return (h @ p["c"]).real

    params = randoms(b=(8, 3), rate=(8,), c=(8, 2))
    turn = 1 if dtype == jnp.float64 else jnp.exp(0.7j)
    params = jax.tree.map(lambda p: (p * turn).astype(dtype), params)
    grads = dtype == jnp.float64
    groups = promise.check(fn, params, (X,), shares=(0.5, 0.99), grads=grads)
    roles = {m.path: m.role for m in groups["b"].members}
    assert roles == {"b": "producer", "rate": "consumer", "c": "consumer"}


def test_a_function_that_divides_by_what_is_zero_is_refused(x64):
    params = randoms(a=(3, 8), b=(8, 2))

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    groups = sdp_jax.find_groups(fn, params, X)
    cut = promise.random_cut(groups, 0.5, 0)
    small = cut.take(params)
    penalised = sdp_jax.narrow(lambda p, x: fn(p, x).sum() + jnp.log(p["a"]).sum(), cut)
    with pytest.raises(ValueError, match="axis 1 of 'a'"):
        penalised(small, X)


def test_a_sum_over_what_divides_stays_whole(x64):
    def fn(p, x):
        return jnp.tanh((x @ p["a"]) / p["s"]) @ p["b"] + jnp.log(p["s"]).sum()

    groups = sdp_jax.find_groups(fn, randoms(a=(3, 8), s=(8,), b=(8, 2)), X)
    assert not len(groups)
