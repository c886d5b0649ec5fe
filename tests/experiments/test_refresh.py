from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import data, models, steps
from experiments.config import Config
from experiments.refresh import make_from_outside
from experiments.train import make_setup

STEPS = 20


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sgd"},
        {"sparsity": 0.5},
        {"sparsity": 0.5, "valley": "svd"},
        {"method": "l2", "sparsity": 0.5},
        {"method": "l2", "sparsity": 0.5, "valley": "hessian"},
    ],
    ids=str,
)
def test_most_methods_are_given_nothing(options):
    # Nothing is asked of network and data, then.
    nothing: Any = None
    config = Config(**options)
    found = make_from_outside(config, nothing, nothing, nothing, nothing, STEPS)
    assert found == (None, range(0))


def test_sharp_directions_come_as_often_as_asked_for():
    dataset = data.synthetic("digits", count=40)
    config = Config(sparsity=0.5, valley="hessian", valley_every=7)
    model, groups, nothing = models.make_model("dnn", 10), None, {}
    state = steps.State(nothing, nothing, nothing)
    found, due = make_from_outside(config, model, groups, dataset.train, state, STEPS)
    assert found is not None and list(due) == [0, 7, 14]


def test_scores_come_once_before_the_step_that_removes():
    options = {"method": "discriminant", "sparsity": 0.5, "begin": 0.2, "end": 0.6}
    config, dataset = (
        Config(widths=(6, 4), **options),
        data.synthetic("digits", count=40),
    )
    made = make_setup(config, dataset, STEPS)
    refresh, due = make_from_outside(
        config, made.model, made.groups, dataset.train, made.state, STEPS
    )
    # The eighth step removes: halfway between the fourth and the twelfth.
    assert refresh is not None and list(due) == [7]
    state, left = made.state, []
    gradient = jax.tree.map(jnp.zeros_like, state.params)

    @jax.jit
    def step(state):
        updates, opt_state = made.tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state)

    for i in range(9):
        state = step(refresh(state) if i in due else state)
        kernels = [state.params[k]["kernel"] for k in ("dense0", "dense1")]
        left.append(tuple(int(kernel.any(0).sum()) for kernel in kernels))
    # Half of each layer.
    assert left[:7] == [(6, 4)] * 7 and left[7] == left[8]
    assert left[7] == (3, 2)
