"""How AltSDP does over eight networks, against baselines of the same budget.

``python -m experiments.networks --data-dir D --out OUT``

Each run is one of :mod:`experiments.compare`, in a directory of its own below ``OUT``,
which gets ``results.json`` and ``table.md``. Started again it goes on where it was;
several processes may share one ``OUT``, each with some of the networks or seeds. All is
meant for one core a process, and programs are shared through a cache::

    export JAX_COMPILATION_CACHE_DIR=CACHE JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
    export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
    taskset -c 0 python -m experiments.networks --data-dir D --out OUT --seeds 0 1
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tyro

from experiments import compare, data
from experiments.files import write_whole

_SHARED: dict[str, Any] = {
    **{"target": "flops", "schedule": "cosine", "begin": 0.1, "end": 0.5},
    **{"batch_size": 64, "momentum": 0.9, "weight_decay": 5e-4, "loop": "step"},
}
_MNIST = _SHARED | {"dataset": "mnist", "epochs": 1}
_CIFAR = _SHARED | {"dataset": "cifar10", "downscale": 2, "epochs": 1}
_CIFAR |= {"learning_rate": 0.05}
# 400 to 940 steps; steps one by one, because convolutions in a scan are slow there.
NETWORKS: Mapping[str, dict[str, Any]] = {
    "dnn": _MNIST | {"model": "dnn", "learning_rate": 0.05},
    "lenet": _MNIST
    | {"model": "lenet", "widths": (10, 25, 250), "examples": 25_600}
    | {"learning_rate": 0.01},
    "vgg_small": _CIFAR | {"model": "vgg_small", "examples": 25_600},
    "resnet20": _CIFAR
    | {"model": "resnet20", "widths": (8, 16, 32), "examples": 25_600},
    "preact": _CIFAR | {"model": "preact", "examples": 25_600},
    "depthwise": _CIFAR | {"model": "depthwise", "examples": 12_800, "batch_size": 32},
    "mixer": _CIFAR | {"model": "mixer", "examples": 32_000},
    "decoder": _SHARED
    | {"dataset": "shakespeare", "model": "decoder", "epochs": 1, "batch_size": 16}
    | {"widths": (64, 176), "examples": 6_400}
    | {"base": "adamw", "learning_rate": 3e-3, "momentum": 0.0, "weight_decay": 0.1},
}
METHODS = (
    *("SGD, dense", "AltSDP", "L2", "gradual magnitude", "DepGraph", "slimming"),
    *("DHSPG", "random", "from scratch"),
)
OURS, DENSE, SCRATCH = compare.OURS, "SGD, dense", "from scratch"
# What the table calls them, where the base may be AdamW.
TITLES = {DENSE: "dense", "DHSPG": "OTOv2"}
# Ranked by their test loss.
LANGUAGE = {"decoder"}
# More than this share beyond the target is a target missed.
BEYOND = 0.02


@dataclasses.dataclass(frozen=True)
class Networks:
    """The study.

    Attributes:
      out: directory for runs, results and table.
      networks: names of networks, or all.
      methods: names of entries of :mod:`experiments.compare`, or all of the study.
      targets: shares of the FLOPs that go.
      seeds: seeds of initialisation and data order.
      data_dir: directory with mnist.npz, cifar10-jpeg.tar.xz and tinyshakespeare.txt.
    """

    out: pathlib.Path
    networks: tuple[str, ...] = ("all",)
    methods: tuple[str, ...] = ("all",)
    targets: tuple[float, ...] = (0.5, 0.75)
    seeds: tuple[int, ...] = (0, 1, 2)
    data_dir: pathlib.Path | None = None


def comparisons(config: Networks) -> dict[str, compare.Compare]:
    """The comparison of the methods on each network.

    Args:
      config: the study.

    Returns:
      Comparisons by the name of the network.

    Raises:
      ValueError: if a network is unknown.
    """
    names = compare.chosen(config.networks, NETWORKS, "networks")
    return {
        name: compare.Compare(
            out=config.out / name,
            methods=METHODS if config.methods == ("all",) else config.methods,
            targets=config.targets,
            seeds=config.seeds,
            data_dir=config.data_dir,
            **NETWORKS[name],
        )
        for name in names
    }


def cells(
    records: list[dict[str, Any]], key: str
) -> dict[tuple[str, float], dict[str, np.ndarray]]:
    """Values of all seeds, by network and target, and by method.

    Args:
      records: what :func:`experiments.compare.record` returned, and ``network``.
      key: which of their numbers; ``"score"`` is the accuracy in per cent, or the test
        loss of a language model.

    Returns:
      For each row of a table, the values of each method; the dense network is in all.
    """

    def value(record: dict[str, Any]) -> float:
        if key != "score":
            return record[key]
        if record["network"] in LANGUAGE:
            return record["test_loss"]
        return 100 * record["accuracy"]

    targets = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})
    found: dict[tuple[str, float], dict[str, np.ndarray]] = {}
    for network in NETWORKS:
        own = [r for r in records if r["network"] == network]
        for target in targets:
            row: dict[str, list[float]] = {}
            for r in own:
                if r["sparsity"] in (target, None):
                    row.setdefault(r["name"], []).append(value(r))
            if set(row) - {DENSE}:
                arrays = {
                    name: np.asarray(row[name]) for name in METHODS if name in row
                }
                found[network, target] = arrays
    return found


def ranks(means: Mapping[str, float], *, lower: bool) -> dict[str, float]:
    """Places of the methods, 1 for the best; equal ones share the mean of theirs.

    Args:
      means: a number for each method.
      lower: whether a lower number is better.

    Returns:
      Their places.
    """
    values = np.asarray(list(means.values())) * (1 if lower else -1)
    better = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    places = better + (equal + 1) / 2
    return dict(zip(means, places.tolist(), strict=True))


def standard_errors(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two means in standard errors; not a number where there is none.

    Args:
      one: values.
      other: values, subtracted.

    Returns:
      ``(mean - mean) / √(s² / n + s² / n)``.
    """
    if min(len(one), len(other)) < 2:
        return float("nan")
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return float((one.mean() - other.mean()) / error) if error > 0 else float("nan")


def table(records: list[dict[str, Any]], key: str, better: str = "lower") -> str:
    """A Markdown table of one number.

    Args:
      records: as for :func:`cells`.
      key: which number.
      better: lower, higher (of test losses, lower in any case) or neither.

    Returns:
      A row for each network and target. What a method reached with more FLOPs than the
      target leaves is in parentheses and does not count. Unless neither is better, the
      best method is in bold, the row ends with how many standard errors AltSDP is
      better than the best baseline and than its own widths from scratch, and a last row
      has the mean place of each method and the means of these.
    """
    rows, flops = cells(records, key), cells(records, "flops_left")
    names = [n for n in METHODS if any(n in row for row in rows.values())]
    titles = ["network", "FLOPs to go", "seeds", *(TITLES.get(n, n) for n in names)]
    ranked = better != "neither"
    if ranked:
        titles += ["AltSDP to best baseline", "AltSDP to from scratch"]
    lines = [_line(titles), "|---" * len(titles) + "|"]
    places: dict[str, list[float]] = {}
    gains: list[list[float]] = []
    for (network, target), row in rows.items():
        lower = better == "lower" or (key == "score" and network in LANGUAGE)
        left = {n: float(v.mean()) for n, v in flops[network, target].items()}
        missed = {n for n in left if n != DENSE and left[n] > 1 - target + BEYOND}
        place = ranks(
            {n: float(v.mean()) for n, v in row.items() if n not in {DENSE, *missed}},
            lower=lower,
        )
        best = {n for n in place if ranked and place[n] == 1}
        shown = [_cell(row.get(n), bold=n in best, aside=n in missed) for n in names]
        if ranked:
            for name, number in place.items():
                places.setdefault(name, []).append(number)
            gains.append(_gains(row, place, 1 - 2 * lower))
            shown += map(_signed, gains[-1])
        seeds = str(max(map(len, row.values())))
        lines.append(_line([network, f"{target:.0%}", seeds, *shown]))
    if gains:
        means = [f"{np.mean(places[n]):.2f}" if n in places else "" for n in names]
        ends = [_signed(_mean(column)) for column in zip(*gains, strict=True)]
        lines.append(_line(["mean place", "", "", *means, *ends]))
    return "\n".join(lines) + "\n"


def _gains(
    row: Mapping[str, np.ndarray], place: Mapping[str, float], sign: int
) -> list[float]:
    """Standard errors from the best baseline to AltSDP, and from its widths."""
    baselines = [n for n in place if n not in (OURS, SCRATCH)]
    best = min(baselines, key=place.__getitem__, default=SCRATCH)
    if OURS not in row:
        return [float("nan"), float("nan")]
    return [
        sign * standard_errors(row[OURS], row.get(other, np.zeros(0)))
        for other in (best, SCRATCH)
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(values: np.ndarray | None, *, bold: bool, aside: bool) -> str:
    if values is None:
        return ""
    deviation = f" ± {values.std(ddof=1):.3g}" if len(values) > 1 else ""
    text = f"{values.mean():.4g}{deviation}"
    return f"**{text}**" if bold else f"({text})" if aside else text


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _signed(value: float) -> str:
    return f"{value:+.1f}" if np.isfinite(value) else ""


def markdown(records: list[dict[str, Any]]) -> str:
    """All tables.

    Args:
      records: as for :func:`cells`.

    Returns:
      Markdown.
    """
    parts = {
        "Test accuracy in per cent; of the decoder, test loss": ("score", "higher"),
        "Training loss": ("train_loss", "lower"),
        "FLOPs left": ("flops_left", "neither"),
        "Time left, median of paired ratios": ("latency_left", "neither"),
    }
    return "\n".join(
        f"**{title}**\n\n{table(records, key, better)}"
        for title, (key, better) in parts.items()
    )


def summarise(out: pathlib.Path) -> str:
    """Writes results and tables of all finished runs in a directory.

    Args:
      out: the directory of a study.

    Returns:
      The tables.
    """
    records = [
        {"network": path.parts[-3], **json.loads(path.read_text())}
        for path in sorted(out.glob("*/*/compared.json"))
    ]
    lines = ",\n".join(json.dumps(r) for r in records)
    write_whole(out / "results.json", f"[\n{lines}\n]\n")
    text = markdown(records)
    write_whole(out / "table.md", text)
    return text


def main(config: Networks) -> str:
    """Runs what is missing, and writes results and tables.

    Args:
      config: the study.

    Returns:
      The tables.
    """
    load = functools.lru_cache(maxsize=1)(data.load)
    for network, comparison in comparisons(config).items():
        dataset = load(
            comparison.dataset, config.data_dir, downscale=comparison.downscale
        )
        for name, run in compare.runs(comparison):
            found = compare.record(name, run, dataset)
            share = "" if run.sparsity is None else f" {run.sparsity:.0%}"
            print(
                f"{network}, {name}{share}, seed {run.seed}: {found['accuracy']:.2%}, "
                f"loss {found['test_loss']:.4f}, FLOPs {found['flops_left']:.1%}",
                flush=True,
            )
            # Compiled functions of so many runs would fill the memory.
            jax.clear_caches()
    text = summarise(config.out)
    print(text)
    return text


if __name__ == "__main__":
    try:
        main(tyro.cli(Networks))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
