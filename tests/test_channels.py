"""Arithmetic on channels against NumPy, position by position."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdp_jax
from sdp_jax.channels import (
    Term,
    channel_maxima,
    channel_sums,
    channel_weights,
    member_sums,
    nonzero,
    square,
    weighted_norms,
)
from sdp_jax.factors import shrink_channels
from sdp_jax.tree import leaf_table
from tests import toy


def reference_norms(groups, tree):
    """Norms by explicit positions, in NumPy float64."""
    table = {k: np.asarray(v, np.float64) for k, v in leaf_table(tree).items()}
    norms = []
    for d in groups:
        total = np.zeros(d.size)
        for m in d.producers:
            moved = np.moveaxis(table[m.path], m.axis, 0)
            for c in range(d.size):
                total[c] += (moved[m.positions(d.size)[:, c, :].ravel()] ** 2).sum()
        norms.append(np.sqrt(total))
    return np.concatenate(norms)


def reference_scale(groups, tree, factors):
    table = {k: np.array(v, np.float64) for k, v in leaf_table(tree).items()}
    parts = groups.split(np.asarray(factors))
    for d in groups:
        for m in d.producers:
            moved = np.moveaxis(table[m.path], m.axis, 0)
            for c in range(d.size):
                moved[m.positions(d.size)[:, c, :].ravel()] *= parts[d.name][c]
    return table


def check_against_reference(groups, tree):
    factors = jnp.asarray(np.random.default_rng(0).normal(size=groups.num_channels))

    @jax.jit
    def found(tree):
        return (
            sdp_jax.channel_norms(groups, tree),
            sdp_jax.scale_channels(groups, tree, factors),
            sdp_jax.channel_products(groups, tree, tree),
            channel_sums(groups, Term(nonzero, (tree,), small=True))[0],
        )

    norms, scaled, squares, probe = found(tree)
    expected = reference_norms(groups, tree)
    np.testing.assert_allclose(norms, expected, rtol=1e-6)
    chex.assert_trees_all_close(
        dict(leaf_table(scaled)), reference_scale(groups, tree, factors), rtol=1e-6
    )
    # The product of a tree with itself is the square of the norm.
    np.testing.assert_allclose(squares, expected**2, rtol=1e-5)
    assert probe.dtype == jnp.int32 and (np.asarray(probe) > 0).all()
    largest = np.asarray(channel_maxima(groups, tree))
    assert ((largest <= expected * (1 + 1e-6)) & (largest > 0)).all()


class Factorisations(chex.TestCase):
    """Each way in which channels sit on an axis, with and without jit."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_plain(self):
        params = toy.mlp_params()
        groups = toy.mlp_groups(params)
        norms = self.variant(lambda t: sdp_jax.channel_norms(groups, t))(params)
        np.testing.assert_allclose(norms, reference_norms(groups, params), rtol=1e-6)
        chex.assert_shape(norms, (11,))

    @chex.variants(with_jit=True, without_jit=True)
    def test_scaling(self):
        params = toy.mlp_params()
        groups = toy.mlp_groups(params)
        factors = jnp.concatenate([jnp.arange(6.0), jnp.zeros(5)])
        scaled = self.variant(lambda t, f: sdp_jax.scale_channels(groups, t, f))(
            params, factors
        )
        expected = reference_scale(groups, params, factors)
        chex.assert_trees_all_close(dict(leaf_table(scaled)), expected, rtol=1e-6)


def test_flattened_convolution_heads_and_concatenation():
    rng = np.random.default_rng(0)
    params = {
        "conv_a": jnp.asarray(rng.normal(size=(3, 3, 2, 4))),
        "conv_b": jnp.asarray(rng.normal(size=(3, 3, 2, 3))),
        "qkv": jnp.asarray(rng.normal(size=(5, 3 * 2 * 4))),
        "dense": jnp.asarray(rng.normal(size=(9 * 7, 6))),
        "both": jnp.asarray(rng.normal(size=(2, 11))),
        "block": jnp.asarray(rng.normal(size=(7 + 2 * 5, 2))),
    }
    groups = sdp_jax.groups_from_axes(
        params,
        {
            # Two convolutions, concatenated, flattened over 9 positions; the dense
            # rows count as producers here to exercise outer, offset and period.
            "a": [
                sdp_jax.Member("conv_a", -1),
                sdp_jax.Member("dense", 0, outer=9),
            ],
            "b": [
                sdp_jax.Member("conv_b", -1),
                sdp_jax.Member("dense", 0, outer=9, offset=4),
            ],
            # Heads of 4 in a fused projection: queries, keys and values.
            "heads": [sdp_jax.Member("qkv", 1, outer=3, inner=4)],
            # A repeated block that starts behind 7 others.
            "late": [sdp_jax.Member("block", 0, outer=2, offset=7, period=5)],
            "part": [sdp_jax.Member("both", 1, inner=2, offset=1, period=11)],
        },
        sizes={"part": 5, "late": 5},
    )
    assert groups.sizes == {"a": 4, "b": 3, "heads": 2, "late": 5, "part": 5}
    assert groups["a"].members[1].period == 7
    check_against_reference(groups, params)


@settings(max_examples=12)
@given(
    outer=st.integers(1, 3),
    size=st.integers(1, 4),
    inner=st.integers(1, 3),
    gap=st.integers(0, 2),
    offset=st.integers(0, 3),
    tail=st.integers(0, 2),
    axis=st.integers(0, 2),
)
def test_any_factorisation(outer, size, inner, gap, offset, tail, axis):
    period = size * inner + gap
    length = offset + (outer - 1) * period + size * inner + tail
    shape = [2, 3]
    shape.insert(axis, length)
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))}
    member = sdp_jax.Member(
        "w", axis, outer=outer, inner=inner, offset=offset, period=period
    )
    groups = sdp_jax.groups_from_axes(tree, {"d": [member]}, sizes={"d": size})
    check_against_reference(groups, tree)
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups


def test_weights():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    assert sdp_jax.channel_weights(groups).tolist() == [1.0] * 11
    size = sdp_jax.channel_weights(groups, "size")
    assert size.tolist() == [5**0.5] * 6 + [7**0.5] * 5
    cost = sdp_jax.channel_weights(groups, "cost")
    # hidden0: 4 + 1 + 5 entries a channel, hidden1: 6 + 1 + 3; 6 and 5 channels.
    assert cost == pytest.approx(np.ones(11))
    given_ = sdp_jax.channel_weights(groups, {"hidden1": 2.0, "hidden0": 4.0})
    assert given_.tolist() == [4.0] * 6 + [2.0] * 5
    plain = sdp_jax.channel_norms(groups, params)
    weighted = sdp_jax.channel_norms(groups, params, weights="size")
    np.testing.assert_allclose(weighted * size, plain, rtol=1e-6)


def with_invariant():
    """A filter and its bias that are scale-invariant, a scale that is not."""
    params = {"w": jnp.arange(1.0, 13).reshape(3, 4), "b": jnp.arange(4.0)}
    params |= {"scale": jnp.array([3.0, 4, 0, 1]), "v": jnp.ones((2, 3))}
    groups = sdp_jax.groups_from_axes(
        params,
        {
            "unit": [
                sdp_jax.Member("w", 1, scale_invariant=True),
                sdp_jax.Member("b", 0, scale_invariant=True),
                sdp_jax.Member("scale", 0),
            ],
            "all": [sdp_jax.Member("v", 1, scale_invariant=True)],
        },
    )
    return params, groups


def test_what_shrinks_is_what_is_not_invariant():
    params, groups = with_invariant()
    assert [m.path for _, m, _ in groups.shrinking] == ["scale", "v"]
    (squares,) = channel_sums(groups, Term(square, (params,), shrinking=True))
    root = 2**0.5
    want = [3, 4, 0, 1, root, root, root]
    np.testing.assert_allclose(
        weighted_norms(groups, squares, "plain", shrinking=True), want, rtol=1e-6
    )
    sizes = np.sqrt([1, 1, 1, 1, 2, 2, 2])
    np.testing.assert_allclose(
        weighted_norms(groups, squares, "size", shrinking=True),
        np.divide(want, sizes),
        rtol=1e-6,
    )
    # Norms that rank channels count all producers, as they always do.
    np.testing.assert_allclose(
        sdp_jax.channel_norms(groups, params),
        reference_norms(groups, params),
        rtol=1e-6,
    )
    np.testing.assert_allclose(channel_weights(groups, "size")[:4], 5**0.5)


def test_a_threshold_takes_all_or_spares_what_is_invariant():
    params, groups = with_invariant()
    factors = jnp.array([1.0, 0.5, 0.25, 0, 0.5, 0, 1])
    found = jax.jit(lambda tree: shrink_channels(groups, tree, factors))(params)
    alive = np.array([1, 1, 1, 0])
    want = {
        "w": params["w"] * alive,
        "b": params["b"] * alive,
        "scale": params["scale"] * factors[:4],
        "v": params["v"] * factors[4:],
    }
    chex.assert_trees_all_equal(found, want)


def test_cost_weight_has_mean_one_over_channels():
    params = toy.mlp_params(widths=(40, 6, 5, 3))
    groups = toy.mlp_groups(params)
    cost = sdp_jax.channel_weights(groups, "cost")
    assert cost.mean() == pytest.approx(1)
    assert cost[0] / cost[6] == pytest.approx(46 / 10)


def test_half_precision_is_summed_in_float32():
    tree = {"w": jnp.full((4096, 2), 3.0, jnp.bfloat16)}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.Member("w", 1)]})
    norms = sdp_jax.channel_norms(groups, tree)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, 3 * 64, rtol=1e-6)
    scaled = sdp_jax.scale_channels(groups, tree, norms)
    assert scaled["w"].dtype == jnp.bfloat16


def test_complex_parameters():
    tree = {"w": jnp.array([[3 + 4j, 0], [0, 1j]], jnp.complex64)}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.Member("w", 1)]})
    norms = sdp_jax.channel_norms(groups, tree)
    np.testing.assert_allclose(norms, [5, 1])
    assert norms.dtype == jnp.float32
    turned = jax.tree.map(lambda x: 1j * x, tree)
    # The real part of conj(z) · i z.
    np.testing.assert_array_equal(sdp_jax.channel_products(groups, tree, turned), 0)


def test_alive_sees_what_a_norm_would_lose():
    tree = {"w": jnp.array([[1e-30, 0.0], [0.0, 0.0]])}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.Member("w", 1)]})
    assert sdp_jax.channels_alive(groups, tree).tolist() == [True, False]


def test_member_sums_are_those_of_the_roles():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    roles = ("producer", "consumer")
    sums = member_sums(groups, params, jnp.square, roles=roles)
    assert list(sums) == ["hidden0", "hidden1"]
    found = {m.path: (m.role, np.asarray(value)) for m, value in sums["hidden0"]}
    for path, axis, role in (
        ("layer0/kernel", 0, "producer"),
        ("layer1/kernel", 1, "consumer"),
    ):
        layer, leaf = path.split("/")
        want = np.sum(np.square(params[layer][leaf]), axis=axis)
        assert found[path][0] == role
        np.testing.assert_allclose(found[path][1], want, rtol=1e-6)
    bias = np.square(params["layer0"]["bias"])
    np.testing.assert_allclose(found["layer0/bias"][1], bias, rtol=1e-6)
    alone = member_sums(groups, params, jnp.square)
    assert [m.role for m, _ in alone["hidden1"]] == ["producer", "producer"]
    first = sdp_jax.Groups(groups.dimensions[:1], groups.leaves)
    short = {"layer0": params["layer0"]}
    with pytest.raises(ValueError, match="has no leaf 'layer1/kernel' of shape"):
        member_sums(first, short, jnp.square, roles=roles)


def test_probes_look_at_vectors_or_the_smallest_producer():
    tree = {
        "big": jnp.array([[-3.0, 1.0], [5.0, 0.5]]),
        "small": jnp.array([[0.25, -2.0]]),
        "bias": jnp.array([-4.0, 0.0]),
    }

    def probe(groups):
        return channel_sums(groups, Term(nonzero, (tree,), small=True))[0]

    matrices = [sdp_jax.Member("big", 1), sdp_jax.Member("small", 1)]
    groups = sdp_jax.groups_from_axes(tree, {"d": matrices})
    assert probe(groups).tolist() == [1, 1]
    with_bias = [*matrices, sdp_jax.Member("bias", 0)]
    groups = sdp_jax.groups_from_axes(tree, {"d": with_bias})
    assert probe(groups).tolist() == [1, 0]


def test_abstract_parameters():
    abstract = jax.eval_shape(toy.mlp_params)
    shapes = jax.eval_shape(
        lambda t: sdp_jax.channel_norms(toy.mlp_groups(), t), abstract
    )
    assert shapes.shape == (11,)


def test_one_pass_per_leaf_and_no_gather():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    factors = jnp.ones(11)
    text = str(jax.make_jaxpr(lambda t: sdp_jax.channel_norms(groups, t))(params))
    text += str(
        jax.make_jaxpr(lambda t: sdp_jax.scale_channels(groups, t, factors))(params)
    )
    assert "gather" not in text
    assert "scatter" not in text
    # One square per producer leaf, whatever the number of channels.
    assert text.count("square") == 4


@pytest.mark.parametrize("factors", [1.0, np.ones(10), np.ones((11, 1))])
def test_factors_are_one_number_for_each_channel(factors):
    params = toy.mlp_params()
    with pytest.raises(ValueError, match="one number for each of 11 channels"):
        sdp_jax.scale_channels(toy.mlp_groups(params), params, factors)


def test_other_parameters_are_refused():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    with pytest.raises(ValueError, match=r"no leaf 'layer1/kernel'.*as a whole"):
        sdp_jax.channel_norms(groups, {"layer0": params["layer0"]})
    other = toy.mlp_params(widths=(4, 5, 5, 3))
    with pytest.raises(ValueError, match=r"has shape \(4, 5\).*use cut.groups"):
        sdp_jax.channels_alive(groups, other)
