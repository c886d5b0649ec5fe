"""AltSDP on quadratics whose exact SDP point is known, as training goes on.

``python -m experiments.quadratic`` draws ``quadratic/distance.png`` and prints the loss
that rushed schedules end at, in float64, with the true sharp directions.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
import tyro

import sdp_jax
from experiments.files import write_whole

GROUP, GAMMA = 5, 0.01


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """What to compute.

    Attributes:
      dimension: number of parameters, a multiple of 5 (the size of a group).
      sharp: number of sharp directions; the others are flat.
      c: scale of the threshold.
      mu: its exponent.
      time: training time ``t``, the steps are ``t / 0.01``.
      seeds: number of problems.
      out: directory of picture and figures.
    """

    dimension: int = 100
    sharp: int = 10
    c: float = 0.1
    mu: float = 0.51
    time: float = 2000.0
    seeds: int = 4
    out: pathlib.Path = pathlib.Path("quadratic")


def problem(dimension: int, sharp: int, seed: int) -> tuple[np.ndarray, ...]:
    """Hessian, sharp directions, centre, start, and where gradient descent ends.

    Args:
      dimension: number of parameters.
      sharp: number of directions with curvature between 1 and 5.
      seed: of the problem.

    Returns:
      Arrays ``(n, n)``, ``(n, sharp)``, and three of ``(n,)``.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0][:, :sharp]
    hessian = (basis * rng.uniform(1, 5, size=sharp)) @ basis.T
    centre, start = rng.normal(size=dimension), rng.normal(size=dimension)
    return hessian, basis, centre, start, start - basis @ (basis.T @ (start - centre))


def trajectory(
    options: Quadratic, seed: int, explicit: bool, times: np.ndarray
) -> list[dict[str, float]]:
    """Distance to the exact point and loss at some times.

    Args:
      options: the problem.
      seed: of the problem.
      explicit: whether the shrinkage is projected onto the valley.
      times: training times, rising.

    Returns:
      For each time a record with ``distance``, ``loss``, ``zero`` groups and those of
      the exact point.
    """
    hessian, basis, centre, start, minimizer = problem(
        options.dimension, options.sharp, seed
    )
    params = {"w": jnp.asarray(start.reshape(-1, GROUP))}
    groups = sdp_jax.groups_from_axes(params, {"all": [sdp_jax.Member("w", 0)]})
    directions = {"w": jnp.asarray(basis.T.reshape(options.sharp, -1, GROUP))}
    rule = sdp_jax.valley_strength(options.c, options.mu, GAMMA)
    tx = sdp_jax.altsdp(GAMMA, groups, strength=rule)
    if explicit:
        tx = optax.chain(
            optax.sgd(GAMMA),
            sdp_jax.dual_averaging(),
            sdp_jax.valley.project_onto_valley(groups, rule, basis=directions),
            sdp_jax.group_soft_threshold(groups, rule),
        )

    @jax.jit
    def run(carry: Any, steps: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            params, state = carry
            flat = params["w"].reshape(-1)
            grads = {"w": (jnp.asarray(hessian) @ (flat - centre)).reshape(-1, GROUP)}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, carry)

    carry, done, records = (params, tx.init(params)), 0, []
    solution = {"w": jnp.asarray(minimizer.reshape(-1, GROUP))}
    for time in times:
        steps = round(float(time) / GAMMA)
        carry = run(carry, steps - done)
        done = steps
        strength = options.c * GAMMA**0.5 * (steps * GAMMA) ** options.mu
        exact = sdp_jax.valley.sdp(
            solution, groups, strength, directions, min_channels=0
        ).params
        w = np.asarray(carry[0]["w"])
        error = (w.reshape(-1) - centre) @ hessian @ (w.reshape(-1) - centre) / 2
        records.append(
            {
                "time": steps * GAMMA,
                "distance": float(np.linalg.norm(w - np.asarray(exact["w"]))),
                "loss": max(float(error), 0.0),
                "zero": int((np.abs(w).max(axis=1) == 0).sum()),
                "exact_zero": int((np.abs(np.asarray(exact["w"])).max(1) == 0).sum()),
            }
        )
    return records


def main(options: Quadratic) -> dict[str, Any]:
    """Computes, prints, draws.

    Args:
      options: what to compute.

    Returns:
      The figures that are written to ``quadratic.json``.
    """
    times = np.geomspace(options.time / 100, options.time, 13)
    rushed = dataclasses.replace(options, c=2.0, mu=0.6)
    figures: dict[str, Any] = {"options": dataclasses.asdict(options)}
    del figures["options"]["out"]
    with jax.enable_x64(True):
        for name, setting, when in (
            ("as training goes on", options, times),
            ("rushed", rushed, np.asarray([5.0, 50.0])),
        ):
            figures[name] = {
                method: [
                    trajectory(setting, seed, method == "explicit", when)
                    for seed in range(options.seeds)
                ]
                for method in ("plain", "explicit")
            }
    figures["slope"] = {
        method: _slope(figures["as training goes on"][method])
        for method in ("plain", "explicit")
    }
    write_whole(options.out / "quadratic.json", json.dumps(figures) + "\n")
    _draw(figures, options)
    rich.console.Console().print(_table(figures))
    return figures


def _mean(runs: list[list[dict[str, float]]], key: str) -> np.ndarray:
    """Geometric mean over the problems, one for each time."""
    values = [[max(r[key], 1e-17) for r in run] for run in runs]
    return np.exp(np.mean(np.log(values), axis=0))


def _slope(runs: list[list[dict[str, float]]]) -> float:
    """Exponent of the distance as a power of time, over the second half."""
    times = np.asarray([r["time"] for r in runs[0]])
    late = times >= np.median(times)
    fit = np.polyfit(np.log(times[late]), np.log(_mean(runs, "distance")[late]), 1)
    return float(fit[0])


def _table(figures: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(title="mean over problems")
    for name in ("", "time", "zero groups", "distance", "loss"):
        table.add_column(name, justify="right")
    for part in ("as training goes on", "rushed"):
        for method, runs in figures[part].items():
            for i in (0, -1):
                zero = np.mean([run[i]["zero"] for run in runs])
                exact = np.mean([run[i]["exact_zero"] for run in runs])
                table.add_row(
                    f"{part}, {method}",
                    f"{runs[0][i]['time']:g}",
                    f"{zero:.1f} (exact {exact:.1f})",
                    f"{_mean(runs, 'distance')[i]:.1e}",
                    f"{_mean(runs, 'loss')[i]:.1e}",
                )
    return table


def _draw(figures: dict[str, Any], options: Quadratic) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, colour in (("plain", "#666666"), ("explicit", "#d1495b")):
        runs = figures["as training goes on"][method]
        times = [r["time"] for r in runs[0]]
        label = f"AltSDP, {method}"
        slope = figures["slope"][method]
        left.loglog(
            times,
            _mean(runs, "distance"),
            color=colour,
            label=f"{label}: t^{slope:.2f}",
        )
        right.loglog(times, _mean(runs, "loss"), color=colour, label=label)
    left.set(xlabel="training time t", title="distance to the exact SDP point")
    right.set(xlabel="training time t", title="training loss (that of SGD is 0)")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out / "distance.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Quadratic))
