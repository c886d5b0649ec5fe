"""Python numbers are refused in the factory; arrays pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.checks import (
    check_momentum,
    check_number,
    check_share,
    check_steps,
    check_whole,
)

RULE = "a number in [0, 2]"


@pytest.mark.parametrize("value", [0, 2, 1.5, np.int32(1), np.float32(2)])
def test_numbers_in_range_pass(value):
    check_number("x", value, low=0, high=2, rule=RULE)


@pytest.mark.parametrize("value", [-1e-9, 2.1, math.nan, math.inf, np.float64(3)])
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match=r"x must be a number in \[0, 2\]; got"):
        check_number("x", value, low=0, high=2, rule=RULE)
    if value != 2.1 and not isinstance(value, np.float64):
        with pytest.raises(ValueError, match="x must be positive"):
            check_number("x", value, low=0, rule="positive")


@pytest.mark.parametrize("value", [True, "1", None, 1j, [1.0]])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"x must be a number in \[0, 2\]; got"):
        check_number("x", value, low=0, high=2, rule=RULE)


def test_arrays_pass_also_traced():
    check_number("x", jnp.array(-1.0), low=0, high=2, rule=RULE)
    check_momentum(jnp.array(7.0))

    @jax.jit
    def traced(x):
        check_number("x", x, low=0, high=2, rule=RULE)
        return x

    assert traced(-1.0) == -1


@pytest.mark.parametrize("value", [3, 2**31 - 1, np.int64(3)])
def test_whole_numbers(value):
    check_whole("every", value, low=3)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (2, ValueError, "at least 3 and below"),
        (2**31, ValueError, "at least 3 and below"),
        (3.0, TypeError, "every must be an integer number of updates; got 3.0"),
        (True, TypeError, "integer"),
        (None, TypeError, "integer"),
    ],
)
def test_what_is_no_whole_number_in_range(value, error, match):
    with pytest.raises(error, match=match):
        check_whole("every", value, low=3)


@pytest.mark.parametrize("value", [0, 0.9, math.nextafter(1, 0)])
def test_momentum(value):
    check_momentum(value)


@pytest.mark.parametrize(
    ("value", "error"), [(1, ValueError), (-0.1, ValueError), ("0.9", TypeError)]
)
def test_momentum_out_of_range(value, error):
    with pytest.raises(error, match=r"momentum must be a number in \[0, 1\)"):
        check_momentum(value)


def test_steps_in_order():
    check_steps(0, 1)
    check_steps(np.int64(5), 2**31 - 1)


@pytest.mark.parametrize(
    ("begin", "end", "error", "match"),
    [
        (-1, 5, ValueError, "begin_step=-1, end_step=5"),
        (5, 5, ValueError, "0 <= begin_step < end_step < 2"),
        (0, 2**31, ValueError, "0 <= begin_step < end_step < 2"),
        (0.0, 5, TypeError, "begin_step must be an integer number of updates; got 0.0"),
        (0, True, TypeError, "end_step must be an integer number of updates; got True"),
    ],
)
def test_steps_out_of_order(begin, end, error, match):
    with pytest.raises(error, match=match):
        check_steps(begin, end)


def test_shares_are_numbers_below_one():
    for value in (0, 0.5, np.float32(0.5)):
        check_share("sparsity", value)
    for value in (1, -0.1, math.nan, jnp.float32(0.5)):
        with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
            check_share("sparsity", value)
    for value in (True, "0.5", None):
        with pytest.raises(TypeError, match="sparsity must be"):
            check_share("sparsity", value)
