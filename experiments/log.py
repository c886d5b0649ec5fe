"""The metrics file of a run: JSON lines."""

import json
import os
import pathlib
import subprocess
from typing import Any

import jax

import sdp_jax
from experiments.config import Config
from experiments.files import write_whole


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
            self._header = {"config": config.key(), **environment()}
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
        results = [line for line in lines if "test_accuracy" in line]
        # Timed later, a run has a second one.
        self.result = results[-1] if results else None

    def truncate(self, epochs: int) -> None:
        """Forgets what came after the last checkpoint, by an atomic rewrite."""
        if epochs < len(self.epochs):
            self.result = None
        self.epochs = self.epochs[:epochs]
        records = [self._header, *self.epochs]
        if self.result is not None:
            records.append(self.result)
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_whole(self.path, text)

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


def read_finished(run: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a finished run: configuration, epochs, result.

    Args:
      run: its directory.

    Returns:
      The records.

    Raises:
      ValueError: if there is no finished run.
    """
    path = pathlib.Path(run) / "metrics.jsonl"
    lines = read_lines(path) if path.is_file() else []
    if not lines or "test_accuracy" not in lines[-1]:
        raise ValueError(
            f"{run} holds no finished run of experiments.train; the command that began "
            "it goes on where it was"
        )
    return lines


def environment() -> dict[str, Any]:
    """Versions, device and commit of a run."""
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
        "cores": os.cpu_count(),
        "commit": commit or None,
    }
