"""Scales are told by name, biases by their place beside them."""

import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax.methods import scales
from sdp_jax.methods.scales import DEFAULT_SCALES, find_gates, find_scales


def paths(gates):
    return [[m.path for m in gate.members] for gate in gates]


def make(params, axes, **kwargs):
    return sdp_jax.groups_from_axes(params, axes, **kwargs)


def test_scale_and_bias_of_a_module():
    params = {
        "conv": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    }
    members = [sdp_jax.Member("conv/kernel", 1), sdp_jax.Member("conv/bias", 0)]
    members += [sdp_jax.Member("norm/bias", 0), sdp_jax.Member("norm/scale", 0)]
    groups = make(params, {"hidden": members})
    (gate,) = find_gates(groups)["hidden"]
    assert gate.scale is not None and gate.scale.path == "norm/scale"
    assert paths([gate]) == [["norm/scale", "norm/bias"]]
    assert [m.path for m in find_scales(groups)["hidden"]] == ["norm/scale"]


def test_without_a_scale_all_producers_are_the_gate():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    members = [sdp_jax.Member("kernel", 1), sdp_jax.Member("bias", 0)]
    groups = make(params, {"hidden": members})
    (gate,) = find_gates(groups)["hidden"]
    assert gate.scale is None and gate.members == groups["hidden"].producers
    assert find_scales(groups) == {"hidden": ()}


@pytest.mark.parametrize(
    "name, patterns, hit",
    [
        ("scale", DEFAULT_SCALES, True),
        ("gamma", DEFAULT_SCALES, True),
        ("weight", DEFAULT_SCALES, True),
        ("Scale", DEFAULT_SCALES, False),
        ("scales", DEFAULT_SCALES, False),
        ("bn_scale", ("*_scale",), True),
        ("scale", ["g"], False),
    ],
)
def test_patterns(name, patterns, hit):
    groups = make({"a": {name: jnp.ones(4)}}, {"d": sdp_jax.Member(f"a/{name}", 0)})
    assert bool(find_scales(groups, patterns)["d"]) == hit


@pytest.mark.parametrize(
    "shape, axis, hit",
    [((4,), 0, True), ((1, 1, 4), 2, True), ((1, 4, 1), 1, True)]
    + [((4, 1), 0, False), ((3, 4), 1, False)],
)
def test_only_vectors_are_scales(shape, axis, hit):
    groups = make({"weight": jnp.ones(shape)}, {"d": sdp_jax.Member("weight", axis)})
    assert bool(find_scales(groups)["d"]) == hit


def test_consumers_and_state_are_no_scales():
    params = {
        "w": jnp.ones((3, 4)),
        "scale": jnp.ones(4),
        "next": {"scale": jnp.ones(4)},
    }
    members = [sdp_jax.Member("w", 1), sdp_jax.Member("next/scale", 0, "consumer")]
    members += [sdp_jax.Member("scale", 0, "state")]
    assert find_scales(make(params, {"d": members})) == {"d": ()}


def test_residual_dimension_has_a_gate_for_each_scale():
    params = {
        k: {"scale": jnp.ones(4), "bias": jnp.ones(4), "kernel": jnp.ones((3, 4))}
        for k in "ab"
    }
    members = [sdp_jax.Member(f"{k}/kernel", 1) for k in "ab"]
    members += [sdp_jax.Member(f"{k}/{n}", 0) for n in ("bias", "scale") for k in "ab"]
    gates = find_gates(make(params, {"d": members}))["d"]
    assert paths(gates) == [["a/scale", "a/bias"], ["b/scale", "b/bias"]]


def test_the_filter_of_one_input_is_no_bias():
    params = {"w": jnp.ones((1, 4)), "scale": jnp.ones(4)}
    members = [sdp_jax.Member("w", 1), sdp_jax.Member("scale", 0)]
    assert paths(find_gates(make(params, {"d": members}))["d"]) == [["scale"]]


def test_biases_of_a_concatenation_go_by_position():
    params = {"scale": jnp.ones(5), "bias": jnp.ones(5)}
    axes = {
        "first": [
            sdp_jax.Member("scale", 0, period=2),
            sdp_jax.Member("bias", 0, period=2),
        ],
        "second": [
            sdp_jax.Member("bias", 0, offset=2, period=3),
            sdp_jax.Member("scale", 0, offset=2, period=3),
        ],
    }
    groups = make(params, axes, sizes={"first": 2, "second": 3})
    for name, gates in find_gates(groups).items():
        assert paths(gates) == [["scale", "bias"]]
        assert {m.offset for m in gates[0].members} == {0 if name == "first" else 2}


def test_entries_go_out_and_back():
    # Three channels of two neighbouring entries, twice, with a gap and an offset.
    leaf = jnp.arange(16.0, dtype=jnp.bfloat16).reshape(1, 16)
    m = sdp_jax.Member("scale", 1, outer=2, inner=2, offset=1, period=7)
    taken = scales.take_entries(leaf, m, 3)
    assert taken.shape == (2, 3, 2) and taken.dtype == jnp.float32
    where = [
        [[1 + 7 * o + 2 * c + i for i in (0, 1)] for c in range(3)] for o in (0, 1)
    ]
    np.testing.assert_array_equal(taken, where)
    put = scales.put_entries(leaf, m, 3, taken + 100)
    expected = np.arange(16.0)
    expected[np.ravel(where)] += 100
    assert put.shape == leaf.shape and put.dtype == leaf.dtype
    np.testing.assert_array_equal(np.asarray(put[0], np.float32), expected)


def test_a_string_is_no_sequence_of_patterns():
    groups = make({"w": jnp.ones((3, 4))}, {"d": sdp_jax.Member("w", 1)})
    for bad in ("scale", 3, [1], None):
        with pytest.raises(TypeError, match="scales must be a tuple of patterns"):
            find_gates(groups, bad)  # type: ignore
