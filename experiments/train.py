"""Trains a network on one data set with one method, and cuts it.

``python -m experiments.train --dataset mnist --model dnn --method altsdp --data-dir D``

A run is a directory: ``metrics.jsonl`` (configuration, one line per epoch, result) and
checkpoints. Started again with the same configuration it goes on where it was; the
result is the same to the last bit.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
from experiments.optimizers import Counted, Method, make_optimizer
from sdp_jax import methods


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
      dataset: digits (bundled), mnist or cifar10.
      downscale: images become the means of squares of this side.
      model: dnn or conv.
      method: the method, see :mod:`experiments.optimizers`.
      widths: hidden widths; default: the model's.
      epochs: passes over the training set.
      batch_size: examples in a batch.
      learning_rate: initial rate.
      schedule: constant, or cosine decay to zero.
      momentum: momentum of SGD; 0 for none.
      weight_decay: added to the gradient, ``weight_decay`` times the parameters.
      c: altsdp: scale of the threshold c √γ (nγ)^μ.
      mu: altsdp: its exponent.
      sparsity: share of the target that goes; with altsdp instead of c and mu.
      target: what it is a share of: channels, params or flops.
      ranking: altsdp with sparsity: all channels together, or within each dimension.
      begin: with sparsity: share of the steps after which pruning begins.
      end: with sparsity: share of the steps after which it is done; what goes in one
        shot goes halfway between.
      power: altsdp: exponent of the adaptive threshold; 1 for the plain one.
      stop_rise: altsdp: stop pruning further once the PQ Index of what is left has
        risen by so much above its least; none for no such rule.
      penalty: weight of the penalty, for methods that have one.
      decay_steps: steps of the Decay Pruning Method around its hosts; 1 for none.
      release_rate: its threshold of the escape rate; none releases no channel.
      release_length: its threshold of the gradient's length.
      dual: altsdp: full or radial dual variable.
      valley: altsdp: how sharp directions are estimated that shrinkage keeps out of;
        none for plain AltSDP, hessian for eigenvectors on some training examples.
      valley_rank: altsdp with valley: number of directions.
      valley_decay: altsdp with valley: what share of the past an estimate keeps.
      valley_every: altsdp with valley: steps from one estimate to the next.
      norm: weighting of the channel norms.
      floor: channels that stay in each dimension.
      validation: training examples held out and evaluated every epoch.
      evaluate_every: epochs from one evaluation on the whole training set to the next;
        the last epoch has one in any case.
      seed: of initialisation and data order.
      data_dir: directory with mnist.npz or cifar10-jpeg.tar.xz; default:
        tensorflow-datasets.
      out: directory of the run; default: a name made of the configuration.
    """

    dataset: data.Name = "digits"
    downscale: int = 1
    model: models.Name = "dnn"
    method: Method = "altsdp"
    widths: tuple[int, ...] = ()
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    c: float = 0.1
    mu: float = 0.6
    sparsity: float | None = None
    target: Literal["channels", "params", "flops"] = "channels"
    ranking: Literal["global", "per_dimension"] = "global"
    begin: float = 0.1
    end: float = 0.6
    power: float = 1.0
    stop_rise: float | None = None
    penalty: float = 1e-3
    decay_steps: int = 1
    release_rate: float | None = None
    release_length: float = 1.0
    dual: Literal["full", "radial"] = "full"
    valley: Literal["none", "hessian", "svd", "frequent_directions", "oja"] = "none"
    valley_rank: int = 8
    valley_decay: float = 0.5
    valley_every: int = 1
    norm: Literal["plain", "size", "cost"] = "plain"
    floor: int = 1
    validation: int = 0
    evaluate_every: int = 1
    seed: int = 0
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def key(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        raw = dataclasses.asdict(self)
        del raw["data_dir"], raw["out"]
        return json.loads(json.dumps(raw))

    def directory(self) -> pathlib.Path:
        """Where the run is kept."""
        if self.out is not None:
            return self.out
        parts = [self.dataset, self.model, self.method]
        if self.method == "altsdp":
            parts.append(
                f"c{self.c:g}-mu{self.mu:g}"
                if self.sparsity is None
                else f"sparsity{self.sparsity:g}"
            )
            parts.append(self.dual if self.valley == "none" else self.valley)
        elif self.method != "sgd":
            parts.append(f"{self.penalty:g}")
            if self.sparsity is not None:
                parts.append(f"sparsity{self.sparsity:g}")
        return pathlib.Path("runs") / "-".join([*parts, f"seed{self.seed}"])


class State(NamedTuple):
    """What training changes.

    Attributes:
      params: the parameters.
      batch_stats: running statistics, ``{}`` if there are none.
      opt_state: state of the optimizer.
    """

    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Flax's view of the model."""
        return variables_of(self.params, self.batch_stats)


class Run(NamedTuple):
    """A finished run.

    Attributes:
      model: the dense network.
      groups: its channel dimensions, on all variables.
      state: the last state.
      epochs: one record for each epoch.
      result: the record of the cut and the test.
    """

    model: models.Model
    groups: sdp_jax.Groups
    state: State
    epochs: list[dict[str, Any]]
    result: dict[str, Any]


def make_loss(
    model: models.Model,
) -> Callable[[Any, Any, data.Split], tuple[jax.Array, Any]]:
    """``params, batch_stats, batch -> mean loss, new batch_stats`` in training mode."""

    def loss_fn(
        params: Any, batch_stats: Any, batch: data.Split
    ) -> tuple[jax.Array, Any]:
        output, changed = model.apply(
            variables_of(params, batch_stats),
            batch.images,
            train=True,
            mutable=["batch_stats"],
        )
        logits: Any = output
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), changed.get("batch_stats", {})

    return loss_fn


def make_step(
    model: models.Model, tx: optax.GradientTransformation
) -> Callable[[State, data.Split], tuple[State, jax.Array]]:
    """One jitted step: ``state, batch -> state, mean loss of the batch``."""
    loss_fn = make_loss(model)

    def step(state: State, batch: data.Split) -> tuple[State, jax.Array]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def make_refresh(
    model: models.Model, training: data.Split, batch_stats: Any, config: Config
) -> Callable[[State], State]:
    """Gives the optimizer the sharp directions of the loss on 2,000 examples."""
    loss_fn = make_loss(model)
    size = min(2000, len(training.labels))
    batch = next(data.batches(training, size, seed=config.seed, epoch=0))
    # Shapes are all that training mode needs of them; the state's buffers are donated.
    batch_stats = jax.tree.map(jnp.zeros_like, batch_stats)

    def mean_loss(params: Any, batch: data.Split) -> jax.Array:
        return loss_fn(params, batch_stats, batch)[0]

    def refresh(state: State) -> State:
        pairs = sdp_jax.top_eigenpairs(
            mean_loss, state.params, [batch], config.valley_rank, tol=0.1
        )
        opt_state = sdp_jax.set_basis(state.opt_state, pairs.vectors)
        return state._replace(opt_state=opt_state)

    return refresh


def make_scores(
    model: models.Model, groups: sdp_jax.Groups, training: data.Split, config: Config
) -> Callable[[State], State]:
    """Gives the optimizer discriminant information of 2,000 examples as scores."""
    size = min(2000, len(training.labels))
    batch = next(data.batches(training, size, seed=config.seed, epoch=0))
    score = methods.discriminant_score(jnp.asarray(batch.labels))

    def refresh(state: State) -> State:
        maps = models.feature_maps(model, groups, state.variables, batch.images)
        scores = score(groups, state.params, activations=maps)
        opt_state = methods.set_scores(state.opt_state, groups, scores)
        return state._replace(opt_state=opt_state)

    return refresh


def make_evaluate(
    apply: Callable[..., Any],
) -> Callable[[dict[str, Any], data.Split], tuple[float, float]]:
    """``variables, split -> mean loss, accuracy`` in inference mode."""

    @jax.jit
    def chunk(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits: Any = apply(variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

    def evaluate(variables: dict[str, Any], split: data.Split) -> tuple[float, float]:
        size, totals = 2000, np.zeros(2)
        for start in range(0, len(split.labels), size):
            part = (x[start : start + size] for x in split)
            totals += np.asarray([float(t) for t in chunk(variables, *part)])
        loss, correct = totals / len(split.labels)
        return float(loss), float(correct)

    return evaluate


def train(
    config: Config,
    *,
    dataset: data.Dataset | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Run:
    """Trains, or goes on training, and cuts.

    Args:
      config: the run.
      dataset: the data set of the configuration, if it is loaded already.
      on_step: called after each step with its number and the number of all steps.
      on_epoch: called with the record of each epoch, also of those done earlier.

    Returns:
      The finished run.

    Raises:
      ValueError: if the configuration or the data cannot be used, the directory holds
        another run, or the loss is no longer finite.
      FileNotFoundError: if the data is not there.
      ImportError: if tensorflow-datasets is needed and not installed.
    """
    if config.epochs < 1 or config.evaluate_every < 1:
        raise ValueError(
            f"epochs and evaluate_every must be at least 1; got {config.epochs} and "
            f"{config.evaluate_every}"
        )
    if dataset is None:
        dataset = data.load(config.dataset, config.data_dir, downscale=config.downscale)
    training, validation = data.hold_out(dataset.train, config.validation)
    per_epoch = data.steps_per_epoch(training, config.batch_size)
    steps = per_epoch * config.epochs

    chosen: Any = {"widths": config.widths} if config.widths else {}
    model = models.MODELS[config.model](classes=dataset.classes, **chosen)
    example = jnp.zeros((1, *training.images.shape[1:]))
    variables: Any = model.init(jax.random.key(config.seed), example)
    groups = sdp_jax.find_groups(model.apply, variables, example)
    counted = Counted(groups, model.apply, variables, (example,))
    tx = make_optimizer(config, groups.at("params"), steps, counted)
    params = variables["params"]
    state = State(params, variables.get("batch_stats", {}), tx.init(params))

    directory = config.directory().absolute()
    log = Log(directory / "metrics.jsonl", config)
    manager = ocp.CheckpointManager(
        directory / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        ),
    )
    with manager:
        saved = [n for n in manager.all_steps() if n <= len(log.epochs)]
        done = max(saved, default=0)
        for late in set(manager.all_steps()) - set(saved):
            manager.delete(late)
        log.truncate(done)
        if done:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            restored: Any = manager.restore(
                done, args=ocp.args.StandardRestore(abstract)
            )
            state = State(*restored)
        for record in log.epochs:
            on_epoch(record)
        step, evaluate = make_step(model, tx), make_evaluate(model.apply)
        watch = make_watch(groups)
        refresh, due = None, range(0)
        if config.method == "altsdp" and config.valley == "hessian":
            refresh = make_refresh(model, training, state.batch_stats, config)
            due = range(0, steps, config.valley_every)
        elif config.method in optimizers.FROM_OUTSIDE:
            refresh = make_scores(model, groups.at("params"), training, config)
            due = range(optimizers.one_shot_step(config, steps) - 1, steps, steps)
        for epoch in range(done + 1, config.epochs + 1):
            start = time.perf_counter()
            order = data.batches(
                training, config.batch_size, seed=config.seed, epoch=epoch
            )
            losses = []
            for i, batch in enumerate(order):
                number = (epoch - 1) * per_epoch + i
                if refresh is not None and number in due:
                    state = refresh(state)
                state, loss = step(state, batch)
                losses.append(loss)
                on_step(number + 1, steps)
            record: dict[str, Any] = {"epoch": epoch}
            record["batch_loss"] = float(np.mean(jax.device_get(losses)))
            if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                found = evaluate(state.variables, training)
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
            record |= watch(state.variables)
            record["seconds"] = time.perf_counter() - start
            # The record comes first: an epoch without a checkpoint is done again.
            log.epoch(record)
            manager.save(epoch, args=ocp.args.StandardSave(state))
            on_epoch(record)
    if log.result is None:
        log.finish(_result(model, groups, state.variables, dataset))
    assert log.result is not None
    return Run(model, groups, state, log.epochs, log.result)


def _result(
    model: models.Model, groups: sdp_jax.Groups, variables: Any, dataset: data.Dataset
) -> dict[str, Any]:
    """Cuts, checks that the small network computes the same, and tests both."""
    cut = sdp_jax.plan_cut(groups, variables)
    small, small_variables = sdp_jax.narrow(model.apply, cut), cut.take(variables)
    images = dataset.test.images[:1000]
    dense: Any = jax.jit(model.apply)(variables, images)
    after: Any = jax.jit(small)(small_variables, images)
    difference = float(jnp.max(jnp.abs(dense - after)))
    if not difference <= 1e-3 * max(1.0, float(jnp.max(jnp.abs(dense)))):
        raise AssertionError(
            f"the small network differs from the dense one by {difference}"
        )
    loss, accuracy = make_evaluate(model.apply)(variables, dataset.test)
    _, small_accuracy = make_evaluate(small)(small_variables, dataset.test)
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "small_test_accuracy": small_accuracy,
        "largest_difference": difference,
        "widths": cut.widths,
        "dense_widths": groups.sizes,
        "parameters": _count(variables["params"]),
        "small_parameters": _count(small_variables["params"]),
        "flops": sdp_jax.cost(model.apply, variables, images[:1]).flops,
        "small_flops": sdp_jax.cost(small, small_variables, images[:1]).flops,
    }


def make_watch(groups: sdp_jax.Groups) -> Callable[[Any], dict[str, Any]]:
    """``variables -> what a record says of the channels``."""

    @jax.jit
    def look(variables: Any) -> Any:
        alive = sdp_jax.channels_alive(groups, variables)
        norms = jnp.concatenate(list(sdp_jax.channel_norms(groups, variables).values()))
        return (
            {name: jnp.sum(value) for name, value in alive.items()},
            methods.pq_index(variables["params"]),
            methods.pq_index(norms, mask=norms > 0),
        )

    def watch(variables: Any) -> dict[str, Any]:
        alive, weights, norms = look(variables)
        index = {"weights": float(weights), "norms": float(norms)}
        counts = {name: int(alive[name]) for name in groups.sizes}
        return {"channels": counts, "pq_index": index}

    return watch


def variables_of(params: Any, batch_stats: Any) -> dict[str, Any]:
    """Flax's view of a model."""
    stats = {"batch_stats": batch_stats} if batch_stats else {}
    return {"params": params, **stats}


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


class Log:
    """The metrics file of a run: configuration, epochs, result.

    Attributes:
      path: the file.
      epochs: records of the epochs so far.
      result: the last record of a finished run, or ``None``.
    """

    def __init__(self, path: pathlib.Path, config: Config):
        """Reads the file or begins it.

        Args:
          path: the file.
          config: the run it belongs to.

        Raises:
          ValueError: if it belongs to another run.
        """
        self.path = path
        self.epochs: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        lines = read_lines(path) if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._header = {"config": config.key(), **_environment()}
            return
        self._header = lines[0]
        # What a run of an earlier version does not name had its default.
        ours, theirs = config.key(), Config().key() | self._header.get("config", {})
        other = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
        if other:
            raise ValueError(
                f"{path.parent} holds a run with another configuration; it differs in "
                + ", ".join(
                    f"{k} ({theirs.get(k)!r}, not {ours.get(k)!r})" for k in other
                )
                + ". Give another --out, or delete the directory"
            )
        self.epochs = [line for line in lines if "epoch" in line]
        self.result = next((line for line in lines if "test_accuracy" in line), None)

    def truncate(self, epochs: int) -> None:
        """Forgets what came after the last checkpoint, by an atomic rewrite."""
        if epochs < len(self.epochs):
            self.result = None
        self.epochs = self.epochs[:epochs]
        records = [self._header, *self.epochs]
        if self.result is not None:
            records.append(self.result)
        text = "".join(json.dumps(record) + "\n" for record in records)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)

    def epoch(self, record: dict[str, Any]) -> None:
        """Adds the record of an epoch."""
        self.epochs.append(record)
        self._write(record)

    def finish(self, result: dict[str, Any]) -> None:
        """Adds the result."""
        self.result = result
        self._write(result)

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete records of a metrics file; a torn last line is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
        check=False,
    ).stdout.strip()
    device = jax.devices()[0]
    return {
        "versions": {"jax": jax.__version__, "sdp_jax": sdp_jax.__version__},
        "device": f"{device.platform} {device.device_kind}",
        "commit": commit or None,
    }


def progress_bars(console: rich.console.Console) -> rich.progress.Progress:
    """Bars with a count, for stages whose length may be unknown."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def main(config: Config) -> Run:
    """Trains with a progress bar and prints a line per epoch and the result.

    Args:
      config: the run.

    Returns:
      The finished run.
    """
    console = rich.console.Console()
    with progress_bars(console) as progress:
        task = progress.add_task(config.method, total=None)

        def on_step(step: int, steps: int) -> None:
            progress.update(task, completed=step, total=steps)

        def on_epoch(record: dict[str, Any]) -> None:
            channels = " ".join(str(n) for n in record["channels"].values())
            console.print(
                f"epoch {record['epoch']:3d}  batch loss {record['batch_loss']:.4f}  "
                f"channels {channels}"
            )

        run = train(config, on_step=on_step, on_epoch=on_epoch)
    result = run.result
    widths = ", ".join(
        f"{name} {left} of {result['dense_widths'][name]}"
        for name, left in result["widths"].items()
    )
    console.print(
        f"test accuracy {result['test_accuracy']:.2%}, after the cut "
        f"{result['small_test_accuracy']:.2%}; {widths}; parameters "
        f"{result['parameters']:,} to {result['small_parameters']:,}; "
        f"{config.directory()}"
    )
    return run


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
