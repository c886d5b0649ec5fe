"""The promise, for many architectures."""

import jax
import pytest

from tests import promise
from tests.zoo import ZOO

# The dimensions that each model must have, by size; heads and head dimensions too.
SIZES = {
    "vgg": [8, 12, 16],
    "resnet18": [8, 8, 8, 12, 12, 12],
    "resnet50": [4, 4, 4, 4, 6, 6, 6, 6, 8, 12],
    "groupnorm": [2, 2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 6],
    "wideresnet": [8, 8, 12, 12],
    "bit": [2, 2, 2, 2, 4, 4, 6, 6],
    "resnext": [3, 3, 3, 3, 4, 4, 8],
    "mobilenet": [6, 12, 12],
    "efficientnet": [3, 3, 6, 12, 12],
    "eca": [6, 6, 8],
    "densenet": [4, 4, 4, 4, 6, 6, 6, 8, 8, 8, 8],
    "shufflenet": [2, 4, 4, 4],
    "unet": [6, 8, 8, 8, 10],
    "convnext": [8, 16, 16],
    "vit": [3, 3, 4, 4, 4, 4, 12, 20, 20],
    "vit_fused": [3, 3, 4, 4, 12, 20, 20],
    "swin": [2, 2, 4, 4, 4, 4, 8, 12, 12],
    "mixer": [7, 20],
    "encoder_decoder": [2, 2, 3, 4, 4, 6, 6, 6, 6, 12, 16, 16],
    "decoder": [2, 2, 2, 2, 2, 2, 4, 4, 16, 24, 24],
    "lstm": [8, 8],
    "gru": [8, 8],
    "state_space": [6, 6, 8],
    "vae": [4, 12, 12],
    "actor_critic": [8, 12, 12],
    "experts": [4, 8, 12],
    "remat": [8, 12, 12],
    "nnx_vgg": [8, 12],
    "nnx_transformer": [3, 4, 4, 12, 20],
    "equinox": [12, 12],
    "haiku": [8, 12],
    "stacked": [8, 12],
    "grouped_experts": [8, 12],
    "quantised": [6, 8],
    "custom_vjp": [8],
    "custom_jvp": [8],
    "cached_decoder": [3, 3, 4, 4, 4, 4, 8, 12, 12],
    "factorised": [6, 8],
    "neural_ode": [6, 8],
    "adjoint_ode": [8, 12],
    "sharded": [2, 2, 4, 6, 8],
}


@pytest.mark.parametrize("name", ZOO)
def test_small_is_dense_with_zeros(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes)
    trains = model.train is not None
    # With a training mode, the single channels and the gradients are left to it.
    shares = (0.5,) if trains else (0.5, 0.99)
    groups = promise.check(
        model.fn,
        params,
        model.inputs,
        shares=shares,
        grads=not trains,
        **model.where,
    )
    assert sorted(groups.sizes.values()) == SIZES[name]
    share = promise.prunable_share(groups)
    assert share == pytest.approx(model.share, abs=0.0051)
    if trains:
        training = promise.check(
            model.train, params, model.inputs, shares=(0.99,), join=model.join
        )
        assert training.sizes == groups.sizes
    jax.clear_caches()


@pytest.mark.study
@pytest.mark.parametrize("name", ZOO)
def test_many_cuts(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes, seed=1)
    many = {"shares": (0.25, 0.5, 0.75, 0.9), "seeds": (1, 2, 3)}
    promise.check(model.fn, params, model.inputs, **many, **model.where)
    if model.train is not None:
        promise.check(model.train, params, model.inputs, join=model.join, **many)
    jax.clear_caches()
