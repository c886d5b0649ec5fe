"""Python numbers are refused when a factory is called, arrays pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax import checks


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(1), np.int64(0)])
def test_numbers_in_range_pass(value):
    checks.check_number("x", value, low=0, high=1, rule="a share")


@pytest.mark.parametrize("value", [-1e-9, 1.1, float("nan"), float("inf")])
def test_numbers_out_of_range_are_told(value):
    with pytest.raises(ValueError, match=f"x must be a share; got {value!r}"):
        checks.check_number("x", value, low=0, high=1, rule="a share")
    # What is only known under jit cannot be checked.
    checks.check_number("x", jnp.asarray(value), low=0, high=1, rule="a share")


@pytest.mark.parametrize("value", [True, "1", None, [1]])
def test_what_is_no_number_is_told(value):
    with pytest.raises(TypeError, match="x must be a share"):
        checks.check_number("x", value, low=0, rule="a share")
    with pytest.raises(TypeError, match="x must be an integer number of updates"):
        checks.check_whole("x", value)


def test_whole_numbers_fit_the_counter():
    checks.check_whole("x", np.int32(0))
    checks.check_whole("x", 2**31 - 1)
    with pytest.raises(TypeError, match="must be an integer number of updates; got 2"):
        checks.check_whole("x", 2.0)
    for value, low in ((-1, 0), (0, 1), (2**31, 0)):
        with pytest.raises(ValueError, match=f"at least {low} and below 2"):
            checks.check_whole("x", value, low=low)


def test_momentum_is_below_one():
    checks.check_momentum(0)
    checks.check_momentum(1 - 1e-12)
    checks.check_momentum(jnp.asarray(2.0))
    for value in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"momentum must be a number in \[0, 1\)"):
            checks.check_momentum(value)


def test_steps_are_in_order():
    checks.check_steps(0, 1)
    checks.check_steps(np.int64(3), 2**31 - 1)
    with pytest.raises(TypeError, match="begin_step must be an integer .*; got True"):
        checks.check_steps(True, 2)
    for steps in ((1, 1), (-1, 3), (0, 2**31)):
        with pytest.raises(ValueError, match="0 <= begin_step < end_step < 2.*got"):
            checks.check_steps(*steps)
