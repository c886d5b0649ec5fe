"""Reductions and ranks within blocks, against NumPy block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdp_jax import segments

VECTORS = hnp.arrays(np.float32, (9,), elements=st.integers(0, 3).map(float))
# Sorted, as the owners of channels are, and mixed, as alike dimensions may be.
BLOCKS = st.sampled_from(
    [[0] * 9, [0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 0, 0, 1, 2, 0, 2, 1]]
).map(np.asarray)


@given(VECTORS, BLOCKS)
def test_reductions_are_those_of_each_block(values, block):
    for ours, numpys in (
        (segments.sum_over, np.sum),
        (segments.max_over, np.max),
        (segments.min_over, np.min),
    ):
        want = [numpys(values[block == k]) for k in block]
        np.testing.assert_array_equal(ours(jnp.asarray(values), block), want)
    counted = segments.sum_over(jnp.asarray(values > 1), block)
    assert counted.tolist() == [(values[block == k] > 1).sum() for k in block]


@given(VECTORS, BLOCKS)
def test_ranks_are_places_in_ascending_order(values, block):
    ranks = np.asarray(segments.ranks(jnp.asarray(values), block))
    for k in range(block.max() + 1):
        order = np.argsort(values[block == k], kind="stable")
        np.testing.assert_array_equal(np.argsort(ranks[block == k]), order)


@given(VECTORS, BLOCKS, st.integers(0, 9))
def test_lowest_counts_exactly_under_ties(values, block, count):
    counts = np.minimum(np.bincount(block), count)
    mask, last, following = map(
        np.asarray, jax.jit(lambda v, c: segments.lowest(v, c, block))(values, counts)
    )
    for k, number in enumerate(counts):
        order = np.argsort(values[block == k], kind="stable")
        marked = np.zeros(len(order), bool)
        marked[order[:number]] = True
        np.testing.assert_array_equal(mask[block == k], marked)
        if number:
            assert last[k] == values[block == k][marked].max()
        if number < len(order):
            assert following[k] == values[block == k][~marked].min()


def test_what_is_not_a_number_goes_last():
    values, block = jnp.array([jnp.nan, 2.0, 1.0]), np.zeros(3, int)
    assert segments.lowest(values, np.array([2]), block).mask.tolist() == [
        False,
        *[1] * 2,
    ]
    assert segments.ranks(values, block).tolist() == [2, 1, 0]


@pytest.mark.parametrize("function", [segments.max_over, segments.ranks])
def test_nothing_passes(function):
    assert function(jnp.zeros(0), np.zeros(0, int)).shape == (0,)


def test_the_number_of_operations_does_not_grow_with_the_blocks():
    def size(blocks):
        block = np.repeat(np.arange(blocks), 3)
        counts = np.ones(blocks, int)
        function = lambda v: segments.lowest(v, counts, block)  # noqa: E731
        return len(jax.make_jaxpr(function)(jnp.zeros(3 * blocks)).eqns)

    assert size(2) == size(20)
