"""Structure, serialisation and hot-path operations of groups."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sdp_jax
from sdp_jax.channels import probe_channels
from sdp_jax.tree import leaf_table
from tests import toy


def reference_norms(groups, tree):
    """Norms by explicit positions, in NumPy float64."""
    table = {k: np.asarray(v, np.float64) for k, v in leaf_table(tree).items()}
    norms = {}
    for d in groups:
        total = np.zeros(d.size)
        for m in d.producers:
            moved = np.moveaxis(table[m.path], m.axis, 0)
            for c in range(d.size):
                total[c] += (moved[m.positions(d.size)[:, c, :].ravel()] ** 2).sum()
        norms[d.name] = np.sqrt(total)
    return norms


def reference_scale(groups, tree, factors):
    table = {k: np.array(v, np.float64) for k, v in leaf_table(tree).items()}
    for d in groups:
        for m in d.producers:
            moved = np.moveaxis(table[m.path], m.axis, 0)
            for c in range(d.size):
                moved[m.positions(d.size)[:, c, :].ravel()] *= factors[d.name][c]
    return table


def check_against_reference(groups, tree):
    norms = sdp_jax.channel_norms(groups, tree)
    expected = reference_norms(groups, tree)
    chex.assert_trees_all_close(norms, expected, rtol=1e-6)
    rng = np.random.default_rng(0)
    factors = {d.name: jnp.asarray(rng.normal(size=d.size)) for d in groups}
    scaled = leaf_table(sdp_jax.scale_channels(groups, tree, factors))
    chex.assert_trees_all_close(
        dict(scaled), reference_scale(groups, tree, factors), rtol=1e-6
    )


class Factorisations(chex.TestCase):
    """Each way in which channels sit on an axis, with and without jit."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_plain(self):
        params = toy.mlp_params()
        groups = toy.mlp_groups(params)
        norms = self.variant(lambda t: sdp_jax.channel_norms(groups, t))(params)
        chex.assert_trees_all_close(norms, reference_norms(groups, params), rtol=1e-6)
        chex.assert_shape(norms["hidden0"], (6,))

    @chex.variants(with_jit=True, without_jit=True)
    def test_scaling(self):
        params = toy.mlp_params()
        groups = toy.mlp_groups(params)
        factors = {"hidden0": jnp.arange(6.0), "hidden1": jnp.zeros(5)}
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
                sdp_jax.producer("conv_a", -1),
                sdp_jax.producer("dense", 0, outer=9),
            ],
            "b": [
                sdp_jax.producer("conv_b", -1),
                sdp_jax.producer("dense", 0, outer=9, offset=4),
            ],
            # Heads of 4 in a fused projection: queries, keys and values.
            "heads": [sdp_jax.producer("qkv", 1, outer=3, inner=4)],
            # A repeated block that starts behind 7 others.
            "late": [sdp_jax.producer("block", 0, outer=2, offset=7, period=5)],
            "part": [sdp_jax.producer("both", 1, inner=2, offset=1, period=11)],
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
    member = sdp_jax.producer(
        "w", axis, outer=outer, inner=inner, offset=offset, period=period
    )
    groups = sdp_jax.groups_from_axes(tree, {"d": [member]}, sizes={"d": size})
    check_against_reference(groups, tree)
    probe = probe_channels(groups, tree)["d"]
    assert probe.shape == (size,)
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups


def test_weights():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    assert sdp_jax.channel_weights(groups) == {"hidden0": 1.0, "hidden1": 1.0}
    size = sdp_jax.channel_weights(groups, "size")
    assert size == {"hidden0": 5**0.5, "hidden1": 7**0.5}
    cost = sdp_jax.channel_weights(groups, "cost")
    # hidden0: 4 + 1 + 5 entries a channel, hidden1: 6 + 1 + 3; 6 and 5 channels.
    assert cost == pytest.approx({"hidden0": 1.0, "hidden1": 1.0})
    given_ = sdp_jax.channel_weights(groups, {"hidden1": 2.0, "hidden0": 4.0})
    assert given_ == {"hidden0": 4.0, "hidden1": 2.0}
    plain = sdp_jax.channel_norms(groups, params)["hidden1"]
    weighted = sdp_jax.channel_norms(groups, params, norm="size")["hidden1"]
    chex.assert_trees_all_close(weighted * 7**0.5, plain, rtol=1e-6)


def test_cost_weight_has_mean_one_over_channels():
    params = toy.mlp_params(widths=(40, 6, 5, 3))
    groups = toy.mlp_groups(params)
    cost = sdp_jax.channel_weights(groups, "cost")
    assert (6 * cost["hidden0"] + 5 * cost["hidden1"]) / 11 == pytest.approx(1)
    assert cost["hidden0"] / cost["hidden1"] == pytest.approx(46 / 10)


def test_half_precision_is_summed_in_float32():
    tree = {"w": jnp.full((4096, 2), 3.0, jnp.bfloat16)}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.producer("w", 1)]})
    norms = sdp_jax.channel_norms(groups, tree)["d"]
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, 3 * 64, rtol=1e-6)
    scaled = sdp_jax.scale_channels(groups, tree, {"d": norms})
    assert scaled["w"].dtype == jnp.bfloat16


def test_complex_parameters():
    tree = {"w": jnp.array([[3 + 4j, 0], [0, 1j]], jnp.complex64)}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.producer("w", 1)]})
    norms = sdp_jax.channel_norms(groups, tree)["d"]
    np.testing.assert_allclose(norms, [5, 1])
    assert norms.dtype == jnp.float32


def test_alive_sees_what_a_norm_would_lose():
    tree = {"w": jnp.array([[1e-30, 0.0], [0.0, 0.0]])}
    groups = sdp_jax.groups_from_axes(tree, {"d": [sdp_jax.producer("w", 1)]})
    assert sdp_jax.channels_alive(groups, tree)["d"].tolist() == [True, False]


def test_static_hashable_printable():
    groups, again = toy.mlp_groups(), toy.mlp_groups()
    assert groups == again
    assert hash(groups) == hash(again)
    assert {groups: 1}[again] == 1
    text = str(groups)
    assert "hidden1" in text
    assert "layer2/kernel[0] (consumer)" in text
    assert "11 channels" in text
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups


def test_at_gives_the_view_of_the_optimizer():
    variables = {
        "params": toy.mlp_params(),
        "batch_stats": {"norm": {"mean": jnp.zeros(6)}},
    }
    axes = toy.mlp_axes(prefix="params/")
    axes["hidden0"].append(sdp_jax.running_state("batch_stats/norm/mean", 0))
    groups = sdp_jax.groups_from_axes(variables, axes)
    inner = groups.at("params")
    assert inner == toy.mlp_groups()
    with pytest.raises(ValueError, match=r"groups.at\('params'\)"):
        sdp_jax.channel_norms(groups, variables["params"])
    with pytest.raises(ValueError, match="no leaf lies below 'parms'"):
        groups.at("parms")


def test_abstract_parameters():
    abstract = jax.eval_shape(toy.mlp_params)
    assert toy.mlp_groups(abstract) == toy.mlp_groups()
    shapes = jax.eval_shape(
        lambda t: sdp_jax.channel_norms(toy.mlp_groups(), t), abstract
    )
    assert shapes["hidden0"].shape == (6,)


def test_paths_of_linen_and_nnx():
    module = linen.Dense(3)
    variables = module.init(jax.random.key(0), jnp.ones((1, 2)))
    assert list(leaf_table(variables)) == ["params/bias", "params/kernel"]
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert list(leaf_table(state)) == ["bias", "kernel"]
    assert list(leaf_table(nnx.to_pure_dict(state))) == ["bias", "kernel"]


def test_one_pass_per_leaf_and_no_gather():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    factors = {"hidden0": jnp.ones(6), "hidden1": jnp.ones(5)}
    text = str(jax.make_jaxpr(lambda t: sdp_jax.channel_norms(groups, t))(params))
    text += str(
        jax.make_jaxpr(lambda t: sdp_jax.scale_channels(groups, t, factors))(params)
    )
    assert "gather" not in text
    assert "scatter" not in text
    # One square per producer leaf, whatever the number of channels.
    assert text.count("square") == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["dimensions"][0]["members"][0].update(axis="1"),
        lambda raw: raw["dimensions"][0]["members"][0].update(axis=1.0),
        lambda raw: raw["dimensions"][0]["members"][0].update(axis=None),
        lambda raw: raw["dimensions"][0]["members"][0].update(inner="1"),
        lambda raw: raw["dimensions"][0]["members"][0].update(period=-5),
        lambda raw: raw["dimensions"][0]["members"][0].update(path=3),
        lambda raw: raw["dimensions"][0].update(size=True),
        lambda raw: raw["dimensions"][0].update(name=["d"]),
        lambda raw: raw["dimensions"][0].update(members=[]),
        lambda raw: raw["leaves"][0].update(shape="12"),
        lambda raw: raw["leaves"][0].update(shape=[-1]),
        lambda raw: raw["leaves"].append(raw["leaves"][0]),
        lambda raw: raw.update(leaves=None),
    ],
)
def test_damaged_json_is_refused(change):
    raw = json.loads(toy.mlp_groups().to_json())
    change(raw)
    with pytest.raises(ValueError, match="not groups in JSON"):
        sdp_jax.Groups.from_json(json.dumps(raw))


def test_numpy_integers_are_integers():
    params = toy.mlp_params()
    given = sdp_jax.groups_from_axes(
        params,
        {"d": [sdp_jax.producer("layer0/kernel", np.int64(1))]},
        sizes={"d": np.int64(6)},
    )
    assert sdp_jax.Groups.from_json(given.to_json()) == given
    with pytest.raises(TypeError, match="axis must be an integer; got 1.0"):
        sdp_jax.groups_from_axes(
            params, {"d": [sdp_jax.producer("layer0/kernel", 1.0)]}
        )
    with pytest.raises(TypeError, match="axes must map dimension names"):
        sdp_jax.groups_from_axes(params, [sdp_jax.producer("layer0/kernel", 1)])
