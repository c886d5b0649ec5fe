"""Abstract values: what is known of an array while a function is traced.

Every axis of an array is a tuple of *factors*, outermost first, whose sizes multiply to
its length (an axis of length 1 has none): one that holds heads × head dimensions has
two. A position is kept where the atoms of all its factors are. The *fill* of a factor
says what the dense function holds at an absent position: 0 once certain parameter axes
are zero there (a set of their numbers, empty for "0 anyway"), or something else.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from sdp_jax.tracing.atoms import Atoms, Reason, common_sizes, deal_out

Fill: TypeAlias = frozenset[int] | None
ZERO: frozenset[int] = frozenset()
_LONGEST = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A factor of an axis: its atoms and what absent positions hold.

    Where that is not zero, ``rest`` says whether it can be computed from arrays of the
    same jaxpr, once certain parameter axes are zero there. All absent positions hold
    the same, unless it has ``varied`` with a constant that differs between them.
    """

    atoms: np.ndarray
    fill: Fill
    rest: Fill = None
    varied: bool = False

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self.atoms)


Axis: TypeAlias = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of an array."""

    axes: tuple[Axis, ...]
    data: bool  # Depends on the inputs (an activation), not on parameters alone.
    zero: bool = False  # Everywhere.
    # The entries, of scalars and small integer arrays that depend on nothing.
    known: np.ndarray | None = None
    # Depends on neither parameters nor inputs: each reader may take another part.
    free: bool = False
    # No derivative comes to it: it hangs on what stops gradients.
    still: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape."""
        return tuple(length(axis) for axis in self.axes)


def length(axis: Axis) -> int:
    """Length of an axis."""
    return math.prod(f.size for f in axis)


def refill(axis: Axis, fill: Fill) -> Axis:
    """The same axis with another fill."""
    return tuple(Factor(f.atoms, fill) for f in axis)


def union(fills: Iterable[Fill]) -> Fill:
    """What holds where all of several fills do."""
    given = list(fills)
    return None if None in given else ZERO.union(*(f or ZERO for f in given))


def agree(axes: Sequence[Axis]) -> Axis:
    """One of several axes with the same atoms, with the fills that all of them have."""
    return tuple(
        Factor(fs[0].atoms, fs[0].fill if len({f.fill for f in fs}) == 1 else None)
        for fs in zip(*axes, strict=True)
    )


class Space:
    """Makes, splits, flattens and equates axes over one set of atoms."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self._plain: dict[int, np.ndarray] = {}
        # Results by the identity of their arguments, which the values keep alive.
        self._splits: dict[tuple[int, tuple[int, ...]], tuple[np.ndarray, list]] = {}
        self._flat: dict[tuple[int, ...], tuple[list[np.ndarray], np.ndarray]] = {}

    def plain(self, size: int) -> Axis:
        """An axis that is always kept."""
        if size == 1:
            return ()
        if size not in self._plain:
            self._plain[size] = np.broadcast_to(np.zeros(1, np.int32), size)
        return (Factor(self._plain[size], ZERO),)

    def fresh(self, size: int, fill: Fill) -> Axis:
        """An axis of which nothing is known (too long a one is always kept)."""
        if size > _LONGEST:
            return self.plain(size)
        return () if size == 1 else (Factor(self.atoms.fresh(size), fill),)

    def is_plain(self, factor: Factor) -> bool:
        """Whether a factor is known to be always kept."""
        return self._plain.get(factor.size) is factor.atoms

    def plain_value(self, shape: Sequence[int], *, data: bool) -> Value:
        """An array that is always kept."""
        return Value(tuple(self.plain(n) for n in shape), data)

    def fresh_value(
        self, shape: Sequence[int], *, data: bool, zero: bool = False
    ) -> Value:
        """An array that any part can be taken of: a constant, a random number."""
        fill = ZERO if zero else None
        return Value(tuple(self.fresh(n, fill) for n in shape), data, zero)

    def copy(self, value: Value) -> Value:
        """A free array as one equation reads it, whatever others take of it."""
        fill = ZERO if value.zero else None
        axes = []
        for axis in value.axes:
            varied = any(f.rest is None or f.varied for f in axis)
            new = self.fresh(length(axis), fill)
            axes.append(tuple(Factor(f.atoms, fill, ZERO, varied) for f in new))
        return dataclasses.replace(value, axes=tuple(axes))

    def freeze(self, axis: Axis, reason: Reason) -> Axis:
        """Says that an axis is always kept; returns it so."""
        for factor in axis:
            if not self.is_plain(factor):
                self.atoms.freeze(factor.atoms, reason)
        return self.plain(length(axis))

    def split(self, factor: Factor, sizes: Sequence[int]) -> Axis:
        """Splits a factor into several, outermost first."""
        if len(sizes) == 1:
            return (factor,)
        if self.is_plain(factor):
            return tuple(f for n in sizes for f in self.plain(n))
        key = (id(factor.atoms), tuple(sizes))
        if key not in self._splits:
            self._splits[key] = (factor.atoms, self._split(factor.atoms, sizes))
        return tuple(Factor(part, factor.fill) for part in self._splits[key][1])

    def _split(self, atoms: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        grid = atoms.reshape(sizes)
        for k, size in enumerate(sizes):
            line = np.moveaxis(grid, k, 0).reshape(size, -1)
            if (line == line[:, :1]).all():
                # A repetition: only one factor varies.
                parts = [self.plain(n)[0].atoms for n in sizes]
                parts[k] = line[:, 0]
                return parts
        parts = [self.atoms.fresh(n) for n in sizes]
        self.atoms.conjoin(atoms, parts)
        return parts

    def flatten(self, axis: Axis) -> Axis:
        """The same axis with at most one factor."""
        if len(axis) < 2:
            return axis
        if all(self.is_plain(f) for f in axis):
            return self.plain(length(axis))
        live = [f for f in axis if not self.is_plain(f)]
        fill = union(f.fill for f in live)
        key = tuple(id(f.atoms) for f in axis)
        if key not in self._flat:
            arrays = [f.atoms for f in axis]
            if len(live) == 1:
                grid = np.meshgrid(*arrays, indexing="ij")
                atoms = grid[axis.index(live[0])].reshape(-1)
            else:
                atoms = self.atoms.fresh(length(axis))
                self.atoms.conjoin(atoms, arrays)
            self._flat[key] = (arrays, atoms)
        return (Factor(self._flat[key][1], fill),)

    def refine(self, axis: Axis, sizes: Sequence[int]) -> Axis:
        """Splits the factors of an axis to sizes that refine theirs."""
        shares = deal_out([f.size for f in axis], sizes)
        parts = zip(axis, shares, strict=True)
        return tuple(f for factor, share in parts for f in self.split(factor, share))

    def align(self, axes: Sequence[Axis]) -> list[Axis]:
        """Brings axes of one length to the same factors, without equating them."""
        sizes = [f.size for f in axes[0]]
        for axis in axes[1:]:
            other = [f.size for f in axis]
            if other != sizes:
                common = common_sizes(sizes, other)
                if common is None:
                    return [self.flatten(axis) for axis in axes]
                sizes = common
        return [self.refine(axis, sizes) for axis in axes]

    def unify(self, axes: Sequence[Axis], reason: Reason) -> list[Axis]:
        """Equates axes of one length; each keeps its own fills."""
        aligned = self.align(axes)
        out: list[list[Factor]] = [[] for _ in aligned]
        for factors in zip(*aligned, strict=True):
            plain = [f for f in factors if self.is_plain(f)]
            head = (plain or factors)[0]
            for f in factors:
                if f.atoms is head.atoms:
                    continue
                if plain:
                    self.atoms.freeze(f.atoms, reason)
                else:
                    self.atoms.equate(head.atoms, f.atoms)
            for line, f in zip(out, factors, strict=True):
                line.append(dataclasses.replace(f, atoms=head.atoms))
        return [tuple(line) for line in out]

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
        """Reads axes, in row-major order, as axes of other lengths, if they line up."""
        factors = tuple(f for axis in axes for f in axis)
        if all(self.is_plain(f) for f in factors):
            return [self.plain(n) for n in sizes]
        wanted = [n for n in sizes if n != 1]
        common = common_sizes([f.size for f in factors], wanted)
        if common is None:
            return None
        parts = list(self.refine(factors, common))
        out: list[Axis] = []
        for n in sizes:
            axis: list[Factor] = []
            while math.prod(f.size for f in axis) < n:
                axis.append(parts.pop(0))
            out.append(tuple(axis))
        return out
