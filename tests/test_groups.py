"""Structure, views and serialisation of groups."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdp_jax
from sdp_jax.polynomial import Polynomial
from tests import toy

FLOPS = Polynomial.of({(): 1.0, (0,): 2.0, (1,): 3.0, (0, 1): 5.0})


def cut_groups():
    groups = toy.mlp_groups()
    return sdp_jax.Cut(groups, tuple((0,) for _ in groups)).groups


def with_flops():
    return dataclasses.replace(toy.mlp_groups(), flops=FLOPS)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=11, max_size=11))
def test_join_undoes_split(values):
    groups, vector = toy.mlp_groups(), jnp.asarray(values, jnp.float32)
    parts = groups.split(vector)
    assert {name: x.shape for name, x in parts.items()} == {
        "hidden0": (6,),
        "hidden1": (5,),
    }
    np.testing.assert_array_equal(groups.join(parts), vector)
    # The order is that of the groups.
    turned = dict(reversed(parts.items()))
    np.testing.assert_array_equal(groups.join(turned), vector)


def test_split_keeps_leading_axes_and_kinds():
    table = np.arange(22).reshape(2, 11)
    parts = toy.mlp_groups().split(table)
    assert isinstance(parts["hidden1"], np.ndarray)
    np.testing.assert_array_equal(parts["hidden1"], table[:, 6:])
    nothing = sdp_jax.Groups((), ())
    assert nothing.split(nothing.join({})) == {}


@pytest.mark.parametrize("vector", [1.0, np.ones(10), np.ones((11, 2))])
def test_split_refuses_another_length(vector):
    with pytest.raises(ValueError, match="one number for each of 11 channels"):
        toy.mlp_groups().split(vector)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"hidden0": np.ones(6)}, r"lacking are \['hidden1'\]"),
        ({"hidden0": np.ones(6), "hidden2": np.ones(5)}, r"no use for \['hidden2'\]"),
        ({"hidden0": np.ones(5), "hidden1": np.ones(6)}, "'hidden0' has 6 channels"),
        ({"hidden0": np.ones(6), "hidden1": 1.0}, r"an array of shape \(\) was given"),
    ],
)
def test_join_refuses_what_does_not_fit(parts, match):
    with pytest.raises(ValueError, match=match):
        toy.mlp_groups().join(parts)


def test_blocks_are_what_a_ranking_compares():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4, 2)), "c": jnp.ones((5, 2))}
    axes = {name: [sdp_jax.Member(name, 1)] for name in params}
    groups = sdp_jax.groups_from_axes(params, axes)

    def blocks(ranking):
        return groups.blocks(ranking).tolist()

    assert blocks("global") == [0] * 9
    assert blocks("dimension") == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert groups.owner.tolist() == blocks("dimension")
    # Matrices are built alike, whatever stands between them and how large they are.
    assert blocks("isomorphic") == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="ranking is 'scope'; use 'global'"):
        groups.blocks("scope")


def test_repetitions_and_runs_set_dimensions_apart():
    params = {name: jnp.ones((2, 6)) for name in "abcd"}
    axes = {
        "a": [sdp_jax.Member("a", 1)],
        "b": [sdp_jax.Member("b", 1, outer=2)],
        "c": [sdp_jax.Member("c", 1, inner=2)],
        "d": [sdp_jax.Member("d", 1, outer=3)],
    }
    groups = sdp_jax.groups_from_axes(params, axes)
    blocks = groups.blocks("isomorphic").tolist()
    assert blocks == [0] * 6 + [1] * 3 + [2] * 3 + [1] * 2


def shared():
    """Heads and head dimensions on one axis; one dimension on two; a part that stays.

    The ninth column of ``qkv`` belongs to nobody.
    """
    dimensions = (
        sdp_jax.Dimension("heads", 2, (sdp_jax.Member("qkv", 1, inner=4),)),
        sdp_jax.Dimension("parts", 4, (sdp_jax.Member("qkv", 1, outer=2, period=4),)),
        sdp_jax.Dimension("loop", 3, (sdp_jax.Member("w", 0), sdp_jax.Member("w", 1))),
    )
    leaves = (("qkv", (5, 9)), ("w", (3, 3)), ("free", (7,)))
    leaves = [{"path": path, "shape": shape} for path, shape in leaves]
    raw = {"dimensions": map(dataclasses.asdict, dimensions), "leaves": leaves}
    return sdp_jax.Groups.from_json(json.dumps(raw, default=list))


def test_covered_says_where_channels_sit():
    groups = shared()
    assert set(groups.covered) == {("qkv", 1), ("w", 0), ("w", 1)}
    masks = groups.covered["qkv", 1]
    assert list(masks) == ["heads", "parts"]
    for mask in masks.values():
        assert mask.tolist() == [True] * 8 + [False]
    toys = toy.mlp_groups().covered
    # What one dimension reads, the next one makes.
    assert list(toys["layer1/kernel", 0]) == ["hidden0"]
    assert list(toys["layer1/kernel", 1]) == ["hidden1"]


@given(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3))
def test_parameters_are_those_that_stay(heads, parts, loop):
    groups = shared()
    assert groups.parameters.at([2, 4, 3]) == pytest.approx(45 + 9 + 7)
    want = 5 * (heads * parts + 1) + loop**2 + 7
    assert groups.parameters.at([heads, parts, loop]) == pytest.approx(want)


@given(st.integers(0, 6), st.integers(0, 5))
def test_parameters_of_a_chain_of_layers(first, second):
    want = 5 * first + (first + 1) * second + (second + 1) * 3
    assert toy.mlp_groups().parameters.at([first, second]) == pytest.approx(want)


def test_prunable_entries_belong_to_a_channel():
    assert shared().prunable_entries == 5 * 8 + 9
    # All but the last bias.
    assert toy.mlp_groups().prunable_entries == 83 - 3


def test_flops_go_to_json_and_back():
    groups = with_flops()
    again = sdp_jax.Groups.from_json(groups.to_json())
    assert again == groups and hash(again) == hash(groups)
    assert again.need_flops() == FLOPS
    assert groups != toy.mlp_groups()
    traced = sdp_jax.find_groups(toy.mlp_apply, toy.mlp_params(), jnp.ones((1, 4)))
    assert traced.need_flops().terms
    assert sdp_jax.Groups.from_json(traced.to_json()) == traced


def test_groups_by_hand_know_no_flops():
    assert json.loads(toy.mlp_groups().to_json())["flops"] is None
    with pytest.raises(ValueError, match=r"sdp_jax.count_flops\(groups, fn, params"):
        toy.mlp_groups().need_flops()


def test_at_writes_flops_in_the_dimensions_that_are_left():
    variables = {"a": toy.mlp_params(widths=(4, 6, 3)), "b": {"w": jnp.ones((2, 5))}}
    axes = {**toy.mlp_axes(1, prefix="a/"), "other": [sdp_jax.Member("b/w", 1)]}
    groups = sdp_jax.groups_from_axes(variables, axes)
    groups = dataclasses.replace(groups, flops=FLOPS)
    # The widths that are lost stay full: 6 and 5.
    assert groups.at("b").sizes == {"other": 5}
    assert groups.at("b").flops == Polynomial.of({(): 1 + 12.0, (0,): 3 + 30.0})
    assert groups.at("a").flops == Polynomial.of({(): 1 + 15.0, (0,): 2 + 25.0})


def test_pictures_name_layers_and_couplings():
    groups = toy.mlp_groups()
    picture = groups.draw()
    assert picture.startswith("digraph")
    assert '"layer0" -> "hidden0"' in picture and '"hidden0" -> "layer1"' in picture
    assert np.all([name in picture for name in groups.sizes])


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
    axes["hidden0"].append(sdp_jax.Member("batch_stats/norm/mean", 0, "state"))
    groups = sdp_jax.groups_from_axes(variables, axes)
    inner = groups.at("params")
    assert inner == toy.mlp_groups()
    with pytest.raises(ValueError, match=r"groups.at\('params'\)"):
        sdp_jax.channel_norms(groups, variables["params"])
    with pytest.raises(ValueError, match="no leaf lies below 'parms'"):
        groups.at("parms")


def test_scale_invariance_is_part_of_a_member():
    params = {"params": {"w": np.ones((3, 2)), "s": np.ones(2)}, "v": np.ones(3)}
    members = [
        sdp_jax.Member("params/w", 1, scale_invariant=True),
        sdp_jax.Member("params/s", 0),
    ]
    groups = sdp_jax.groups_from_axes(
        params, {"unit": members, "other": [sdp_jax.Member("v", 0)]}
    )
    plain = [dataclasses.replace(m, scale_invariant=False) for m in members]
    other = sdp_jax.groups_from_axes(
        params, {"unit": plain, "other": [sdp_jax.Member("v", 0)]}
    )
    assert groups != other and hash(groups) != hash(other)
    back = sdp_jax.Groups.from_json(groups.to_json())
    assert back == groups and hash(back) == hash(groups)
    cut = sdp_jax.Cut(groups, ((0,), (0, 2)))
    for some in (groups.at("params"), groups.without("other"), cut.groups):
        assert [m.path.rpartition("/")[2] for m in some["unit"].shrinking] == ["s"]
    assert "params/w[1] (scale-invariant), params/s[0]" in str(groups)


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
        lambda raw: raw.update(flops=3.0),
        lambda raw: raw.update(flops={"0": 1.0}),
        lambda raw: raw.update(flops=[[0]]),
        lambda raw: raw.update(flops=[[[0], 1.0, 2.0]]),
        lambda raw: raw.update(flops=[[[2], 1.0]]),
        lambda raw: raw.update(flops=[[[-1], 1.0]]),
        lambda raw: raw.update(flops=[[[0.0], 1.0]]),
        lambda raw: raw.update(flops=[[[True], 1.0]]),
        lambda raw: raw.update(flops=[[[0], "1"]]),
        lambda raw: raw.update(flops=[[[0], None]]),
        lambda raw: raw.update(flops=[[[0], float("nan")]]),
        lambda raw: raw.update(flops=[[[0, 1], 1.0], [[1, 0], 2.0]]),
        lambda raw: raw.update(before=raw | {"before": dict(raw)}),
        lambda raw: (
            raw.update(before=json.loads(cut_groups().to_json())["before"])
            or raw["dimensions"][0].update(name="other")
        ),
        lambda raw: (
            raw.update(before=json.loads(cut_groups().to_json()))
            or raw["before"].update(before=None)
        ),
    ],
)
def test_damaged_json_is_refused(change):
    raw = json.loads(toy.mlp_groups().to_json())
    change(raw)
    with pytest.raises(ValueError, match="not groups in JSON"):
        sdp_jax.Groups.from_json(json.dumps(raw))


def test_what_is_left_out_stays_whole():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 6)), "c": jnp.ones((6, 2))}
    groups = sdp_jax.find_groups(fn, params, jnp.ones((1, 3)))
    some = groups.without("b")
    assert some.sizes == {"a": 4} and some.leaves == groups.leaves
    for width in (4, 1):
        assert some.flops.at([width]) == groups.flops.at([width, 6])
        assert some.parameters.at([width]) == groups.parameters.at([width, 6])
    assert groups.without() == groups
    with pytest.raises(KeyError, match="no channel dimension 'd'"):
        groups.without("d")
