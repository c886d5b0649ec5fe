"""What a record says of the channels, and what becomes of a run: cut, test, timing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax
from experiments import data, models
from experiments.config import Config
from experiments.steps import make_evaluate
from sdp_jax import methods
from sdp_jax.measure import Timing


def make_watch(groups: sdp_jax.Groups) -> Callable[[Any], dict[str, Any]]:
    """``variables -> what a record says of the channels``."""

    @jax.jit
    def look(variables: Any) -> Any:
        alive = sdp_jax.channels_alive(groups, variables)
        norms = sdp_jax.channel_norms(groups, variables)
        return (
            {name: jnp.sum(part) for name, part in groups.split(alive).items()},
            methods.pq_index(variables["params"]),
            methods.pq_index(norms, mask=norms > 0),
        )

    def watch(variables: Any) -> dict[str, Any]:
        alive, weights, norms = look(variables)
        index = {"weights": float(weights), "norms": float(norms)}
        counts = {name: int(alive[name]) for name in groups.sizes}
        return {"channels": counts, "pq_index": index}

    return watch


def outcome(
    config: Config,
    model: models.Model,
    groups: sdp_jax.Groups,
    variables: Any,
    dataset: data.Dataset,
) -> dict[str, Any]:
    """Cuts, checks that the small network computes the same, and tests both."""
    cut = sdp_jax.plan_cut(groups, variables)
    small, small_variables = sdp_jax.narrow(model.apply, cut), cut.take(variables)
    images = dataset.test.images[:1000]
    dense: Any = jax.jit(model.apply)(variables, images)
    after: Any = jax.jit(small)(small_variables, images)
    difference = float(jnp.max(jnp.abs(dense - after)))
    # In bfloat16 sums over fewer channels round in another way.
    tolerance = 1e-3 if config.compute == "float32" else 0.1
    if not difference <= tolerance * max(1.0, float(jnp.max(jnp.abs(dense)))):
        raise AssertionError(
            f"the small network differs from the dense one by {difference}"
        )
    loss, accuracy = make_evaluate(model.apply)(variables, dataset.test)
    small_loss, small_accuracy = make_evaluate(small)(small_variables, dataset.test)
    result = {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "small_test_loss": small_loss,
        "small_test_accuracy": small_accuracy,
        "largest_difference": difference,
        "widths": cut.widths,
        "dense_widths": groups.sizes,
        "parameters": _count(variables["params"]),
        "small_parameters": _count(small_variables["params"]),
        "flops": sdp_jax.cost(model.apply, variables, images[:1]).flops,
        "small_flops": sdp_jax.cost(small, small_variables, images[:1]).flops,
    }
    if config.timed:
        dense, less = time_cut(model, cut, variables, dataset.test.images[:200])
        result["milliseconds"] = 1e3 * dense.seconds
        result["small_milliseconds"] = 1e3 * less.seconds
    return result


def time_cut(
    model: models.Model,
    cut: sdp_jax.Cut,
    variables: Any,
    images: np.ndarray,
    *,
    repeats: int = 10,
) -> list[Timing]:
    """How long dense and small network take for some images, in turns.

    Args:
      model: the dense network.
      cut: what makes the small one.
      variables: variables of the dense one, with zeros where channels go.
      images: the images.
      repeats: how often each is timed.

    Returns:
      Both timings.
    """
    # On the device, or the copies would be timed, too.
    args = [(variables, images), (cut.take(variables), images)]
    return sdp_jax.latency(
        model.apply,
        sdp_jax.narrow(model.apply, cut),
        args=jax.device_put(args),
        repeats=repeats,
    )


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
