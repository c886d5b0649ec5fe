"""Polynomials in the widths against counts of the narrowed functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import promise
from tests.zoo import ZOO


@pytest.mark.parametrize(
    "name",
    ["resnext", "densenet", "vit_fused", "decoder", "lstm", "unet", "actor_critic"],
)
def test_they_are_what_the_small_function_costs(name, x64):
    model = ZOO[name]()
    groups = sdp_jax.find_groups(model.fn, model.shapes, *model.inputs)
    parameters = groups.parameters
    operations = sdp_jax.count_flops(
        groups, model.fn, model.shapes, *model.inputs
    ).flops
    for share, seed in ((0.0, 0), (0.5, 0), (0.9, 1)):
        cut = promise.random_cut(groups, share, seed)
        widths = list(cut.widths.values())
        small = cut.take(model.shapes)
        cost = sdp_jax.cost(sdp_jax.narrow(model.fn, cut), small, *model.inputs)
        assert round(parameters.at(widths)) == cost.parameters
        if all(widths):
            assert operations.at(widths) == pytest.approx(cost.flops, rel=0.002)
        else:
            # What nobody needs any more is not computed, but counted.
            assert operations.at(widths) >= cost.flops * 0.998
    full = sdp_jax.cost(model.fn, model.shapes, *model.inputs)
    sizes = list(groups.sizes.values())
    assert operations.at(sizes) == pytest.approx(full.flops, rel=0.002)


def test_heads_and_head_dimensions_multiply():
    def fn(p, x):
        q, k, v = ((x @ p[n]).reshape(3, 4, 8).swapaxes(0, 1) for n in "qkv")
        out = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
        return out.swapaxes(0, 1).reshape(3, 32) @ p["o"]

    params = {n: jnp.ones((5, 32)) for n in "qkv"} | {"o": jnp.ones((32, 6))}
    groups = sdp_jax.find_groups(fn, params, jnp.ones((3, 5)))
    sizes = list(groups.sizes.values())
    assert sorted(sizes) == [4, 8, 8]
    polynomial = groups.parameters
    assert polynomial.at(sizes) == 5 * 96 + 32 * 6
    halves = [n // 2 for n in sizes]
    assert polynomial.at(halves) == 5 * 24 + 8 * 6
    share = polynomial.share(sizes)
    np.testing.assert_allclose(share(jnp.asarray(sizes, jnp.float32)), 1, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(share)(jnp.asarray(halves, jnp.float32)), 0.25, rtol=1e-6
    )
    cut = promise.random_cut(groups, 0.5, 0)
    operations = sdp_jax.count_flops(groups, fn, params, jnp.ones((3, 5))).flops
    small = sdp_jax.narrow(fn, cut)
    cost = sdp_jax.cost(small, cut.take(params), jnp.ones((3, 5)))
    assert operations.at(halves) == pytest.approx(cost.flops, rel=1e-9)


def test_products_of_a_dimension_with_itself():
    def fn(p, x):
        y = x @ p["a"]
        return jnp.tanh((y[:, :, None] * y[:, None]).reshape(2, 36)).sum(-1)

    params = {"a": jnp.ones((3, 6))}
    x = jnp.ones((2, 3))
    groups = sdp_jax.find_groups(fn, params, x)
    assert groups.sizes == {"a": 6}
    cut = promise.random_cut(groups, 0.5, 0)
    small = cut.take(params)
    counted = sdp_jax.count_flops(groups, fn, params, x).flops.at(
        list(cut.widths.values())
    )
    cost = sdp_jax.cost(sdp_jax.narrow(fn, cut), small, x)
    assert counted == pytest.approx(cost.flops, rel=1e-9)
