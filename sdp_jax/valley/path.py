"""The loss along paths between two solutions: straight line, and trained curve."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax.tree import PyTree
from sdp_jax.valley.curvature import LossFn, Progress
from sdp_jax.valley.vectors import wide

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class PathLoss:
    """Metrics along a path.

    Attributes:
      places: parameter of the path, from 0 (the reference) to 1, ``(points,)``.
      train: metrics on the training data by name, ``"loss"`` among them, each
        ``(points,)``.
      test: the same on the test data; empty without.
    """

    places: np.ndarray
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]

    @property
    def barrier(self) -> float:
        """How far the training loss rises above the line between its two ends.

        As in Frankle, Dziugaite, Roy, Carbin, ICML 2020, arXiv 1912.05671; 0 if it
        nowhere does, infinite where the loss is not a number.
        """
        loss = np.nan_to_num(self.train["loss"], nan=np.inf, posinf=np.inf)
        chord = (1 - self.places) * loss[0] + self.places * loss[-1]
        return float(np.max(loss - chord))


def on_line(first: PyTree, last: PyTree, t: float | jax.Array) -> PyTree:
    """The point at share ``t`` of the way, in the dtype of ``first``."""
    return jax.tree.map(
        lambda a, b: ((1 - t) * wide(a) + t * wide(b)).astype(a.dtype), first, last
    )


def on_curve(first: PyTree, bend: PyTree, last: PyTree, t: float | jax.Array) -> PyTree:
    """The point of the quadratic Bézier curve, in the dtype of ``first``.

    ``(1 − t)² first + 2 t (1 − t) bend + t² last``.
    """

    def leaf(a: jax.Array, m: jax.Array, b: jax.Array) -> jax.Array:
        point = (1 - t) ** 2 * wide(a) + 2 * t * (1 - t) * wide(m) + t**2 * wide(b)
        return point.astype(a.dtype)

    return jax.tree.map(leaf, first, bend, last)


def train_bend(
    loss_fn: LossFn,
    first: PyTree,
    last: PyTree,
    data: Iterable[Any],
    *,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PyTree:
    """Trains the middle point of a Bézier curve for a low mean loss along it.

    It starts half-way, at least float32; each step takes a batch and a random place.
    Without an optimizer: Adam, its rate falling from 1e-3 to 0 on a cosine. Garipov,
    Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
    Ensembling of DNNs", NeurIPS 2018, arXiv 1802.10026.
    """
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, max(steps, 1)))
    tx = optimizer

    @jax.jit
    def step(bend: PyTree, state: Any, batch: Any, t: jax.Array) -> Any:
        grads = jax.grad(lambda m: loss_fn(on_curve(first, m, last, t), batch))(bend)
        updates, state = tx.update(grads, state, bend)
        return optax.apply_updates(bend, updates), state

    bend: Any = jax.tree.map(lambda a, b: (wide(a) + wide(b)) / 2, first, last)
    state = tx.init(bend)
    places = np.random.default_rng(seed).uniform(size=steps)
    batches = iter(data)
    for n, t in enumerate(places):
        batch = next(batches, None)
        if batch is None:
            batches = iter(data)
            batch = next(batches)
        bend, state = step(bend, state, batch, jnp.asarray(t, jnp.float32))
        if progress is not None:
            progress("curve", n + 1, steps)
    return bend


def metrics_along(
    path: Callable[[float], PyTree],
    measure: Callable[[PyTree], tuple[Metrics, Metrics]],
    places: np.ndarray,
    *,
    ends: tuple[tuple[Metrics, Metrics], tuple[Metrics, Metrics]],
    stage: str,
    progress: Progress | None = None,
) -> PathLoss:
    """Measures along a path from 0 to 1 whose ends are measured already."""
    inside = []
    for n, t in enumerate(places[1:-1]):
        inside.append(measure(path(float(t))))
        if progress is not None:
            progress(stage, n + 1, len(places) - 2)
    rows = [ends[0], *inside, ends[1]]
    train, test = (
        {k: np.asarray([row[i][k] for row in rows]) for k in rows[0][i]} for i in (0, 1)
    )
    return PathLoss(np.asarray(places), train, test)
