"""Sums over channels: grouped products, convolutions along channels, comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sdp_jax
from tests import promise
from tests.test_tracing import check

X = np.random.default_rng(0).normal(size=(6, 5))
SIZES = jnp.array([2, 1, 3])


def mixture(p, x):
    h = jnp.tanh(lax.ragged_dot(x @ p["a"], p["up"], SIZES))
    return lax.ragged_dot(h, p["down"], SIZES) @ p["b"]


def attention(p, x):  # ECA: a convolution along the channels gates them
    y = jnp.tanh(x @ p["a"])
    gate = lax.conv_general_dilated(
        y[..., None], p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return (y * jax.nn.sigmoid(gate[..., 0])) @ p["b"]


def adapted(fn, *names):
    """A step of gradient descent first: rules of the derivatives are traced, too."""

    def after(p, x):
        some = {k: p[k] for k in names}
        slope = jax.grad(lambda some: jnp.sum(fn(p | some, x) ** 2))(some)
        return fn(p | {k: p[k] - 0.01 * slope[k] for k in names}, x)

    return after


def strongest(p, x):  # the largest of several, and where: one reduction of two operands
    h = jnp.tanh(x @ p["a"])
    at = jnp.broadcast_to(jnp.arange(6)[:, None], h.shape)

    def larger(a, b):
        first = a[0] >= b[0]
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    top, where = lax.reduce((h, at), (-jnp.inf, 0), larger, (0,))
    return (h * top) @ p["b"] + (h * where) @ p["b"]


def widened(p, x):  # a pixel shuffle: rows of an image made of channels
    y = (x @ p["a"]).reshape(2, 3, 2, 4).reshape(2, 6, 4)
    return lax.conv_general_dilated(
        y, p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


EXPERTS = {"a": (5, 4), "up": (3, 4, 8), "down": (3, 8, 4), "b": (4, 2)}
ECA = {"a": (5, 8), "k": (3, 1, 1), "b": (8, 2)}
MLP = {"a": (5, 8), "b": (8, 2)}

# name: function, parameters, sizes of the dimensions that must be found
PROGRAMS = {
    "grouped products": (mixture, EXPERTS, [4, 4, 8]),
    "their derivatives": (adapted(mixture, *EXPERTS), EXPERTS, [4, 4, 8]),
    "along channels": (attention, ECA, [8]),
    "derivatives along channels": (adapted(attention, "k"), ECA, [8]),
    "rows of an image": (widened, {"a": (5, 8), "k": (3, 4, 2)}, [4]),
    "several reduced": (strongest, MLP, [8]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_keep_the_promise(name, x64):
    fn, sizes, expected = PROGRAMS[name]
    # JAX has no derivative of a reduction of several arrays, and no second one of a
    # grouped product.
    grads = name not in ("several reduced", "their derivatives")
    groups = check(fn, sizes, X, shares=(0.5, 0.9), grads=grads)
    assert sorted(groups.sizes.values()) == expected
    cut = promise.random_cut(groups, 0.5, 0)
    params = {k: jnp.ones(s) for k, s in sizes.items()}
    cost = sdp_jax.cost(sdp_jax.narrow(fn, cut), cut.take(params), X)
    flops = groups.flops.at(list(cut.widths.values()))
    assert flops == pytest.approx(cost.flops, rel=0.02)


def test_a_grouped_product_costs_what_its_rows_cost():
    found = sdp_jax.cost(
        lambda p, x: lax.ragged_dot(x, p, SIZES), jnp.ones((3, 5, 8)), X
    )
    assert found.flops == 2 * 6 * 5 * 8


FROZEN = {
    "experts": (mixture, EXPERTS, "up[0]", "known only at run time"),
    "over channels": (
        lambda p, x: lax.reduce(x @ p["a"], 1.0, lax.mul, (1,)),
        MLP,
        "a[1]",
        "compares all channels",
    ),
    "nearly the largest": (
        lambda p, x: lax.approx_max_k(x @ p["a"], 2)[0],
        MLP,
        "a[1]",
        "compares all channels",
    ),
    "window of a parameter": (
        attention,
        ECA,
        "k[0]",
        "convolves along this axis",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_says_why(name, x64):
    fn, sizes, axis, why = FROZEN[name]
    params = {k: jnp.ones(s) for k, s in sizes.items()}
    groups = sdp_jax.find_groups(fn, params, X)
    (reasons,) = [f.reasons for f in groups.frozen if f"{f.path}[{f.axis}]" == axis]
    assert any(why in reason for reason in reasons)


def test_channels_beside_the_nearly_largest_pass(x64):
    def fn(p, x):
        return lax.approx_max_k(x @ p["a"], 2, reduction_dimension=0)[0] @ p["b"]

    assert check(fn, MLP, X).sizes == {"a": 8}
