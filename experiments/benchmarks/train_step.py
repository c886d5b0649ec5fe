"""Whole training steps of AltSDP relative to SGD, images per second, share of the peak.

``python -m experiments.benchmarks.train_step --row vgg16-cifar10 --batch-size 512
--peak 989`` times the steps of :mod:`experiments.train` (batch gathered and augmented
on the device, forward and backward pass, update) on random images, the methods in
turns. On GPU and TPU a call is a scan over many steps, as in training. FLOPs of a step
are three times those of the network that :func:`sdp_jax.cost` counts.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np
import tyro

import sdp_jax
from experiments import data
from experiments.config import Config
from experiments.configs import CONFIGS, ROWS
from experiments.steps import make_advance
from experiments.train import make_setup


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What to time.

    Attributes:
      row: a row of :mod:`experiments.configs`.
      methods: its methods, the reference first.
      batch_size: examples in a batch; default: the row's.
      widths: widths of the network; default: the row's.
      compute: type in which the network computes; default: the row's.
      steps: steps in a call; default: 100 on GPU and TPU, 1 on the CPU.
      repeats: timed calls of each method.
      peak: what the device can do at most in this type, in 10^12 FLOPs per second (H100
        SXM in bfloat16: 989); none leaves the share out.
    """

    row: str = "vgg16-cifar10"
    methods: tuple[str, ...] = ("sgd", "altsdp")
    batch_size: int | None = None
    widths: tuple[int, ...] = ()
    compute: Literal["float32", "bfloat16"] | None = None
    steps: int | None = None
    repeats: int = 10
    peak: float | None = None


def run_of(options: TrainStep, method: str) -> Config:
    """The run whose steps are timed.

    Raises:
      ValueError: if there is no such row or method.
    """
    name = f"{options.row}-{method}"
    if name not in CONFIGS:
        raise ValueError(f"no configuration is named {name!r}; rows are {list(ROWS)}")
    changed: dict[str, Any] = {
        "batch_size": options.batch_size,
        "widths": options.widths,
        "compute": options.compute,
    }
    changed = {name: value for name, value in changed.items() if value}
    # On the ramp at every step.
    return dataclasses.replace(CONFIGS[name], **changed, begin=0.0, end=1.0)


def main(options: TrainStep) -> dict[str, dict[str, float]]:
    """Times the methods and prints a line for each.

    Args:
      options: what to time.

    Returns:
      By method: ``ratio`` to the first one (median over rounds), ``milliseconds`` and
      ``tflops`` of a step, ``images_per_second``.

    Raises:
      ValueError: if there is no such row or method.
    """
    device = jax.devices()[0]
    scan = device.platform != "cpu"
    count = options.steps or (100 if scan else 1)
    calls: dict[str, Any] = {}
    flops = size = 0
    for method in options.methods:
        config = run_of(options, method)
        size = config.batch_size
        dataset = data.synthetic(
            config.dataset, count=2 * size, downscale=config.downscale
        )
        model, _, tx, state = make_setup(config, dataset, 1000 * count)
        advance = make_advance(model, tx, augment=config.augment, scan=scan)
        images = dataset.train.images[:1]
        flops = 3 * size * sdp_jax.cost(model.apply, state.variables, images).flops
        order = data.order_of(dataset.train, size, seed=0, epoch=1)
        order = jax.numpy.asarray(np.tile(order, (count, 1))[:count])
        resident = jax.tree.map(jax.numpy.asarray, dataset.train)
        calls[method] = [advance, state, resident, order]

    times: dict[str, list[float]] = {method: [] for method in calls}
    for i in range(options.repeats + 1):
        for method, call in calls.items():
            advance, state, resident, order = call
            start = time.perf_counter()
            call[1], losses = advance(state, resident, order, 0, i * count, count)
            jax.block_until_ready((call[1], losses))
            times[method].append((time.perf_counter() - start) / count)
    reference = np.asarray(times[options.methods[0]][1:])
    found: dict[str, dict[str, float]] = {}
    print(
        f"{device.platform} ({device.device_kind}), jax {jax.__version__}, "
        f"{options.row}, batch {size}, {count} steps a call, median of "
        f"{options.repeats} calls"
    )
    print(
        f"{'method':<12} {'ms a step':>10} {'ratio':>6} {'images/s':>9} {'TFLOP/s':>8}"
    )
    for method, values in times.items():
        seconds = np.asarray(values[1:])  # The first call compiles.
        median = float(np.median(seconds))
        one = {
            "ratio": float(np.median(seconds / reference)),
            "milliseconds": 1e3 * median,
            "images_per_second": size / median,
            "tflops": flops / median / 1e12,
        }
        found[method] = one
        share = "" if options.peak is None else f"  {one['tflops'] / options.peak:.1%}"
        print(
            f"{method:<12} {one['milliseconds']:10.2f} {one['ratio']:6.3f} "
            f"{one['images_per_second']:9.0f} {one['tflops']:8.3f}{share}"
        )
    return found


if __name__ == "__main__":
    main(tyro.cli(TrainStep))
