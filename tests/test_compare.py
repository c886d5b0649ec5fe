"""Where two functions differ, and how much of it may be rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.compare import differences, rounding

X = jnp.arange(6.0).reshape(2, 3)


def test_the_largest_difference_of_each_output():
    def fn(shift, x):
        y = x.at[1, 2].add(shift)
        return {"same": x, "moved": y, "count": jnp.int32(3), "none": x[:0]}

    found = {d.path: d for d in differences((fn, 0.0, (X,)), (fn, 0.25, (X,)))}
    assert set(found) == {"same", "moved"}  # whole numbers and nothing do not round
    assert found["same"].size == 0
    moved = found["moved"]
    assert (moved.index, moved.shape, moved.size, moved.largest) == (
        (1, 2),
        (2, 3),
        0.25,
        5.0,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_one_of_them_differs(bad):
    fn = lambda value, x: x.at[0, 1].set(value)  # noqa: E731
    (both,) = differences((fn, bad, (X,)), (fn, bad, (X,)))
    assert both.size == 0 and both.largest == 5
    (one,) = differences((fn, 0.0, (X,)), (fn, bad, (X,)))
    assert not one.size <= 1e9 and one.index == (0, 1)


def test_complex_outputs():
    fn = lambda value, x: x + 1j * value  # noqa: E731
    (found,) = differences((fn, 0.0, (X,)), (fn, 2.0, (X,)))
    assert found.size == pytest.approx(2)


def test_rounding_is_that_of_the_coarsest_type():
    fn = lambda p, x: jax.lax.scan(lambda c, y: (c * p, y), 1.0, x)[0]  # noqa: E731
    assert rounding(fn, jnp.float32(1), (X,)) == np.finfo(np.float32).eps
    half = lambda p, x: jax.lax.map(lambda y: y.astype(jnp.bfloat16).sum(), x)  # noqa: E731
    assert rounding(half, None, (X,)) == float(jnp.finfo(jnp.bfloat16).eps)
    assert rounding(lambda p, x: x, None, (jnp.arange(3),)) == 0
