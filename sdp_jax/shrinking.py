"""Shrinking: what has become zero is cut out while the model trains."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

from sdp_jax.channels import producer_leaves
from sdp_jax.checks import check_whole
from sdp_jax.cut import Cut
from sdp_jax.fast import check_round_to
from sdp_jax.groups import Groups, need_groups
from sdp_jax.plan import RoundTo, kept_without, of_the_first, spread, widths_for
from sdp_jax.remains import zeros_that_stay
from sdp_jax.tree import PyTree, missing_path_message
from sdp_jax.zeros import zero_channels

# Looks over a whole training: often enough to follow a ramp, and too few to cost time.
LOOKS = 100
# A cut waits until so much of what it costs has been wasted on zeros. Half of it is
# within a few per cent of the best times for ramps that end at any sparsity.
WASTE = 0.5


class Shrinker:
    """Cuts channels out while the model trains, where that pays.

    A channel that is zero costs as much as a living one until it is cut, and a cut
    costs a compilation. Asked behind each step, a shrinker looks now and then which
    channels are zero, and says when to cut: as soon as the time that has gone into
    zeros since the last cut is half of the time that was spent on compiling then, if a
    cut now saves more than all of it until the end. The times are measured: the FLOPs
    that a cut saves of a step of the length that steps have at present.

    The training goes on as it would have done without: what a later step makes of the
    small parameters and the small state is what it would have made of the dense ones,
    up to rounding, as long as what was cut would have stayed zero. So it is by a
    target (:func:`sdp_jax.target_sparsity`), and for all methods by which what is gone
    stays gone. A base that looks at all gradients at once, as one that clips their
    global norm, no longer sees those of what is gone.

    The loop is the user's. ``cut.take`` cuts parameters, statistics, optimizer state
    and whatever else goes along; the function and the transformation are made anew::

        shrinker = sdp_jax.Shrinker(groups, steps)
        step = make_step(apply, groups)  # tx and a function under jit
        for n, batch in enumerate(batches, start=1):
            params, opt_state = step(params, opt_state, batch)
            cut = shrinker(n, params)
            if cut is not None:
                params, opt_state = cut.take((params, opt_state))
                small = sdp_jax.narrow(apply, shrinker.cut)
                step = make_step(small, shrinker.groups)

    At steps that one chooses oneself, ask :meth:`now` instead.

    Attributes:
      cut: what has been cut so far, as one cut of the groups that it was made with.
    """

    def __init__(
        self,
        groups: Groups,
        steps: int,
        *,
        every: int | None = None,
        patience: int = 0,
        round_to: RoundTo = 1,
    ) -> None:
        """Makes a shrinker that has not cut anything yet.

        Args:
          groups: the channel dimensions.
          steps: number of updates of the whole training.
          every: steps from one look to the next, of which each waits for the device;
            default: a hundredth of all steps.
          patience: steps that a channel must have been zero for. 0 is right where what
            is gone stays gone; strengths that shrink let channels return.
          round_to: widths to cut to, see :func:`sdp_jax.plan_cut`; channels that are
            zero fill them up.

        Raises:
          ValueError: if a number is out of range.
          TypeError: if ``groups`` is of another kind, or a number no integer.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[3., 0.], [4., 0.]])}
          >>> groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
          >>> shrinker = sdp_jax.Shrinker(groups, steps=100)
          >>> cut = shrinker.now(10, params)
          >>> print(cut.take(params)["w"].shape, shrinker.groups.sizes)
          (2, 1) {'h': 1}
          >>> shrinker.now(11, cut.take(params))  # Nothing is zero: None.
        """
        need_groups(groups)
        check_whole("steps", steps, low=1)
        self._every = max(1, steps // LOOKS) if every is None else every
        check_whole("every", self._every, low=1)
        check_whole("patience", patience)
        check_round_to(round_to, ("fast", "mesh"))
        self._steps, self._patience = steps, patience
        self._round_to: RoundTo = round_to
        self._start(Cut(groups, tuple(tuple(range(d.size)) for d in groups)))
        self._zero_since, self._looked = np.full(groups.num_channels, -1), 0
        _listen()

    def __call__(self, step: int, params: PyTree) -> Cut | None:
        """Cuts if it is time to look, something is zero, and a cut pays.

        Args:
          step: number of updates so far; the first update is 1.
          params: the parameters behind it, the tree that the groups were found on.

        Returns:
          The cut from the present shapes to the new ones, or ``None``. :attr:`cut` and
          :attr:`groups` are new with it.

        Raises:
          ValueError: if the groups know no FLOPs, the parameters are not those of the
            groups, have no values (under ``jit``), or one is not a number.
        """
        flops = self.groups.need_flops().at
        _check_values(params)
        if step < self._looked + self._every:
            return None
        self._looked = step
        jax.block_until_ready(params)
        before, self._last = self._last, (step, time.perf_counter(), _compiled[0])
        ripe = self._ripe(step, params)
        if before is None or before[0] >= step:
            return None
        updates, elapsed, compiled = np.subtract(self._last, before).tolist()
        now = flops(list(self.groups.sizes.values()))
        kept = self._kept(params, ripe)
        later = flops(list(map(len, kept)))
        saved = max(elapsed - compiled, 0) / updates * (1 - later / max(now, 1e-300))
        self._wasted += saved * updates
        cost = _compiled[0] - self._compiled
        pays = self._wasted >= WASTE * cost and saved * (self._steps - step) > cost
        if spread(params):
            pays = bool(of_the_first(pays))
        return self._cut(params, kept) if pays and later < now else None

    def now(
        self,
        step: int,
        params: PyTree,
        *,
        cut: Cut | None = None,
        nonzero: bool = False,
    ) -> Cut | None:
        """Cuts what is zero, whether it pays or not.

        Args:
          step: number of updates so far.
          params: the parameters, the tree that the groups were found on.
          cut: a cut of :attr:`groups`, instead of one of what is zero.
          nonzero: whether it may cut what is not zero, which changes the function.

        Returns:
          The cut from the present shapes to the new ones, or ``None`` if nothing goes.

        Raises:
          ValueError: if the parameters are not those of the groups, have no values
            (under ``jit``), one is not a number, or ``cut`` is one of other groups, or
            of channels that are not zero.
        """
        _check_values(params)
        if cut is None:
            ripe = self._ripe(step, params)
            return self._cut(params, self._kept(params, ripe))
        if not isinstance(cut, Cut):
            raise TypeError(
                "cut must be a sdp_jax.Cut, as plan_cut(shrinker.groups, params) makes "
                f"it; got {type(cut).__name__}"
            )
        if cut.dense != self.groups:
            self.cut.then(cut)  # It says what is wrong.
        zero = self.groups.split(zero_channels(self.groups, self._table(params)))
        pairs = zip(zero.items(), cut.kept, strict=True)
        lost = {
            name: sorted(set(np.flatnonzero(~line).tolist()) - set(kept))
            for (name, line), kept in pairs
        }
        lost = {name: channels for name, channels in lost.items() if channels}
        if lost and not nonzero:
            raise ValueError(
                f"the cut takes channels that are not zero, by dimension {lost}, and "
                "so changes the function; zero them first (cut.zero), or give "
                "nonzero=True"
            )
        return self._made(cut)

    @property
    def groups(self) -> Groups:
        """The groups of the present parameters, to make the transformation of."""
        return self.cut.groups

    @property
    def flops(self) -> float:
        """The share of the FLOPs of the dense model that a call costs at present.

        Raises:
          ValueError: if the groups know no FLOPs.
        """
        dense = self.groups.dense
        count = dense.need_flops().at
        full = count(list(dense.sizes.values()))
        return count(self.groups.widths_in(dense)) / max(full, 1e-300)

    def to_json(self) -> str:
        """What :meth:`restore` needs, for a checkpoint beside the small arrays."""
        cut = json.loads(self.cut.to_json())
        return json.dumps({"cut": cut, "zero_since": self._zero_since.tolist()})

    def restore(self, text: str) -> None:
        """Goes on from the cuts of an earlier process.

        Args:
          text: what :meth:`to_json` gave.

        Raises:
          ValueError: if it is no such text, or one of another model.
        """
        try:
            raw = json.loads(text)
            cut = Cut.from_json(json.dumps(raw["cut"]))
            since = np.asarray(raw["zero_since"], int)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a shrinker in JSON, as written by Shrinker.to_json: {error!r}"
            ) from error
        if cut.dense != self.cut.dense or since.shape != (cut.groups.num_channels,):
            raise ValueError(
                "these cuts were made on another model, of the widths "
                f"{cut.dense.sizes}; this one has {self.cut.dense.sizes}"
            )
        self._start(cut)
        self._zero_since = since

    def _start(self, cut: Cut) -> None:
        self.cut = cut
        self._last: tuple[int, float, float] | None = None
        self._wasted, self._compiled = 0.0, _compiled[0]

    def _ripe(self, step: int, params: PyTree) -> np.ndarray:
        """Which channels are zero, and have been for long enough."""
        zero = zero_channels(self.groups, self._table(params))
        known = zero & (self._zero_since >= 0)
        self._zero_since = np.where(known, self._zero_since, np.where(zero, step, -1))
        return zero & (step - self._zero_since >= self._patience)

    def _table(self, params: PyTree) -> dict[str, Any]:
        """The leaves by path, after checking them."""
        table = producer_leaves(self.groups, params)
        for leaf in self.groups.leaves:
            if leaf.path not in table:
                raise ValueError(
                    f"{missing_path_message(leaf.path, list(table))}; a shrinker needs "
                    "the tree that its groups were found on, statistics as well"
                )
        return table

    def _kept(self, params: PyTree, gone: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """What stays when these channels go."""
        widths = widths_for(self.groups, params, self._round_to)
        return kept_without(self.groups, gone, 1, widths)

    def _cut(self, params: PyTree, kept: tuple[tuple[int, ...], ...]) -> Cut | None:
        notes = zeros_that_stay(self.groups, self._table(params), kept)
        return self._made(Cut(self.groups, kept, notes))

    def _made(self, cut: Cut) -> Cut | None:
        if cut.groups is self.groups:
            return None
        since = zip(self.groups.split(self._zero_since).values(), cut.kept, strict=True)
        self._zero_since = np.concatenate([line[list(kept)] for line, kept in since])
        self._start(self.cut.then(cut))
        return cut


# Seconds that this process has spent on compiling, from the first shrinker on.
_compiled = [0.0]
_listening: list[Callable[..., None]] = []


def _listen() -> None:
    if _listening:
        return

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            _compiled[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)
    _listening.append(heard)


def _check_values(params: PyTree) -> None:
    """Refuses to look under ``jit``."""
    nothing = jax.core.Tracer | jax.ShapeDtypeStruct
    if any(isinstance(leaf, nothing) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "a shrinker looks which channels are zero, but these parameters are traced "
            "or shapes and have no values: ask it outside jit, between two steps"
        )
