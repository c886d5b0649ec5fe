"""A network that is cut while it trains, and when a run cuts."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

import sdp_jax
from experiments import models
from experiments.config import Config
from experiments.files import write_whole

# Odd widths are slow on every device, and a few zeros more cost little.
ROUND_TO = 8


@dataclasses.dataclass(frozen=True)
class Small:
    """What a cut has left of a network, see :class:`experiments.models.Model`."""

    dense: models.Model
    cut: sdp_jax.Cut

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the dense network, which fixed all constants in it."""
        return self.dense.widths

    def init(self, key: jax.Array, images: Any, /) -> Any:
        """Random variables of the dense network, cut."""
        return self.cut.take(self.dense.init(key, images))

    def apply(self, variables: Any, images: Any, /, **options: Any) -> Any:
        """As the dense network."""

        def dense(variables: Any, images: Any) -> Any:
            return self.dense.apply(variables, images, **options)

        return sdp_jax.narrow(dense, self.cut)(variables, images)


class Shrinking:
    """When a run cuts: at given steps, where it pays, or not at all.

    Where it pays is measured, and so another time elsewhere. The steps are kept beside
    the run; when it goes on from an earlier checkpoint, it cuts at the same ones again.

    Attributes:
      shrinker: what has been cut so far.
    """

    def __init__(
        self,
        config: Config,
        groups: sdp_jax.Groups,
        steps: int,
        directory: pathlib.Path,
    ):
        """Nothing has been cut yet.

        Args:
          config: the run.
          groups: the channel dimensions of the dense network, on all variables.
          steps: number of its updates.
          directory: where the run is kept.

        Raises:
          ValueError: if a share is outside (0, 1), or the method zeroes channels for a
            while only.
        """
        self._on = config.shrink is not None
        if self._on and config.method == "spp":
            raise ValueError(
                "spp drops channels at random, step by step: what is zero is not gone. "
                "Leave --shrink out"
            )
        shares = config.shrink or ()
        if not all(0 < share < 1 for share in shares):
            raise ValueError(
                f"shrink takes shares of the steps between 0 and 1; got {shares}"
            )
        self._given = [round(share * steps) for share in shares]
        self._path = directory / "cuts.json"
        self._made: list[int] = []
        if self._path.exists():
            self._made = json.loads(self._path.read_text())
        self._asked = 0
        self.shrinker = sdp_jax.Shrinker(groups, steps, round_to=ROUND_TO)

    @property
    def cut(self) -> sdp_jax.Cut | None:
        """What has been cut so far, ``None`` if nothing has."""
        cut = self.shrinker.cut
        return None if cut.groups is cut.dense else cut

    def model(self, dense: models.Model) -> models.Model:
        """The network as it is at present."""
        return dense if self.cut is None else Small(dense, self.cut)

    def ask(self, done: int, variables: Any) -> sdp_jax.Cut | None:
        """The cut that is made behind so many steps, or ``None``."""
        before, self._asked = self._asked, done
        if not self._on:
            return None
        if self._given:
            due = any(before < step <= done for step in self._given)
            return self.shrinker.now(done, variables) if due else None
        if done <= max(self._made, default=0):
            again = done in self._made
            return self.shrinker.now(done, variables) if again else None
        cut = self.shrinker(done, variables)
        if cut is not None:
            self._made.append(done)
            write_whole(self._path, json.dumps(self._made))
        return cut

    def restore(self, done: int, saved: Any) -> None:
        """Goes on from a checkpoint.

        Args:
          done: the number of its steps.
          saved: what :meth:`save` gave.
        """
        self._asked = done
        self.shrinker.restore(json.dumps(saved))

    def save(self) -> Any:
        """What :meth:`restore` needs, as plain lists and numbers."""
        return json.loads(self.shrinker.to_json())
