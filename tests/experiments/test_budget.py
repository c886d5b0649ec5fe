import dataclasses

import numpy as np
import pytest

from experiments import budget
from experiments.config import Config
from experiments.configs import CONFIGS
from sdp_jax.polynomial import Polynomial
from tests import toy


def test_the_ramp_is_that_of_the_target():
    config = Config(sparsity=0.6, begin=0.2, end=0.6)
    gone = budget.ramp(config, 10)
    done = np.clip((np.arange(1, 11) - 2) / 4, 0, 1)
    np.testing.assert_allclose(gone, 0.6 * (1 - (1 - done) ** 3))
    assert gone[1] == 0 and gone[5] == 0.6


def test_flops_left():
    params = toy.mlp_params()
    groups = dataclasses.replace(
        toy.mlp_groups(params), flops=Polynomial.of({(0,): 8.0, (0, 1): 2.0, (1,): 6.0})
    )
    gone = np.array([0.0, 0.25, 0.5])
    # The same share of the target: FLOPs go as they are counted.
    left = budget.flops_left(groups, groups.need_flops(), gone)
    np.testing.assert_allclose(left, 1 - gone, atol=1e-3)
    # Of 6 and 5 channels: 60 of 138 FLOPs are quadratic, 78 linear.
    channels = Polynomial.of({(0,): 1.0, (1,): 1.0})
    left = budget.flops_left(groups, channels, gone)
    width = 1 - gone
    np.testing.assert_allclose(left, (78 * width + 60 * width**2) / 138, atol=1e-3)


def test_a_row(capsys):
    name = "lenet-mnist"
    found = budget.main(budget.Budget(rows=(name,)))[name]
    config = CONFIGS[f"{name}-altsdp"]
    images = 60_000 // config.batch_size * config.batch_size * config.epochs
    # The convolutions of LeNet 20-50-500 by hand: 5×5, to 24×24 and 8×8, then dense.
    forward = 2 * (576 * 25 * 20 + 64 * 25 * 20 * 50 + 800 * 500 + 500 * 10)
    assert found["dense"] == pytest.approx(3 * forward * images, rel=0.02)
    assert found["end"] == pytest.approx(0.5, abs=1e-3)
    # A tenth dense, half of them done; between them 1 − 0.5 · 3/4.
    assert found["share"] == pytest.approx(0.1 + 0.4 * 0.625 + 0.25, abs=0.005)
    assert name in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row is named 'dnn'"):
        budget.count("dnn")
