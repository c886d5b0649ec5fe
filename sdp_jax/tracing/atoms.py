"""Atoms: unknowns that say of a position whether it is kept, and their equations.

Every position of every array axis has an atom; atom 0 stands for "always kept". A trace
leaves equalities between atoms, conjunctions (``z`` is kept where ``x`` and ``y`` both
are) and freezes. :meth:`Atoms.solve` turns them into classes: *base* classes, which may
be kept or not at will, and derived ones, which are conjunctions of base classes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sdp_jax.tracing.source import user_line


@dataclasses.dataclass(frozen=True, eq=False)
class Reason:
    """Why channels cannot be cut: what needs them whole, and at which equation."""

    primitive: str
    why: str
    source: Any = None

    @functools.cached_property
    def where(self) -> str:
        """The user's file and line, or an empty string."""
        return user_line(self.source)

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.primitive}: {self.why}{place}"


@dataclasses.dataclass
class Conjunction:
    """``z[i, j, …]`` is kept where all of ``parts[0][i], parts[1][j], …`` are."""

    z: np.ndarray
    parts: list[np.ndarray]

    def operands(self) -> np.ndarray:
        """The operands of each entry of ``z``, ``(len(z), len(parts))``."""
        grid = np.meshgrid(*self.parts, indexing="ij")
        return np.stack([g.reshape(-1) for g in grid], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The class of each atom, and of which base classes it is the conjunction."""

    label: np.ndarray  # Class 0 is always kept.
    operands: np.ndarray  # Padded with 0; a base class stands for itself.


class Atoms:
    """The unknowns of one trace and what is known of them."""

    def __init__(self) -> None:
        self.count = 1
        self._left: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._frozen: list[tuple[np.ndarray, Reason]] = []
        self._held: list[np.ndarray] = []  # Frozen by what else is.
        self._conjunctions: list[Conjunction] = []
        # Classes by what has been merged so far: equalities; freezes, too.
        self._free = np.zeros(1, np.int32)
        self._fixed: np.ndarray | None = None
        self._stuck = 0

    def fresh(self, size: int) -> np.ndarray:
        """New atoms."""
        atoms = np.arange(self.count, self.count + size, dtype=np.int32)
        self.count += size
        return atoms

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """Says that two vectors of atoms are equal, entry by entry."""
        self._left.append(a)
        self._right.append(b)

    def conjoin(self, z: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """Says that ``z``, read as a grid, is the conjunction of its parts."""
        self._conjunctions.append(Conjunction(z, list(parts)))

    def freeze(self, atoms: np.ndarray, reason: Reason) -> None:
        """Says that these atoms are always kept."""
        self._frozen.append((atoms, reason))

    def reasons(self) -> tuple[np.ndarray, dict[int, list[Reason]]]:
        """For each atom a number under which the reasons to freeze it are."""
        label = self._components(frozen=False)
        stuck = self._components() == 0
        found: dict[int, list[Reason]] = {}
        for atoms, reason in self._frozen:
            for one in np.unique(label[atoms]).tolist():
                found.setdefault(one, []).append(reason)
        # A grid that is frozen without a reason of its own has that of its factors.
        source = np.full(label.max() + 1, -1)
        source[list(found)] = list(found)
        pairs = [np.zeros((0, 2), np.int32)]
        for c in self._conjunctions:
            for part in np.moveaxis(c.operands(), 1, 0):
                both = stuck[c.z] & stuck[part]
                pairs.append(np.unique(label[np.stack([c.z, part], 1)[both]], axis=0))
        a, b = np.concatenate(pairs).T
        while True:
            before = source.copy()
            for x, y in ((a, b), (b, a)):
                new = (source[x] < 0) & (source[y] >= 0)
                source[x[new]] = source[y[new]]
            if (source == before).all():
                return source[label], found

    def solve(self) -> Solution:
        """Solves all equations; what cannot be expressed exactly becomes coarser."""
        while True:
            label = self._components()
            conjunctions = self._conjunctions
            if not conjunctions:
                return Solution(
                    label, np.arange(label.max() + 1, dtype=np.int32)[:, None]
                )
            if self._refine(label):
                continue
            z, operands = self._table(label)
            pairs = _conclusions(z, operands)
            if not pairs:
                expanded = _expand(label.max() + 1, z, operands)
                if expanded is not None:
                    return Solution(label, expanded)
                # A class is defined through itself: all such classes become one.
                live = operands > 0
                pairs = [
                    (np.broadcast_to(z[:, None], live.shape)[live], operands[live])
                ]
            # Classes are joined through one atom of each.
            atom = np.zeros(label.max() + 1, np.int32)
            atom[label[::-1]] = np.arange(len(label))[::-1]
            for a, b in pairs:
                stuck = (a == 0) | (b == 0)
                self._held.append(atom[np.maximum(a, b)[stuck]])
                self.equate(atom[a[~stuck]], atom[b[~stuck]])

    def _components(self, frozen: bool = True) -> np.ndarray:
        """The class of each atom by all equalities, with or without the freezes."""
        pairs = list(zip(self._left, self._right, strict=True))
        self._left, self._right = [], []
        zero = np.zeros(1, np.int32)
        stuck = [
            (atoms, np.broadcast_to(zero, atoms.shape))
            for atoms, _ in self._frozen[self._stuck :]
        ]
        stuck += [(atoms, np.broadcast_to(zero, atoms.shape)) for atoms in self._held]
        self._stuck, self._held = len(self._frozen), []
        self._free = _merge(self._free, pairs, self.count)
        if self._fixed is None:
            self._fixed = _merge(self._free, stuck, self.count)
        else:
            self._fixed = _merge(self._fixed, pairs + stuck, self.count)
        return self._fixed if frozen else self._free

    def _refine(self, label: np.ndarray) -> bool:
        """Brings grids over the same atoms to a common factorisation."""
        seen: dict[bytes, Conjunction] = {}
        changed = False
        for item in list(self._conjunctions):
            key = label[item.z].tobytes()
            first = seen.setdefault(key, item)
            if first is item:
                continue
            sizes = common_sizes(
                [len(p) for p in first.parts], [len(p) for p in item.parts]
            )
            if sizes is None:
                continue
            self._split_parts(first, sizes)
            self._split_parts(item, sizes)
            for a, b in zip(first.parts, item.parts, strict=True):
                self.equate(a, b)
            self._conjunctions = [c for c in self._conjunctions if c is not item]
            changed = True
        return changed

    def _split_parts(self, item: Conjunction, sizes: list[int]) -> None:
        parts = []
        shares = deal_out([len(p) for p in item.parts], sizes)
        for part, need in zip(item.parts, shares, strict=True):
            if len(need) == 1:
                parts.append(part)
                continue
            new = [self.fresh(n) for n in need]
            self.conjoin(part, new)
            parts += new
        item.parts = parts

    def _table(self, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All conjunctions as rows: class of ``z``, classes of its operands."""
        width = max(len(c.parts) for c in self._conjunctions)
        heads, rows = [], []
        for c in self._conjunctions:
            operands = np.zeros((len(c.z), width), np.int32)
            operands[:, : len(c.parts)] = label[c.operands()]
            heads.append(label[c.z])
            rows.append(operands)
        z, operands = np.concatenate(heads), np.concatenate(rows)
        # The classes that matter to the left, in their order; repetitions dropped.
        for i in range(1, width):
            again = (operands[:, :i] == operands[:, i : i + 1]).any(axis=1)
            operands[again, i] = 0
        order = np.argsort(operands == 0, axis=1, kind="stable")
        operands = np.take_along_axis(operands, order, axis=1)
        return z, operands


def _merge(
    label: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> np.ndarray:
    """The class of each of ``count`` atoms after merging; class 0 is that of atom 0.

    Atoms beyond ``label`` are classes of their own.
    """
    classes = int(label.max()) + 1
    new = np.arange(classes, classes + count - len(label), dtype=np.int32)
    if len(label) == 1:
        label, pairs = _merge_blocks(pairs, count)
    elif len(new):
        label = np.concatenate([label, new])
    if not pairs:
        return label
    a = np.concatenate([label[x] for x, _ in pairs])
    b = np.concatenate([label[y] for _, y in pairs])
    size = int(label.max()) + 1
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    merged = connected_components(graph, directed=False)[1]
    if merged[0] != 0:
        first = merged[0]
        merged = np.where(merged == first, 0, np.where(merged == 0, first, merged))
    return merged.astype(np.int32)[label]


def _merge_blocks(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Merges atoms of their own by whole blocks, and the pairs that this leaves.

    Most equalities are of arrays as they were made: of neighbouring atoms, all of them.
    """
    whole = [_is_block(x) and _is_block(y) for x, y in pairs]
    blocks = {
        (int(x[0]), len(x)) for p, w in zip(pairs, whole, strict=True) if w for x in p
    }
    table = np.array(sorted(blocks)).reshape(-1, 2)
    starts, ends = table[:, 0], table.sum(axis=1)
    # Blocks that share atoms with other blocks are left to the others.
    before = np.maximum.accumulate(np.append(0, ends))[:-1]
    after = np.append(starts, count)[1:]
    alone = (starts >= before) & (ends <= after)
    place = {int(n): k for k, n in enumerate(starts) if alone[k]}
    edges, rest = [], []
    for pair, is_whole in zip(pairs, whole, strict=True):
        ids = [place.get(int(x[0])) for x in pair] if is_whole else [None]
        edges.append(ids) if None not in ids else rest.append(pair)
    label = np.arange(count, dtype=np.int32)
    if edges:
        a, b = np.array(edges).T
        graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(table),) * 2)
        roots: dict[int, int] = {}
        for k, one in enumerate(connected_components(graph, directed=False)[1]):
            root = roots.setdefault(int(one), int(starts[k]))
            if root != starts[k]:
                label[starts[k] : ends[k]] = np.arange(root, root + table[k, 1])
    there = np.zeros(count, bool)
    there[label] = True
    return (np.cumsum(there, dtype=np.int32) - 1)[label], rest


def _is_block(atoms: np.ndarray) -> bool:
    size = len(atoms)
    return size > 1 and atoms[-1] - atoms[0] == size - 1 and (np.diff(atoms) == 1).all()


def _conclusions(
    z: np.ndarray, operands: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of classes that must be one, as far as one round can see."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def join(a: np.ndarray, b: np.ndarray) -> None:
        differ = a != b
        if differ.any():
            pairs.append((a[differ], b[differ]))

    number = (operands > 0).sum(axis=1)
    # What is always kept has operands that are always kept, and the other way.
    frozen = z == 0
    join(operands[frozen].reshape(-1), np.zeros(operands[frozen].size, np.int32))
    join(z[number == 0], np.zeros((number == 0).sum(), np.int32))
    join(z[number == 1], operands[number == 1, 0])
    live = (number > 1) & ~frozen
    z, operands, number = z[live], operands[live], number[live]
    if not len(z):
        return pairs
    # Equal operands, equal results.
    ordered = np.sort(operands, axis=1)
    _, first, inverse = np.unique(
        ordered, axis=0, return_index=True, return_inverse=True
    )
    join(z, z[first[inverse.reshape(-1)]])
    # The same in another order (a transposed grid) says nothing new.
    z, operands, number = z[first], operands[first], number[first]
    # One result, two sets of operands: they must agree one by one.
    _, first, inverse = np.unique(z, return_index=True, return_inverse=True)
    other = first[inverse.reshape(-1)]
    same = number == number[other]
    for column in range(operands.shape[1]):
        join(operands[same, column], operands[other[same], column])
        rest = ~same & (operands[:, column] > 0)
        join(operands[rest, column], operands[other[rest], 0])
        rest = ~same & (operands[other, column] > 0)
        join(operands[other[rest], column], operands[other[rest], 0])
    return pairs


def _expand(count: int, z: np.ndarray, operands: np.ndarray) -> np.ndarray | None:
    """Writes every class as a conjunction of base classes, or finds a circle."""
    live = (z > 0) & ((operands > 0).sum(axis=1) > 1)
    z, operands = z[live], operands[live]
    table = np.zeros((count, max(operands.shape[1], 1)), np.int32)
    table[:, 0] = np.arange(count)
    derived = np.zeros(count, bool)
    derived[z] = True
    rules = table.copy()
    rules[z] = operands
    for _ in range(64):
        expanded = rules[table].reshape(count, -1)
        expanded = np.sort(expanded, axis=1)
        expanded[:, 1:][expanded[:, 1:] == expanded[:, :-1]] = 0
        expanded = -np.sort(-expanded, axis=1)
        width = max(int((expanded > 0).sum(axis=1).max()), 1)
        if width > 64:
            return None
        expanded = expanded[:, :width]
        if expanded.shape == table.shape and (expanded == table).all():
            break
        table = expanded
    else:
        return None
    if derived[table].any():
        return None
    return table


def common_sizes(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest factorisation that refines two of the same number, if any."""
    bounds: set[int] = set()
    for sizes in (a, b):
        bounds |= set(np.cumprod(np.asarray(sizes[::-1], object)).tolist())
    chain = [1, *sorted(int(n) for n in bounds)]
    if any(high % low for low, high in zip(chain[:-1], chain[1:], strict=True)):
        return None
    out = [high // low for low, high in zip(chain[:-1], chain[1:], strict=True)][::-1]
    assert math.prod(out) == math.prod(a)
    return [n for n in out if n > 1]


def deal_out(sizes: Sequence[int], fine: Sequence[int]) -> list[list[int]]:
    """Which sizes of a finer factorisation make up each size of a coarser one."""
    rest = list(fine)
    out = []
    for size in sizes:
        share: list[int] = []
        while math.prod(share) < size:
            share.append(rest.pop(0))
        out.append(share)
    return out
