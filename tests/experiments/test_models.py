import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from experiments import models

MODELS = {
    "dnn": models.Dnn(widths=(7, 5), classes=3),
    "conv": models.ConvNet(widths=(4, 3, 5, 6, 7), classes=3),
    "three convolutions": models.ConvNet(widths=(4, 3, 5, 7), classes=3),
}


def _members(groups):
    return {
        d.name: {
            (m.path, m.axis, m.role, m.outer, m.inner, m.offset) for m in d.members
        }
        for d in groups
    }


def hand_made_groups(model, variables):
    if isinstance(model, models.Dnn):
        layers = [f"dense{i}" for i in range(len(model.widths))]
        above = [*layers[1:], "head"]
        axes = {
            layer: [
                sdp_jax.producer(f"params/{layer}/kernel", 1),
                sdp_jax.producer(f"params/{layer}/bias", 0),
                sdp_jax.consumer(f"params/{next_layer}/kernel", 0),
            ]
            for layer, next_layer in zip(layers, above, strict=True)
        }
        return sdp_jax.groups_from_axes(variables, axes)
    convs = len(model.widths) - 1
    axes = {}
    for i, width in enumerate(model.widths[:-1]):
        axes[f"conv{i}"] = [
            sdp_jax.producer(f"params/conv{i}/kernel", 3),
            sdp_jax.producer(f"params/norm{i}/scale", 0),
            sdp_jax.producer(f"params/norm{i}/bias", 0),
            sdp_jax.running_state(f"batch_stats/norm{i}/mean", 0),
            sdp_jax.running_state(f"batch_stats/norm{i}/var", 0),
        ]
        if i + 1 < convs:
            axes[f"conv{i}"].append(sdp_jax.consumer(f"params/conv{i + 1}/kernel", 2))
        else:
            # Flattened in the order height, width, channel.
            pixels = variables["params"]["dense"]["kernel"].shape[0] // width
            flat = sdp_jax.consumer("params/dense/kernel", 0, outer=pixels)
            axes[f"conv{i}"].append(flat)
    axes["dense"] = [
        sdp_jax.producer("params/dense/kernel", 1),
        sdp_jax.producer("params/dense/bias", 0),
        sdp_jax.consumer("params/head/kernel", 0),
    ]
    return sdp_jax.groups_from_axes(variables, axes)


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_widths_belong_together(name):
    model = MODELS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    groups = sdp_jax.find_groups(model.apply, variables, x)
    assert _members(groups) == _members(hand_made_groups(model, variables))
    assert tuple(groups.sizes.values()) == model.widths
    # Every parameter but those of the output layer is a producer.
    producers = {m.path for d in groups for m in d.producers}
    names = {leaf.path for leaf in groups.leaves if leaf.path.startswith("params/")}
    assert names - producers == {"params/head/kernel", "params/head/bias"}

    # Random running statistics, then half of the channels zero: the same output.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda v: v + jnp.asarray(rng.uniform(0, 0.5, v.shape), v.dtype), variables
    )
    keep = {
        k: jnp.asarray(rng.permutation(size) >= size // 2, jnp.float32)
        for k, size in groups.sizes.items()
    }
    variables = sdp_jax.scale_channels(groups, variables, keep)
    cut = sdp_jax.plan_cut(groups, variables)
    assert list(cut.widths.values()) == [size - size // 2 for size in model.widths]
    expected = model.apply(variables, x)
    found = sdp_jax.narrow(model.apply, cut)(cut.take(variables), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3  # the output depends on the input
