"""Certifies that a finished run has stayed in the valley of its SGD twin.

``python -m experiments.certify runs/mnist-dnn-altsdp-sparsity0.5-full-seed0``

The twin (the same run with plain SGD) is trained if it is not there. Written into the
directory of the run: ``certificate.json`` and ``certificate.png``.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import tyro

import sdp_jax
from experiments import data, models
from experiments.config import Config
from experiments.files import write_whole
from experiments.log import read_finished, read_lines
from experiments.steps import make_loss, variables_of
from experiments.train import Run, progress_bars, train

# What twins have in common; what only pruning uses does not count.
ALIKE = (
    *("dataset", "downscale", "augment", "model", "compute", "widths", "epochs"),
    *("batch_size", "learning_rate", "schedule", "warmup", "momentum"),
    *("weight_decay", "validation"),
)


@dataclasses.dataclass(frozen=True)
class Certify:
    """What to certify.

    Attributes:
      run: directory of a finished run.
      twin: directory of its twin; default: ``twin`` in that of the run.
      data_dir: directory of the data, as for experiments.train.
      examples: training examples along the paths; 0 for all.
      curvature_examples: training examples for the curvature; 0 for all.
      rank: number of sharp directions.
      density_steps: products for the density of all eigenvalues; 0 for none.
      points: points of each path.
      curve_steps: steps of training the curve.
      tolerance: what gap and barrier may be, as a share of the loss of guessing.
    """

    run: tyro.conf.Positional[pathlib.Path]
    twin: pathlib.Path | None = None
    data_dir: pathlib.Path | None = None
    examples: int = 10_000
    curvature_examples: int = 2_000
    rank: int = 10
    density_steps: int = 32
    points: int = 11
    curve_steps: int = 500
    tolerance: float = 0.02


class Task(NamedTuple):
    """A model and its data, as :func:`sdp_jax.valley.certify` wants them.

    Attributes:
      loss_fn: mean loss of a batch in training mode.
      keywords: ``evaluate``, ``update_stats`` and ``stats``.
      training: batches of the training set.
      curvature: batches of part of it.
      test: batches of the test set.
    """

    loss_fn: Callable[[Any, data.Split], jax.Array]
    keywords: dict[str, Any]
    training: list[data.Split]
    curvature: list[data.Split]
    test: list[data.Split]


def load_run(path: pathlib.Path, data_dir: pathlib.Path | None = None) -> Run:
    """A finished run of :mod:`experiments.train`, its network in float32.

    Args:
      path: its directory.
      data_dir: directory of the data.

    Returns:
      The run.

    Raises:
      ValueError: if there is no finished run.
    """
    read_finished(path)
    config = config_of(path, data_dir)
    return in_float32(train(config), config)


def in_float32(run: Run, config: Config) -> Run:
    """The run with a network that computes in float32.

    Curvature and barriers are measured beyond the precision of the training.
    """
    classes = data.INFO[config.dataset].classes
    return run._replace(model=models.make_model(config.model, classes, config.widths))


def config_of(path: pathlib.Path, data_dir: pathlib.Path | None) -> Config:
    """The configuration that a run was started with."""
    raw: dict[str, Any] = read_lines(path / "metrics.jsonl")[0]["config"]
    raw["widths"] = tuple(raw["widths"])
    return Config(**raw, data_dir=data_dir, out=path)


def dataset_of(config: Config, data_dir: pathlib.Path | None) -> data.Dataset:
    """What a run was trained and tested on, without what it held out."""
    dataset = data.load(config.dataset, data_dir, downscale=config.downscale)
    training, _ = data.hold_out(dataset.train, config.validation)
    return dataset._replace(train=training)


def histories(twin: Run, run: Run, method: str) -> dict[str, list[float]]:
    """Training losses of both, of the batches where the rest was not evaluated."""
    records = [*twin.epochs, *run.epochs]
    key = "train_loss" if all("train_loss" in r for r in records) else "batch_loss"
    return {
        name: [record[key] for record in found.epochs]
        for name, found in (("SGD", twin), (method, run))
    }


def make_task(
    run: Run, dataset: data.Dataset, *, examples: int, curvature_examples: int
) -> Task:
    """Losses, metrics and batches of a run.

    Args:
      run: the run.
      dataset: its data.
      examples: training examples, drawn at random; 0 for all.
      curvature_examples: of these, those for the curvature; 0 for all.

    Returns:
      The task.
    """
    model, stats = run.model, run.state.batch_stats
    step_loss = make_loss(model)

    def measure(params: Any, batch_stats: Any, batch: data.Split) -> dict[str, Any]:
        logits: Any = model.apply(variables_of(params, batch_stats), batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        accuracy = jnp.mean(logits.argmax(-1) == batch.labels)
        return {"loss": losses.mean(), "accuracy": accuracy}

    keywords: dict[str, Any] = {
        "evaluate": lambda params, batch: measure(params, stats, batch)
    }
    if stats:
        keywords = {
            "evaluate": measure,
            "update_stats": lambda p, s, batch: step_loss(p, s, batch)[1],
            "stats": stats,
        }
    order = np.random.default_rng(0).permutation(len(dataset.train.labels))
    some = order[: examples or None]
    return Task(
        lambda params, batch: step_loss(params, stats, batch)[0],
        keywords,
        list(_batches(dataset.train, some)),
        list(_batches(dataset.train, some[: curvature_examples or None])),
        list(_batches(dataset.test, np.arange(len(dataset.test.labels)))),
    )


def _batches(split: data.Split, order: np.ndarray) -> Iterator[data.Split]:
    for start in range(0, len(order), 500):
        part = order[start : start + 500]
        yield data.Split(split.images[part], split.labels[part])


class Reporter:
    """Progress bars for :func:`sdp_jax.valley.certify`, one for each stage."""

    def __init__(self, progress: rich.progress.Progress, name: str = ""):
        """Draws into ``progress``, with ``name`` before each stage."""
        self._progress = progress
        self._name = name
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Moves the bar of a stage on."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(
                self._name + stage, total=total
            )
        self._progress.update(self._tasks[stage], completed=done, total=total)


def main(options: Certify) -> sdp_jax.valley.Certificate:
    """Certifies, prints the summary and writes the files.

    Args:
      options: what to certify.

    Returns:
      The certificate.

    Raises:
      ValueError: if the run is not finished, or its twin differs in more than the
        method.
    """
    console = rich.console.Console()
    run = load_run(options.run, options.data_dir)
    config = config_of(options.run, options.data_dir)
    directory = options.run / "twin" if options.twin is None else options.twin
    twin_config = dataclasses.replace(config.twin_of(), out=directory)
    file = directory / "metrics.jsonl"
    if file.is_file() and read_lines(file):
        twin_config = config_of(directory, options.data_dir)
        other = [k for k in ALIKE if getattr(twin_config, k) != getattr(config, k)]
        if other or twin_config.method != "sgd":
            raise ValueError(
                f"{directory} is no twin of {options.run}: it differs in "
                f"{', '.join(other) or 'the method, which must be sgd'}"
            )
    dataset = dataset_of(config, options.data_dir)
    with progress_bars(console) as progress:
        report = Reporter(progress)
        twin = train(twin_config, on_step=lambda n, all: report("twin", n, all))
        task = make_task(
            in_float32(twin, twin_config),
            dataset,
            examples=options.examples,
            curvature_examples=options.curvature_examples,
        )
        certificate = sdp_jax.valley.certify(
            task.loss_fn,
            twin.state.params,
            run.state.params,
            task.training,
            test_data=task.test,
            groups=run.groups.at("params"),
            curvature_data=task.curvature,
            rank=options.rank,
            density_steps=options.density_steps,
            points=options.points,
            curve_steps=options.curve_steps,
            tolerance=options.tolerance,
            same_seed=config.seed == twin_config.seed,
            histories=histories(twin, run, config.method),
            progress=report,
            **task.keywords,
        )
    write_whole(options.run / "certificate.json", certificate.to_json() + "\n")
    certificate.plot(options.run / "certificate.png")
    console.print(str(certificate), soft_wrap=True, highlight=False)
    console.print(f"picture: {options.run / 'certificate.png'}", soft_wrap=True)
    return certificate


if __name__ == "__main__":
    try:
        main(tyro.cli(Certify))
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
