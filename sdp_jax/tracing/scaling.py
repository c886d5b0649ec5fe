"""Which producers may be scaled, channel by channel, without changing the function.

One pass over a trace, forward. Scale the entries of one producer in channel ``c`` by
``λ_c``: an array in which ``c`` lies along one axis is *homogeneous of degree k* if its
entries there are multiplied by ``λ_c^k`` and no others change. Products add degrees,
roots halve them, sums need equal ones; a sum over the channels or a function of another
kind ends it. A producer is scale-invariant if its degree has become 0 wherever it goes.

A bias moves its channels instead: it is followed as a *shift* that is the same at all
places, until the mean is subtracted, or the variance taken. A producer in front of it
is then judged as if the bias were zero, since the function does not depend on it.

Small constants that keep a denominator from zero count as zero, and running statistics
follow what they are statistics of, as they do in training.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import Literal

from sdp_jax.groups import Groups
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.flops import kinds
from sdp_jax.tracing.origins import CALLS
from sdp_jax.tracing.ports import class_channels
from sdp_jax.tracing.trace import Body, Record, number_of
from sdp_jax.tracing.values import Axis, Value

# Constants below this, added to a variance or a norm, count as zero.
SMALL = 1e-2
NOTHING: Mapping[int, Any] = {}


class Degree(NamedTuple):
    """Along which axis the channels lie, and the power of their factors."""

    axis: int
    power: float


class Shift(NamedTuple):
    """How an array moves with a bias: ``factor`` times sums of an array that does.

    The array is ``root`` (that of a bias is negative), ``steps`` are what has been done
    to it, and ``squared`` what has been done to the square of that, if to anything.
    """

    axis: int
    factor: float
    root: int
    steps: tuple[Any, ...] = ()
    squared: tuple[Any, ...] | None = None


class Scaling(NamedTuple):
    """What is known of an array.

    Attributes:
      degree: by producer, where it is not 0.
      shift: by bias.
      state: of what comes from running statistics alone, by dimension.
      centred: the producers of which running statistics have been subtracted.
      stacked: biases of the steps of a loop, which begin to move in it.
    """

    degree: Mapping[int, Degree] = NOTHING
    shift: Mapping[int, Shift] = NOTHING
    state: Mapping[int, Degree] = NOTHING
    centred: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()


NONE = Scaling()
Follow: TypeAlias = Callable[["Walk", Record, list[Scaling]], list[Scaling]]
# What goes into bodies, in which the biases of a loop are.
BODIES = CALLS | {"scan"}


class Walk:
    """One pass over a trace for all producers of all dimensions."""

    def __init__(
        self, found: Analysis, groups: Groups, rules: Mapping[str, Follow]
    ) -> None:
        self._rules = rules
        self._found = found
        self._groups = groups
        # Producers by number: dimension, path, axis.
        self.sources: list[tuple[int, str, int]] = []
        self.uneven: set[int] = set()  # Not homogeneous somewhere.
        self.moves: set[int] = set()  # A shift that does not drop out.
        self.ends: set[int] = set()  # Of degree 0 from some place on.
        self.drops: set[int] = set()  # A shift that drops out somewhere.
        self.needs: dict[int, set[int]] = {}  # Biases that have to drop out.
        self._roots = 0
        self._label = found.solution.label
        self._there: dict[int, tuple[np.ndarray, frozenset[int]]] = {}

    def invariant(self) -> set[tuple[int, str, int]]:
        """The producers that are scale-invariant."""
        outs = self.run(self._found.body, self._leaves())
        for path, out in zip(self._found.outputs, outs, strict=True):
            if path not in self._found.renewed:
                self.lose(out)
        gone = self.drops - self.moves
        free = {s for s in self.ends - self.uneven if self.needs.get(s, gone) <= gone}
        return {self.sources[s] for s in free | gone}

    def _leaves(self) -> list[Scaling]:
        """The arguments of the function."""
        numbers: dict[tuple[int, str, int], int] = {}
        leaves: dict[str, Scaling] = {}
        for k, d in enumerate(self._groups):
            for m in d.members:
                if m.role == "consumer":
                    continue
                old = leaves.get(m.path, NONE)
                if m.role == "state":
                    state = {**old.state, k: Degree(m.axis, 1.0)}
                    leaves[m.path] = old._replace(state=state)
                    continue
                place = (k, m.path, m.axis)
                # A shift of several entries is not the same at all places.
                single = m.outer * m.inner == 1 and place not in numbers
                if place not in numbers:
                    numbers[place] = len(self.sources)
                    self.sources.append(place)
                s = numbers[place]
                degree = {**old.degree, s: Degree(m.axis, 1.0)}
                shift = {b: x for b, x in old.shift.items() if b != s}
                stacked = old.stacked - {s}
                shape = self._groups.shapes[m.path]
                if single and math.prod(shape) == shape[m.axis]:
                    shift[s] = Shift(m.axis, 1.0, -1 - s)
                elif single and m.axis and math.prod(shape[1:]) == shape[m.axis]:
                    stacked |= {s}
                leaves[m.path] = Scaling(degree, shift, stacked=stacked)
        found = [leaves.get(leaf.path, NONE) for leaf in self._groups.leaves]
        return found + [NONE] * (len(self._found.body.ins) - len(found))

    def run(self, body: Body, ins: Sequence[Scaling]) -> list[Scaling]:
        """Follows the arguments of a jaxpr to its results."""
        env: dict[Any, Scaling] = dict(zip(body.jaxpr.invars, ins, strict=True))

        def read(var: Any) -> Scaling:
            return NONE if isinstance(var, Literal) else env.get(var, NONE)

        for record in body.records:
            given = [self._live(read(v)) for v in record.eqn.invars]
            if all(x is NONE for x in given):
                continue
            name = record.eqn.primitive.name
            if name not in BODIES:
                self.moves.update(*(x.stacked for x in given))
            outs = self._rules.get(name, unknown)(self, record, given)
            for var, out in zip(record.eqn.outvars, outs, strict=True):
                if any(out):
                    env[var] = out
        return [self._live(read(v)) for v in body.jaxpr.outvars]

    def _live(self, x: Scaling) -> Scaling:
        """Less those of which all is known."""
        if x is NONE:
            return x
        if not self.uneven.isdisjoint(x.degree):
            degree = {s: k for s, k in x.degree.items() if s not in self.uneven}
            x = x._replace(degree=degree)
        if not self.moves.isdisjoint(x.shift):
            x = x._replace(
                shift={b: k for b, k in x.shift.items() if b not in self.moves}
            )
        return x if any(x) else NONE

    def lose(self, *some: Scaling) -> None:
        """Says that nothing is known of what is made of these."""
        for x in some:
            self.uneven.update(x.degree)
            self.moves.update(x.shift, x.stacked)

    def root(self) -> int:
        """A number for an array that shifts are told of."""
        self._roots += 1
        return self._roots

    def dimension(self, source: int) -> int:
        """The number of a producer's dimension."""
        return self.sources[source][0]

    def holds(self, d: int, axis: Axis) -> bool:
        """Whether channels of a dimension are along an axis."""
        there = [self._along(f.atoms) for f in axis]
        return any(d in some or ~d in some for some in there)

    def lies_along(self, d: int, axis: Axis) -> bool:
        """Whether they are, one at each position."""
        there = [self._along(f.atoms) for f in axis]
        return sum(d in some for some in there) == 1 and not any(~d in x for x in there)

    def _along(self, atoms: np.ndarray) -> frozenset[int]:
        """The dimensions along a factor; ``~d`` if two of its channels meet there."""
        known = self._there.get(id(atoms))
        if known is None:
            kind, dimensions = self._kinds
            there = np.flatnonzero(np.bincount(kind[self._label[atoms]])).tolist()
            all_of = frozenset().union(*(dimensions[k] for k in there))
            # The arrays are kept alive, so that their identity stays theirs.
            known = self._there[id(atoms)] = (atoms, all_of)
        return known[1]

    @functools.cached_property
    def _kinds(self) -> tuple[np.ndarray, list[frozenset[int]]]:
        """For each class a number, and the dimensions of classes of that number."""
        channel = class_channels(self._found, self._groups)
        rows = np.append(self._groups.owner, -1)[channel[self._found.solution.operands]]
        kind, rows = kinds(rows)
        sets = []
        for row in rows:
            twice = {~d for d in row if row.count(d) > 1}
            sets.append(frozenset(row) | twice)
        return kind, sets


def unknown(w: Walk, record: Record, ins: list[Scaling]) -> list[Scaling]:
    """What is no function of a known kind ends it all."""
    w.lose(*ins)
    return [NONE] * len(record.outs)


def number(value: Value) -> float | None:
    """The one real number that all entries of a constant are."""
    found = number_of(value.known)
    return None if found is None or np.iscomplexobj(found) else float(found)


def is_zero(value: Value, *, nearly: bool = False) -> bool:
    """Whether it is zero, or a small positive constant."""
    found = 0 if value.zero else number(value)
    return found == 0 or (nearly and found is not None and 0 < found < SMALL)
