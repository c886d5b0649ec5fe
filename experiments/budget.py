"""What a run costs if what it prunes is cut at once, without training it.

``python -m experiments.budget`` prints for each row of :mod:`experiments.configs` the
FLOPs of its dense run and those of AltSDP, whose ramp is known beforehand: at each step
the network has the FLOPs that the target leaves. Where the target counts something
else, all dimensions are taken to lose the same share. A step counts three times the
forward pass.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import tyro

import sdp_jax
from experiments import data
from experiments.config import Config
from experiments.configs import CONFIGS, ROWS
from experiments.optimizers import pruning_steps
from experiments.train import make_setup
from sdp_jax import target
from sdp_jax.polynomial import Polynomial


@dataclasses.dataclass(frozen=True)
class Budget:
    """What to count.

    Attributes:
      rows: rows of :mod:`experiments.configs`.
    """

    rows: tuple[str, ...] = tuple(ROWS)


def ramp(config: Config, steps: int) -> np.ndarray:
    """The share of the target that is gone behind each step.

    Args:
      config: a run with a target.
      steps: number of its updates.

    Returns:
      Numbers ``(steps,)``.
    """
    begin, end = pruning_steps(config, steps)
    done = (np.arange(1, steps + 1) - begin) / (end - begin)
    return (config.sparsity or 0.0) * target.ramp(np.clip(done, 0, 1))


def flops_left(
    groups: sdp_jax.Groups, counted: Polynomial, gone: np.ndarray
) -> np.ndarray:
    """The share of the FLOPs that is left when a share of something else has gone.

    Args:
      groups: the channel dimensions.
      counted: what the target counts, in the widths.
      gone: shares of it that are gone.

    Returns:
      Numbers of the same shape; widths are no whole numbers.
    """
    sizes = list(groups.sizes.values())

    def at(polynomial: Polynomial, widths: np.ndarray) -> np.ndarray:
        whole = polynomial.at(sizes)
        rows = [polynomial.at([w * n for n in sizes]) / whole for w in widths]
        return np.asarray(rows)

    # The same share of each width, from a table.
    widths = np.linspace(0, 1, 1001)
    width = np.interp(1 - gone, at(counted, widths), widths)
    return np.interp(width, widths, at(groups.need_flops(), widths))


def count(row: str) -> dict[str, float]:
    """The costs of a row.

    Args:
      row: its name.

    Returns:
      ``dense``, FLOPs of the dense run; ``share`` of them that the run with AltSDP
      costs; ``end``, the share that its last step costs.

    Raises:
      ValueError: if there is no such row.
    """
    if row not in ROWS:
        raise ValueError(f"no row is named {row!r}; there are {', '.join(ROWS)}")
    config = CONFIGS[f"{row}-altsdp"]
    size = data.INFO[config.dataset].train
    steps = size // config.batch_size * config.epochs
    some = data.synthetic(config.dataset, count=16, downscale=config.downscale)
    kept: list[Any] = []

    def make() -> None:
        kept.append(make_setup(config, some, steps))

    jax.eval_shape(make)
    groups = kept[0].groups
    sizes = list(groups.sizes.values())
    if config.target == "channels":
        counted = Polynomial.of({(k,): 1.0 for k in range(len(sizes))})
    elif config.target == "params":
        counted = groups.at("params").parameters
    else:
        counted = groups.need_flops()
    left = flops_left(groups, counted, ramp(config, steps))
    # The first step is still dense.
    left = np.append(1.0, left[:-1])
    images = steps * config.batch_size
    return {
        "dense": 3 * groups.need_flops().at(sizes) * images,
        "share": float(left.mean()),
        "end": float(left[-1]),
    }


def main(budget: Budget) -> dict[str, dict[str, float]]:
    """Prints a line for each row.

    Args:
      budget: what to count.

    Returns:
      By row what :func:`count` found.
    """
    found = {}
    width = max(len(row) for row in budget.rows)
    print(f"{'row':<{width}}  FLOPs, dense  AltSDP, cut at once  last step")
    for row in budget.rows:
        found[row] = got = count(row)
        print(
            f"{row:<{width}}  {got['dense']:12.2e}  {got['share']:19.1%}  "
            f"{got['end']:9.1%}"
        )
    return found


if __name__ == "__main__":
    main(tyro.cli(Budget, description=__doc__))
