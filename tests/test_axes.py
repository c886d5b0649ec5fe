"""Groups by hand: what is filled in, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import toy


def test_abstract_parameters():
    abstract = jax.eval_shape(toy.mlp_params)
    assert toy.mlp_groups(abstract) == toy.mlp_groups()


def test_axes_and_periods_are_filled_in():
    params = {"conv": jnp.ones((3, 3, 2, 4)), "dense": jnp.ones((9 * 7, 6))}
    members = [
        sdp_jax.Member("conv", -1),
        # Behind a flattened concatenation with three others.
        sdp_jax.Member("dense", 0, "consumer", outer=9),
        sdp_jax.Member("dense", -2, "consumer", outer=9, offset=3),
    ]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    conv, first, second = groups["d"].members
    assert (conv.axis, conv.period) == (3, 4)
    assert (first.axis, first.period) == (second.axis, second.period) == (0, 7)
    # A single member need not stand in a list.
    one = sdp_jax.groups_from_axes(params, {"d": sdp_jax.Member("conv", 3)})
    assert one.sizes == {"d": 4}


def test_numpy_integers_are_integers():
    params = toy.mlp_params()
    given = sdp_jax.groups_from_axes(
        params,
        {"d": [sdp_jax.Member("layer0/kernel", np.int64(1))]},
        sizes={"d": np.int64(6)},
    )
    assert sdp_jax.Groups.from_json(given.to_json()) == given
    with pytest.raises(TypeError, match="axis must be an integer; got 1.0"):
        sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("layer0/kernel", 1.0)]})
    with pytest.raises(TypeError, match="axes must map dimension names"):
        sdp_jax.groups_from_axes(params, [sdp_jax.Member("layer0/kernel", 1)])


W = {"w": jnp.ones((4, 6)), "n": jnp.ones(6, int)}


def member(axis=1, role="producer", path="w", **factors):
    return sdp_jax.Member(path, axis, role, **factors)


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        ({}, ValueError, "axes names no dimension"),
        ({"d": ["w"]}, TypeError, "'w' is not a member; make it with sdp_jax.Member"),
        ({"d": [member(path="v")]}, ValueError, "no leaf 'v' in the tree"),
        ({"d": [member(2)]}, ValueError, r"axis 2 of 'w' does not exist.*\(4, 6\)"),
        ({"d": [member(role="consumer")]}, ValueError, "'d' has no producer"),
        ({"d": [member(role="maker")]}, ValueError, "'d' has no producer"),
        ({"d": [member(), member(0, "maker")]}, ValueError, "role 'maker' is not one"),
        ({"d": [member(0, path="n")]}, TypeError, "producer 'n' has dtype int"),
        ({"d": [member(outer=4)]}, ValueError, r"outer \* inner = 4 \* 1 does not"),
        ({"d": [member(offset=1)]}, ValueError, r"pass sizes=\{'d': number"),
        ({"d": [member(), member(0)]}, ValueError, "6 channels need 6 positions"),
        ({"d": [member()], "e": [member()]}, ValueError, "along axis 1 and to 'e' al"),
        ({"d": [member()], "e": [member(0)]}, ValueError, "'e' along axis 0; an entry"),
    ],
)
def test_what_does_not_fit(axes, error, match):
    with pytest.raises(error, match=match):
        sdp_jax.groups_from_axes(W, axes)


def test_sizes_are_those_of_dimensions():
    with pytest.raises(ValueError, match=r"does not have: \['e'\]"):
        sdp_jax.groups_from_axes(W, {"d": [member()]}, sizes={"e": 6})
    with pytest.raises(ValueError, match="has size 0; it needs at least 1 channel"):
        sdp_jax.groups_from_axes(W, {"d": [member()]}, sizes={"d": 0})


def test_what_stays_is_said_by_a_period():
    with pytest.raises(ValueError, match=r"cover 4 of its 6 positions \(shape \(4, 6"):
        sdp_jax.groups_from_axes(W, {"d": [member()]}, sizes={"d": 4})
    groups = sdp_jax.groups_from_axes(W, {"d": [member(period=6)]}, sizes={"d": 4})
    (mask,) = groups.covered["w", 1].values()
    assert mask.tolist() == [True] * 4 + [False] * 2
