"""Statistics of activations: how they are joined and pooled."""

import numpy as np

import sdp_jax
from sdp_jax.activations import (
    ChannelActivations,
    Moments,
    Reading,
    merge_moments,
    scatter,
)
from tests import toy
from tests.seen import check, statistics


def moments_of(values):
    return Moments(**statistics(values))


def test_merging_is_the_statistics_of_both():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, (7, 5)), rng.normal(-1, 4, (4, 5))
    check(merge_moments(moments_of(a), moments_of(b)), np.concatenate([a, b]))


def test_merging_with_nothing_changes_nothing():
    nothing = Moments(*np.zeros((5, 3)))
    some = moments_of(np.random.default_rng(0).normal(size=(4, 3)))
    for both in (merge_moments(nothing, some), merge_moments(some, nothing)):
        np.testing.assert_allclose(both, some)
    np.testing.assert_array_equal(merge_moments(nothing, nothing), nothing)


def test_positions_are_summed_to_all_their_channels():
    channels = np.array([[[0, 2], [1, 2]], [[0, -1], [1, 3]]])
    values = np.array([[[1.0, 2], [3, 4]], [[10, 20], [30, 40]]])
    got = scatter(4, channels, values)
    np.testing.assert_array_equal(got, [[4, 6, 3, 4], [40, 60, 30, 40]])


def test_channels_pool_their_positions_and_places():
    rng = np.random.default_rng(1)
    first, second = rng.normal(2, 1, (6, 4)), rng.normal(size=(3, 2))
    groups = toy.line_groups(a=2, b=1)
    readings = (
        Reading(
            "first", np.array([[0, 2], [1, 2], [0, -1], [1, -1]]), moments_of(first)
        ),
        Reading("second", np.array([[1], [0]]), moments_of(second)),
    )
    found = ChannelActivations(groups, readings, 1)
    values = [
        np.concatenate([first[:, 0], first[:, 2], second[:, 1]]),
        np.concatenate([first[:, 1], first[:, 3], second[:, 0]]),
        np.concatenate([first[:, 0], first[:, 1]]),
    ]
    for c, line in enumerate(values):
        check(found.moments, line[:, None], where=np.array([c]))
    assert found.examples is None


def test_statistics_of_examples_are_pooled_one_by_one():
    x = np.random.default_rng(2).normal(
        size=(5, 6, 2)
    )  # Examples, positions, channels.
    each = Moments(*(np.stack(part) for part in zip(*map(moments_of, x), strict=True)))
    table = np.array([[0], [1]])
    reading = Reading("here", table, moments_of(x), examples=each)
    found = ChannelActivations(toy.line_groups(a=2), (reading,), 1)
    np.testing.assert_allclose(found.examples.mean, x.mean(1))
    np.testing.assert_allclose(found.examples.variance, x.var(1))
    assert sdp_jax.ChannelActivations is ChannelActivations
