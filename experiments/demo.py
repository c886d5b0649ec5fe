"""Trains, prunes and cuts a small convolutional network in about a minute.

``python -m experiments.demo`` trains two networks from the same seed on the digits that
come with scikit-learn, one with SGD and one with AltSDP, which is cut while it trains.
What is zero in the end is cut out of the second, its output is checked to stay the
same, both are timed, and a picture is drawn.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table
import tyro

import sdp_jax
from experiments import data, report
from experiments.config import Config
from experiments.train import Run, train


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demo does.

    Attributes:
      sparsity: share of channels to prune.
      epochs: passes over the digits.
      seed: of both runs.
      widths: channels of the convolutions and of the dense layer.
      out: directory of the report.
    """

    sparsity: float = 0.75
    epochs: int = 20
    seed: int = 0
    widths: tuple[int, ...] = (64, 64, 128, 128, 256)
    out: pathlib.Path = pathlib.Path("demo")


def main(demo: Demo) -> dict[str, Any]:
    """Runs the demo.

    Args:
      demo: what to do.

    Returns:
      The figures of the table.
    """
    console = rich.console.Console()
    demo.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        config = Config(
            dataset="digits",
            model="conv",
            widths=demo.widths,
            epochs=demo.epochs,
            batch_size=64,
            learning_rate=0.05,
            schedule="cosine",
            momentum=0.9,
            seed=demo.seed,
        )
        directory = pathlib.Path(scratch)
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<8}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeRemainingColumn(),
            console=console,
        ) as progress:
            dense = _train(
                progress,
                "SGD",
                dataclasses.replace(config, method="sgd", out=directory / "sgd"),
            )
            pruned = _train(
                progress,
                "AltSDP",
                dataclasses.replace(
                    config,
                    method="altsdp",
                    sparsity=demo.sparsity,
                    begin=0.0,
                    end=0.5,
                    shrink=(),
                    out=directory / "altsdp",
                ),
            )
    cut = sdp_jax.plan_cut(pruned.groups, pruned.state.variables)
    small = cut.take(pruned.state.variables)

    images = data.load("digits").test.images
    large_apply = jax.jit(pruned.model.apply)
    small_apply = jax.jit(sdp_jax.narrow(pruned.model.apply, cut))
    before: Any = large_apply(pruned.state.variables, images)
    after: Any = small_apply(small, images)
    difference = float(jnp.max(jnp.abs(before - after)))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    times = sdp_jax.latency(
        large_apply,
        small_apply,
        args=[(pruned.state.variables, images), (small, images)],
        repeats=30,
    )
    flops = [
        sdp_jax.cost(pruned.model.apply, pruned.state.variables, images).flops,
        sdp_jax.cost(small_apply, small, images).flops,
    ]

    figures = {
        "dense_accuracy": dense.result["test_accuracy"],
        "small_accuracy": pruned.result["small_test_accuracy"],
        "dense_loss": dense.epochs[-1]["train_loss"],
        "small_loss": pruned.epochs[-1]["train_loss"],
        "dense_parameters": pruned.result["parameters"],
        "small_parameters": pruned.result["small_parameters"],
        "dense_flops": flops[0] / len(images),
        "small_flops": flops[1] / len(images),
        "dense_training": sum(record["seconds"] for record in dense.epochs),
        "small_training": sum(record["seconds"] for record in pruned.epochs),
        "dense_seconds": times[0].seconds,
        "small_seconds": times[1].seconds,
        "time": str(times[1]),
        "difference": difference,
        "widths": cut.widths,
    }
    console.print(_table(figures, pruned.groups.sizes, len(images)))
    console.print(
        f"largest difference between the outputs of the pruned network before and "
        f"after the cut: {difference:.1e}"
    )
    picture = demo.out / "report.png"
    report.plot_twins(
        dense,
        pruned,
        picture,
        title="Digits, a small convolutional network, two runs of one seed",
    )
    console.print(f"report: {picture}", soft_wrap=True)
    return figures


def _train(progress: rich.progress.Progress, name: str, config: Config) -> Run:
    task = progress.add_task(name, total=None, note="compiling")

    def on_step(step: int, steps: int) -> None:
        progress.update(task, completed=step, total=steps)

    def on_epoch(record: dict[str, Any]) -> None:
        left = sum(record["channels"].values())
        cost = record.get("step_flops", 1.0)
        progress.update(
            task,
            note=f"loss {record['batch_loss']:.4f}  channels {left}  "
            f"FLOPs of a step {cost:.0%}",
        )

    return train(config, on_step=on_step, on_epoch=on_epoch)


def _table(
    figures: dict[str, Any], sizes: dict[str, int], images: int
) -> rich.table.Table:
    table = rich.table.Table()
    table.add_column("")
    table.add_column("SGD", justify="right")
    table.add_column("AltSDP, cut", justify="right")
    table.add_column("ratio", justify="right")
    table.add_row(
        "test accuracy",
        f"{figures['dense_accuracy']:.2%}",
        f"{figures['small_accuracy']:.2%}",
    )
    table.add_row(
        "training loss", f"{figures['dense_loss']:.4f}", f"{figures['small_loss']:.4f}"
    )
    training = [figures[f"{name}_training"] for name in ("dense", "small")]
    table.add_row(
        "seconds of training, compilations included",
        *(f"{seconds:.1f}" for seconds in training),
        f"{training[1] / training[0]:.1%}",
    )
    for name, left in figures["widths"].items():
        table.add_row(f"channels, {name}", str(sizes[name]), str(left))
    table.add_row(
        "parameters",
        f"{figures['dense_parameters']:,}",
        f"{figures['small_parameters']:,}",
        f"{figures['small_parameters'] / figures['dense_parameters']:.1%}",
    )
    table.add_row(
        "kFLOPs for an image",
        f"{figures['dense_flops'] / 1e3:,.0f}",
        f"{figures['small_flops'] / 1e3:,.0f}",
        f"{figures['small_flops'] / figures['dense_flops']:.1%}",
    )
    table.add_row(
        f"ms for {images} images",
        f"{figures['dense_seconds'] * 1e3:.2f}",
        f"{figures['small_seconds'] * 1e3:.2f}",
        figures["time"],
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Demo))
