"""Prints a Markdown table of finished runs, one row for all seeds of a configuration.

``python -m experiments.table runs/mnist-dnn-*``
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tyro

from experiments.config import Config
from experiments.log import read_finished

DEFAULT = Config().key()


@dataclasses.dataclass(frozen=True)
class Table:
    """What to tabulate.

    Attributes:
      runs: directories of runs.
    """

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]


def rows(runs: tuple[pathlib.Path, ...]) -> list[dict[str, Any]]:
    """One row for each configuration, in the order in which they come.

    Args:
      runs: directories of runs.

    Returns:
      Rows with the name of the method, its settings, the number of seeds, and mean and
      sample deviation (0 for one seed) of accuracy, channels and parameters.

    Raises:
      ValueError: if a directory holds no finished run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        lines = read_finished(run)
        config = {k: v for k, v in lines[0]["config"].items() if k != "seed"}
        epochs = [line for line in lines if "epoch" in line]
        record = lines[-1] | {"train_loss": epochs[-1]["train_loss"], "config": config}
        found.setdefault(json.dumps(config), []).append(record)
    table = []
    for records in found.values():
        config = records[0]["config"]
        row: dict[str, Any] = {
            "method": config["method"],
            "settings": _settings(config),
            "seeds": len(records),
            "widths": list(records[0]["dense_widths"].values()),
        }
        left = [list(r["widths"].values()) for r in records]
        row["left"] = _spread(left)
        for name in ("small_test_accuracy", "train_loss", "small_parameters"):
            row[name] = _spread([r[name] for r in records])
        row["parameters"] = records[0]["parameters"]
        table.append(row)
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table.

    Args:
      table: what :func:`rows` returned.

    Returns:
      Markdown.
    """
    lines = [
        "| method | seeds | test accuracy | training loss | channels left | parameters "
        "left |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        mean, deviation = row["small_test_accuracy"]
        loss, loss_deviation = row["train_loss"]
        left = ", ".join(
            f"{a:.0f} ± {d:.0f}" if d else f"{a:.0f}"
            for a, d in zip(*row["left"], strict=True)
        )
        lines.append(
            f"| {row['method']} {row['settings']} | {row['seeds']} "
            f"| {100 * mean:.2f} ± {100 * deviation:.2f} % "
            f"| {loss:.4f} ± {loss_deviation:.4f} | {left} "
            f"| {row['small_parameters'][0]:,.0f} |"
        )
    return "\n".join(lines)


def _settings(config: dict[str, Any]) -> str:
    """What of a configuration bears on the method and is not the default."""
    if config["method"] == "altsdp" and config["sparsity"] is None:
        shown = ["c", "mu"]
    elif config["method"] == "altsdp":
        shown = ["sparsity"]
    else:
        shown = ["penalty"] if config["method"] == "prox_sgd" else []
    shown += [
        k
        for k in (
            "valley",
            "valley_decay",
            "valley_rank",
            "valley_every",
            "end",
            "weights",
            "widths",
            "momentum",
            "schedule",
            "min_channels",
        )
        if config[k] != DEFAULT[k]
    ]
    return " ".join(f"{k}={_text(config[k])}" for k in shown)


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _spread(values: Any) -> tuple[Any, Any]:
    values = np.asarray(values, float)
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), deviation


if __name__ == "__main__":
    print(markdown(rows(tyro.cli(Table).runs)))
