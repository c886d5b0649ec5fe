"""Counts by hand and by the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sdp_jax
from sdp_jax import measure


def shape(*size):
    return jax.ShapeDtypeStruct(size, jnp.float32)


def conv(p, x, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        p,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


CASES = {
    "matrix product": (lambda p, x: x @ p, shape(5, 7), shape(3, 5), 2 * 3 * 5 * 7),
    "batched product": (
        lambda p, x: jnp.einsum("bij,bjk->bik", x, p),
        shape(2, 5, 7),
        shape(2, 3, 5),
        2 * 2 * 3 * 5 * 7,
    ),
    "convolution": (
        conv,
        shape(3, 3, 4, 6),
        shape(2, 8, 8, 4),
        2 * (2 * 6 * 6 * 6) * (3 * 3 * 4),
    ),
    "strided convolution": (
        lambda p, x: conv(p, x, 2),
        shape(2, 2, 4, 6),
        shape(2, 8, 8, 4),
        2 * (2 * 4 * 4 * 6) * (2 * 2 * 4),
    ),
    "depthwise convolution": (
        lambda p, x: conv(p, x, groups=4),
        shape(3, 3, 1, 4),
        shape(2, 8, 8, 4),
        2 * (2 * 6 * 6 * 4) * 9,
    ),
    "element-wise": (lambda p, x: x * p + p, shape(4), shape(4), 8),
    "sum": (lambda p, x: (p * x).sum(), shape(9), shape(9), 18),
    "loop": (
        lambda p, x: lax.scan(lambda c, _: (c @ p, None), x, None, length=6)[0],
        shape(5, 5),
        shape(3, 5),
        6 * 2 * 3 * 5 * 5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_by_hand(name):
    fn, params, x, flops = CASES[name]
    found = sdp_jax.cost(fn, params, x)
    assert found.flops == flops
    assert found.parameters == np.prod(params.shape)
    assert sum(e.flops * e.repeats for e in found.equations) == flops


@pytest.mark.parametrize("name", [n for n in CASES if n != "loop"])
def test_the_compiler_agrees(name):
    fn, params, x, flops = CASES[name]
    analysis = jax.jit(fn).lower(params, x).compile().cost_analysis()
    assert flops == pytest.approx(analysis["flops"], rel=0.03, abs=1)


def test_a_branch_counts_as_its_dearest_and_bytes_are_those_of_results():
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda y: y @ p, lambda y: y, x)

    assert sdp_jax.cost(fn, shape(5, 5), shape(3, 5)).flops == 2 * 3 * 5 * 5 + 1
    found = sdp_jax.cost(lambda p, x: jnp.tanh(x @ p), shape(5, 7), shape(3, 5))
    assert found.activation_bytes == 2 * 3 * 7 * 4
    assert "dot_general" in str(found) and __file__ in str(found)


def test_latency_times_in_turns():
    fast, slow = sdp_jax.latency(
        lambda x: x, lambda x: x @ x @ x, args=[(jnp.ones(1),), (jnp.ones((300, 300)),)]
    )
    assert 0 < fast.seconds < slow.seconds
    assert (fast.ratio, fast.low, fast.high) == (1, 1, 1)
    assert 1 < slow.low <= slow.ratio <= slow.high
    with pytest.raises(ValueError, match="arguments for each function"):
        sdp_jax.latency(lambda x: x, args=[])


def busy(monkeypatch, costs, seed):
    """A machine on which calls cost what they say, and others run, too."""
    rng = np.random.default_rng(seed)
    now = [0.0]
    load = [1.0]

    class Compiled:
        def __init__(self, fn):
            self.cost = costs[fn([])]

        def __call__(self, moving):
            load[0] = max(1.0, load[0] + rng.normal() * 0.3)
            pause = rng.exponential(2.0) if rng.random() < 0.1 else 0.0
            now[0] += load[0] * self.cost * rng.lognormal(0, 0.1) + pause
            return 0.0

    monkeypatch.setattr(measure.jax, "jit", Compiled)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])


def test_equal_programs_are_equal_on_a_busy_machine(monkeypatch):
    told = {"equal": 0, "faster": 0}
    for seed in range(200):
        with monkeypatch.context() as patch:
            busy(patch, {"a": 1.0, "b": 1.0, "c": 0.7}, seed)
            _, same, less = sdp_jax.latency(
                lambda: "a", lambda: "b", lambda: "c", args=[(), (), ()], repeats=30
            )
        told["equal"] += same.low <= 1 <= same.high
        told["faster"] += less.high < 1
    assert told["equal"] >= 185  # 95 %, less what chance allows
    assert told["faster"] >= 195


def test_the_interval_is_that_of_order_statistics():
    # Of 20 values the 6th and the 15th: P(fewer than 6 of 20 heads) = 0.021.
    median, low, high = measure._interval(np.arange(1.0, 21.0)[::-1])
    assert (median, low, high) == (10.5, 6, 15)
    assert measure._interval(np.array([3.0, 1.0, 2.0])) == (2, 1, 3)
