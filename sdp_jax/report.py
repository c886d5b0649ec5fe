"""What a cut has changed, as a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sdp_jax._narrow import narrow
from sdp_jax.compare import differences
from sdp_jax.cut import Cut, before_and_after
from sdp_jax.measure import Cost, Timing, cost, latency
from sdp_jax.tree import PyTree
from sdp_jax.widths import powers_to, round_up


@dataclasses.dataclass(frozen=True)
class Report:
    """Dense and small function side by side.

    Attributes:
      cut: what went.
      dense: parameters, FLOPs and bytes of the dense function; ``None`` without inputs.
      small: those of the small one.
      dense_time: median ``seconds`` of a call of the dense function, compiled; measured
        in turns with the small one.
      small_time: that of the small one; its ``ratio`` to the dense one, and the ends
        ``low`` and ``high`` of a 95 % interval of it.
      difference: largest difference of their floating-point outputs.
      largest: largest magnitude of the output in which that is.
    """

    cut: Cut
    dense: Cost | None = None
    small: Cost | None = None
    dense_time: Timing | None = None
    small_time: Timing | None = None
    difference: float | None = None
    largest: float | None = None

    def __str__(self) -> str:
        """The table; with it what has to be said of it."""
        if self.dense is None or self.small is None:
            return self.cut.summary()
        rows: list[tuple[str, float, float]] = [
            (name, size, self.cut.widths[name])
            for name, size in self.cut.dense.sizes.items()
        ]
        rows += self.cut.passed
        rows += [
            ("parameters", self.dense.parameters, self.small.parameters),
            ("bytes", self.dense.parameter_bytes, self.small.parameter_bytes),
            ("FLOPs", self.dense.flops, self.small.flops),
        ]
        sizes = self.dense.activation_bytes, self.small.activation_bytes
        rows.append(("activation bytes", *sizes))
        assert self.dense_time is not None and self.small_time is not None
        times = 1e6 * self.dense_time.seconds, 1e6 * self.small_time.seconds
        rows.append(("microseconds", *times))
        lines = before_and_after("", rows)
        t = self.small_time
        lines.append(
            f"time left, in turns: {t.ratio:.1%}, between {t.low:.1%} and {t.high:.1%}"
        )
        lines.append(
            f"largest difference of the outputs: {self.difference:.2g}, "
            f"where the largest entry is {self.largest:.3g}"
        )
        if t.high >= 1:
            lines.append(self._advice(t.low > 1))
        return "\n".join([*lines, *self.cut.gone_whole, *self.cut.notes])

    def _advice(self, slower: bool) -> str:
        """Why nothing was gained, and what to do."""
        sizes = self.cut.dense.sizes
        found = self.cut.widths.items()
        # Where measured, other widths were slow.
        even = powers_to(4)
        uneven = [w for name, w in found if round_up(w, sizes[name], even) != w]
        why = (
            f"a width of {uneven[0]} may be slow on this device; prune(..., "
            'round_to="fast") leaves widths that are fast'
            if uneven
            else "the model may be too small for its FLOPs to matter"
        )
        return (
            f"the small function is {'slower' if slower else 'no faster'} here: {why}"
        )


def make_report(
    fn: Callable[..., Any],
    params: PyTree,
    cut: Cut,
    inputs: Sequence[Any],
    repeats: int,
) -> Report:
    """Counts, times and compares both functions; without inputs only the widths."""
    if not inputs:
        return Report(cut)
    need_values(inputs, "report")
    small, dense_params = narrow(fn, cut), cut.fill(params)
    dense = (dense_params, *cut.zero_inputs(*inputs))
    narrowed = (params, *cut.take_inputs(*inputs))
    found = differences(
        (fn, dense[0], dense[1:]), (small, params, narrowed[1:]), cut.take_output
    )
    worst = max(found, key=lambda d: d.size, default=None)
    dense_time, small_time = latency(fn, small, args=[dense, narrowed], repeats=repeats)
    return Report(
        cut,
        cost(fn, *dense),
        cost(small, *narrowed),
        dense_time,
        small_time,
        worst.size if worst else 0.0,
        worst.largest if worst else 0.0,
    )


def need_values(inputs: Sequence[Any], name: str) -> None:
    """Refuses shapes where the functions are run."""
    for leaf in jax.tree.leaves(inputs):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name} runs both functions on the inputs, but one of them is {leaf}: "
                "give arrays"
            )
