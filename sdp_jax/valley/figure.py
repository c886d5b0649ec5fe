"""The picture of a certificate."""

import os
from typing import Any

import numpy as np

REFERENCE, PRUNED, OTHER = "#666666", "#d1495b", "#2e86ab"


def draw(certificate: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draws a :class:`sdp_jax.valley.Certificate`, and writes it to a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'sdp-jax[plot]'"
        ) from error
    panels = [_paths, _moves, _spectrum]
    if certificate.histories:
        panels.insert(1, _histories)
    figure = Figure(figsize=(4.4 * len(panels), 4.0), layout="constrained")
    for axes, panel in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        panel(axes, certificate)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(certificate.verdict, fontsize="medium")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _paths(axes: Any, certificate: Any) -> None:
    for found, colour, label in (
        (certificate.line, PRUNED, "straight line"),
        (certificate.curve, OTHER, "trained curve"),
    ):
        text = f"{label}, barrier {found.barrier:.4f}"
        axes.plot(
            found.places, found.train["loss"], "o-", color=colour, label=text, ms=3
        )
    low = certificate.reference["train"]["loss"]
    top = low + certificate.tolerance
    axes.axhspan(low, top, color=REFERENCE, alpha=0.15, label="tolerance", lw=0)
    axes.set(
        xlabel="from the reference (0) to the pruned solution (1)",
        ylabel="training loss",
        title="loss along the paths",
    )
    axes.legend(frameon=False, fontsize="small")


def _histories(axes: Any, certificate: Any) -> None:
    colours = (REFERENCE, PRUNED, OTHER)
    for i, (name, values) in enumerate(certificate.histories.items()):
        epochs = np.arange(1, len(values) + 1)
        axes.plot(epochs, values, color=colours[i % 3], label=name)
    axes.set(xlabel="epoch", ylabel="training loss", title="training", yscale="log")
    axes.legend(frameon=False, fontsize="small")


def _moves(axes: Any, certificate: Any) -> None:
    moves = certificate.displacements
    names = list(moves)
    shares = [moves[name].sharp_share for name in names]
    colours = [PRUNED if name == "pruned" else REFERENCE for name in names]
    bars = axes.bar(names, shares, color=colours, width=0.6)
    losses = [f"loss {moves[name].train['loss']:.3g}" for name in names]
    axes.bar_label(bars, losses, fontsize="small")
    axes.set(
        ylabel="share in the sharp directions",
        title="moves of the same kind",
    )
    axes.margins(y=0.15)


def _spectrum(axes: Any, certificate: Any) -> None:
    values, errors = certificate.eigenvalues, certificate.eigenvalue_errors
    places = np.arange(1, len(values) + 1)
    if certificate.density is None:
        axes.errorbar(places, values, errors, fmt="o", color=REFERENCE, ms=4)
        axes.set(
            xlabel="number",
            ylabel="eigenvalue",
            title="largest eigenvalues",
            ylim=(0, None),
        )
        return
    density = certificate.density
    low = min(0.0, float(density.nodes.min()))
    high = max(float(density.nodes.max()), float(values.max(initial=0.0)))
    width = (high - low or 1.0) / 150
    grid = np.linspace(low - 5 * width, high + 5 * width, 1000)
    axes.plot(grid, density.at(grid, width), color=REFERENCE, label="density")
    floor = 0.1 / density.size / width
    axes.plot(
        values,
        np.full(len(values), 2 * floor),
        "|",
        color=PRUNED,
        ms=10,
        label="largest eigenvalues",
    )
    axes.set(
        xlabel="eigenvalue",
        ylabel="density",
        title="spectrum",
        yscale="log",
        ylim=(floor, None),
    )
    axes.legend(frameon=False, fontsize="small")
