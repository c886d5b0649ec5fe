"""Draws the PQ Index of finished runs over their epochs, beside the channels left.

``python -m experiments.pqi runs/mnist-* --out pqi.png``
"""

import dataclasses
import pathlib
import sys
from typing import Any

import matplotlib
import tyro

from experiments.log import read_lines

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Trace:
    """What to draw.

    Attributes:
      runs: directories of runs.
      out: PNG file to write.
    """

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    out: pathlib.Path = pathlib.Path("pqi.png")


def traces(runs: tuple[pathlib.Path, ...]) -> dict[str, list[dict[str, Any]]]:
    """The records of the epochs of each run that have a PQ Index.

    Args:
      runs: directories of runs.

    Returns:
      Records by the name of the directory.

    Raises:
      ValueError: if a directory holds no such record.
    """
    found = {}
    for run in runs:
        path = pathlib.Path(run) / "metrics.jsonl"
        lines = read_lines(path) if path.is_file() else []
        found[pathlib.Path(run).name] = [r for r in lines if "pq_index" in r]
        if not found[pathlib.Path(run).name]:
            raise ValueError(f"{run} holds no run of experiments.train with a PQ Index")
    return found


def plot(found: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Index of the weights, index of the living channels, channels left.

    Args:
      found: what :func:`traces` returned.
      path: PNG file to write.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for name, records in found.items():
        epochs = [r["epoch"] for r in records]
        axes[0].plot(epochs, [r["pq_index"]["weights"] for r in records], label=name)
        axes[1].plot(epochs, [r["pq_index"]["norms"] for r in records])
        axes[2].plot(epochs, [sum(r["channels"].values()) for r in records])
    axes[0].set(xlabel="epoch", title="PQ Index of the weights")
    axes[1].set(xlabel="epoch", title="PQ Index of the norms of living channels")
    axes[2].set(xlabel="epoch", title="channels left")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    try:
        config = tyro.cli(Trace)
        plot(traces(config.runs), config.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
