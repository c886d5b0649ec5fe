"""Which estimate of the sharp directions helps AltSDP, where the true ones are known.

``python -m experiments.estimators`` trains a small network on the digits. Along the way
of plain AltSDP it compares what each estimator has found with the true leading
eigenvectors of the Hessian; then it lets each of them steer the shrinkage, and prints
the training loss at the end, at the same share of channels, over seeds.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import sdp_jax
from experiments import data, models
from experiments.config import Config
from experiments.files import write_whole
from experiments.optimizers import make_optimizer
from experiments.steps import State, make_loss, make_step
from experiments.train import train
from sdp_jax.valley.sketch import ESTIMATORS, track
from sdp_jax.valley.vectors import inner


@dataclasses.dataclass(frozen=True)
class Estimators:
    """What to compare.

    Attributes:
      widths: hidden widths.
      epochs: passes over the digits: few, so that pruning is rushed.
      c: scale of the threshold.
      rank: number of directions.
      seeds: number of seeds.
      out: file of the figures.
    """

    widths: tuple[int, ...] = (60, 30)
    epochs: int = 10
    c: float = 0.1
    rank: int = 8
    seeds: int = 3
    out: pathlib.Path = pathlib.Path("estimators.json")


# Estimator and decay, or steps between two computations of the Hessian's eigenvectors.
STREAMS: tuple[tuple[Any, float], ...] = (
    ("svd", 0.99),
    ("svd", 0.9),
    ("svd", 0.5),
    ("frequent_directions", 0.99),
    ("oja", 0.99),
    ("oja", 0.5),
)


def config_of(options: Estimators, seed: int) -> Config:
    """Plain AltSDP of these options."""
    return Config(
        widths=options.widths,
        epochs=options.epochs,
        batch_size=64,
        c=options.c,
        seed=seed,
    )


def overlaps(options: Estimators, seed: int, checks: int = 4) -> dict[str, float]:
    """How much of the true sharp directions the estimators hold.

    Args:
      options: what to compare.
      seed: of the run.
      checks: how often the true directions are computed, in the second half.

    Returns:
      By estimator ``‖Û Uᵀ‖² / rank``: 1 for the same space, about ``rank / parameters``
      for random directions; and the same for the true directions of one check within
      those of the next.
    """
    config = config_of(options, seed)
    dataset = data.load("digits")
    model = models.Dnn(widths=options.widths)
    variables: Any = model.init(jax.random.key(seed), dataset.train.images[:1])
    groups = sdp_jax.find_groups(model.apply, variables, dataset.train.images[:1])
    per_epoch = data.steps_per_epoch(dataset.train, config.batch_size)
    steps = per_epoch * config.epochs
    tx = make_optimizer(config, groups.at("params"), steps)
    state = State(variables["params"], {}, tx.init(variables["params"]))
    step, loss_fn = make_step(model, tx), make_loss(model)

    def mean_loss(params: Any, batch: data.Split) -> jax.Array:
        return loss_fn(params, {}, batch)[0]

    sketches = {
        name: (
            jax.tree.map(lambda p: jnp.zeros((options.rank, *p.shape)), state.params),
            jnp.zeros(options.rank),
        )
        for name in STREAMS
    }
    takes = {
        (name, decay): jax.jit(functools.partial(track, ESTIMATORS[name], decay=decay))
        for name, decay in STREAMS
    }
    when = np.linspace(steps // 2, steps - 1, checks).astype(int)
    found: dict[str, list[float]] = {}
    last = None
    number = 0
    for epoch in range(1, config.epochs + 1):
        for batch in data.batches(
            dataset.train, config.batch_size, seed=seed, epoch=epoch
        ):
            before: Any = jax.tree.map(jnp.copy, state.opt_state[1].dual)
            state, _ = step(state, batch)
            after: Any = state.opt_state[1].dual
            move = jax.tree.map(jnp.subtract, after, before)
            for key, (basis, energy) in sketches.items():
                sketches[key] = takes[key](basis, inner(basis, basis), energy, move)
            if number in when:
                true = sdp_jax.valley.top_eigenpairs(
                    mean_loss, state.params, [dataset.train], options.rank
                ).vectors
                for (name, decay), (basis, _) in sketches.items():
                    share = float(jnp.sum(inner(basis, true) ** 2)) / options.rank
                    found.setdefault(f"{name}, decay {decay}", []).append(share)
                if last is not None:
                    share = float(jnp.sum(inner(last, true) ** 2)) / options.rank
                    found.setdefault("hessian, of the check before", []).append(share)
                last = true
            number += 1
    return {name: float(np.mean(values)) for name, values in found.items()}


def losses(options: Estimators) -> dict[str, list[float]]:
    """Training loss at the end, by method, one for each seed."""
    choices: dict[str, dict[str, Any]] = {
        "SGD, nothing pruned": {"method": "sgd"},
        "plain": {},
    }
    for name, decay in STREAMS:
        choices[f"{name}, decay {decay}"] = {"valley": name, "valley_decay": decay}
    for rank in (options.rank, 8 * options.rank):
        choices[f"hessian, rank {rank}, every 50"] = {
            "valley": "hessian",
            "valley_rank": rank,
            "valley_every": 50,
        }
    wide = {"valley": "svd", "valley_decay": 0.9, "valley_rank": 8 * options.rank}
    choices[f"svd, rank {8 * options.rank}, decay 0.9"] = wide
    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changed in choices.items():
            for seed in range(options.seeds):
                config = dataclasses.replace(
                    config_of(options, seed),
                    **{"valley_rank": options.rank, **changed},
                    out=pathlib.Path(folder) / f"{name}-{seed}",
                )
                out.setdefault(name, []).append(train(config).epochs[-1]["train_loss"])
    return out


def main(options: Estimators) -> dict[str, Any]:
    """Compares, writes the figures and prints a table.

    Args:
      options: what to compare.

    Returns:
      The figures.
    """
    shares = [overlaps(options, seed) for seed in range(options.seeds)]
    found = losses(options)
    raw = dataclasses.asdict(options)
    del raw["out"]
    figures = {"options": raw, "overlap": shares, "loss": found}
    write_whole(options.out, json.dumps(figures) + "\n")
    print("| estimate | overlap with the Hessian | training loss |\n|---|---|---|")
    names = dict.fromkeys([*found, *shares[0]])
    for name in names:
        cells = ["", ""]
        if name in shares[0]:
            cells[0] = f"{np.mean([s[name] for s in shares]):.2f}"
        if name in found:
            mean, deviation = np.mean(found[name]), np.std(found[name], ddof=1)
            cells[1] = f"{mean:.4f} ± {deviation:.4f}"
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Estimators))
