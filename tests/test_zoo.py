"""The promise, for many architectures."""

import jax
import pytest

from tests import promise
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_small_is_dense_with_zeros(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes)
    trains = model.train is not None
    shares = (0.5, 0.99)
    groups = promise.check(
        model.fn, params, model.inputs, shares=shares, grads=not trains
    )
    share = promise.prunable_share(groups)
    assert share >= model.share, f"only {share:.2f} of the parameters can be cut"
    if trains:
        training = promise.check(model.train, params, model.inputs, join=model.join)
        assert training.sizes == groups.sizes
    jax.clear_caches()


@pytest.mark.study
@pytest.mark.parametrize("name", ZOO)
def test_many_cuts(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes, seed=1)
    many = {"shares": (0.25, 0.5, 0.75, 0.9), "seeds": (1, 2, 3)}
    promise.check(model.fn, params, model.inputs, **many)
    if model.train is not None:
        promise.check(model.train, params, model.inputs, join=model.join, **many)
    jax.clear_caches()
