"""Compares all methods on the same data, seeds, budget and targets.

``python -m experiments.compare --dataset mnist --model dnn --data-dir D --out OUT``

Each method trains for the same number of epochs, is cut with ``narrow``, tested and
timed. ``OUT`` gets one directory for each run, ``results.json``, ``table.md`` and
``pareto.png`` (accuracy against FLOPs, parameters and measured latency). Started again
it goes on where it was; several processes may share one ``OUT``, each with some of the
methods, targets or seeds.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

import sdp_jax
from experiments import data, models, train
from experiments.config import Config
from experiments.files import write_whole
from experiments.optimizers import NEED_SCALES
from experiments.outcome import time_cut

# What each entry trains with, beside what all share. Penalties are those of the papers,
# scaled up where so short a budget would not let them act.
ENTRIES: Mapping[str, dict[str, Any]] = {
    "SGD, dense": {"method": "sgd"},
    "AltSDP": {"method": "altsdp"},
    "L2 at the end": {"method": "l2_last"},
    "random": {"method": "random"},
    "L1": {"method": "l1"},
    "L2": {"method": "l2"},
    "gradual magnitude": {"method": "gradual"},
    "Taylor": {"method": "taylor"},
    "discriminant": {"method": "discriminant"},
    "DepGraph": {"method": "depgraph"},
    "DepGraph, regularised": {"method": "depgraph_reg", "penalty": 5e-4},
    "DepGraph, growing": {"method": "depgraph_growing", "penalty": 1e-4},
    "slimming": {"method": "slimming", "penalty": 1e-4},
    "group lasso": {"method": "prox_sgd", "penalty": 1e-3},
    "perspective": {"method": "perspective", "penalty": 1e-3},
    "HSPG": {"method": "hspg", "penalty": 1e-3},
    "HESSO": {"method": "hesso"},
    "SPP": {"method": "spp"},
    "IncReg": {"method": "increg"},
    "gRDA": {"method": "grda", "c": 0.02, "mu": 0.6},
    "DHSPG": {"method": "dhspg", "penalty": 1e-3},
    "DHSPG + DPM": {"method": "dhspg", "penalty": 1e-3, "decay_steps": 50},
    "DepGraph, stepwise": {"method": "depgraph_steps"},
    "DepGraph, stepwise + DPM": {"method": "depgraph_steps", "decay_steps": 50},
    "Gate Decorator": {"method": "gate_decorator", "penalty": 1e-3},
    "Gate Decorator + DPM": {
        "method": "gate_decorator",
        "penalty": 1e-3,
        "decay_steps": 50,
    },
    # The widths at which AltSDP ended, trained from the start.
    "from scratch": {"method": "scratch"},
}
DPM = {"release_rate": 0.0, "release_length": 1.0}
# Once for each seed, whatever the targets: they take none.
WITHOUT_TARGET = {"SGD, dense", "HSPG", "gRDA"}
# None of their channels has the scale of a normalisation.
WITHOUT_SCALES = {"dnn", "lenet", "mixer"}
OURS = "AltSDP"


@dataclasses.dataclass(frozen=True)
class Compare:
    """A comparison.

    Attributes:
      out: directory for runs, results, table and plot.
      methods: names of entries, or all; those that need a normalisation are left out
        for networks without one.
      targets: shares that go.
      target: what they are shares of.
      seeds: seeds of initialisation and data order.
      dataset: digits (bundled), mnist, cifar10, cifar100 or shakespeare.
      downscale: images become the means of squares of this side.
      examples: training examples that there are; none for all.
      model: name of the network.
      widths: hidden widths; default: the model's.
      epochs: passes over the training set.
      batch_size: examples in a batch.
      learning_rate: initial rate.
      schedule: constant, or cosine decay to zero.
      base: sgd or adamw.
      momentum: momentum of SGD; 0 for none.
      weight_decay: added to the gradient, times the parameters; decoupled with adamw.
      begin: share of the steps after which pruning begins.
      end: share of the steps after which it is done.
      loop: scan, step or auto.
      data_dir: directory with mnist.npz or cifar10-jpeg.tar.xz; default:
        tensorflow-datasets.
    """

    out: pathlib.Path
    methods: tuple[str, ...] = ("all",)
    targets: tuple[float, ...] = (0.5, 0.7, 0.9)
    target: Literal["channels", "params", "flops"] = "flops"
    seeds: tuple[int, ...] = (0,)
    dataset: data.Name = "digits"
    downscale: int = 1
    examples: int | None = None
    model: models.Name = "dnn"
    widths: tuple[int, ...] = ()
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: Literal["constant", "cosine"] = "constant"
    base: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    begin: float = 0.1
    end: float = 0.6
    loop: Literal["auto", "step", "scan"] = "auto"
    data_dir: pathlib.Path | None = None


def runs(config: Compare) -> list[tuple[str, Config]]:
    """The runs of a comparison, with the name of each one's entry.

    Args:
      config: the comparison.

    Returns:
      Names and configurations.

    Raises:
      ValueError: if a method is unknown.
    """
    names = chosen(config.methods, ENTRIES, "methods")
    shared = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in ("out", "methods", "targets", "seeds")
    }
    shared["evaluate_every"] = config.epochs
    if config.model in WITHOUT_SCALES:
        names = [n for n in names if ENTRIES[n]["method"] not in NEED_SCALES]
    found = []
    for seed in config.seeds:
        for name in names:
            without = name in WITHOUT_TARGET
            for share in (None,) if without else config.targets:
                entry = dict(ENTRIES[name])
                if "decay_steps" in entry:
                    entry |= DPM
                directory = config.out / _directory(name, share, seed)
                settings = shared | entry
                settings |= {"sparsity": share, "seed": seed, "out": directory}
                found.append((name, Config(**settings)))
    return found


def chosen(names: Sequence[str], known: Mapping[str, Any], what: str) -> list[str]:
    """The names that were asked for.

    Args:
      names: names, or ``("all",)``.
      known: all that there are, by name.
      what: what they are, for the message.

    Returns:
      The names.

    Raises:
      ValueError: if one of them is unknown.
    """
    asked = list(known) if tuple(names) == ("all",) else list(names)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {unknown}; there are {list(known)}")
    return asked


def record(name: str, config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """Trains, or goes on training, cuts, tests and times.

    Args:
      name: name of the entry.
      config: the run.
      dataset: its data set.

    Returns:
      What is known of it, also kept beside the run.

    Raises:
      ValueError: if it needs the widths of a run that is not finished.
    """
    path = config.directory() / "compared.json"
    if path.is_file():
        return json.loads(path.read_text())
    if config.method == "scratch":
        config = _with_widths(config)
    run = train.train(config, dataset=dataset)
    result, images = run.result, dataset.test.images[:200]
    variables = run.state.variables
    cut = sdp_jax.plan_cut(run.groups, variables)
    _, small_time = time_cut(run.model, cut, variables, images, repeats=30)
    found = {
        "name": name,
        "sparsity": config.sparsity,
        "seed": config.seed,
        "accuracy": result["small_test_accuracy"],
        "test_loss": result["small_test_loss"],
        "train_loss": run.epochs[-1]["train_loss"],
        "flops_left": result["small_flops"] / result["flops"],
        "parameters_left": result["small_parameters"] / result["parameters"],
        "latency_left": small_time.ratio,
        "latency_interval": [small_time.low, small_time.high],
        "widths": list(result["widths"].values()),
        "seconds": sum(r["seconds"] for r in run.epochs),
    }
    write_whole(path, json.dumps(found))
    return found


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample deviation over the seeds of each entry and target.

    Args:
      records: what :func:`record` returned.

    Returns:
      One row for each entry and target: numbers as pairs of mean and deviation.
    """
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for r in records:
        found.setdefault((r["name"], r["sparsity"]), []).append(r)
    out = []
    for (name, sparsity), group in found.items():
        row: dict[str, Any] = {"name": name, "sparsity": sparsity, "seeds": len(group)}
        for key in (
            "accuracy",
            "test_loss",
            "train_loss",
            "flops_left",
            "parameters_left",
            "latency_left",
        ):
            values = np.asarray([r[key] for r in group])
            deviation = values.std(ddof=1) if len(values) > 1 else 0.0
            row[key] = (float(values.mean()), float(deviation))
        if all("latency_interval" in r for r in group):
            ends = np.mean([r["latency_interval"] for r in group], axis=0)
            row["latency_interval"] = tuple(ends.tolist())
        out.append(row)
    return out


def front(table: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that no other row beats in accuracy at no more of ``key``.

    Args:
      table: rows.
      key: ``"flops_left"``, ``"parameters_left"`` or ``"latency_left"``.

    Returns:
      These rows, from the cheapest to the dearest.
    """
    ranked = sorted(table, key=lambda r: (r[key][0], -r["accuracy"][0]))
    best, out = -1.0, []
    for row in ranked:
        if row["accuracy"][0] > best:
            best = row["accuracy"][0]
            out.append(row)
    return out


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as Markdown tables, one for each target, best accuracy first.

    Args:
      table: what :func:`rows` returned.

    Returns:
      Markdown. Rows on the Pareto front of accuracy and FLOPs are marked ``●``.
    """
    on_front = {(r["name"], r["sparsity"]) for r in front(table, "flops_left")}
    parts = []
    targets = sorted({r["sparsity"] for r in table if r["sparsity"] is not None})
    for target in [None, *targets]:
        part = [r for r in table if r["sparsity"] == target]
        if not part:
            continue
        title = "without a target" if target is None else f"{target:.0%} to go"
        lines = [
            f"| {title} | seeds | test accuracy | training loss | FLOPs left | "
            "parameters left | time left |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in sorted(part, key=lambda r: -r["accuracy"][0]):
            mark = " ●" if (r["name"], r["sparsity"]) in on_front else ""
            mean, deviation = r["accuracy"]
            ends = r.get("latency_interval")
            left = f"{r['latency_left'][0]:.0%}"
            left += f" ({ends[0]:.0%} to {ends[1]:.0%})" if ends else ""
            lines.append(
                f"| {r['name']}{mark} | {r['seeds']} "
                f"| {100 * mean:.2f} ± {100 * deviation:.2f} % "
                f"| {r['train_loss'][0]:.4f} ± {r['train_loss'][1]:.4f} "
                f"| {r['flops_left'][0]:.1%} | {r['parameters_left'][0]:.1%} "
                f"| {left} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(table: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Accuracy against FLOPs, parameters and latency, with the Pareto fronts.

    Args:
      table: what :func:`rows` returned.
      path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["name"] for r in table))
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))
    figure, axes = plt.subplots(1, 3, figsize=(15, 6), sharey=True)
    titles = {
        "flops_left": "FLOPs left",
        "parameters_left": "parameters left",
        "latency_left": "time left",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for i, name in enumerate(names):
            line = sorted((r for r in table if r["name"] == name), key=lambda r: r[key])
            ours = name == OURS
            axis.errorbar(
                [r[key][0] for r in line],
                [100 * r["accuracy"][0] for r in line],
                [100 * r["accuracy"][1] for r in line],
                color="black" if ours else colours[i % 20],
                marker="o*sd^v"[i % 6] if not ours else "o",
                linewidth=2 if ours else 0.8,
                markersize=5 if ours else 4,
                label=name,
                zorder=3 if ours else 2,
            )
        best = front(table, key)
        axis.step(
            [r[key][0] for r in best],
            [100 * r["accuracy"][0] for r in best],
            where="post",
            color="lightgrey",
            linewidth=6,
            zorder=0,
        )
        axis.set_xlabel(title)
        axis.set_xscale("log")
    # Collapsed networks would flatten the picture; the table has them.
    values = [100 * r["accuracy"][0] for r in table]
    low, high = float(np.quantile(values, 0.1)), max(values)
    axes[0].set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes[0].set_ylabel("test accuracy, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def summarise(out: pathlib.Path) -> list[dict[str, Any]]:
    """Writes results, table and plot of all finished runs in a directory.

    Args:
      out: the directory of a comparison.

    Returns:
      The rows of the table.
    """
    order = list(ENTRIES)
    records = [json.loads(p.read_text()) for p in sorted(out.glob("*/compared.json"))]
    records.sort(
        key=lambda r: (order.index(r["name"]), r["sparsity"] or 0.0, r["seed"])
    )
    table = rows(records)
    lines = ",\n".join(json.dumps(r) for r in records)
    write_whole(out / "results.json", f"[\n{lines}\n]\n")
    write_whole(out / "table.md", markdown(table))
    plot(table, out / "pareto.png")
    return table


def main(config: Compare) -> list[dict[str, Any]]:
    """Runs what is missing, and writes results, table and plot.

    Args:
      config: the comparison.

    Returns:
      The rows of the table.
    """
    planned = runs(config)
    dataset = data.load(config.dataset, config.data_dir, downscale=config.downscale)
    for i, (name, run) in enumerate(planned):
        found = record(name, run, dataset)
        print(
            f"{i + 1:3d} of {len(planned)}  {name}, "
            f"{'no target' if run.sparsity is None else format(run.sparsity, '.0%')}, "
            f"seed {run.seed}: {found['accuracy']:.2%}, "
            f"{found['flops_left']:.1%} of the FLOPs left",
            flush=True,
        )
        # Compiled functions of so many runs would fill the memory.
        jax.clear_caches()
    table = summarise(config.out)
    print(markdown(table))
    return table


def _with_widths(config: Config) -> Config:
    """The run with the widths at which AltSDP ended."""
    name = _directory("AltSDP", config.sparsity, config.seed)
    path = config.directory().with_name(name) / "compared.json"
    if not path.is_file():
        raise ValueError(
            f"{config.directory()} takes its widths from {path}, which is not there; "
            "run the method 'AltSDP' with the same target and seed first"
        )
    widths = tuple(json.loads(path.read_text())["widths"])
    return dataclasses.replace(config, widths_left=widths)


def _directory(name: str, share: float | None, seed: int) -> str:
    label = "" if share is None else f"-{share:g}"
    return f"{_slug(name)}{label}-seed{seed}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")


if __name__ == "__main__":
    try:
        main(tyro.cli(Compare))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
