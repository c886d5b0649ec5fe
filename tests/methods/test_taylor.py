"""The first-order Taylor score against loops, and against the loss itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy


def oracle(params, grads, hidden=2):
    """|Σ g w| over kernel column and bias, channel by channel."""
    p, g = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in (params, grads)
    )
    found = {}
    for i in range(hidden):
        layer, slope = p[f"layer{i}"], g[f"layer{i}"]
        found[f"hidden{i}"] = [
            abs(
                sum(
                    slope["kernel"][r, c] * row[c]
                    for r, row in enumerate(layer["kernel"])
                )
                + slope["bias"][c] * layer["bias"][c]
            )
            for c in range(layer["bias"].size)
        ]
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_all_producers(dtype):
    params = toy.mlp_params(dtype=dtype)
    grads = toy.mlp_grads(params)
    groups = toy.mlp_groups(params)
    score = methods.taylor()
    found = groups.split(score(groups, params, grads))
    jitted = groups.split(jax.jit(lambda p, g: score(groups, p, g))(params, grads))
    for name, want in oracle(params, grads).items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(jitted[name], want, rtol=1e-4, atol=1e-6)


def test_producers_of_one_dimension_may_cancel():
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
    grads = {"a": jnp.array([[6.0, 1.0]]), "b": jnp.array([[-2.0, 1.0]])}
    axes = {"d": [sdp_jax.Member("a", 1), sdp_jax.Member("b", 1)]}
    groups = sdp_jax.groups_from_axes(params, axes)
    scores = methods.taylor()(groups, params, grads)
    # 1·6 + 3·(−2) = 0, 2·1 + 4·1 = 6: the sum is taken before the magnitude.
    np.testing.assert_array_equal(scores, [0, 6])


def test_change_of_the_loss_to_first_order(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    groups = toy.mlp_groups(params)
    batch = toy.batch(dtype=jnp.float64)
    value_at = jax.jit(lambda p: toy.loss(p, batch))
    loss, grads = value_at(params), jax.grad(toy.loss)(params, batch)
    scores = methods.taylor()(groups, params, grads)
    share = 1e-6
    for name, value in groups.split(scores).items():
        i = name.removeprefix("hidden")
        for c in range(len(value)):
            smaller = jax.tree.map(np.array, params)
            smaller[f"layer{i}"]["kernel"][:, c] *= 1 - share
            smaller[f"layer{i}"]["bias"][c] *= 1 - share
            change = abs(value_at(smaller) - loss) / share
            np.testing.assert_allclose(change, value[c], rtol=1e-3, atol=1e-6)


def test_refuses_missing_gradients():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    with pytest.raises(ValueError, match="taylor needs gradients: .*hosted"):
        methods.taylor()(groups, params)
    rule = sdp_jax.target_sparsity(0.5, 0, 1)
    host = methods.remove_lowest(groups, rule, methods.taylor())
    tx = optax.chain(optax.sgd(0.1), host)
    with pytest.raises(ValueError, match="taylor needs gradients"):
        tx.update(params, tx.init(params), params)


def test_hosted_hands_on_the_raw_gradient():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    grads = toy.mlp_grads(params)
    rule = sdp_jax.target_sparsity(0.4, 0, 1, ranking="dimension")
    host = methods.remove_lowest(groups, rule, methods.taylor())
    # Adam's first step has the size of its rate everywhere: it would rank otherwise.
    tx = methods.hosted(optax.adam(1e-3), host)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    alive = sdp_jax.channels_alive(groups, optax.apply_updates(params, updates))
    alive = groups.split(alive)
    for name, want in oracle(params, grads).items():
        gone = np.argsort(want)[: round(0.4 * len(want))]
        assert set(np.flatnonzero(~np.asarray(alive[name]))) == set(gone)
