"""Paths of leaves in trees of several kinds."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdp_jax.tree import leaf_dtype, leaf_keys, leaf_table, missing_path_message

Pair = collections.namedtuple("Pair", "first value")


def test_paths_of_dictionaries_lists_and_fields():
    tree = {"b": [1, {"c": 2}], "a": Pair(3, 4)}
    assert leaf_table(tree) == {"a/first": 3, "a/value": 4, "b/0": 1, "b/1/c": 2}
    assert leaf_table(5) == {"": 5}
    assert leaf_keys(tree)[-1] == (("b", "1", "c"), 2)


def test_variables_of_nnx_have_the_paths_of_their_arrays():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert set(leaf_table(state)) == {"kernel", "bias"}
    assert set(leaf_table(nnx.to_pure_dict(state))) == {"kernel", "bias"}


def test_a_lone_attribute_value_is_left_out_but_no_field_beside_others():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Box:
        value: int

    assert leaf_table({"x": Box(1)}) == {"x": 1}
    assert leaf_table({"value": 1}) == {"value": 1}  # a key, no attribute


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'; rename"):
        leaf_table({"a/b": 1, "a": {"b": 2}})


def test_none_is_a_leaf_on_demand():
    found = leaf_keys({"a": None, "b": 1}, is_leaf=lambda x: x is None)
    assert found == [(("a",), None), (("b",), 1)]
    assert leaf_keys({"a": None}) == []


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.ones(1, jnp.bfloat16), jnp.bfloat16),
        (jax.ShapeDtypeStruct((2,), jnp.int8), jnp.int8),
        (np.float64(1), np.float64),
        (2, np.int64),
    ],
)
def test_dtypes_of_leaves(leaf, dtype):
    assert leaf_dtype(leaf) == dtype


def test_a_missing_path_is_told_with_what_is_near():
    paths = ["conv/kernel", "conv/bias", "dense/kernel"]
    assert "did you mean ['conv/kernel'" in missing_path_message("conv/kernl", paths)
    assert "the tree has ['conv/kernel'" in missing_path_message("zzz", paths)
    told = missing_path_message("params/conv/bias", paths)
    assert "the tree has 'conv/bias': use groups.at('params') here" in told
