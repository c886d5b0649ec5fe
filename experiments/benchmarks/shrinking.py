"""Whole runs that shrink while they prune, against dense ones: time, memory, loss.

``python -m experiments.benchmarks.shrinking --data-dir D`` trains a VGG-like network on
CIFAR-10 at 16×16 and a decoder on plain text, for each seed the dense network, AltSDP,
and AltSDP that cuts what is zero where that pays, in turns. Times are those of all
steps, all compilations, cuts and the evaluation at the end; nothing is compiled
beforehand. The last line is the ratio of the times of the convolutional network.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import data
from experiments.config import Config
from experiments.optimizers import make_optimizer
from experiments.shrink import Small
from experiments.steps import State, make_jitted
from experiments.train import Run, make_setup, train

_SHARED: dict[str, Any] = {
    **{"target": "flops", "sparsity": 0.7, "begin": 0.1, "end": 0.5},
    **{"schedule": "cosine", "evaluate_every": 99},
}
# Widths that a CPU has work with. The decoder comes first, the convolutions last.
NETWORKS: Mapping[str, Config] = {
    "decoder": Config(
        **{"dataset": "shakespeare", "model": "decoder", "widths": (256, 688)},
        **{"examples": 6_400, "epochs": 2, "batch_size": 32, "base": "adamw"},
        **{"learning_rate": 1e-3, "weight_decay": 0.1},
        **_SHARED,
    ),
    "vgg": Config(
        **{"dataset": "cifar10", "downscale": 2, "model": "vgg_small"},
        **{"widths": (64, 128, 256), "examples": 12_800, "epochs": 2},
        **{"batch_size": 64, "learning_rate": 0.05, "momentum": 0.9},
        **{"weight_decay": 5e-4},
        **_SHARED,
    ),
}
WAYS = ("dense", "pruned", "shrunk")


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """What to run.

    Attributes:
      networks: names of networks.
      ways: dense, pruned (cut in the end), shrunk (cut while it trains).
      seeds: of initialisation and data order.
      epochs: passes over the examples; default: the network's.
      examples: training examples; default: the network's.
      data_dir: directory with cifar10-jpeg.tar.xz and tinyshakespeare.txt.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    ways: tuple[str, ...] = WAYS
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    examples: int | None = None
    data_dir: pathlib.Path | None = None


def run_of(options: Shrinking, network: str, way: str, seed: int) -> Config:
    """The run of a network.

    Raises:
      ValueError: if network or way is unknown.
    """
    if network not in NETWORKS or way not in WAYS:
        raise ValueError(
            f"expected one of the networks {list(NETWORKS)} and of the ways {WAYS}; "
            f"got {network!r} and {way!r}"
        )
    config = dataclasses.replace(
        NETWORKS[network],
        seed=seed,
        epochs=options.epochs or NETWORKS[network].epochs,
        examples=options.examples or NETWORKS[network].examples,
        data_dir=options.data_dir,
        shrink=() if way == "shrunk" else None,
    )
    if way == "dense":
        config = dataclasses.replace(config.twin_of(), out=None)
    return config


def step_bytes(config: Config, dataset: data.Dataset, run: Run | None = None) -> int:
    """What the compiled step of a network needs: its arguments and its temporaries.

    Args:
      config: the run.
      dataset: its data set.
      run: if given, the network is as it is in the end.

    Returns:
      Bytes, without the training set.
    """
    model, groups, tx, state = make_setup(config, dataset, 100)
    if run is not None:
        model = Small(model, run.cut)
        tx = make_optimizer(config, run.cut.groups.at("params"), 100)
        state = State(*run.cut.take(tuple(state)))
    split = data.Split(*(x[: config.batch_size] for x in dataset.train))
    order = jnp.arange(config.batch_size)[None]
    step = make_jitted(model, tx).lower(state, split, order, 0, 0).compile()
    found: Any = step.memory_analysis()
    inputs = sum(x.nbytes for x in (*jax.tree.leaves(split), order))
    return int(found.argument_size_in_bytes + found.temp_size_in_bytes - inputs)


def measure(config: Config, dataset: data.Dataset, out: pathlib.Path) -> dict[str, Any]:
    """One whole run.

    Args:
      config: the run.
      dataset: its data set.
      out: its directory.

    Returns:
      ``seconds`` of all epochs, ``flops``, the share of the dense network's that all
      steps cost together, ``step``, that of the last step, ``cuts``, ``bytes`` of the
      last step, ``loss`` and ``accuracy`` in the test, ``train_loss``.
    """
    jax.clear_caches()
    shares: list[tuple[int, float]] = []
    run = train(
        dataclasses.replace(config, out=out),
        dataset=dataset,
        on_cut=lambda done, share: shares.append((done, share)),
    )
    steps = config.epochs * (config.examples or 0) // config.batch_size
    edges = [(0, 1.0), *shares, (steps, 0.0)]
    spent = sum((b[0] - a[0]) * a[1] for a, b in zip(edges, edges[1:], strict=False))
    return {
        "seconds": sum(record["seconds"] for record in run.epochs),
        "flops": spent / steps,
        "step": shares[-1][1] if shares else 1.0,
        "cuts": [done for done, _ in shares],
        "bytes": step_bytes(config, dataset, run if shares else None),
        "loss": run.result["small_test_loss"],
        "accuracy": run.result["small_test_accuracy"],
        "train_loss": run.epochs[-1]["train_loss"],
    }


def main(options: Shrinking) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs all, prints a line for each run and the means.

    Args:
      options: what to run.

    Returns:
      By network and way what :func:`measure` found, seed by seed.

    Raises:
      ValueError: if compiled programs are kept on disk, which would not be compiled.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir:
        raise ValueError(
            "compilations belong to what is timed, and JAX keeps compiled programs in "
            f"{settings.jax_compilation_cache_dir}: unset JAX_COMPILATION_CACHE_DIR"
        )
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for network in options.networks:
        lines = found[network] = {way: [] for way in options.ways}
        first = run_of(options, network, "dense", 0)
        dataset = data.load(first.dataset, first.data_dir, downscale=first.downscale)
        for seed in options.seeds:
            # The order changes, so that none always runs on the warmer machine.
            for way in options.ways if seed % 2 == 0 else options.ways[::-1]:
                config = run_of(options, network, way, seed)
                with tempfile.TemporaryDirectory() as out:
                    got = measure(config, dataset, pathlib.Path(out))
                lines[way].append(got)
                print(
                    f"{network} {way} seed {seed}: {got['seconds']:.1f} s, FLOPs "
                    f"{got['flops']:.0%} (last step {got['step']:.0%}), "
                    f"{got['bytes'] / 1e6:.1f} MB a step, test loss "
                    f"{got['loss']:.4f}, accuracy {got['accuracy']:.2%}, training "
                    f"loss {got['train_loss']:.4f}, cuts {got['cuts']}",
                    flush=True,
                )
        for way in options.ways:
            for key in ("loss", "accuracy", "train_loss"):
                values = [got[key] for got in lines[way]]
                print(
                    f"{network} {way} {key}: {np.mean(values):.4f} ± "
                    f"{np.std(values, ddof=min(1, len(values) - 1)):.4f}"
                )
        if {"dense", "shrunk"} <= set(options.ways):
            pairs = zip(lines["shrunk"], lines["dense"], strict=True)
            ratios = [ours["seconds"] / dense["seconds"] for ours, dense in pairs]
            print(
                f"{network}: time of the runs that shrink, over that of dense ones: "
                f"{np.median(ratios):.3f}"
            )
    return found


if __name__ == "__main__":
    main(tyro.cli(Shrinking, description=__doc__))
