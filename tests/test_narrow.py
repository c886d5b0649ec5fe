"""The small function under transformations, in training, after another cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sdp_jax
from tests import promise

X = np.random.default_rng(0).normal(size=(3, 4, 5))
MLP = {"a": (5, 8), "b": (8, 3)}
TANH = (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], MLP)


def shapes(**sizes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in sizes.items()}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def test_training_mode_returns_small_statistics(x64):
    net = Net()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 3)))
    variables = promise.randomise(
        jax.eval_shape(lambda: net.init(jax.random.key(0), x, train=False))
    )

    def train(variables, x):
        return net.apply(
            variables,
            x,
            True,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )

    groups = sdp_jax.find_groups(train, variables, x)
    assert list(groups.sizes.values()) == [8]
    cut = promise.random_cut(groups, 0.5, 0)
    dense = cut.zero(variables)
    expected, stats = train(dense, x)
    found, small_stats = sdp_jax.narrow(train, cut)(cut.take(dense), x)
    promise.close(found, expected, 1e-12)
    for a, b in zip(
        jax.tree.leaves(small_stats),
        jax.tree.leaves(cut.take(dense | stats)["batch_stats"]),
        strict=True,
    ):
        promise.close(a, b, 1e-12)

    # The same cut serves inference, another batch size and a static argument.
    def infer(variables, x, train):
        return net.apply(variables, x, train)

    small = sdp_jax.narrow(infer, cut)(cut.take(dense), x[:3], False)
    promise.close(small, infer(dense, x[:3], False), 1e-12)
    small = sdp_jax.narrow(infer, cut)(cut.take(dense), x[:3], train=False)
    promise.close(small, infer(dense, x[:3], False), 1e-12)


def test_narrow_composes_with_transformations(x64):
    fn, sizes = TANH
    params = promise.randomise(shapes(**sizes))
    x = jnp.asarray(X)
    cut = promise.random_cut(sdp_jax.find_groups(fn, params, x), 0.5, 0)
    dense = cut.zero(params)
    small, narrowed = cut.take(dense), sdp_jax.narrow(fn, cut)
    over = jax.vmap(narrowed, (None, 0))(small, x)
    promise.close(over, jax.vmap(fn, (None, 0))(dense, x), 1e-12)
    slope = jax.jacrev(narrowed, 1)(small, x[0, 0])
    promise.close(slope, jax.jacrev(fn, 1)(dense, x[0, 0]), 1e-12)
    again = jax.checkpoint(jax.jit(narrowed))(small, x)
    promise.close(again, fn(dense, x), 1e-12)
    exported = jax.export.export(jax.jit(narrowed))(small, x)
    promise.close(exported.call(small, x), fn(dense, x), 1e-12)


def test_a_cut_of_a_cut(x64):
    fn, sizes = TANH
    params = promise.randomise(shapes(**sizes))
    x = jnp.asarray(X)
    first = promise.random_cut(sdp_jax.find_groups(fn, params, x), 0.5, 0)
    small = first.take(first.zero(params))
    narrowed = sdp_jax.narrow(fn, first)
    groups = sdp_jax.find_groups(narrowed, small, x)
    assert groups.sizes == first.widths
    second = promise.random_cut(groups, 0.5, 1)
    dense = second.zero(small)
    promise.close(
        sdp_jax.narrow(narrowed, second)(second.take(dense), x),
        narrowed(dense, x),
        1e-12,
    )


def test_relu_at_zero_keeps_its_gradient(x64):
    def fn(p, x):
        return jax.nn.relu(p["s"] * (x @ p["a"])) @ p["b"]

    params = promise.randomise(shapes(**MLP, s=(8,)))
    params["s"] = jnp.zeros(8)
    cut = promise.random_cut(sdp_jax.find_groups(fn, params, X), 0.5, 0)
    narrowed = sdp_jax.narrow(fn, cut)
    slope = jax.grad(lambda p: narrowed(p, X).sum())(cut.take(params))
    assert not np.any(slope["s"])


def half_of_tanh():
    fn, sizes = TANH
    return promise.random_cut(sdp_jax.find_groups(fn, shapes(**sizes), X), 0.5, 0)


BAD = {
    "dense parameters for the small function": (
        lambda: sdp_jax.narrow(TANH[0], half_of_tanh())(
            promise.randomise(shapes(**MLP)), X
        ),
        ValueError,
        r"leaf 'a' is \(5, 8\), expected \(5, 4\); pass cut.take\(params\)",
    ),
    "a loss with a penalty on what only reads": (
        lambda: sdp_jax.narrow(
            lambda p, x: TANH[0](p, x).sum() + sum((w**2).sum() for w in p.values()),
            half_of_tanh(),
        )(half_of_tanh().take(promise.randomise(shapes(**MLP))), X),
        ValueError,
        "axis 0 of 'b' were zero",
    ),
    "a function that needs more zeros": (
        lambda: sdp_jax.narrow(
            lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"], half_of_tanh()
        )(half_of_tanh().take(promise.randomise(shapes(**MLP))), X),
        ValueError,
        "axis 0 of 'b' were zero",
    ),
    "the cut of another function": (
        lambda: sdp_jax.narrow(lambda p, x: jax.nn.softmax(x @ p["a"]), half_of_tanh())(
            half_of_tanh().take(promise.randomise(shapes(**MLP))), X
        ),
        ValueError,
        "positions of axis 1 of 'a' that this function needs: .*output",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, x64):
    act, error, message = BAD[case]
    with pytest.raises(error, match=message):
        act()


def small_tanh():
    calls = []

    def fn(p, x, scale=1.0):
        calls.append(scale)
        return jnp.tanh(x @ p["a"] * scale) @ p["b"]

    params = {
        k: jnp.asarray(np.random.default_rng(3).normal(size=s)) for k, s in MLP.items()
    }
    groups = sdp_jax.find_groups(fn, params, X)
    cut = promise.random_cut(groups, 0.5, 0)
    calls.clear()
    return fn, cut, cut.take(params), cut.zero(params), sdp_jax.narrow(fn, cut), calls


def test_a_function_is_traced_once_for_its_shapes(x64):
    fn, _, params, dense, small, calls = small_tanh()
    with jax.checking_leaks():
        jax.jit(small)(params, X)
        jax.vmap(small, (None, 0))(params, X)
        jax.grad(lambda p: small(p, X[0]).sum())(params)
        jax.vmap(jax.grad(lambda p, x: small(p, x).sum()), (None, 0))(params, X)
    assert len(calls) == 2  # A batch of matrices, and one of them.
    promise.close(small(params, X), fn(dense, X), 1e-12)
    promise.close(small(params, X, 0.0), fn(dense, X, 0.0), 1e-12)
    promise.close(small(params, X, -1.0), fn(dense, X, -1.0), 1e-12)
    # Another batch size, another dtype, numbers that are equal but not alike.
    before = len(calls)
    for x, scale in ((X[:2], 1.0), (X.astype(np.float32), 1.0), (X, 1), (X, True)):
        small(params, x, scale)
        small(params, x, scale)
    assert len(calls) == before + 4


def test_what_is_closed_over_stays_in_its_trace(x64):
    _, cut, params, dense, *_ = small_tanh()
    seen = {}

    def fn(p, x):
        return jnp.tanh(x @ p["a"] * seen["scale"]) @ p["b"]

    small = sdp_jax.narrow(fn, cut)

    def scaled(function, p, scale):
        seen["scale"] = scale
        return function(p, X)

    for scale in (2.0, 3.0):  # A new trace each time, of which nothing may stay.
        found = jax.jit(lambda p, s: scaled(small, p, s))(params, scale)
        promise.close(found, scaled(fn, dense, scale), 1e-12)


def test_arguments_that_may_change_are_looked_at_each_time(x64):
    _, cut, params, dense, *_ = small_tanh()

    class Scale:
        value = 1.0

    def fn(p, x, scale):
        return jnp.tanh(x @ p["a"] * scale.value) @ p["b"]

    small, scale = sdp_jax.narrow(fn, cut), Scale()
    for scale.value in (1.0, 2.0):
        promise.close(small(params, X, scale), fn(dense, X, scale), 1e-12)
