"""Widths are rounded up: numbers, arrays and traced arrays alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdp_jax.widths import powers_to, round_up

# Steps, and the widths that they allow up to 300.
LADDERS = {
    "any": (1, set(range(300))),
    "a number": (12, set(range(0, 300, 12))),
    "powers to 8": (powers_to(8), {0, 1, 2, 4, *range(8, 300, 8)}),
    "two steps": (((0, 8), (127, 128)), {*range(0, 128, 8), 128, 256, 384}),
}


@pytest.mark.parametrize("ladder", LADDERS)
@given(sizes=st.lists(st.integers(1, 280), min_size=1, max_size=4), data=st.data())
def test_the_next_width_that_is_allowed(ladder, sizes, data):
    steps, allowed = LADDERS[ladder]
    kept = [data.draw(st.integers(0, size)) for size in sizes]
    want = [
        min(min(w for w in allowed if w >= count), size)
        for count, size in zip(kept, sizes, strict=True)
    ]
    assert [round_up(k, n, steps) for k, n in zip(kept, sizes, strict=True)] == want
    found = round_up(np.asarray(kept), np.asarray(sizes), steps)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("ladder", LADDERS)
def test_traced_arrays_are_rounded_as_numbers_are(ladder):
    steps, _ = LADDERS[ladder]
    kept = np.arange(200, dtype=np.int32)
    rounded = jax.jit(lambda kept, sizes: round_up(kept, sizes, steps))
    for sizes in (np.int32(150), np.full(200, 190, np.int32)):
        found = rounded(kept, sizes)
        assert found.dtype == jnp.int32
        want = [round_up(int(k), int(np.max(sizes)), steps) for k in kept]
        np.testing.assert_array_equal(found, want)
        # Counts that are float32 stay that.
        found = rounded(kept.astype(np.float32), sizes.astype(np.float32))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, want)


def test_powers_reach_the_multiple_and_stop():
    assert powers_to(1) == ((0, 1),)
    assert [round_up(k, 99, powers_to(4)) for k in range(1, 10)] == [
        1, 2, 4, 4, 8, 8, 8, 8, 12,
    ]  # fmt: skip
