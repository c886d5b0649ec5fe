"""Loops whose tests run along axes, as vmap makes them of loops over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import promise

X = np.random.default_rng(0).normal(size=(5, 3))
SHAPES = {"a": (3, 8), "b": (8, 2), "c": (8, 8), "s": (8,)}


def until(test, body, x):
    """At least once, at most four times."""

    def goes_on(carry):
        number, y = carry
        return (number < 1) | ((number < 4) & test(y))

    return lax.while_loop(goes_on, lambda c: (c[0] + 1, body(c[1])), (0, x))[1]


def examples(p, x):
    def one(row):
        def body(h):
            return jnp.einsum("h,hk->k", jnp.tanh(h), p["c"]) + h

        return until(lambda h: jnp.abs(h).sum() < 4, body, row @ p["a"]) @ p["b"]

    return jax.vmap(one)(x)


def channels(p, x):
    def one(column, scale):
        return until(lambda h: h.sum() < 0.5, lambda h: h * scale, column)

    return jax.vmap(one, (1, 0), 1)(x @ p["a"], 1 + p["s"]) @ p["b"]


@pytest.mark.parametrize("fn", [examples, channels])
def test_each_stops_on_its_own(fn, x64):
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in SHAPES.items()}
    params, x = promise.randomise(shapes), jnp.asarray(X)
    groups = promise.check(fn, params, (x,), shares=(0.5, 0.8), grads=False)
    assert list(groups.sizes.values()) == [8]
