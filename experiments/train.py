"""Trains a network on one data set with one method, and cuts it.

``python -m experiments.train --dataset mnist --model dnn --method altsdp --data-dir D``
or ``python -m experiments.train NAME --data-dir D`` with the name of one of
:mod:`experiments.configs`, and any option of it changed.

A run is a directory: ``metrics.jsonl`` (configuration, one line per epoch, result),
checkpoints, and event files for TensorBoard. Interrupted, it saves and stops. Started
again with the same configuration it goes on where it was; the result is the same to the
last bit.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rich.console
import rich.progress
import tyro

import sdp_jax
from experiments import data, models, optimizers
from experiments.board import Board
from experiments.config import Config
from experiments.configs import CONFIGS
from experiments.interrupt import Interrupt, Interrupted
from experiments.log import Log
from experiments.optimizers import make_optimizer
from experiments.outcome import make_watch, outcome
from experiments.refresh import make_from_outside
from experiments.shrink import Shrinking
from experiments.steps import (
    State,
    make_advance,
    make_evaluate,
    make_mesh,
    on_devices,
)


class Run(NamedTuple):
    """A finished run.

    Attributes:
      model: the dense network.
      groups: its channel dimensions, on all variables.
      state: the last state; parameters and statistics dense also where a run shrinks.
      cut: what was cut while it trained.
      epochs: one record for each epoch.
      result: the record of the cut and the test.
    """

    model: models.Model
    groups: sdp_jax.Groups
    state: State
    cut: sdp_jax.Cut
    epochs: list[dict[str, Any]]
    result: dict[str, Any]


class Setup(NamedTuple):
    """What a run is made of before its first step.

    Attributes:
      model: the network.
      groups: its channel dimensions, on all variables.
      tx: the optimizer.
      state: the first state.
    """

    model: models.Model
    groups: sdp_jax.Groups
    tx: optax.GradientTransformation
    state: State


def make_setup(config: Config, dataset: data.Dataset, steps: int) -> Setup:
    """The network, its channels, the optimizer and the first state.

    Args:
      config: the run.
      dataset: its data set.
      steps: number of its updates.

    Returns:
      These; under ``jax.eval_shape`` everything but their shapes is lost.

    Raises:
      ValueError: if the configuration cannot be used.
    """
    model = models.make_model(
        config.model, dataset.classes, config.widths, jnp.dtype(config.compute)
    )
    images = dataset.train.images
    example = jnp.zeros((1, *images.shape[1:]), images.dtype)
    # Under jit, because a deep network has thousands of small arrays to draw.
    variables: Any = jax.jit(model.init)(jax.random.key(config.seed), example)
    groups = sdp_jax.find_groups(model.apply, variables, example)
    tx = make_optimizer(config, groups.at("params"), steps)
    params = variables["params"]
    state = State(params, variables.get("batch_stats", {}), tx.init(params))
    return Setup(model, groups, tx, state)


def train(
    config: Config,
    *,
    dataset: data.Dataset | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_cut: Callable[[int, float], None] = lambda step, share: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Trains, or goes on training, and cuts.

    Args:
      config: the run; ``twin`` is for :func:`main` alone.
      dataset: the data set of the configuration, if it is loaded already.
      on_step: called as steps are done with their number and the number of all steps.
      on_cut: called behind a cut with the number of steps done and the share of the
        dense network's FLOPs that a step costs from now on.
      on_epoch: called with the record of each epoch, also of those done earlier.
      stop: asked between steps (with ``loop="scan"``, between epochs) whether to save
        and stop.

    Returns:
      The finished run.

    Raises:
      ValueError: if the configuration or the data cannot be used, the directory holds
        another run, or the loss is no longer finite.
      FileNotFoundError: if the data is not there.
      ImportError: if tensorflow-datasets is needed and not installed.
      Interrupted: if ``stop`` asked for it; the run is saved.
    """
    if config.epochs < 1 or config.evaluate_every < 1:
        raise ValueError(
            f"epochs and evaluate_every must be at least 1; got {config.epochs} and "
            f"{config.evaluate_every}"
        )
    mesh = make_mesh(config.devices, config.batch_size)
    if dataset is None:
        dataset = data.load(config.dataset, config.data_dir, downscale=config.downscale)
    training = dataset.train
    if config.examples is not None:
        _, training = data.hold_out(training, config.examples)
    training, validation = data.hold_out(training, config.validation)
    per_epoch = data.steps_per_epoch(training, config.batch_size)
    steps = per_epoch * config.epochs
    model, groups, tx, state = make_setup(config, dataset, steps)
    state = on_devices(state, mesh)

    directory = config.directory().absolute()
    shrinking = Shrinking(config, groups, steps, directory)
    log = Log(directory / "metrics.jsonl", config)
    manager = ocp.CheckpointManager(
        directory / "updates",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        ),
    )
    with manager:
        # Losses of the epoch that was interrupted; NaN stands for those to come.
        nothing = np.full(per_epoch, np.nan, np.float32)
        saved = Saved(state, jnp.asarray(nothing))
        done, saved = _restore(manager, log, saved, per_epoch, shrinking)
        state = saved.state
        for record in log.epochs:
            on_epoch(record)
        scan = config.loop == "scan" or (
            config.loop == "auto" and jax.default_backend() != "cpu"
        )
        watch = make_watch(groups)

        def present() -> tuple[Any, ...]:
            """What a step, an evaluation and the optimizer's helpers are by now."""
            now, left = shrinking.model(model), shrinking.shrinker.groups
            small_tx = tx
            if now is not model:
                small_tx = make_optimizer(config, left.at("params"), steps)
            advance = make_advance(
                now,
                small_tx,
                augment=config.augment,
                seed=config.seed,
                scan=scan,
                mesh=mesh,
            )
            outside = make_from_outside(config, now, left, training, state, steps)
            return advance, make_evaluate(now.apply), *outside

        advance, evaluate, refresh, due = present()
        resident = on_devices(training, mesh) if done < steps else training
        for epoch in range(done // per_epoch + 1, config.epochs + 1):
            start = time.perf_counter()
            order = on_devices(
                data.order_of(
                    training, config.batch_size, seed=config.seed, epoch=epoch
                ),
                mesh,
            )
            first = done % per_epoch
            losses = [saved.losses[:first]]
            while first < per_epoch:
                if refresh is not None and done in due:
                    state = refresh(state)
                count = 1
                if scan:
                    count = per_epoch - first
                    if refresh is not None:
                        later = (n - done for n in due if n > done)
                        count = min(count, next(later, count))
                state, found = advance(state, resident, order, first, done, count)
                losses.append(found)
                first, done = first + count, done + count
                on_step(done, steps)
                cut = shrinking.ask(done, state.variables)
                if cut is not None:
                    state = State(*cut.take(tuple(state)))
                    advance, evaluate, refresh, due = present()
                    on_cut(done, shrinking.shrinker.flops)
                if first < per_epoch and stop():
                    kept = nothing.copy()
                    kept[:first] = _joined(losses)
                    part = Saved(state, jnp.asarray(kept))
                    _save(manager, done, part, shrinking)
                    raise Interrupted(f"stopped after {done} steps")
            record: dict[str, Any] = {"epoch": epoch}
            record["batch_loss"] = float(np.mean(_joined(losses)))
            if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                found = evaluate(state.variables, resident)
                record["train_loss"], record["train_accuracy"] = found
            loss = record.get("train_loss", record["batch_loss"])
            if not np.isfinite(loss):
                raise ValueError(
                    f"the training loss is {loss} after epoch {epoch}; lower "
                    "learning_rate"
                )
            if config.validation:
                found = evaluate(state.variables, validation)
                record["validation_loss"], record["validation_accuracy"] = found
            if config.method in optimizers.THRESHOLD:
                sdp_jax.check_zeros(state.opt_state)
            record |= watch(_dense(shrinking, state).variables)
            if config.shrink is not None:
                record["step_flops"] = shrinking.shrinker.flops
            record["seconds"] = time.perf_counter() - start
            # The record comes first: an epoch without a checkpoint is done again.
            log.epoch(record)
            _save(manager, done, Saved(state, jnp.asarray(nothing)), shrinking)
            on_epoch(record)
            if epoch < config.epochs and stop():
                raise Interrupted(f"stopped after epoch {epoch}")
    state = _dense(shrinking, state)
    if log.result is None or (config.timed and "milliseconds" not in log.result):
        variables = jax.device_get(state.variables)
        log.finish(outcome(config, model, groups, variables, dataset))
    assert log.result is not None
    cut = shrinking.shrinker.cut
    return Run(model, groups, state, cut, log.epochs, log.result)


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
      state: the state.
      losses: of the steps of an epoch that is not complete, float32
        ``(steps per epoch,)``, NaN for those to come.
    """

    state: State
    losses: Any


def _dense(shrinking: Shrinking, state: State) -> State:
    """The state with parameters and statistics of the dense network."""
    if shrinking.cut is None:
        return state
    full = shrinking.cut.fill(state.variables)
    return state._replace(
        params=full["params"], batch_stats=full.get("batch_stats", {})
    )


def _save(
    manager: ocp.CheckpointManager, done: int, saved: Saved, shrinking: Shrinking
) -> None:
    manager.save(
        done,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardSave(saved),
            shrinking=ocp.args.JsonSave(shrinking.save()),
        ),
    )


def _joined(losses: list[Any]) -> np.ndarray:
    return np.concatenate(jax.device_get(losses))


def _restore(
    manager: ocp.CheckpointManager,
    log: Log,
    fresh: Saved,
    per_epoch: int,
    shrinking: Shrinking,
) -> tuple[int, Saved]:
    """The last checkpoint whose epochs are recorded; records beyond it are dropped.

    Returns:
      The number of steps done, and the checkpoint or, without one, ``fresh``.
    """
    steps = manager.all_steps()
    usable = [n for n in steps if n // per_epoch <= len(log.epochs)]
    done = max(usable, default=0)
    for late in set(steps) - set(usable):
        manager.delete(late)
    log.truncate(done // per_epoch)
    if not done:
        return 0, fresh
    cuts = ocp.args.Composite(shrinking=ocp.args.JsonRestore())
    shrinking.restore(done, manager.restore(done, args=cuts)["shrinking"])
    if shrinking.cut is not None:
        small = shrinking.cut.take(tuple(fresh.state))
        fresh = fresh._replace(state=State(*small))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
    arrays = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
    restored: Any = manager.restore(done, args=arrays)["arrays"]
    return done, Saved(State(*restored[0]), restored[1])


def progress_bars(console: rich.console.Console) -> rich.progress.Progress:
    """Bars with a count, for stages whose length may be unknown."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def show(config: Config, **options: Any) -> Run:
    """Trains with a progress bar, a line per epoch and event files for TensorBoard.

    Args:
      config: the run.
      **options: handed on to :func:`train`.

    Returns:
      The finished run.
    """
    console = rich.console.Console()
    board = Board(config.directory() / "tensorboard")
    with progress_bars(console) as progress:
        task = progress.add_task(config.method, total=None)

        def on_step(step: int, steps: int) -> None:
            progress.update(task, completed=step, total=steps)

        def on_epoch(record: dict[str, Any]) -> None:
            board.write(record)
            accuracy = record.get("validation_accuracy", record.get("train_accuracy"))
            shown = "" if accuracy is None else f"  accuracy {accuracy:.2%}"
            if "step_flops" in record:
                shown += f"  FLOPs of a step {record['step_flops']:.0%}"
            state = (
                f"loss {record['batch_loss']:.4f}{shown}  "
                f"channels left {sum(record['channels'].values())}"
            )
            progress.update(task, description=f"{config.method}  {state}")
            counts = " ".join(str(n) for n in record["channels"].values())
            console.print(f"epoch {record['epoch']:3d}  {state}: {counts}")

        try:
            run = train(config, on_step=on_step, on_epoch=on_epoch, **options)
        finally:
            board.close()
    result = run.result
    widths = ", ".join(
        f"{name} {left} of {result['dense_widths'][name]}"
        for name, left in result["widths"].items()
    )
    console.print(
        f"test accuracy {result['test_accuracy']:.2%}, after the cut "
        f"{result['small_test_accuracy']:.2%}; {widths}; parameters "
        f"{result['parameters']:,} to {result['small_parameters']:,}, FLOPs "
        f"{result['flops']:,} to {result['small_flops']:,}; {config.directory()}"
    )
    return run


def main(config: Config) -> Run:
    """Trains, with ``twin`` first the twin, and prints how they compare.

    Args:
      config: the run.

    Returns:
      The finished run.
    """
    with Interrupt() as stop:
        if not config.twin:
            return show(config, stop=stop)
        dataset = data.load(config.dataset, config.data_dir, downscale=config.downscale)
        twin = show(config.twin_of(), dataset=dataset, stop=stop)
        run = show(config, dataset=dataset, stop=stop)
    ours, theirs = (
        (r.epochs[-1]["train_loss"], r.result["small_test_accuracy"])
        for r in (run, twin)
    )
    print(
        f"training loss {ours[0]:.4f}, of the twin {theirs[0]:.4f}; "
        f"test accuracy {ours[1]:.2%}, of the twin {theirs[1]:.2%}"
    )
    return run


def parse(arguments: list[str]) -> Config:
    """The run that a command line names.

    Args:
      arguments: options, or the name of a configuration and options.

    Returns:
      The run; that of a configuration is kept in ``runs/NAME-seedSEED`` if ``--out``
      does not say otherwise.

    Raises:
      ValueError: if there is no configuration of that name.
    """
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(Config, args=arguments, description=__doc__)
    name, *arguments = arguments
    if name not in CONFIGS:
        known = "\n  ".join(CONFIGS)
        raise ValueError(f"no configuration is named {name!r}; there are\n  {known}")
    config = tyro.cli(Config, default=CONFIGS[name], args=arguments, prog=name)
    if config.out is None:
        out = pathlib.Path("runs") / f"{name}-seed{config.seed}"
        config = dataclasses.replace(config, out=out)
    return config


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except Interrupted as error:
        print(f"{error} and saved; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
