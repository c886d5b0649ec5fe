"""Proximal maps against their variational definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sdp_jax
from sdp_jax import prox
from tests import toy

floats = st.floats(-4, 4, allow_subnormal=False)


def objective(w, v, threshold, weight):
    return 0.5 * np.sum((w - v) ** 2) + threshold * weight * np.sqrt(np.sum(w**2))


@given(
    v=hnp.arrays(np.float64, (3,), elements=floats),
    threshold=st.floats(0, 4),
    weight=st.floats(0.25, 4),
    seed=st.integers(0, 10),
)
def test_group_soft_threshold_minimises_its_objective(v, threshold, weight, seed):
    import jax

    with jax.enable_x64(True):
        norm = jnp.asarray(np.sqrt(np.sum(v**2)) / weight)[None]
        factor = prox.soft_threshold_factor(norm, jnp.asarray(threshold))
    w = float(factor[0]) * v
    rng = np.random.default_rng(seed)
    best = objective(w, v, threshold, weight)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            other = w + scale * rng.normal(size=3)
            assert best <= objective(other, v, threshold, weight) + 1e-12
    # Optimality: v - w is threshold * weight times a subgradient of the norm at w.
    rest = v - w
    if np.any(w != 0):
        unit = w / np.abs(w).max()  # Squares of tiny entries vanish.
        unit = unit / np.linalg.norm(unit)
        np.testing.assert_allclose(rest, threshold * weight * unit, atol=1e-9)
    else:
        assert np.linalg.norm(rest) <= threshold * weight * (1 + 1e-12)


@given(
    v=hnp.arrays(np.float64, (2, 3), elements=floats),
    u=hnp.arrays(np.float64, (2, 3), elements=floats),
    threshold=st.floats(0, 4),
)
def test_proximal_map_is_nonexpansive(v, u, threshold):
    import jax

    with jax.enable_x64(True):
        a, b = (
            x
            * np.asarray(
                prox.soft_threshold_factor(
                    jnp.asarray(np.linalg.norm(x, axis=1)), jnp.asarray(threshold)
                )
            )[:, None]
            for x in (v, u)
        )
    assert np.linalg.norm(a - b) <= np.linalg.norm(v - u) + 1e-9


def test_special_values():
    norms = jnp.array([0.0, 1.0, 2.0, jnp.nan, jnp.inf])
    one = prox.soft_threshold_factor(norms, jnp.array(0.0))
    assert one.tolist() == [1, 1, 1, 1, 1]
    half = prox.soft_threshold_factor(norms, jnp.array(1.0))
    assert half[:3].tolist() == [0, 0, 0.5]
    assert np.isnan(half[3])
    assert half[4] == 1
    gone = prox.soft_threshold_factor(norms, jnp.array(jnp.inf))
    assert gone[:3].tolist() == [0, 0, 0]
    assert np.isnan(gone[3])


@given(
    norms=hnp.arrays(np.float32, (5,), elements=st.floats(0, 4, width=32)),
    threshold=st.floats(0, 8),
    floor=st.integers(0, 5),
)
def test_floor_is_held_and_otherwise_untouched(norms, threshold, floor):
    norms, groups = jnp.asarray(norms), toy.line_groups(a=5)
    static = prox.hold_floors(groups, norms, threshold, [floor])
    traced = prox.hold_floors(groups, norms, threshold, [jnp.asarray(floor)])
    np.testing.assert_array_equal(static, traced)
    factor = np.asarray(prox.soft_threshold_factor(norms, static))
    plain = np.asarray(prox.soft_threshold_factor(norms, jnp.asarray(threshold)))
    assert (factor != 0).sum() >= floor
    assert (factor >= plain).all()
    untouched = factor == plain
    order = np.argsort(-np.asarray(norms), kind="stable")
    level = np.asarray(norms)[order[floor - 1]] if floor else np.inf
    assert untouched[np.asarray(norms) < level].all()
    roomy = plain > prox.FLOOR_FACTOR + 1e-5
    np.testing.assert_allclose(factor[roomy], plain[roomy], rtol=1e-6)


@pytest.mark.parametrize("floor", [1, 2])
def test_protected_channels_keep_a_tenth_under_any_threshold(floor):
    params = {"w": jnp.array([[3.0, 0.3, 1.0], [4.0, 0.4, 0.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.group_soft_threshold(groups, 1e6, min_channels=floor)
    zero = {"w": jnp.zeros((2, 3))}
    updates, _ = tx.update(zero, tx.init(params), params)
    expected = 0.1 * np.asarray(params["w"]) * ([1, 0, 0] if floor == 1 else [1, 0, 1])
    np.testing.assert_allclose(params["w"] + updates["w"], expected, atol=1e-6)


def test_each_dimension_has_its_own_floor():
    groups = toy.mlp_groups()
    rng = np.random.default_rng(0)
    norms = jnp.asarray(rng.uniform(1, 2, size=11), jnp.float32)
    floors = prox.resolve_floors(groups, {"hidden1": 3})
    assert floors == (1, 3)
    thresholds = prox.hold_floors(groups, norms, 5.0, floors)
    parts, held = groups.split(norms), groups.split(thresholds)
    for (name, part), floor in zip(parts.items(), floors, strict=True):
        # All are below the threshold: a tenth of so many stays.
        levels = np.sort(part)[::-1][:floor]
        want = np.where(np.isin(part, levels), np.float32(0.9) * part, 5)
        np.testing.assert_allclose(held[name], want, rtol=1e-6)
    marked = prox.largest_each(groups, norms, floors)
    np.testing.assert_array_equal(marked, thresholds < norms)
    assert [int(m.sum()) for m in groups.split(marked).values()] == [1, 3]
    # A threshold for each channel passes where the floor does not hold.
    each = prox.hold_floors(groups, norms, norms / 2, floors)
    np.testing.assert_array_equal(each, norms / 2)


def test_public_transformation_is_the_proximal_map():
    params = {"w": jnp.array([[3.0, 0.3, 1.0], [4.0, 0.4, 0.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    for weights, weight in (("plain", 1.0), ("size", 2**0.5), ({"d": 0.5}, 0.5)):
        tx = sdp_jax.group_soft_threshold(groups, 0.75, weights=weights, min_channels=0)
        zero = {"w": jnp.zeros((2, 3))}
        updates, _ = tx.update(zero, tx.init(params), params)
        norms = np.linalg.norm(params["w"], axis=0)
        factor = np.maximum(0, 1 - 0.75 * weight / norms)
        np.testing.assert_allclose(
            params["w"] + updates["w"], params["w"] * factor, rtol=1e-6
        )


@pytest.mark.parametrize("floor", [7, -1])
def test_floor_out_of_range(floor):
    params = {"w": jnp.ones((2, 3))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    with pytest.raises(ValueError, match="it has 3 channels"):
        prox.resolve_floors(groups, floor)
