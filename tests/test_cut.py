"""Cutting: the small model is the dense model, and so is its training."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from tests import toy


def random_tree(shapes, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def test_same_output_after_the_cut(x64):
    params = toy.mlp_params(dtype=jnp.float64, widths=(4, 9, 7, 3))
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (0, 3, 8), "hidden1": (6,)})
    cut = sdp_jax.plan_cut(groups, params)
    assert cut.widths == {"hidden0": 6, "hidden1": 6}
    assert cut.kept[0] == (1, 2, 4, 5, 6, 7)
    small = cut.take(params)
    assert small["layer1"]["kernel"].shape == (6, 6)
    x, _ = toy.batch(dtype=jnp.float64)
    expected = toy.mlp_apply(params, x)
    np.testing.assert_allclose(toy.mlp_apply(small, x), expected, rtol=1e-12)
    # Nothing but slices: the entries themselves are the same bits.
    np.testing.assert_array_equal(
        small["layer0"]["kernel"],
        np.asarray(params["layer0"]["kernel"])[:, cut.kept[0]],
    )


def conv_net(params, x, running):
    """Convolution, batch norm, flatten in height, width, channel order, dense."""
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x - running["mean"]) / jnp.sqrt(running["var"] + 1e-5)
    x = jax.nn.relu(x * params["scale"] + params["shift"])
    return x.reshape(x.shape[0], -1) @ params["dense"]


def test_flattened_convolution_with_running_statistics(x64):
    height, width, channels = 3, 2, 5
    shapes = {
        "conv": (3, 3, 2, channels),
        "scale": (channels,),
        "shift": (channels,),
        "dense": (height * width * channels, 4),
    }
    variables = {
        "params": random_tree(shapes),
        "running": {
            "mean": jnp.arange(5.0),
            "var": jnp.arange(1.0, 6.0),
        },
    }
    groups = sdp_jax.groups_from_axes(
        variables,
        {
            "conv": [
                sdp_jax.Member("params/conv", -1),
                sdp_jax.Member("params/scale", 0),
                sdp_jax.Member("params/shift", 0),
                sdp_jax.Member("running/mean", 0, "state"),
                sdp_jax.Member("running/var", 0, "state"),
                sdp_jax.Member("params/dense", 0, "consumer", outer=height * width),
            ]
        },
    )
    variables = toy.kill(groups, variables, {"conv": (1, 4)})
    cut = sdp_jax.plan_cut(groups, variables)
    small = cut.take(variables)
    assert small["params"]["dense"].shape == (height * width * 3, 4)
    np.testing.assert_array_equal(small["running"]["mean"], [0, 2, 3])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, height, width, 2)))
    expected = conv_net(variables["params"], x, variables["running"])
    found = conv_net(small["params"], x, small["running"])
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def attention(params, x, head_dim):
    def split(y):
        return y.reshape(*y.shape[:-1], -1, head_dim)

    q, k, v = (split(x @ params[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("tha,sha->hts", q, k))
    y = jnp.einsum("hts,sha->tha", weights, v)
    return y.reshape(y.shape[0], -1) @ params["out"]


def test_attention_heads_separate_and_fused(x64):
    heads, dim, model = 4, 3, 6
    names = ("q", "k", "v")
    params = random_tree(
        {n: (model, heads * dim) for n in names} | {"out": (12, model)}
    )
    groups = sdp_jax.groups_from_axes(
        params,
        {
            "heads": [sdp_jax.Member(n, 1, inner=dim) for n in names]
            + [sdp_jax.Member("out", 0, "consumer", inner=dim)]
        },
    )
    assert groups.sizes == {"heads": heads}
    params = toy.kill(groups, params, {"heads": (0, 2)})
    small = sdp_jax.plan_cut(groups, params).take(params)
    assert small["q"].shape == (model, 2 * dim)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, model)))
    expected = attention(params, x, dim)
    np.testing.assert_allclose(
        attention(small, x, dim), expected, rtol=1e-11, atol=1e-12
    )

    # One matrix [q | k | v]: the heads repeat three times along its axis.
    fused = {
        "qkv": jnp.concatenate([params[n] for n in names], 1),
        "out": params["out"],
    }
    axes = {
        "heads": [
            sdp_jax.Member("qkv", 1, outer=3, inner=dim),
            sdp_jax.Member("out", 0, "consumer", inner=dim),
        ]
    }
    cut = sdp_jax.plan_cut(sdp_jax.groups_from_axes(fused, axes), fused)
    q, k, v = jnp.split(cut.take(fused)["qkv"], 3, axis=1)
    parts = {"q": q, "k": k, "v": v, "out": cut.take(fused)["out"]}
    np.testing.assert_allclose(
        attention(parts, x, dim), expected, rtol=1e-11, atol=1e-12
    )


def test_concatenation_and_a_cut_of_a_cut(x64):
    params = random_tree({"a": (3, 4), "b": (3, 5), "out": (9, 2)})
    groups = sdp_jax.groups_from_axes(
        params,
        {
            "a": [sdp_jax.Member("a", 1), sdp_jax.Member("out", 0, "consumer")],
            "b": [
                sdp_jax.Member("b", 1),
                sdp_jax.Member("out", 0, "consumer", offset=4),
            ],
        },
    )

    def apply(p, x):
        return jnp.concatenate([x @ p["a"], x @ p["b"]], axis=1) @ p["out"]

    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
    params = toy.kill(groups, params, {"a": (1,), "b": (0, 4)})
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(params)
    np.testing.assert_allclose(
        apply(small, x), apply(params, x), rtol=1e-11, atol=1e-12
    )
    small = toy.kill(cut.groups, small, {"a": (0,), "b": (1,)})
    second = sdp_jax.plan_cut(cut.groups, small)
    smaller = second.take(small)
    assert second.widths == {"a": 2, "b": 2}
    assert {k: v.shape for k, v in smaller.items()} == {
        "a": (3, 2),
        "b": (3, 2),
        "out": (4, 2),
    }
    np.testing.assert_allclose(
        apply(smaller, x), apply(small, x), rtol=1e-11, atol=1e-12
    )
    assert second.groups.sizes == second.widths


OPTIMIZERS = {
    "sgd": lambda g, s: sdp_jax.altsdp(0.05, g, strength=s),
    "momentum": lambda g, s: sdp_jax.altsdp(0.02, g, strength=s, momentum=0.9),
    "adamw": lambda g, s: sdp_jax.altsdp(optax.adamw(0.01), g, strength=s),
    "prox_sgd": lambda g, s: sdp_jax.prox_sgd(0.05, g, strength=s, momentum=0.9),
    "wrapped": lambda g, s: optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(100.0),
            sdp_jax.altsdp(0.05, g, strength=s, momentum=0.9),
        ),
        3,
    ),
}


def projected(groups, strength):
    return optax.chain(
        optax.sgd(0.05),
        sdp_jax.dual_averaging(),
        sdp_jax.valley.project_onto_valley(groups, strength, rank=2),
        sdp_jax.group_soft_threshold(groups, strength),
    )


def train(tx, params, state, steps):
    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(toy.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in steps:
        params, state = step(params, state, toy.batch(seed=i, dtype=jnp.float64))
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_cut(name, x64):
    make = OPTIMIZERS[name]
    params = toy.mlp_params(dtype=jnp.float64, widths=(4, 16, 3))
    groups = toy.mlp_groups(params, hidden=1)
    tx = make(groups, sdp_jax.target_sparsity(0.5, 0, 8))
    params, state = train(tx, params, tx.init(params), range(12))
    cut = sdp_jax.plan_cut(groups, params)
    assert cut.widths == {"hidden0": 8}
    # The channels that are gone count no longer: nothing more is asked for.
    small_tx = make(cut.groups, sdp_jax.target_sparsity(0.0, 0, 8))
    small = cut.take(params)
    small_state = cut.take(state, like=jax.eval_shape(small_tx.init, small))
    params, state = train(tx, params, state, range(12, 22))
    small, small_state = train(small_tx, small, small_state, range(12, 22))
    chex.assert_trees_all_close(small, cut.take(params), rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(small_state, cut.take(state), rtol=1e-7, atol=1e-9)


def test_the_valley_estimate_is_cut_with_the_rest(x64):
    params = toy.mlp_params(dtype=jnp.float64, widths=(4, 16, 3))
    groups = toy.mlp_groups(params, hidden=1)
    strength = sdp_jax.target_sparsity(0.5, 0, 8)
    tx = projected(groups, strength)
    params, state = train(tx, params, tx.init(params), range(12))
    cut = sdp_jax.plan_cut(groups, params)
    small_tx = projected(cut.groups, sdp_jax.target_sparsity(0.0, 0, 8))
    small = cut.take(params)
    like = jax.eval_shape(small_tx.init, small)
    small, _ = train(small_tx, small, cut.take(state, like=like), range(12, 22))
    # The dense estimate also sees gradients of dead channels, so they differ a little.
    params, _ = train(tx, params, state, range(12, 22))
    chex.assert_trees_all_close(small, cut.take(params), rtol=0.05, atol=1e-3)


def test_training_of_a_deep_net_goes_on(x64):
    params = toy.mlp_params(dtype=jnp.float64, widths=(4, 12, 10, 3))
    groups = toy.mlp_groups(params)
    tx = OPTIMIZERS["momentum"](groups, sdp_jax.target_sparsity(0.5, 0, 40))
    params, state = train(tx, params, tx.init(params), range(60))
    cut = sdp_jax.plan_cut(groups, params)
    assert sum(cut.widths.values()) == 11
    # With the base optimizer alone nothing jumps: one step moves as SGD does.
    base = optax.sgd(0.02, momentum=0.9)
    small, base_state = cut.take(params), cut.take(state[0])
    batch = toy.batch(seed=60, dtype=jnp.float64)
    grads = jax.grad(toy.loss)(small, batch)
    updates, _ = base.update(grads, base_state, small)
    trace = jax.tree.map(lambda m, g: 0.9 * m + g, cut.take(state[0][0].trace), grads)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda m: -0.02 * m, trace))
    # With AltSDP as well the pruned set stays, and training goes on.
    small_tx = OPTIMIZERS["momentum"](cut.groups, sdp_jax.target_sparsity(0.0, 0, 40))
    before = float(toy.loss(small, batch))
    small, small_state = train(small_tx, small, cut.take(state), range(60, 120))
    assert sdp_jax.plan_cut(cut.groups, small).widths == cut.widths
    assert float(toy.loss(small, batch)) < 2 * before


def test_take_works_on_shapes_numpy_and_under_jit():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (1, 2)})
    cut = sdp_jax.plan_cut(groups, params)
    expected = cut.take(params)
    shapes = cut.take(jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected)
    host = cut.take(jax.tree.map(np.asarray, params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    chex.assert_trees_all_equal(jax.jit(cut.take)(params), expected)


def test_groups_of_the_cut_fit_the_small_parameters():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (1, 2), "hidden1": (0,)})
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(params)
    assert dataclasses.replace(cut.groups, before=None) == toy.mlp_groups(small)
    assert cut.groups.dense == groups
    assert sdp_jax.plan_cut(cut.groups, small).widths == cut.widths


def test_a_dead_dimension_keeps_a_zero_channel():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": range(6)})
    cut = sdp_jax.plan_cut(groups, params)
    assert cut.widths["hidden0"] == 1
    assert sdp_jax.plan_cut(groups, params, min_channels=3).widths["hidden0"] == 3
    x, _ = toy.batch()
    chex.assert_trees_all_close(
        toy.mlp_apply(cut.take(params), x), toy.mlp_apply(params, x), rtol=1e-6
    )


def test_zero_is_what_take_leaves_out():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    cut = sdp_jax.Cut(groups, ((1, 2, 5), (0,)))
    zero = cut.zero(params)
    dead = {"hidden0": (0, 3, 4), "hidden1": (1, 2, 3, 4)}
    chex.assert_trees_all_equal(zero, toy.kill(groups, params, dead))
    assert sdp_jax.plan_cut(groups, zero) == cut
    chex.assert_trees_all_equal(cut.take(zero), cut.take(params))
    chex.assert_trees_all_equal(jax.jit(cut.zero)(params), zero)


def test_nothing_to_cut_is_the_identity():
    params = toy.mlp_params()
    cut = sdp_jax.plan_cut(toy.mlp_groups(params), params)
    chex.assert_trees_all_equal(cut.take(params), params)
    assert "100.0%" in cut.summary()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (((), (0,)), "at least one; got ()"),
        (((-1,), (0,)), "from 0 to 5"),
        (((3, 1), (0,)), "ascending"),
        (((1, 1), (0,)), "ascending"),
        (((100,), (0,)), "from 0 to 5"),
        (((0,),), "kept has 1 entries, but the groups have 2 dimensions"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(
        ValueError, match=re.escape(message) if "(" in message else message
    ):
        sdp_jax.Cut(toy.mlp_groups(), kept)


def test_what_is_no_cut_is_refused():
    with pytest.raises(TypeError, match="narrow takes a Cut"):
        sdp_jax.narrow(toy.mlp_apply, toy.mlp_groups())
    with pytest.raises(TypeError, match="made of Groups"):
        sdp_jax.Cut({"a": 3}, ((0,),))


def test_summary_shows_what_is_left():
    params = toy.mlp_params()
    x, _ = toy.batch()
    groups = sdp_jax.find_groups(toy.mlp_apply, params, x)
    cut = sdp_jax.Cut(groups, ((0, 1, 2), tuple(range(5))))
    dense = sdp_jax.cost(toy.mlp_apply, params, x)
    small = sdp_jax.cost(sdp_jax.narrow(toy.mlp_apply, cut), cut.take(params), x)
    lines = cut.summary().splitlines()
    assert lines[1].split() == ["layer0", "6", "3", "50.0%"]
    entries = (4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3, 4 * 3 + 3 + 3 * 5 + 5 + 5 * 3 + 3)
    assert lines[3].split() == ["entries", "83", "53", f"{entries[1] / entries[0]:.1%}"]
    assert lines[4].split()[:3] == ["FLOPs", f"{dense.flops:,}", f"{small.flops:,}"]
    # Groups that were made by hand know no FLOPs.
    by_hand = sdp_jax.Cut(toy.mlp_groups(params), cut.kept).summary().splitlines()
    assert [line.split()[1:] for line in by_hand] == [x.split()[1:] for x in lines[:4]]


def test_summary_says_what_share_belongs_to_channels():
    groups = toy.mlp_groups(hidden=2)
    assert groups.prunable_entries == 83 - 3
    assert "80 of 83 entries (96.4%)" in groups.summary()


def test_like_finds_a_state_of_another_optimizer():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (0,)})
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(params)
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(ValueError, match="another structure than `like`"):
        cut.take(state, like=jax.eval_shape(optax.adam(0.1).init, small))
    with pytest.raises(ValueError, match="of the cut tree is"):
        cut.take(state, like=optax.sgd(0.1, momentum=0.9).init(params))


def test_cut_prints_and_hashes():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    cut = sdp_jax.plan_cut(groups, toy.kill(groups, params, {"hidden0": (0,)}))
    same = sdp_jax.plan_cut(groups, toy.kill(groups, params, {"hidden0": (0,)}))
    assert cut == same and hash(cut) == hash(same)
    assert "hidden0         6       5" in str(cut)


def positions(groups, name, path):
    d = groups[name]
    members = [m for m in d.members if m.path == path]
    return np.concatenate([m.positions(d.size) for m in members])


def test_head_dimensions_and_heads_on_one_axis_can_be_cut_again():
    params = {"v": jnp.ones((2, 4)), "s": jnp.ones(4), "o": jnp.arange(16.0)[:, None]}
    axes = {
        "heads": [sdp_jax.Member("v", 1), sdp_jax.Member("o", 0, "consumer", inner=4)],
        "dims": [sdp_jax.Member("s", 0), sdp_jax.Member("o", 0, "consumer", outer=4)],
    }
    groups = sdp_jax.groups_from_axes(params, axes)
    params = toy.kill(groups, params, {"heads": (0,), "dims": (0,)})
    cut = sdp_jax.plan_cut(groups, params)
    small, groups = cut.take(params), cut.groups
    assert small["o"][:, 0].tolist() == [5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups
    small = toy.kill(groups, small, {"heads": (1,), "dims": (2,)})
    second = sdp_jax.plan_cut(groups, small).take(small)
    assert second["o"][:, 0].tolist() == [5, 6, 13, 14]


def test_gaps_that_become_uneven_are_followed():
    params = {k: jnp.ones(2) for k in "abcd"} | {"o": jnp.arange(12.0)}
    axes = {
        "a": [
            sdp_jax.Member("a", 0),
            sdp_jax.Member("o", 0, "consumer", outer=3, period=4),
        ],
        **{
            k: [sdp_jax.Member(k, 0), sdp_jax.Member("o", 0, "consumer", offset=start)]
            for k, start in (("b", 2), ("c", 6), ("d", 10))
        },
    }
    groups = sdp_jax.groups_from_axes(params, axes)
    params = toy.kill(groups, params, {"b": (1,)})
    cut = sdp_jax.plan_cut(groups, params)
    assert positions(cut.groups, "a", "o").tolist() == [
        [[0], [1]],
        [[3], [4]],
        [[7], [8]],
    ]
    small = toy.kill(cut.groups, cut.take(params), {"a": (0,)})
    second = sdp_jax.plan_cut(cut.groups, small).take(small)
    assert second["o"].tolist() == [1, 2, 5, 6, 7, 9, 10, 11]
    # What becomes even again is one member, as by one cut.
    small = toy.kill(cut.groups, cut.take(params), {"c": (0,), "d": (0,)})
    later = sdp_jax.plan_cut(cut.groups, small)
    both = cut.then(later)
    assert later.groups == both.groups and len(both.groups["a"].members) == 2
    last = sdp_jax.Cut(later.groups, ((0,), (0,), (0,), (0,)))
    assert (
        both.then(last).take(params)["o"].tolist()
        == last.take(later.take(small))["o"].tolist()
    )


def test_what_is_bound_to_no_device_stays_so():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    cut = sdp_jax.plan_cut(groups, toy.kill(groups, params, {"hidden0": (1,)}))
    small = cut.take(params)
    # A batch elsewhere takes the parameters with it, before a cut and behind it.
    x = jax.device_put(jnp.ones((2, 4)), jax.devices()[3])
    for tree in (params, small, cut.fill(small)):
        assert toy.mlp_apply(tree, x).devices() == x.devices()
    bound = jax.device_put(params, jax.devices()[2])
    for tree in (cut.take(bound), cut.fill(cut.take(bound))):
        for leaf in jax.tree.leaves(tree):
            assert leaf.committed and leaf.devices() == {jax.devices()[2]}
