"""Places that are read and written, where they are known and where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sdp_jax
from tests import promise
from tests.test_tracing import check, shapes

X = np.random.default_rng(0).normal(size=(3, 5))
W = {"a": (5, 8), "b": (8, 3)}
U = W | {"u": (5, 4)}
ODD = np.array([6, 1, 4, 3])


def block(p, x):
    return (x @ p["a"]).at[:, 2:6].set(jnp.tanh(x @ p["u"])) @ p["b"]


def slots(p, x):
    return (x @ p["a"]).at[:, ODD].set(jnp.tanh(x @ p["u"])) @ p["b"]


def slice_written(p, x):
    return lax.dynamic_update_slice(x @ p["a"], x @ p["u"], (0, 3)) @ p["b"]


def corner(p, x):
    return lax.dynamic_update_slice(x @ p["a"], (x @ p["u"])[:2], (1, 3)) @ p["b"]


def zeros(p, x):
    return jnp.zeros((3, 8)).at[:, 4:].set(x @ p["u"]) @ p["b"]


PERMUTATION = np.array([3, 1, 0, 2, 7, 6, 5, 4])


def permuted(p, x):
    return jnp.tanh(x @ p["a"])[:, PERMUTATION] @ p["b"]


def tied(p, x):
    return (jnp.tanh(x @ p["a"])[:, PERMUTATION] + x @ p["c"]) @ p["b"]


def back(p, x):
    return jnp.zeros((3, 8)).at[:, PERMUTATION].set(x @ p["a"]) @ p["b"]


def shuffled(p, x):
    y = jnp.tanh((x @ p["a"])[:, np.arange(8).reshape(2, 4).T.reshape(-1)])
    return y[:, ::-1] @ p["b"]


def odd_and_even(p, x):
    y = x @ p["a"]
    return jnp.tanh(y[:, ::2]) @ p["u"] + y[:, 1::2] @ p["u"]


def flat(p, x):  # a permutation behind a flattening of 2 × 8
    y = jnp.stack([x @ p["a"], jnp.sin(x @ p["a"])], 1)[..., PERMUTATION]
    return y.reshape(3, 16) @ p["b"]


def taken_apart(p, x):
    first, second = jnp.unstack((x @ p["a"]).reshape(3, 2, 4), axis=1)
    return lax.composite(lambda y: jnp.tanh(y), name="my.tanh")(first * second) @ p["u"]


def entries(p, x):
    h = (x @ p["a"]).at[np.array([0, 2]), np.array([1, 3])].set(1.0)
    each = jax.vmap(lambda y, i: y.at[i].set(0.0))(h, jnp.array([1, 2, 3]))
    return each @ p["b"]


def square(p, x):
    return (x @ p["a"]).at[1:, np.array([2, 3])].add(x[1:, :2]) @ p["b"]


def mended(p, x):  # as many rows as the whole, one by one
    h = (x @ p["a"]).at[jnp.arange(3)].set(jnp.tanh(x @ p["c"]))
    return h.at[1].set(2.0).at[2, 2:6].max(0.5) @ p["b"]


# name: function, parameters, sizes of the dimensions that must be found
PROGRAMS = {
    "set a block": (block, U, [2, 2, 4, 4]),
    "set a number": (lambda p, x: (x @ p["a"]).at[:, :4].set(1.0) @ p["b"], W, [4, 4]),
    "set one": (lambda p, x: (x @ p["a"]).at[:, 3].set(x[:, 0]) @ p["b"], W, [3, 4]),
    "add a block": (
        lambda p, x: (x @ p["a"]).at[:, 4:].add(x @ p["u"]) @ p["b"],
        U,
        [4, 4],
    ),
    "add a number": (
        lambda p, x: (x @ p["a"]).at[:, 4:].add(0.5) @ p["b"],
        W,
        [4],
    ),
    "subtract": (
        lambda p, x: (x @ p["a"]).at[:, :4].subtract(x @ p["u"]) @ p["b"],
        U,
        [4, 4],
    ),
    "multiply": (
        lambda p, x: jnp.tanh(x @ p["a"]).at[:, ODD].multiply(2.0) @ p["b"],
        W,
        [8],
    ),
    "add slots": (
        lambda p, x: (x @ p["a"]).at[:, ODD].add(x @ p["u"]) @ p["b"],
        U,
        [4, 4],
    ),
    "update slice": (slice_written, U, [4, 4, 4]),
    "update corner": (corner, U, [4, 4]),
    "update zeros": (zeros, U, [4]),
    "set slots": (slots, U, [4, 4, 4]),
    "permutation": (permuted, W, [8]),
    "inverse permutation": (back, W, [8]),
    "strides": (odd_and_even, {"a": (5, 8), "u": (4, 3)}, [4]),
    "shuffled and reversed": (shuffled, W, [8]),
    "set entries": (entries, W, []),
    "add a square": (square, W, []),
    "set rows": (mended, W | {"c": (5, 8)}, [8]),
    "taken apart": (taken_apart, {"a": (5, 8), "u": (4, 3)}, [4]),
    "flattened permutation": (flat, {"a": (5, 8), "b": (16, 3)}, [8]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_known_places(name, x64):
    fn, sizes, expected = PROGRAMS[name]
    grads = name != "taken apart"  # JAX has none of a composite
    groups = check(fn, sizes, X, shares=(0.5, 0.99), grads=grads)
    assert sorted(groups.sizes.values()) == expected


def test_a_place_of_run_time_freezes(x64):
    def fn(p, x, i):
        return lax.dynamic_update_slice(x @ p["a"], x @ p["u"], (0 * i, i)) @ p["b"]

    groups = check(fn, U, X, np.int32(2))
    assert not groups.sizes
    assert "known only at run time" in str(groups)


def test_channels_out_of_order_are_channels_like_others(x64):
    params = promise.randomise(shapes(**W, c=(5, 8)))
    groups = sdp_jax.find_groups(tied, params, X)
    (d,) = groups
    rows = {m.path: m.positions(8)[0, :, 0] for m in d.members}
    # Channel c of the first layer is read where the permutation puts it.
    assert rows["a"].tolist() == list(range(8))
    assert PERMUTATION[rows["b"]].tolist() == list(range(8))
    a, c = np.asarray(params["a"]), np.asarray(params["c"])[:, np.argsort(PERMUTATION)]
    norms = np.sqrt((a**2).sum(0) + (c**2).sum(0))
    np.testing.assert_allclose(sdp_jax.channel_norms(groups, params), norms, rtol=1e-12)
    factors = jnp.arange(8.0)
    scaled = sdp_jax.scale_channels(groups, params, factors)
    np.testing.assert_array_equal(scaled["a"], a * factors)
    np.testing.assert_array_equal(scaled["c"][:, np.argsort(PERMUTATION)], c * factors)
    # What is left is in another order, and can be cut again.
    cut = sdp_jax.Cut(groups, ((0, 3, 4, 6),))
    small = cut.take(cut.zero(params))
    again = sdp_jax.Cut(cut.groups, ((1, 2),))
    both = sdp_jax.Cut(groups, ((3, 4),))
    for k in params:
        np.testing.assert_array_equal(again.take(small)[k], both.take(params)[k])
    assert sdp_jax.Groups.from_json(cut.groups.to_json()) == cut.groups


BAD = {
    "too few": ((0, 1), "for each of 8 channels"),
    "twice": ((0, 0, 1, 2, 3, 4, 5, 6), "overlap"),
    "beyond": ((0, 1, 2, 3, 4, 5, 6, 8), "beyond the length 8"),
    "no integers": ("abc", "tuple of integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_places(name):
    places, message = BAD[name]
    members = [sdp_jax.Member("a", 1), sdp_jax.Member("b", 0, places=places)]
    with pytest.raises((TypeError, ValueError), match=message):
        sdp_jax.groups_from_axes(
            {"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3))},
            {"h": members},
            sizes={"h": 8},
        )
