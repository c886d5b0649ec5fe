"""Sums on meshes: the same numbers in every layout, and what they send."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sdp_jax
from sdp_jax import mesh as meshes
from sdp_jax import methods
from sdp_jax.channels import Term, channel_maxima, channel_sums, square
from sdp_jax.tree import leaf_table
from tests import toy

LAYOUTS = {
    "data": {},
    "fsdp": {"layer0/kernel": P("a"), "layer1/kernel": P("a"), "layer1/bias": P("a")},
    "tensor": {"layer0/kernel": P(None, "b"), "layer0/bias": P("b")}
    | {"layer1/kernel": P("b", None)},
    "both": {"layer0/kernel": P("a", "b"), "layer0/bias": P(("a", "b"))}
    | {"layer1/kernel": P("b", "a"), "layer1/bias": P("a")},
}
WIDTHS = (4, 16, 8, 3)
kinds = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])


def placed(tree, mesh, layout):
    return {
        module: {
            key: jax.device_put(
                leaf, NamedSharding(mesh, LAYOUTS[layout].get(f"{module}/{key}", P()))
            )
            for key, leaf in leaves.items()
        }
        for module, leaves in tree.items()
    }


@kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_one_device(layout, kind):
    params = toy.mlp_params(widths=WIDTHS)
    groups = toy.mlp_groups(params)
    over = jnp.arange(groups.num_channels, dtype=jnp.float32)

    def sums(tree):
        terms = Term(square, (tree,)), Term(square, (tree,), over=over)
        return [*channel_sums(groups, *terms), channel_maxima(groups, tree)]

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        found = jax.jit(sums)(placed(params, mesh, layout))
    for ours, alone in zip(found, sums(params), strict=True):
        assert ours.sharding.is_fully_replicated
        np.testing.assert_allclose(ours, alone, rtol=1e-6)


@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
@pytest.mark.parametrize(
    ("strength", "collectives", "per_channel"),
    [
        (sdp_jax.valley_strength(0.1, 0.6, 0.1), 1, 4),
        # One for what must be zero, one for the importances during the ramp.
        (sdp_jax.target_sparsity(0.5, 0, 5), 2, 8),
        (sdp_jax.target_sparsity(0.5, 0, 5, target="params"), 2, 8),
    ],
)
def test_a_step_sends_a_few_bytes_a_channel(layout, strength, collectives, per_channel):
    params = toy.mlp_params(widths=WIDTHS)
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(optax.adamw(0.1), groups, strength=strength)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    params = placed(params, mesh, layout)
    step = jax.jit(toy.make_step(tx)).lower(params, tx.init(params), params)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    text = step.compile().as_text()
    sent = re.findall(rf"= [fs]32\[(\d+)\]\S* (?:{kinds})\(", text)
    every = re.findall(rf" (?:{kinds})(?:-start)?\(", text)
    assert len(sent) == len(every) == collectives
    # The last four bytes tell whether zeros came back.
    assert 4 * sum(map(int, sent)) == per_channel * groups.num_channels + 4


@kinds
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
def test_cuts_keep_shardings_and_choose_widths_that_divide(layout, kind):
    params = toy.mlp_params(widths=WIDTHS)
    groups = toy.mlp_groups(params)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    wide, scores = placed(params, mesh, layout), np.arange(groups.num_channels)
    cut = sdp_jax.plan_cut(
        groups, wide, scores=scores, sparsity=0.2, ranking="dimension", round_to="mesh"
    )
    devices = {"fsdp": (4, 4), "tensor": (2, 1), "both": (8, 4)}[layout]
    widths = list(cut.widths.values())
    assert all(n % count == 0 for n, count in zip(widths, devices, strict=True))
    assert 0 < sum(widths) <= 0.8 * groups.num_channels
    small = cut.take(wide)
    for tree, whole in ((small, cut.take(params)), (cut.fill(small), cut.zero(params))):
        for (path, leaf), other in zip(
            leaf_table(tree).items(), jax.tree.leaves(whole), strict=True
        ):
            want = NamedSharding(mesh, LAYOUTS[layout].get(path, P()))
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
            if tree is small:
                np.testing.assert_array_equal(leaf, other)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wide
    )
    for leaf, other in zip(
        jax.tree.leaves(cut.take(shapes)), jax.tree.leaves(small), strict=True
    ):
        assert leaf.shape == other.shape
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


@kinds
def test_widths_that_do_not_divide_say_which_would(kind):
    params = toy.mlp_params(widths=WIDTHS)
    groups = toy.mlp_groups(params)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    cut = sdp_jax.Cut(groups, (tuple(range(13)), tuple(range(7))))
    with pytest.raises(ValueError, match=r"4 does not divide the 7 .* 4 or 8 would do"):
        cut.take(placed(params, mesh, "fsdp"))


@pytest.mark.parametrize("layout", ["tensor", "both"])
def test_scores_are_those_of_one_device(layout):
    params = toy.mlp_params(widths=WIDTHS)
    groups, grads = toy.mlp_groups(params), jax.tree.map(jnp.cos, params)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    wide, slopes = (placed(tree, mesh, layout) for tree in (params, grads))
    scores = [methods.l1_norm(), methods.taylor(), methods.group_importance()]

    def rate(params, grads):
        found = [score(groups, params, grads) for score in scores]
        return [*found, methods.pq_index(params, groups=groups, scope="channel")]

    with jax.set_mesh(mesh):
        found = jax.jit(rate)(wide, slopes)
    for ours, alone in zip(found, jax.jit(rate)(params, grads), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)


def test_arrays_of_one_line_may_be_split_in_other_ways():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    whole = np.arange(64.0).reshape(8, 8)
    for specs in ((P("a", "b"), P("b", "a")), (P(), P("a", "b"))):
        put = (jax.device_put(whole, NamedSharding(mesh, s)) for s in specs)
        line = meshes.Line(jnp.multiply, tuple(put), 1)
        (found,) = meshes.sum_lines([line], lambda sums: sums)
        np.testing.assert_array_equal(found, (whole**2).sum(0))


def test_every_process_makes_the_same_program():
    """Sums over devices go in one order, whatever the order of a set of strings."""
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"))
    array = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P(("z", "y"), "x")))
    line = meshes.Line(jnp.square, (array,), 1)
    found = jax.make_jaxpr(lambda: meshes.sum_lines([line], lambda sums: sums))()
    assert "axes=('x', 'y', 'z')" in str(found)


def test_meshes_do_not_mix():
    mesh = jax.make_mesh((8,), ("a",)), jax.make_mesh((4, 2), ("a", "b"))
    x = [jax.device_put(jnp.ones((8, 8)), NamedSharding(m, P("a"))) for m in mesh]
    lines = [meshes.Line(jnp.square, (v,), 1) for v in x]
    with pytest.raises(ValueError, match="lie on different meshes"):
        meshes.sum_lines(lines, lambda sums: sums)


def test_an_array_is_cut_like_the_leaf_that_it_broadcasts_to():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    leaf = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("a", "b")))
    with jax.set_mesh(mesh):
        line = meshes.sharded_like(jnp.ones((1, 6)), leaf)
        assert line.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "b")), 2)
        assert meshes.replicated(line).sharding.is_fully_replicated
    assert meshes.replicated_sharding(jnp.ones(3)) is None
