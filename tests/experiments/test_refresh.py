import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.config import Config
from experiments.refresh import make_from_outside
from experiments.train import make_setup

DATASET = data.synthetic("digits", count=40)
STEPS = 20


def from_outside(**options):
    config = Config(widths=(6, 5), **options)
    model, groups, _, state = made = make_setup(config, DATASET, STEPS)
    refresh, due = make_from_outside(
        config, model, groups, DATASET.train, state, STEPS
    )
    return made, refresh, list(due)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sgd"},
        {"sparsity": 0.5},
        {"sparsity": 0.5, "valley": "svd"},
        {"method": "l2", "sparsity": 0.5},
    ],
    ids=str,
)
def test_most_methods_are_given_nothing(options):
    _, refresh, due = from_outside(**options)
    assert refresh is None and due == []


def test_sharp_directions_come_as_often_as_asked_for():
    options = {"sparsity": 0.5, "valley": "hessian", "valley_rank": 2}
    made, refresh, due = from_outside(**options, valley_every=7)
    assert due == [0, 7, 14]
    state = refresh(made.state)
    basis = state.opt_state[-2].basis
    flat = np.concatenate(
        [np.reshape(x, (2, -1)) for layer in basis.values() for x in layer.values()], 1
    )
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-4)


def test_scores_come_once_before_the_step_that_removes():
    options = {"method": "discriminant", "sparsity": 0.5, "begin": 0.2, "end": 0.6}
    made, refresh, due = from_outside(**options)
    # The eighth step removes: halfway between the fourth and the twelfth.
    assert due == [7]
    state = refresh(made.state)
    scores = [x for x in _leaves(state.opt_state) if x.shape in ((6,), (5,))]
    assert len(scores) >= 2 and all(jnp.isfinite(x).all() for x in scores)
