"""Whose leaf is it: what a cut finds in trees of any kind."""

from typing import NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import sdp_jax
from tests import toy


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array


TREES = {
    "a bare array": (jnp.arange(1.0, 9.0).reshape(2, 4), [("", 1)]),
    "fields called key and value": (
        Attention(*(jnp.ones((3, 4)) for _ in range(3)), jnp.ones((2, 4))),
        [("query", 1), ("key", 1), ("value", 1), ("out", 1)],
    ),
    "keys with the separator, as in Haiku": (
        {"mlp/~/linear_0": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}},
        [("mlp/~/linear_0/w", 1), ("mlp/~/linear_0/b", 0)],
    ),
    "a list": ([jnp.ones((3, 4)), jnp.ones(4)], [("0", 1), ("1", 0)]),
}


def test_take_leaves_counts_keys_and_hyperparameters_alone():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    dead = toy.kill(groups, params, {"hidden0": (0,)})
    cut = sdp_jax.plan_cut(groups, dead)
    tree = {"params": dead, "count": jnp.int32(3), "key": jax.random.key(0), "lr": 0.1}
    small = cut.take(tree)
    assert small["count"] == 3 and small["lr"] == 0.1
    assert small["params"]["layer0"]["kernel"].shape == (4, 5)


def test_factored_state_is_refused():
    params = {"a": jnp.ones((256, 300)), "b": jnp.ones((300, 256))}
    groups = sdp_jax.groups_from_axes(
        params, {"hidden": [sdp_jax.Member("a", 1), sdp_jax.Member("b", 0, "consumer")]}
    )
    params = toy.kill(groups, params, {"hidden": range(100)})
    cut = sdp_jax.plan_cut(groups, params)
    state = optax.adafactor(0.1).init(params)
    with pytest.raises(ValueError, match="initialised anew on the small parameters"):
        cut.take(state)


@pytest.mark.parametrize("name", TREES)
def test_state_of_any_tree_is_cut_with_it(name):
    params, members = TREES[name]
    axes = {"d": [sdp_jax.Member(path, axis) for path, axis in members]}
    groups = sdp_jax.groups_from_axes(params, axes)
    params = toy.kill(groups, params, {"d": (1,)})
    cut = sdp_jax.plan_cut(groups, params)
    small = cut.take(params)
    strength = sdp_jax.target_sparsity(0.25, 0, 2)
    tx, small_tx = (
        sdp_jax.altsdp(optax.adamw(0.1), g, strength=strength)
        for g in (groups, cut.groups)
    )
    state = cut.take(tx.init(params), like=jax.eval_shape(small_tx.init, small))
    updates, _ = small_tx.update(jax.tree.map(jnp.ones_like, small), state, small)
    assert all(3 in x.shape and 4 not in x.shape for x in jax.tree.leaves(updates))


def test_other_models_in_the_tree_are_left_alone():
    params = {"enc": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    axes = {"d": [sdp_jax.Member("enc/kernel", 1), sdp_jax.Member("enc/bias", 0)]}
    groups = sdp_jax.groups_from_axes(params, axes)
    params = toy.kill(groups, params, {"d": (0, 1)})
    cut = sdp_jax.plan_cut(groups, params)
    other = {"head": {"bias": jnp.ones(4)}, "dec": {"kernel": jnp.ones((5, 3, 4))}}
    small = cut.take({"model": params, "below": params["enc"]} | other)
    assert small["model"]["enc"]["bias"].shape == (2,)
    assert small["below"]["kernel"].shape == (3, 2)
    chex.assert_trees_all_equal({k: small[k] for k in other}, other)


def test_a_part_of_the_tree_under_its_own_key_is_cut():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (0,), "hidden1": (1, 2)})
    cut = sdp_jax.plan_cut(groups, params)
    for name, layer in params.items():
        chex.assert_trees_all_equal(
            cut.take({name: layer}), {name: cut.take(params)[name]}
        )


def test_two_parts_of_one_structure_are_told_apart():
    layer = {"d": {"kernel": jnp.ones((3, 4))}}
    variables = {"params": layer, "teacher": layer}
    axes = {"d": [sdp_jax.Member("params/d/kernel", 1)]}
    groups = sdp_jax.groups_from_axes(variables, axes)
    variables = toy.kill(groups, variables, {"d": (0,)})
    cut = sdp_jax.plan_cut(groups, variables)
    assert cut.take(variables)["teacher"]["d"]["kernel"].shape == (3, 4)
    assert cut.take(variables["params"])["d"]["kernel"].shape == (3, 3)
    axes["e"] = [sdp_jax.Member("teacher/d/kernel", 1)]
    cut = sdp_jax.plan_cut(sdp_jax.groups_from_axes(variables, axes), variables)
    with pytest.raises(ValueError, match=r"could be any of \['params', 'teacher'\]"):
        cut.take(variables["params"])


def test_hidden_leaves_may_be_missing():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (0,)})
    cut = sdp_jax.plan_cut(groups, params)
    mask = {k: k != "layer2" for k in params}
    state = optax.masked(optax.trace(0.9), mask).init(params)
    small = cut.take(state).inner_state.trace
    assert small["layer1"]["kernel"].shape == (5, 5)
    assert isinstance(small["layer2"], optax.MaskedNode)
    assert cut.take(params | {"layer2": None})["layer1"]["kernel"].shape == (5, 5)


@pytest.mark.parametrize("base", [optax.sm3(0.1), optax.flatten(optax.adam(0.1))])
def test_state_in_another_form_is_refused(base):
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params = toy.kill(groups, params, {"hidden0": (0,)})
    cut = sdp_jax.plan_cut(groups, params)
    with pytest.raises(ValueError, match="initialised anew"):
        cut.take(base.init(params))


def test_state_that_has_become_dictionaries_is_cut():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(0.1, groups, strength=sdp_jax.target_sparsity(0.5, 0, 2))
    state = tx.init(params)
    params = toy.kill(groups, params, {"hidden0": (0,), "hidden1": (1, 2)})
    cut = sdp_jax.plan_cut(groups, params)
    plain = flax.serialization.to_state_dict(state)
    small = flax.serialization.to_state_dict(cut.take(state))
    chex.assert_trees_all_equal(cut.take(plain), small)
    sdp_jax.check_zeros(plain)
    with pytest.raises(ValueError, match="belongs to a transformation with other"):
        sdp_jax.plan_cut(cut.groups, cut.take(params)).take(state[-1])


def project(groups):
    return optax.chain(
        sdp_jax.dual_averaging(),
        sdp_jax.valley.project_onto_valley(groups, 0.0, rank=2),
        sdp_jax.group_soft_threshold(groups, 0.0),
    )


def test_state_of_a_bare_array_is_cut():
    params = jnp.ones((3, 4)).at[:, 1].set(0)
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("", 1)]})
    tx = project(groups)
    state = tx.init(params)
    cut = sdp_jax.plan_cut(groups, params)
    small, small_state = cut.take(params), cut.take(state)
    want = project(cut.groups).init(small)
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, want)
