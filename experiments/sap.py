"""The PQ Index while a network is pruned, retrained and pruned again.

``python -m experiments.sap --dataset mnist --data-dir D --out sap`` runs four loops
from one initialisation and writes ``<dataset>.json`` and ``<dataset>.png``:
sparsity-informed adaptive pruning of weights and of channels, lottery ticket, one-shot.
Started again with the same configuration it goes on after the last finished round; the
result is the same.
"""

import dataclasses
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import tyro
from flax import traverse_util

import sdp_jax
from experiments import data, models, steps
from experiments.files import write_whole
from sdp_jax import methods

Method = Literal["sap", "sap_channels", "lottery_ticket", "one_shot"]
METHODS: tuple[Method, ...] = ("sap", "sap_channels", "lottery_ticket", "one_shot")
LABELS = {
    "sap": ("SAP, weights", "#d1495b"),
    "sap_channels": ("SAP, neurons", "#2e86ab"),
    "lottery_ticket": ("lottery ticket", "#3a7d44"),
    "one_shot": ("one-shot", "#666666"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      dataset: digits (bundled), mnist or cifar10.
      downscale: images become the means of squares of this side.
      widths: hidden widths of the dense network.
      methods: the loops.
      rounds: removals; there is one training more.
      epochs: passes over the training set in each round.
      batch_size: examples in a batch.
      learning_rate: initial rate, with a cosine to zero in each round.
      momentum: Nesterov momentum.
      weight_decay: added to the gradient.
      channel_decay: the same for SAP of channels: with a weak one the norms of neurons
        stay alike, their index is near zero, and next to nothing is removed.
      p: smaller exponent of the index that SAP prunes by.
      q: its larger exponent.
      eta: SAP: the share that the bound leaves out.
      gamma: SAP: scale of what is removed.
      beta: SAP: largest share that a round removes.
      scope: SAP of weights: what index and removal are taken over.
      sparsity: lottery ticket and one-shot: share that a round removes.
      seed: of initialisation and data order.
      data_dir: directory with the data set's file; default: tensorflow-datasets.
      out: directory of results; what it takes to go on lies in ``state`` below it.
    """

    dataset: data.Name = "digits"
    downscale: int = 1
    widths: tuple[int, ...] = (300, 100)
    methods: tuple[Method, ...] = METHODS
    rounds: int = 30
    epochs: int = 2
    batch_size: int = 250
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    channel_decay: float = 5e-3
    p: float = 1.0
    q: float = 2.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: Literal["global", "tensor", "row"] = "global"
    sparsity: float = 0.2
    seed: int = 0
    data_dir: pathlib.Path | None = None
    out: pathlib.Path = pathlib.Path("sap")

    def key(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        raw = dataclasses.asdict(self)
        del raw["data_dir"], raw["out"], raw["methods"]
        return json.loads(json.dumps(raw))

    def exponents(self) -> list[tuple[float, float]]:
        """The pairs that the index is reported for."""
        return sorted({(self.p, self.q), (0.5, 1.0), (1.0, 2.0)})


def make_train(
    config: Config, model: models.Model, training: data.Split, weight_decay: float
) -> Callable[[int, Any, Any], Any]:
    """``round, params, mask -> params``: one training from scratch under a mask."""
    images, labels = (jnp.asarray(x) for x in training)
    per_epoch = data.steps_per_epoch(training, config.batch_size)
    rate = optax.cosine_decay_schedule(config.learning_rate, per_epoch * config.epochs)

    def optimizer(mask: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.sgd(rate, config.momentum or None, nesterov=config.momentum > 0),
            methods.keep_mask(mask),
        )

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # The mask is in the state: one compilation serves all rounds.
    update = optimizer({}).update

    @jax.jit
    def epoch(params: Any, state: Any, images: Any, labels: Any, order: Any) -> Any:
        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, images[index], labels[index])
            updates, state = update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def run(number: int, params: Any, mask: Any) -> Any:
        state = optimizer(mask).init(params)
        for i in range(config.epochs):
            rng = np.random.default_rng([config.seed, number, i])
            order = rng.permutation(len(labels))[: per_epoch * config.batch_size]
            order = jnp.asarray(order.reshape(per_epoch, config.batch_size))
            params, state = epoch(params, state, images, labels, order)
        return params

    return run


def indices(
    config: Config, groups: sdp_jax.Groups | None, params: Any, mask: Any
) -> dict[str, float]:
    """The PQ Index of what is left: of weights, or of channel norms with groups."""
    out = {}
    for p, q in config.exponents():
        if groups is None:
            tree, alive = (_matrices(t) for t in (params, mask))
            value = methods.pq_index(tree, p, q, mask=alive)
        else:
            value = methods.pq_index(params, p, q, groups=groups, of="norms", mask=mask)
        out[f"{p:g},{q:g}"] = float(value)
    return out


def loop(
    config: Config,
    method: Method,
    dataset: data.Dataset,
    on_round: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Runs one method, or goes on with it.

    Args:
      config: what to run.
      method: the loop.
      dataset: the data set.
      on_round: called with the record of each round.

    Returns:
      A record for each round.
    """
    model = models.Dnn(widths=config.widths, classes=dataset.classes)
    example = jnp.zeros((1, *dataset.train.images.shape[1:]))
    variables: Any = model.init(jax.random.key(config.seed), example)
    params = variables["params"]
    groups = sdp_jax.find_groups(model.apply, variables, example).at("params")
    ours = groups if method == "sap_channels" else None
    decay = config.weight_decay if ours is None else config.channel_decay
    trainer = make_train(config, model, dataset.train, decay)
    evaluate = steps.make_evaluate(model.apply)

    saved = State(config.out / "state" / f"{config.dataset}-{method}.npz", params)
    records = saved.records
    for record in records:
        on_round(record)
    if len(records) > config.rounds:
        return records

    def run(params: Any, mask: Any) -> Any:
        return trainer(len(records), params, mask)

    start = time.perf_counter()
    for done in _rounds(config, method, run, params, ours, saved):
        if method == "one_shot" and done.round == 0:
            saved.dense = done.params
        weights = [np.asarray(m) for m in _matrices(done.mask).values()]
        loss, _ = evaluate({"params": done.params}, dataset.train)
        test_loss, accuracy = evaluate({"params": done.params}, dataset.test)
        record: dict[str, Any] = {
            "round": done.round,
            "kept": done.kept,
            "weights": sum(w.sum() for w in weights) / sum(w.size for w in weights),
            "index": indices(config, ours, done.params, done.mask),
            "pruned_index": None,
            "train_loss": loss,
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "seconds": time.perf_counter() - start,
        }
        if done.next_mask is not None:
            pruned = methods.apply_mask(done.params, done.next_mask)
            record["pruned_index"] = indices(config, ours, pruned, done.next_mask)
        saved.write(record, done.next_mask)
        on_round(record)
        start = time.perf_counter()
    return records


def _rounds(
    config: Config,
    method: Method,
    run: Callable[[Any, Any], Any],
    params: Any,
    groups: sdp_jax.Groups | None,
    saved: "State",
) -> Iterator[methods.PruningRound]:
    if method == "lottery_ticket":
        rule = methods.lottery_ticket(config.sparsity)
    elif method == "one_shot":
        rule = methods.one_shot(config.sparsity, saved.dense)
    else:
        rule = methods.sap(config.eta, config.gamma, config.beta)
    return methods.pruning_rounds(
        run,
        params,
        rule,
        rounds=config.rounds,
        p=config.p,
        q=config.q,
        scope=config.scope if method == "sap" else "global",
        groups=groups,
        begin_round=len(saved.records),
        mask=saved.mask,
    )


class State:
    """What it takes to go on with one loop; one file, replaced as a whole.

    Attributes:
      records: of the finished rounds.
      mask: of the next round, ``None`` for no mask.
      dense: the first trained weights, where the loop ranks by them.
    """

    def __init__(self, path: pathlib.Path, params: Any):
        """Reads the file, if it is there.

        Args:
          path: the file.
          params: parameters, for their structure.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.mask: Any = None
        self.dense: Any = None
        if not path.exists():
            return
        with np.load(path) as file:
            self.records = json.loads(str(file["records"]))
            for name in ("mask", "dense"):
                prefix = f"{name}/"
                leaves = {
                    tuple(k.removeprefix(prefix).split("/")): file[k]
                    for k in file.files
                    if k.startswith(prefix)
                }
                if leaves:
                    tree = traverse_util.unflatten_dict(leaves)
                    # In the order of the parameters.
                    tree = jax.tree.map(lambda _, leaf: leaf, params, tree)
                    setattr(self, name, tree)

    def write(self, record: dict[str, Any], mask: Any) -> None:
        """Adds a round.

        Args:
          record: its record.
          mask: the mask of the next one.
        """
        self.records.append(json.loads(json.dumps(record, default=float)))
        self.mask = mask
        arrays: Any = {"records": np.asarray(json.dumps(self.records))}
        for name in ("mask", "dense"):
            tree = getattr(self, name)
            flat = {} if tree is None else traverse_util.flatten_dict(tree)
            arrays |= {"/".join((name, *k)): np.asarray(x) for k, x in flat.items()}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_whole(self.path, file.getvalue())


def main(
    config: Config, on_round: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Runs the loops, writes results and picture.

    Args:
      config: what to run.
      on_round: called with the record of each round.

    Returns:
      What is written to ``<dataset>.json``.

    Raises:
      ValueError: if the directory holds results of another configuration.
    """
    path = config.out / f"{config.dataset}.json"
    results: dict[str, Any] = {
        "config": config.key(),
        "versions": {"jax": jax.__version__, "sdp_jax": sdp_jax.__version__},
        "methods": {},
    }
    if path.exists():
        theirs = json.loads(path.read_text())
        other = sorted(
            k for k, v in config.key().items() if theirs["config"].get(k) != v
        )
        if other:
            raise ValueError(
                f"{path} is of another configuration; it differs in {other}. Give "
                "another --out, or delete the directory"
            )
        results["methods"] = theirs["methods"]
    have = {*results["methods"], *config.methods}
    results["methods"] = {
        m: results["methods"].get(m, []) for m in METHODS if m in have
    }
    _write(path, results)
    dataset = data.load(config.dataset, config.data_dir, downscale=config.downscale)
    console = rich.console.Console()
    for method in config.methods:
        results["methods"][method] = []

        def show(record: dict[str, Any], method: Method = method) -> None:
            results["methods"][method].append(record)
            index = record["index"][f"{config.p:g},{config.q:g}"]
            console.print(
                f"{method} {record['round']:2d}  left {record['kept']:7.2%}  index "
                f"{index:.4f}  train loss {record['train_loss']:.4f}  test accuracy "
                f"{record['test_accuracy']:.2%}"
            )
            if on_round is not None:
                on_round(record)

        results["methods"][method] = loop(config, method, dataset, show)
        _write(path, results)
    _draw(results, config, path.with_suffix(".png"))
    return results


def turns(values: list[float]) -> tuple[int, int]:
    """Where a series first ends to fall, and where the rise after it ends.

    The two places, a valley ``i`` and a peak ``j > i``, are those of the largest rise
    ``values[j] − values[i]``.

    Args:
      values: the series.

    Returns:
      ``i`` and ``j``; equal if it never rises.
    """
    best, low = (0, 0), 0
    for j, value in enumerate(values):
        low = j if value < values[low] else low
        if value - values[low] > values[best[1]] - values[best[0]]:
            best = low, j
    return best


def _matrices(tree: Any) -> dict[str, Any]:
    """The leaves with two axes or more."""
    flat: Any = traverse_util.flatten_dict(tree, sep="/")
    return {k: x for k, x in flat.items() if np.ndim(x) > 1}


def _write(path: pathlib.Path, results: dict[str, Any]) -> None:
    write_whole(path, json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Results with numbers of six digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _draw(results: dict[str, Any], config: Config, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    # Weights at each pair of exponents; norms of neurons apart, they are more alike.
    ours = f"{config.p:g},{config.q:g}"
    views = [(f"{p:g},{q:g}", False) for p, q in config.exponents()] + [(ours, True)]
    figure = Figure(figsize=(3 * (1 + len(views)), 3.2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(views))
    for method, records in results["methods"].items():
        label, colour = LABELS[method]
        left = [r["weights"] for r in records]
        accuracy = [r["test_accuracy"] for r in records]
        first.plot(left, accuracy, ".-", color=colour, label=label)
        for axes, (pair, neurons) in zip(others, views, strict=True):
            if neurons != (method == "sap_channels"):
                continue
            axes.plot(left, [r["index"][pair] for r in records], ".-", color=colour)
            pruned = [r["pruned_index"][pair] for r in records[:-1]]
            axes.plot(left[1:], pruned, ":", color=colour)
    first.set(title="test accuracy")
    first.legend(frameon=False)
    for axes, (pair, neurons) in zip(others, views, strict=True):
        p, q = pair.split(",")
        what = "norms of neurons" if neurons else "weights"
        axes.set_title(f"{what}, p = {p}, q = {q}", fontsize="medium")
        axes.set(yscale="log")
    others[0].set(ylabel="PQ Index retrained, dotted: just pruned")
    for axes in (first, *others):
        axes.set(xscale="log", xlabel="share of weights left")
        axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
