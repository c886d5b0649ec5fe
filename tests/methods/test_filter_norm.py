"""Norms of filters against loops over channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy


def case(dtype=jnp.float32, seed=0):
    """Two layers into one residual dimension, a scale, heads; consumers beside."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "a": {"kernel": draw(3, 4), "bias": draw(4)},
        "b": {"kernel": draw(2, 2, 5, 4)},
        "norm": {"scale": draw(4), "bias": draw(4)},
        "heads": {"kernel": draw(3, 6)},
        "out": {"kernel": draw(4, 2)},
    }
    axes = {
        "residual": [
            sdp_jax.Member("a/kernel", 1),
            sdp_jax.Member("a/bias", 0),
            sdp_jax.Member("b/kernel", 3),
            sdp_jax.Member("norm/scale", 0),
            sdp_jax.Member("norm/bias", 0),
            sdp_jax.Member("out/kernel", 0, "consumer"),
        ],
        "heads": [sdp_jax.Member("heads/kernel", 1, inner=2)],
    }
    return params, sdp_jax.groups_from_axes(params, axes)


def entries(params):
    """For each channel of the case all entries of its producers, by hand."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    residual = [
        np.concatenate(
            [
                p["a"]["kernel"][:, c],
                p["a"]["bias"][[c]],
                p["b"]["kernel"][..., c].ravel(),
                p["norm"]["scale"][[c]],
                p["norm"]["bias"][[c]],
            ]
        )
        for c in range(4)
    ]
    heads = [p["heads"]["kernel"][:, 2 * c : 2 * c + 2].ravel() for c in range(3)]
    return {"residual": residual, "heads": heads}


ORACLES = {
    (methods.l1_norm, "plain"): lambda w: np.sum(np.abs(w)),
    (methods.l1_norm, "size"): lambda w: np.mean(np.abs(w)),
    (methods.l2_norm, "plain"): lambda w: np.sqrt(np.sum(w**2)),
    (methods.l2_norm, "size"): lambda w: np.sqrt(np.mean(w**2)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "factory, norm", list(ORACLES), ids=lambda x: getattr(x, "__name__", x)
)
def test_norms_of_all_producers(factory, norm, dtype):
    params, groups = case(dtype)
    vector = factory(weights=norm)(groups, params)
    found = groups.split(vector)
    assert list(found) == ["residual", "heads"]
    for name, channels in entries(params).items():
        want = [ORACLES[factory, norm](w) for w in channels]
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], want, rtol=1e-5)


@pytest.mark.parametrize("factory", [methods.l1_norm, methods.l2_norm])
def test_a_number_for_each_dimension_divides(factory):
    params, groups = case()
    plain = groups.split(factory()(groups, params))
    weights = {"residual": 4.0, "heads": 0.5}
    found = groups.split(factory(weights=weights)(groups, params))
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value / weights[name], rtol=1e-6)


@pytest.mark.parametrize("factory", [methods.l1_norm, methods.l2_norm])
def test_jit_agrees_and_scaling_scales(factory):
    params, groups = case()
    score = factory()
    plain = score(groups, params)
    jitted = jax.jit(lambda p: score(groups, p))(params)
    double = score(groups, jax.tree.map(lambda x: -2 * x, params))
    np.testing.assert_allclose(jitted, plain, rtol=1e-6)
    np.testing.assert_allclose(double, 2 * plain, rtol=1e-6)


def test_complex_entries_count_by_their_magnitude():
    params = {"w": jnp.array([[3 + 4j, 1j]])}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    for factory in (methods.l1_norm, methods.l2_norm):
        np.testing.assert_allclose(factory()(groups, params), [5, 1], rtol=1e-6)


@pytest.mark.parametrize("factory", [methods.l1_norm, methods.l2_norm])
def test_bad_input(factory):
    params, groups = case()
    with pytest.raises(ValueError, match="weights is 'median'"):
        factory(weights="median")(groups, params)
    with pytest.raises(ValueError, match="no leaf 'a/kernel'"):
        factory()(groups, {k: v for k, v in params.items() if k != "a"})
    with pytest.raises(ValueError, match="shape"):
        factory()(toy.mlp_groups(), toy.mlp_params(widths=(4, 7, 5, 3)))
