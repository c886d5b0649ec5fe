"""The certificate: what was found about a pruned solution and its reference."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from sdp_jax.valley.curvature import SpectralDensity
from sdp_jax.valley.figure import draw
from sdp_jax.valley.path import Metrics, PathLoss


@dataclasses.dataclass(frozen=True)
class Displacement:
    """A move away from the reference.

    Attributes:
      length: its Euclidean length, in units of the parameters.
      sharp_share: ``‖U Δ‖ / ‖Δ‖``: how much of it lies in the sharp directions.
      curvature: ``Δᵀ H Δ / ‖Δ‖²``, the curvature of the training loss along it.
      train: metrics on the training data where it ends.
    """

    length: float
    sharp_share: float
    curvature: float
    train: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What :func:`sdp_jax.valley.certify` found: numbers, which go to JSON and back.

    Attributes:
      reference: metrics of the reference: ``{"train": …, "test": …}``, each with
        ``"loss"`` and what else ``evaluate`` gives; no ``"test"`` without test data.
      pruned: the same of the pruned solution.
      sparsity: share of the channels that are zero, or ``None`` without groups.
      line: metrics along the straight line between the two.
      curve: metrics along the trained Bézier curve.
      displacements: the move to the pruned solution (``"pruned"``) beside a random one
        whose leaves have the same lengths (``"random"``) and, with groups, beside
        setting as many channels of smallest norm to zero (``"magnitude"``).
      eigenvalues: the largest eigenvalues of the Hessian at the reference.
      eigenvalue_errors: how far each may be off.
      density: the density of all eigenvalues, if it was asked for.
      tolerance: what gap and barrier may be, in units of loss.
      same_seed: whether the two runs were said to share initialisation and data order.
      histories: training curves to draw, by name.
    """

    reference: dict[str, Metrics]
    pruned: dict[str, Metrics]
    sparsity: float | None
    line: PathLoss
    curve: PathLoss
    displacements: dict[str, Displacement]
    eigenvalues: np.ndarray
    eigenvalue_errors: np.ndarray
    density: SpectralDensity | None
    tolerance: float
    same_seed: bool
    histories: dict[str, list[float]]

    @property
    def gap(self) -> float:
        """Training loss of the pruned solution less that of the reference."""
        return self.pruned["train"]["loss"] - self.reference["train"]["loss"]

    @property
    def in_valley(self) -> bool:
        """Whether gap and barrier of the straight line are within the tolerance."""
        return self.gap <= self.tolerance and self.line.barrier <= self.tolerance

    @property
    def connected(self) -> bool:
        """Whether gap and barrier of the better path are within the tolerance.

        Independent solutions mostly are connected by a curve: this is weaker than
        :attr:`in_valley`.
        """
        barrier = min(self.line.barrier, self.curve.barrier)
        return self.gap <= self.tolerance and barrier <= self.tolerance

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.in_valley:
            return (
                "In the valley: neither the end nor the straight way to it is higher."
            )
        if self.gap > self.tolerance:
            return (
                f"Not in the valley: the training loss is {self.gap:.4f} higher, more "
                f"than {self.tolerance:.4f}."
            )
        wall = f"a barrier of {self.line.barrier:.4f} stands on the straight way"
        if self.connected:
            return (
                f"Not in the same valley, {wall}; but a curve leads around it "
                f"(barrier {self.curve.barrier:.4f})."
            )
        return (
            f"Not in the valley: {wall}, and one of {self.curve.barrier:.4f} on the "
            "curve."
        )

    def summary(self) -> str:
        """A table of what was found, and the verdict."""
        rows = []
        for part in self.reference:
            for name, value in self.reference[part].items():
                other = self.pruned[part][name]
                rows.append((f"{part} {name}", f"{value:.4f}", f"{other:.4f}"))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'':<{width}}  reference    pruned"]
        lines += [f"{name:<{width}}  {a:>9}  {b:>8}" for name, a, b in rows]
        if self.sparsity is not None:
            lines.append(f"channels that are zero: {self.sparsity:.1%}")
        lines.append(
            f"gap {self.gap:.4f}, barrier {self.line.barrier:.4f} on the straight line "
            f"and {self.curve.barrier:.4f} on the curve (tolerance "
            f"{self.tolerance:.4f})"
        )
        lines.append(
            "move        length  share in sharp directions  curvature  training loss"
        )
        for name, d in self.displacements.items():
            lines.append(
                f"{name:<9}  {d.length:7.3f}  {d.sharp_share:25.4f}  "
                f"{d.curvature:9.2e}  {d.train['loss']:13.4f}"
            )
        if len(self.eigenvalues):
            lines.append(
                f"largest curvatures: {self.eigenvalues[0]:.3g} to "
                f"{self.eigenvalues[-1]:.3g} in {len(self.eigenvalues)} directions"
            )
        if not self.same_seed:
            lines.append(
                "The runs do not share a seed: their channels may be permuted, and no "
                "permutation was sought. A barrier then does not tell valleys apart."
            )
        return "\n".join([*lines, self.verdict])

    def __str__(self) -> str:
        return self.summary()

    def to_json(self) -> str:
        """The certificate as a JSON string."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, np.ndarray) else value

        raw = dataclasses.asdict(self)
        return json.dumps(
            {"verdict": self.verdict, "in_valley": self.in_valley, **raw}, default=plain
        )

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """Reads what :meth:`to_json` wrote.

        Args:
          text: a JSON string.

        Returns:
          The certificate.

        Raises:
          ValueError: if the text is not such a JSON string.
        """
        try:
            raw = json.loads(text)
            del raw["verdict"], raw["in_valley"]
            for name in ("line", "curve"):
                path = raw[name]
                parts = (
                    {k: np.asarray(v) for k, v in path[part].items()}
                    for part in ("train", "test")
                )
                raw[name] = PathLoss(np.asarray(path["places"]), *parts)
            raw["displacements"] = {
                k: Displacement(**v) for k, v in raw["displacements"].items()
            }
            for name in ("eigenvalues", "eigenvalue_errors"):
                raw[name] = np.asarray(raw[name])
            if raw["density"] is not None:
                d = raw["density"]
                raw["density"] = SpectralDensity(
                    np.asarray(d["nodes"]), np.asarray(d["weights"]), d["size"]
                )
            return cls(**raw)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"not a certificate in JSON, as written by to_json: {error!r}"
            ) from error

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the loss along the paths, the training curves and the spectrum.

        Args:
          path: file to write, PNG, PDF or SVG by its ending.

        Returns:
          A ``matplotlib.figure.Figure``.

        Raises:
          ImportError: if matplotlib is not installed (extra ``plot``).
        """
        return draw(self, path)
