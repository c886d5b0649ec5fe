"""Where the channels of a member sit, spelt out."""

import numpy as np
import pytest

import sdp_jax
from sdp_jax.dimension import as_count, as_flag, as_text, check_member


@pytest.mark.parametrize(
    ("member", "size", "positions"),
    [
        (sdp_jax.Member("w", 0), 3, [[0], [1], [2]]),
        (sdp_jax.Member("w", 0, outer=2), 2, [[0, 2], [1, 3]]),
        (sdp_jax.Member("w", 0, inner=2, offset=1), 2, [[1, 2], [3, 4]]),
        (sdp_jax.Member("w", 0, outer=2, inner=1, period=5), 2, [[0, 5], [1, 6]]),
        (sdp_jax.Member("w", 0, places=(4, 0), period=6), 2, [[4], [0]]),
    ],
)
def test_positions_follow_the_formula(member, size, positions):
    found = np.moveaxis(member.positions(size), 1, 0).reshape(size, -1)
    assert found.tolist() == positions
    d = sdp_jax.Dimension("d", size, (member,))
    check_member({"w": (8,)}, d, member)
    with pytest.raises(ValueError, match="length"):
        check_member({"w": (found.max(),)}, d, member)


@pytest.mark.parametrize(
    ("check", "value"),
    [(as_text, 3), (as_count, -1), (as_count, True), (as_count, "1"), (as_flag, 1)],
)
def test_json_of_another_kind_is_refused(check, value):
    with pytest.raises(TypeError, match="expected a"):
        check(value)


@pytest.mark.parametrize("role", ["consumer", "state"])
def test_only_a_producer_is_scale_invariant(role):
    with pytest.raises(ValueError, match=f"this one is a {role}"):
        sdp_jax.groups_from_axes(
            {"w": np.ones((3, 2)), "v": np.ones(3)},
            {
                "unit": [
                    sdp_jax.Member("v", 0),
                    sdp_jax.Member("w", 0, role, scale_invariant=True),
                ]
            },
        )


def test_what_shrinks_is_all_where_all_is_invariant():
    filters = sdp_jax.Member("w", 1, scale_invariant=True)
    scale, reader = sdp_jax.Member("s", 0), sdp_jax.Member("v", 0, "consumer")
    assert sdp_jax.Dimension("d", 2, (filters, scale, reader)).shrinking == (scale,)
    assert sdp_jax.Dimension("d", 2, (filters, reader)).shrinking == (filters,)
