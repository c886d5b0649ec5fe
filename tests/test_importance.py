"""The importance that targets rank by: which members count, and what is gone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import importance
from tests import toy

P = sdp_jax.Member


@pytest.mark.parametrize(
    "shapes, biases",
    [
        ({"l/kernel": (3, 4), "l/bias": (4,)}, ["l/bias"]),
        ({"l/weight": (3, 4), "l/offs": (4,)}, ["l/offs"]),
        ({"l/w": (3, 4), "l/b": (1, 4), "n/offset": (1, 1, 4)}, ["l/b", "n/offset"]),
        ({"n/scale": (4,), "n/bias": (4,)}, ["n/bias"]),
        ({"n/gamma": (4,), "n/beta": (4,)}, ["n/beta"]),
        ({"n/weight": (4,), "a": (3, 4)}, []),
        ({"w": (3, 4), "scale": (4,), "b": (3, 4)}, []),
        ({"q/kernel": (3, 2, 4), "q/bias": (2, 4)}, ["q/bias"]),
        ({"slope": (4,), "m/kernel": (3, 4)}, []),
    ],
)
def test_which_producers_are_biases(shapes, biases):
    params = {}
    for path, shape in shapes.items():
        *module, key = path.split("/")
        at = params.setdefault(module[0], {}) if module else params
        at[key] = jnp.ones(shape)
    members = [P(path, -1) for path in shapes]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    (d,) = groups
    found = [m.path for m in d.members if importance.is_bias(groups, d, m)]
    assert found == biases


def test_importance_is_that_of_the_cut_network():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
    }

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    groups = sdp_jax.find_groups(apply, params, jnp.ones((2, 5)))
    keep = jnp.asarray(rng.permutation([1.0] * 8 + [0.0] * 6))
    zeroed = sdp_jax.scale_channels(groups, params, keep)
    cut = sdp_jax.plan_cut(groups, zeroed)
    small = importance.channel_importance(cut.groups, cut.take(zeroed))
    found = np.asarray(importance.channel_importance(groups, zeroed))
    np.testing.assert_allclose(found[np.asarray(keep) > 0], small, rtol=1e-6)
    assert (found[np.asarray(keep) == 0] == 0).all()
    # A mean over both sides, over the mean of the dimension.
    table = {k: np.asarray(v, float) for k, v in params.items()}
    raw = (np.sum(table["a"] ** 2, 0) + np.sum(table["b"] ** 2, 1)) / 2
    whole = groups.split(importance.channel_importance(groups, params))
    (name,) = [d.name for d in groups if d.size == 8]
    np.testing.assert_allclose(whole[name], raw / raw.mean(), rtol=1e-5)


def test_hidden_consumers_are_named_unless_a_mask_hides_them():
    params = {"w": jnp.array([[3.0, 1.0, 0.0]]), "v": jnp.ones((3, 1))}
    axes = {"d": [P("w", 1), P("v", 0, "consumer")]}
    groups = sdp_jax.groups_from_axes(params, axes)
    part = {"w": params["w"]}
    with pytest.raises(ValueError, match="no leaf 'v' of shape .* hide no member"):
        importance.channel_importance(groups, part)
    found = importance.channel_importance(groups, part, masked=True)
    np.testing.assert_allclose(found, [1.8, 0.2, 0.0], rtol=1e-6)


def test_a_target_on_a_part_of_the_parameters():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    labels = {name: "head" if name == "layer2" else "rest" for name in params}
    target = sdp_jax.target_sparsity(0.5, 0, 1)
    parts = {
        "rest": sdp_jax.altsdp(0.1, groups, strength=target),
        "head": optax.adam(0.1),
    }
    tx = optax.partition(parts, labels)
    updates, _ = tx.update(toy.mlp_grads(params), tx.init(params), params)
    alive = sdp_jax.channels_alive(groups, optax.apply_updates(params, updates))
    assert int(alive.sum()) == 5
