"""The promise, for many architectures."""

import jax
import pytest

from tests import promise
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_small_is_dense_with_zeros(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes)
    groups = promise.check(model.fn, params, model.inputs, shares=(0.5, 0.99))
    share = promise.prunable_share(groups)
    assert share >= model.share, f"only {share:.2f} of the parameters can be cut"
    jax.clear_caches()
