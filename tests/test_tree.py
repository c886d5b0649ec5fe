"""Paths of leaves, whatever made the tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from sdp_jax.tree import leaf_dtype, leaf_keys, leaf_table, missing_path_message


def test_paths_of_linen_and_nnx():
    module = linen.Dense(3)
    variables = module.init(jax.random.key(0), jnp.ones((1, 2)))
    assert list(leaf_table(variables)) == ["params/bias", "params/kernel"]
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert list(leaf_table(state)) == ["bias", "kernel"]
    assert list(leaf_table(nnx.to_pure_dict(state))) == ["bias", "kernel"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Head:
    value: jax.Array
    policy: jax.Array


def test_a_field_named_value_with_siblings_keeps_its_name():
    tree = {"head": Head(jnp.ones(1), jnp.ones(2)), "list": [jnp.ones(3)]}
    assert list(leaf_table(tree)) == ["head/value", "head/policy", "list/0"]
    # Keys of dictionaries are names of the user's.
    assert list(leaf_table({"value": jnp.ones(1)})) == ["value"]


def test_keys_can_stop_above_the_leaves():
    tree = {"a": (jnp.ones(1), jnp.ones(2)), "b": jnp.ones(3)}
    keys = [k for k, _ in leaf_keys(tree, lambda x: isinstance(x, tuple))]
    assert keys == [("a",), ("b",)]
    assert leaf_keys(jnp.ones(3))[0][0] == ()


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        leaf_table({"a": {"b": 1.0}, "a/b": 2.0})


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.ones(2, jnp.bfloat16), jnp.bfloat16),
        (jax.ShapeDtypeStruct((2,), jnp.float16), jnp.float16),
        (np.int8(3), np.int8),
        (1.5, np.float64),
    ],
)
def test_dtypes(leaf, dtype):
    assert leaf_dtype(leaf) == dtype


@pytest.mark.parametrize(
    ("path", "paths", "hint"),
    [
        ("params/conv/kernel", ["conv/kernel"], r"use groups.at\('params'\) here"),
        ("conv/kernl", ["conv/kernel"], r"did you mean \['conv/kernel'\]"),
        ("x", ["conv/kernel", "dense"], r"the tree has \['conv/kernel', 'dense'\]"),
    ],
)
def test_what_is_missing_and_what_may_be_meant(path, paths, hint):
    with pytest.raises(ValueError, match=f"no leaf '{path}' in the tree; .*{hint}"):
        raise ValueError(missing_path_message(path, paths))
