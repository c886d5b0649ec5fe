"""Pictures of finished runs."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from experiments.train import Run

DENSE, PRUNED = "#666666", "#d1495b"


def plot_twins(dense: Run, pruned: Run, path: pathlib.Path, *, title: str) -> None:
    """Draws two runs of one seed: loss, channels and cost of a step, accuracy and size.

    Args:
      dense: the run of plain SGD.
      pruned: the run that pruned.
      path: PNG file to write.
      title: title of the picture.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.9), layout="constrained"
    )
    figure.suptitle(title)
    for run, colour, label in ((dense, DENSE, "SGD"), (pruned, PRUNED, "AltSDP")):
        epochs = [record["epoch"] for record in run.epochs]
        losses = [record["batch_loss"] for record in run.epochs]
        left.plot(epochs, losses, color=colour, label=label)
    left.set(xlabel="epoch", ylabel="mean loss of the batches", title="training loss")
    left.set_yscale("log")
    left.legend(frameon=False)

    epochs = [record["epoch"] for record in pruned.epochs]
    sizes = pruned.groups.sizes
    for i, (name, size) in enumerate(sizes.items()):
        share = [record["channels"][name] / size for record in pruned.epochs]
        colour = plt.get_cmap("viridis")(0.9 * i / max(1, len(sizes) - 1))
        middle.plot(epochs, share, color=colour, label=f"{name} ({size})")
    cost = [record.get("step_flops", 1.0) for record in pruned.epochs]
    middle.step(epochs, cost, "k--", where="mid", label="FLOPs of a step")
    middle.set(
        xlabel="epoch",
        ylabel="share left",
        title="channels, and what a training step costs",
        ylim=(0, 1.05),
    )
    middle.legend(frameon=False, fontsize="small")

    for run, colour, label in ((dense, DENSE, "SGD"), (pruned, PRUNED, "AltSDP, cut")):
        count, accuracy = _point(run.result)
        right.plot(count, accuracy, "o", color=colour, markersize=9)
        right.annotate(
            f"{label}\n{accuracy:.1%}, {count:,}",
            (count, accuracy),
            textcoords="offset points",
            xytext=(0, -34),
            ha="center",
        )
    counts = [_point(run.result)[0] for run in (dense, pruned)]
    accuracies = [_point(run.result)[1] for run in (dense, pruned)]
    right.set_xscale("log")
    right.set(
        xlabel="parameters",
        ylabel="test accuracy",
        title="accuracy and size",
        xlim=(min(counts) / 3, max(counts) * 3),
        ylim=(min(accuracies) - 0.03, 1),
    )
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _point(result: dict[str, Any]) -> tuple[int, float]:
    return result["small_parameters"], result["small_test_accuracy"]
