"""Time of small networks at whatever widths are left, and at rounded ones.

``python -m experiments.benchmarks.widths`` cuts each network at random, so that the
widths are uneven as after training, rounds these up in several ways, and runs all of
them and the dense network in turns. For each cut it prints the time left (95 %), and
last, for each way of rounding, the geometric means over all cuts: of the time relative
to the dense network, and to the network that is not rounded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import sdp_jax
from experiments.models import make_model
from sdp_jax.fast import steps_of
from sdp_jax.widths import round_up

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vgg_small": ("vgg_small", (16, 32, 64)),
    "vgg_small, twice": ("vgg_small", (32, 64, 128)),
    "resnet20": ("resnet20", (16, 32, 64)),
    "resnet20, half": ("resnet20", (8, 16, 32)),
}
WAYS = (1, "fast", 8, 16)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      networks: names of the networks; all of them if empty.
      left: shares of the channels that are left, about.
      cuts: random cuts for each share.
      batch_size: images in a call.
      side: their height and width.
      repeats: timed rounds.
    """

    networks: tuple[str, ...] = ()
    left: tuple[float, ...] = (0.5, 0.8)
    cuts: int = 2
    batch_size: int = 32
    side: int = 32
    repeats: int = 11


def cut_at_random(groups: sdp_jax.Groups, left: float, seed: int) -> dict[str, int]:
    """Widths at which each dimension keeps about this share of its channels."""
    rng = np.random.default_rng(seed)
    shares = np.clip(left + rng.uniform(-0.15, 0.15, len(groups)), 0, 1)
    pairs = zip(groups.sizes.items(), shares, strict=True)
    return {name: max(1, round(size * share)) for (name, size), share in pairs}


def make_cut(groups: sdp_jax.Groups, widths: dict[str, int], way: Any) -> sdp_jax.Cut:
    """The cut to these widths, rounded up."""
    steps = steps_of(way)
    return sdp_jax.Cut(
        groups,
        tuple(tuple(range(round_up(widths[d.name], d.size, steps))) for d in groups),
    )


def main(config: Config) -> dict[str, dict[str, float]]:
    """Times all cuts and prints the ratios.

    Args:
      config: what to time.

    Returns:
      For each way of rounding, by its name, the geometric means ``dense`` and
      ``uneven`` of the ratios, and ``worst``, the largest to the uneven network.
    """
    print(
        f"{jax.default_backend()}, jax {jax.__version__}, batch {config.batch_size}, "
        f"images of {config.side}², fast multiple {sdp_jax.fast_multiple()}"
    )
    x = jnp.ones((config.batch_size, config.side, config.side, 3))
    found: dict[Any, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for name in config.networks or NETWORKS:
        model, sizes = NETWORKS[name]
        network = make_model(model, 10, sizes)
        variables = jax.jit(network.init)(jax.random.key(0), x)
        groups = sdp_jax.find_groups(network.apply, variables, x)
        for left in config.left:
            for seed in range(config.cuts):
                widths = cut_at_random(groups, left, seed)
                cuts = [make_cut(groups, widths, way) for way in WAYS]
                fns = [sdp_jax.narrow(network.apply, cut) for cut in cuts]
                times = sdp_jax.latency(
                    network.apply,
                    *fns,
                    args=[(variables, x), *((c.take(variables), x) for c in cuts)],
                    repeats=config.repeats,
                )
                print(f"{name}, widths {list(widths.values())}: ", end="")
                parts = []
                for way, time in zip(WAYS, times[1:], strict=True):
                    found[way].append((time.ratio, time.ratio / times[1].ratio))
                    parts.append(f"{way} {time}")
                print(", ".join(parts))
    means: dict[str, dict[str, float]] = {}
    for way, pairs in found.items():
        dense, uneven = np.exp(np.log(pairs).mean(0)).tolist()
        worst = max(ratio for _, ratio in pairs)
        means[str(way)] = {"dense": dense, "uneven": uneven, "worst": worst}
        print(
            f"round_to {way}: ratio to dense {dense:.2f}, to uneven {uneven:.2f} "
            f"(at most {worst:.2f})"
        )
    return means


if __name__ == "__main__":
    main(tyro.cli(Config))
