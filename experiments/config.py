"""What a training run is: one dataclass."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from experiments import data, models
from experiments.optimizers import Method

# They say where and how a run is made, not which one it is.
OUTSIDE = ("data_dir", "out", "loop", "devices", "twin", "timed")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
      dataset: digits (bundled), mnist, cifar10, cifar100 or shakespeare.
      downscale: images become the means of squares of this side.
      augment: crop_flip moves every image by up to an eighth of its side, with zeros
        beyond the edge, and mirrors every second one.
      model: name of the network, see :mod:`experiments.models`.
      compute: type in which the network computes; parameters, optimizer and losses are
        float32 in any case.
      method: the method, see :mod:`experiments.optimizers`.
      widths: hidden widths; default: the model's.
      epochs: passes over the training set.
      batch_size: examples in a batch, on all devices together.
      learning_rate: initial rate.
      schedule: constant, cosine decay to zero, or a tenth after a half and again after
        three quarters of the steps.
      warmup: epochs in which the rate rises from zero, before the schedule begins.
      base: sgd, or adamw with gradients clipped to norm 1, on which a method builds.
      momentum: momentum of SGD; 0 for none.
      weight_decay: with sgd, ``weight_decay`` times the parameters is added to the
        gradient; with adamw it is decoupled, and for matrices only.
      c: altsdp: scale of the threshold c √γ (nγ)^μ.
      mu: altsdp: its exponent.
      sparsity: share of the target that goes; with altsdp instead of c and mu.
      target: what it is a share of: channels, params or flops.
      begin: with sparsity: share of the steps after which pruning begins.
      end: with sparsity: share of the steps after which it is done; what goes in one
        shot goes halfway between.
      stop_rise: altsdp: stop pruning further once the PQ Index of what is left has
        risen by so much above its least; none for no such rule.
      penalty: weight of the penalty, for methods that have one.
      decay_steps: steps of the Decay Pruning Method around its hosts; 1 for none.
      release_rate: its threshold of the escape rate; none releases no channel.
      release_length: its threshold of the gradient's length.
      valley: altsdp: how sharp directions are estimated that shrinkage keeps out of;
        none for plain AltSDP, hessian for eigenvectors on some training examples.
      valley_rank: altsdp with valley: number of directions.
      valley_decay: altsdp with valley: what share of the past an estimate keeps.
      valley_every: altsdp with valley: steps from one estimate to the next.
      weights: weighting of the channel norms.
      min_channels: channels that stay in each dimension.
      widths_left: scratch: channels that stay in each dimension, in order.
      examples: training examples that there are, always the same ones; none for all.
      validation: training examples held out and evaluated every epoch.
      evaluate_every: epochs from one evaluation on the whole training set to the next;
        the last epoch has one in any case.
      seed: of initialisation, data order and augmentation.
      shrink: cut while it trains what has become zero: behind these shares of the
        steps or, if none is given, where it pays; none cuts in the end.
      loop: scan compiles whole epochs, step one step at a time; auto takes scan on GPU
        and TPU and step on the CPU, where convolutions in a scan run on one core.
      devices: local devices that share each batch; default: all, on the CPU one.
      twin: train the same run with plain SGD first, in the directory ``twin`` of this
        one, and compare with it.
      timed: measure how long dense and small network take.
      data_dir: directory with mnist.npz, cifar10-jpeg.tar.xz or the like; default:
        tensorflow-datasets.
      out: directory of the run; default: a name made of the configuration.
    """

    dataset: data.Name = "digits"
    downscale: int = 1
    augment: Literal["none", "crop_flip"] = "none"
    model: models.Name = "dnn"
    compute: Literal["float32", "bfloat16"] = "float32"
    method: Method = "altsdp"
    widths: tuple[int, ...] = ()
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup: float = 0.0
    base: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    c: float = 0.1
    mu: float = 0.6
    sparsity: float | None = None
    target: Literal["channels", "params", "flops"] = "channels"
    begin: float = 0.1
    end: float = 0.6
    stop_rise: float | None = None
    penalty: float = 1e-3
    decay_steps: int = 1
    release_rate: float | None = None
    release_length: float = 1.0
    valley: Literal["none", "hessian", "svd", "frequent_directions", "oja"] = "none"
    valley_rank: int = 8
    valley_decay: float = 0.5
    valley_every: int = 1
    weights: Literal["plain", "size", "cost"] = "plain"
    min_channels: int = 1
    widths_left: tuple[int, ...] = ()
    examples: int | None = None
    validation: int = 0
    evaluate_every: int = 1
    seed: int = 0
    shrink: tuple[float, ...] | None = None
    loop: Literal["auto", "step", "scan"] = "auto"
    devices: int | None = None
    twin: bool = False
    timed: bool = False
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def key(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        raw = dataclasses.asdict(self)
        for name in OUTSIDE:
            del raw[name]
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
            if self.valley != "none":
                parts.append(self.valley)
        elif self.method != "sgd":
            parts.append(f"{self.penalty:g}")
            if self.sparsity is not None:
                parts.append(f"sparsity{self.sparsity:g}")
        return pathlib.Path("runs") / "-".join([*parts, f"seed{self.seed}"])

    def twin_of(self) -> "Config":
        """The same run with plain SGD, in the directory ``twin`` of this one."""
        return dataclasses.replace(
            self,
            **{name: getattr(DEFAULT, name) for name in PRUNING},
            method="sgd",
            twin=False,
            out=self.directory() / "twin",
        )


DEFAULT = Config()
# What bears on pruning alone.
PRUNING = (
    *("c", "mu", "sparsity", "target", "begin", "end"),
    *("stop_rise", "penalty", "decay_steps", "release_rate", "release_length"),
    *("valley", "valley_rank", "valley_decay", "valley_every"),
    *("weights", "min_channels", "widths_left", "shrink"),
)
