"""Cost of the valley's tools: the sketch per step, and the curvature pass.

``python -m experiments.benchmarks.valley_cost`` times jitted steps of AltSDP with
sketches beside plain AltSDP, in turns, on VGG16-BN's parameters, and reads the
compiler's account of memory; then it times products with the Hessian of a small
convolutional network on once and twice the data, and counts those for once and twice
the rank.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import sdp_jax
from experiments import data, models
from experiments.benchmarks import update_cost
from experiments.steps import make_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      repeats: timed rounds.
      narrower: by what to divide the widths of VGG16.
      rank: number of directions.
      examples: examples of the smaller of the two data sets.
      only: names of the chains to time; default: all. The plain one is always there.
    """

    repeats: int = 10
    narrower: int = 1
    rank: int = 8
    examples: int = 500
    only: tuple[str, ...] = ()


def chains(
    groups: sdp_jax.Groups, rank: int
) -> dict[str, optax.GradientTransformation]:
    """AltSDP with and without sketches, the plain chain first."""
    strength = sdp_jax.valley_strength(c=0.01, mu=0.6, learning_rate=0.1)

    def chain(**estimate: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.sgd(0.1),
            sdp_jax.dual_averaging(),
            sdp_jax.valley.project_onto_valley(groups, strength, rank=rank, **estimate),
            sdp_jax.group_soft_threshold(groups, strength),
        )

    return {
        "altsdp": sdp_jax.altsdp(0.1, groups, strength=strength),
        "svd": chain(),
        "frequent_directions": chain(estimator="frequent_directions"),
        "oja": chain(estimator="oja"),
        "svd, every 10": chain(every=10),
        "svd, bfloat16": chain(storage_dtype=jnp.bfloat16),
        "given": chain(estimator=None),
    }


def sketch_cost(config: Config) -> dict[str, tuple[float, ...]]:
    """Time, its ratio to the plain chain, and copies of the parameters.

    Args:
      config: what to time.

    Returns:
      For each chain mean milliseconds a step, the ratio, and copies of the parameters
      more: those that stay between steps, and those that come and go within one.
    """
    shapes, groups = update_cost.shapes_and_groups("vgg16", config.narrower)
    gradients = update_cost.random_params(1, "float32", shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(gradients))
    steps, states, memory = {}, {}, {}
    for name, tx in chains(groups, config.rank).items():
        if config.only and name not in ("altsdp", *config.only):
            continue

        params = update_cost.random_params(0, "float32", shapes)
        compiled = (
            jax.jit(update_cost.make_step(tx), donate_argnums=(0, 1))
            .lower(params, tx.init(params), gradients)
            .compile()
        )
        steps[name] = compiled
        states[name] = params, tx.init(params)
        held = sum(x.nbytes for x in jax.tree.leaves(states[name][1]))
        account: Any = compiled.memory_analysis()
        memory[name] = held / size, account.temp_size_in_bytes / size
    # The mean, not the median: what is done every tenth step counts for a tenth.
    seconds = dict.fromkeys(steps, 0.0)
    for n in range(-1, config.repeats):
        for name, compiled in steps.items():
            start = time.perf_counter()
            states[name] = compiled(*states[name], gradients)
            jax.block_until_ready(states[name])
            seconds[name] += (time.perf_counter() - start) * (n >= 0)
    plain = seconds["altsdp"]
    return {
        name: (
            1e3 * t / config.repeats,
            t / plain,
            *(a - b for a, b in zip(memory[name], memory["altsdp"], strict=True)),
        )
        for name, t in seconds.items()
    }


def curvature_cost(config: Config) -> dict[str, float]:
    """How the curvature pass grows with data and rank.

    Args:
      config: what to time.

    Returns:
      ``"data"``: time of a product on twice the data over that on once, the median over
      rounds; ``"rank"``: products for twice the rank over those for once;
      ``"gradient"``: time of a product over that of the gradient.
    """
    split = data.load("digits").train
    model = models.ConvNet(widths=(16, 16, 32, 32, 64))
    variables: Any = jax.jit(model.init)(jax.random.key(0), split.images[:1])
    params, stats = variables["params"], variables["batch_stats"]
    loss_fn = make_loss(model)

    def mean_loss(params: Any, batch: data.Split) -> jax.Array:
        return loss_fn(params, stats, batch)[0]

    n = config.examples // 2
    batches = [data.Split(*(x[i * n : i * n + n] for x in split)) for i in (0, 1)]
    once, twice = (
        sdp_jax.valley.curvature_product(mean_loss, params, batches * k) for k in (1, 2)
    )
    gradient = jax.jit(jax.grad(mean_loss))
    calls = {
        "once": lambda: once(params),
        "twice": lambda: twice(params),
        "gradient": lambda: [gradient(params, batch) for batch in batches],
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-1, config.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    products = [
        sdp_jax.valley.top_eigenpairs(
            mean_loss, params, batches, rank, tol=0.01
        ).products
        for rank in (config.rank, 2 * config.rank)
    ]
    base = np.asarray(times["once"])
    return {
        "data": float(np.median(np.asarray(times["twice"]) / base)),
        "rank": products[1] / products[0],
        "gradient": float(np.median(base / np.asarray(times["gradient"]))),
    }


def main(
    config: Config,
) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """Times and prints.

    Args:
      config: what to time.

    Returns:
      The figures of :func:`sketch_cost` and :func:`curvature_cost`.
    """
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), jax {jax.__version__}")
    sketches = sketch_cost(config)
    print(f"rank {config.rank}: ms a step, ratio to altsdp, copies held, copies within")
    for name, (ms, ratio, held, within) in sketches.items():
        print(f"{name:<20} {ms:8.2f} {ratio:6.2f} {held:+7.2f} {within:+7.2f}")
    growth = curvature_cost(config)
    print(
        f"curvature: a product takes {growth['gradient']:.2f} gradients; twice the "
        f"data takes {growth['data']:.2f} times as long, twice the rank "
        f"{growth['rank']:.2f} times as many products"
    )
    return sketches, growth


if __name__ == "__main__":
    main(tyro.cli(Config))
