"""Ring laws against evaluation, normal form, plain data and substitution."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdp_jax.polynomial import Polynomial, monomial

DIMENSIONS = 4
# Whole numbers, so that sums and products are exact.
KEYS = st.lists(st.integers(0, DIMENSIONS - 1), max_size=3).map(tuple)
POLYNOMIALS = st.dictionaries(KEYS, st.integers(-9, 9), max_size=5).map(Polynomial.of)
WIDTHS = st.lists(st.integers(0, 7), min_size=DIMENSIONS, max_size=DIMENSIONS)
NUMBERS = st.integers(-5, 5)


@given(POLYNOMIALS, POLYNOMIALS, POLYNOMIALS, NUMBERS, WIDTHS)
def test_ring_laws_hold_as_they_do_for_values(p, q, r, n, widths):
    assert (p + q).at(widths) == p.at(widths) + q.at(widths)
    assert (p * q).at(widths) == p.at(widths) * q.at(widths)
    assert (p + n).at(widths) == (n + p).at(widths) == p.at(widths) + n
    assert (p * n).at(widths) == (n * p).at(widths) == p.at(widths) * n
    # Equal polynomials are equal values.
    assert p + q == q + p and p * q == q * p
    assert (p + q) + r == p + (q + r) and (p * q) * r == p * (q * r)
    assert p * (q + r) == p * q + p * r
    assert p + Polynomial() == p * 1 == p + 0 == p
    assert p + p * -1 == p * 0 == Polynomial()
    assert Polynomial.total([p, n, q, r]) == p + n + q + r
    assert hash(p + q) == hash(q + p)


@given(POLYNOMIALS, POLYNOMIALS)
def test_terms_are_sorted_and_not_zero(p, q):
    for result in (p, p + q, p * q):
        keys = [key for key, _ in result.terms]
        assert keys == sorted(set(keys))
        assert all(key == tuple(sorted(key)) and value for key, value in result.terms)


@given(st.dictionaries(KEYS, st.floats(allow_nan=False, allow_infinity=False)))
def test_plain_data_come_back_as_they_were(terms):
    p = Polynomial.of({tuple(sorted(key)): value for key, value in terms.items()})
    data = json.loads(json.dumps(p.to_list()))
    assert Polynomial.from_list(data, DIMENSIONS) == p
    assert Polynomial.from_list(p.to_list(), DIMENSIONS).to_list() == p.to_list()


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (None, TypeError, "a polynomial is a list"),
        ({"0": 1.0}, TypeError, "a polynomial is a list"),
        ([1.0], TypeError, "a term is a list"),
        ([[[0]]], ValueError, "dimensions, coefficient"),
        ([["0", 1.0]], TypeError, "a monomial is a list"),
        ([[[0.0], 1.0]], TypeError, "numbers of dimensions"),
        ([[[True], 1.0]], TypeError, "numbers of dimensions"),
        ([[[-1], 1.0]], ValueError, "there are 4"),
        ([[[4], 1.0]], ValueError, "there are 4"),
        ([[[0], "1"]], TypeError, "a coefficient is a number"),
        ([[[0], True]], TypeError, "a coefficient is a number"),
        ([[[0], math.nan]], ValueError, "is finite"),
        ([[[0], math.inf]], ValueError, "is finite"),
        ([[[0], 10**400]], ValueError, "is finite"),
        ([[[0, 1], 1.0], [[1, 0], 2.0]], ValueError, "twice"),
    ],
)
def test_malformed_data_are_refused(data, error, match):
    with pytest.raises(error, match=match):
        Polynomial.from_list(data, DIMENSIONS)


@given(
    POLYNOMIALS,
    st.lists(st.none() | st.integers(0, 2), min_size=DIMENSIONS, max_size=DIMENSIONS),
    WIDTHS,
    st.lists(st.integers(0, 7), min_size=3, max_size=3),
)
def test_substitution_is_evaluation_at_the_new_widths(p, numbers, sizes, widths):
    found = p.substitute(dict(enumerate(numbers)), sizes)
    old = [
        size if number is None else widths[number]
        for number, size in zip(numbers, sizes, strict=True)
    ]
    assert found.at(widths) == p.at(old)


@given(POLYNOMIALS, st.permutations(range(DIMENSIONS)), WIDTHS)
def test_renumbering_there_and_back_changes_nothing(p, order, sizes):
    there = dict(enumerate(order))
    back = {new: old for old, new in there.items()}
    assert p.substitute(there, sizes).substitute(back, sizes) == p


def test_a_dimension_without_a_number_is_an_error():
    with pytest.raises(KeyError):
        Polynomial.of({(1,): 2.0}).substitute({0: 0}, [3, 3])


@given(WIDTHS, st.lists(st.integers(1, 7), min_size=DIMENSIONS, max_size=DIMENSIONS))
def test_shares_are_quotients_of_values(widths, sizes):
    p = Polynomial.of({(): 3.0, (0, 1): 2.0, (2,): 5.0, (3, 3, 3): 1.0})
    share = p.share(sizes)(jnp.asarray(widths, jnp.float32))
    np.testing.assert_allclose(share, p.at(widths) / p.at(sizes), rtol=1e-5)


@given(st.lists(st.integers(0, 1), max_size=3).map(tuple), st.data())
def test_monomials_count_positions_of_different_channels(dims, data):
    """A position for each choice of different channels: as many as stay are counted."""
    sizes = [data.draw(st.integers(3, 6)) for _ in range(2)]
    widths = [data.draw(st.integers(0, size)) for size in sizes]

    def choices(numbers):
        return math.prod(math.perm(numbers[d], dims.count(d)) for d in range(2))

    counted = monomial(dims, choices(sizes), sizes).at(widths)
    assert counted == pytest.approx(choices(widths), abs=1e-9)
