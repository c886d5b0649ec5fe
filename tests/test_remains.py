"""Zeros that are found and stay are told, with the reason."""

import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)))


def fn(p, x):
    x = (x @ p["dense"]["kernel"]) * p["norm"]["scale"] + p["norm"]["bias"]
    return jax.nn.relu(x) @ p["out"]


def params(**changed):
    tree = {
        "dense": {"kernel": np.ones((4, 6))},
        "norm": {"scale": np.ones(6), "bias": np.zeros(6)},
        "out": np.ones((6, 3)),
    }
    for path, channels in changed.items():
        layer, name = path.split("_")
        tree[layer][name][..., channels] = 0
    return tree


def notes(tree, **kw):
    groups = sdp_jax.find_groups(fn, tree, X)
    cut = sdp_jax.plan_cut(groups, tree, **kw)
    assert all(note in str(cut) for note in cut.notes)
    assert sdp_jax.Cut.from_json(cut.to_json()).notes == cut.notes
    return cut.notes


def test_nothing_is_said_of_what_starts_at_zero():
    assert notes(params()) == ()


def test_a_dead_normalisation_in_front_of_a_live_filter():
    (note,) = notes(params(norm_scale=[2, 3]))
    assert note == (
        "dense: 2 channels stay (number 2): zero in norm/bias, norm/scale, but not in "
        "dense/kernel"
    )


def test_a_filter_of_zeros_with_a_bias():
    tree = params(dense_kernel=[1])
    tree["norm"]["bias"][1] = 1
    (note,) = notes(tree)
    assert "1 channel stays (number 1): zero in dense/kernel, but not in" in note
    assert note.endswith("norm/bias, norm/scale")


def test_zeros_kept_for_the_width_and_zeros_that_cannot_go():
    tree = params(dense_kernel=range(5), norm_scale=range(5))
    tree["out"][:, 0] = 0
    width, frozen = notes(tree, round_to=2)
    assert width == "dense: 1 channel stays, zero, for min_channels or round_to"
    assert frozen.startswith("out[1]: 1 of 3 positions stay, zero: output: is an")
