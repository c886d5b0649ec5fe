"""What the optimizer of a run is given from outside of its steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sdp_jax
from experiments import data, models, optimizers
from experiments.config import Config
from experiments.steps import State, make_loss
from sdp_jax import methods


def make_from_outside(
    config: Config,
    model: models.Model,
    groups: sdp_jax.Groups,
    training: data.Split,
    state: State,
    steps: int,
) -> tuple[Callable[[State], State] | None, range]:
    """What the optimizer is given from time to time, and before which steps."""
    if config.method == "altsdp" and config.valley == "hessian":
        refresh = make_refresh(model, training, state.batch_stats, config)
        return refresh, range(0, steps, config.valley_every)
    if config.method in optimizers.FROM_OUTSIDE:
        refresh = make_scores(model, groups.at("params"), training, config)
        return refresh, range(optimizers.one_shot_step(config, steps) - 1, steps, steps)
    return None, range(0)


def make_refresh(
    model: models.Model, training: data.Split, batch_stats: Any, config: Config
) -> Callable[[State], State]:
    """Gives the optimizer the sharp directions of the loss on 2,000 examples."""
    loss_fn = make_loss(model)
    size = min(2000, len(training.labels))
    batch = next(data.batches(training, size, seed=config.seed, epoch=0))
    # Shapes are all that training mode needs of them; the state's buffers are donated.
    batch_stats = jax.tree.map(jnp.zeros_like, batch_stats)

    def mean_loss(params: Any, batch: data.Split) -> jax.Array:
        return loss_fn(params, batch_stats, batch)[0]

    def refresh(state: State) -> State:
        pairs = sdp_jax.valley.top_eigenpairs(
            mean_loss, state.params, [batch], config.valley_rank, tol=0.1
        )
        opt_state = sdp_jax.valley.set_basis(state.opt_state, pairs.vectors)
        return state._replace(opt_state=opt_state)

    return refresh


def make_scores(
    model: models.Model, groups: sdp_jax.Groups, training: data.Split, config: Config
) -> Callable[[State], State]:
    """Gives the optimizer discriminant information of 2,000 examples as scores."""
    size = min(2000, len(training.labels))
    batch = next(data.batches(training, size, seed=config.seed, epoch=0))
    score = methods.discriminant_score(jnp.asarray(batch.labels))

    def refresh(state: State) -> State:
        maps = models.feature_maps(model, groups, state.variables, batch.images)
        scores = score(groups, state.params, activations=maps)
        opt_state = methods.set_scores(state.opt_state, groups, scores)
        return state._replace(opt_state=opt_state)

    return refresh
