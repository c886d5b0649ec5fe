"""Parameters and FLOPs as polynomials in the numbers of channels that stay."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.measure import flops
from sdp_jax.tracing.analyse import Analysis, analyse
from sdp_jax.tracing.trace import Body
from sdp_jax.tracing.values import Axis
from sdp_jax.tree import PyTree


class Polynomial:
    """A polynomial in the widths of dimensions.

    Attributes:
      terms: for each monomial, a tuple of dimension numbers with repetitions, its
        coefficient.
    """

    def __init__(self, terms: dict[tuple[int, ...], float]) -> None:
        """Takes the terms."""
        self.terms = terms

    def __add__(self, other: Any) -> "Polynomial":
        """Sum with a polynomial or a number."""
        terms = dict(self.terms)
        for key, value in _terms(other).items():
            terms[key] = terms.get(key, 0.0) + value
        return Polynomial(terms)

    def __mul__(self, other: Any) -> "Polynomial":
        """Product with a polynomial or a number."""
        terms: dict[tuple[int, ...], float] = {}
        for a, x in self.terms.items():
            for b, y in _terms(other).items():
                key = tuple(sorted(a + b))
                terms[key] = terms.get(key, 0.0) + x * y
        return Polynomial(terms)

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, widths: Sequence[int]) -> float:
        """Its value where the dimensions have these widths."""
        return sum(
            value * math.prod(widths[d] for d in key)
            for key, value in self.terms.items()
        )

    def share(self, sizes: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
        """A function from widths to the share of the value at full width.

        Args:
          sizes: the full widths.

        Returns:
          A function from widths, an array ``(dimensions,)``, to a scalar.
        """
        degree = max(map(len, self.terms), default=0)
        # One more entry, 1, pads the monomials of lower degree.
        index = np.full((len(self.terms), degree), len(sizes))
        values = np.zeros(len(self.terms))
        for row, (key, value) in enumerate(self.terms.items()):
            index[row, : len(key)] = key
            values[row] = value * math.prod(sizes[d] for d in key)
        values /= max(values.sum(), 1e-300)

        def evaluate(widths: jax.Array) -> jax.Array:
            shares = jnp.append(widths / np.asarray(sizes, widths.dtype), 1)
            return jnp.sum(jnp.prod(shares[index], axis=1) * values)

        return evaluate


def _terms(other: Any) -> dict[tuple[int, ...], float]:
    return other.terms if isinstance(other, Polynomial) else {(): other}


def _monomial(dims: tuple[int, ...], count: float, sizes: Sequence[int]) -> Polynomial:
    """How many of ``count`` positions stay that need a channel of each of ``dims``."""
    out = Polynomial({(): count})
    for d, times in Counter(dims).items():
        for k in range(times):
            # Different channels of one dimension: n (n - 1) … of size (size - 1) …
            out = out * Polynomial({(d,): 1.0, (): -float(k)}) * (1 / (sizes[d] - k))
    return out


def parameter_counts(groups: Groups) -> Polynomial:
    """The number of entries of all leaves, in the widths of the groups."""
    sizes = [d.size for d in groups]
    owners: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for number, d in enumerate(groups):
        for m in d.members:
            masks = owners.setdefault((m.path, m.axis), {})
            length = groups.shapes[m.path][m.axis]
            mask = masks.setdefault(number, np.zeros(length, bool))
            mask[m.positions(d.size)] = True
    total = Polynomial({})
    for path, shape in groups.shapes.items():
        product = Polynomial({(): 1.0})
        for axis, length in enumerate(shape):
            masks = owners.get((path, axis), {})
            table = np.stack([*masks.values(), np.ones(length, bool)])
            columns, counts = np.unique(table, axis=1, return_counts=True)
            kept = Polynomial({})
            for column, count in zip(columns.T, counts.tolist(), strict=True):
                dims = tuple(
                    d for d, is_in in zip(masks, column, strict=False) if is_in
                )
                kept = kept + _monomial(dims, count, sizes)
            product = product * kept
        total = total + product
    return total


def flop_counts(
    groups: Groups, fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> Polynomial:
    """The FLOPs of ``fn(params, *inputs)``, counted as ``sdp_jax.cost`` counts.

    Args:
      groups: the groups.
      fn: a function that JAX can trace. Of several branches the one counts that is
        dearest at full width.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: its other arguments, likewise.

    Returns:
      The polynomial.
    """
    state = {m.path for d in groups for m in d.members if m.role == "state"}
    found = analyse(
        fn,
        params,
        inputs,
        is_state=state.__contains__,
        prune_inputs=groups.prune_inputs,
        prune_outputs=groups.prune_outputs,
        derivatives=False,
    )
    return _Counter(found, groups).body(found.body)


class _Counter:
    """Counts the equations of a trace."""

    def __init__(self, found: Analysis, groups: Groups) -> None:
        self._sizes = [d.size for d in groups]
        self._solution = found.solution
        self._owner = _owners(found, groups)
        # The arrays are kept alive, so that their identity stays theirs.
        self._lengths: dict[int, tuple[np.ndarray, Polynomial]] = {}

    def body(self, body: Body) -> Polynomial:
        total = Polynomial({})
        for record in body.records:
            name = record.eqn.primitive.name
            if name == "cond":
                branches = map(self.body, record.bodies)
                total = total + max(branches, key=lambda b: b.at(self._sizes))
            elif name == "while":
                total = total + sum(map(self.body, record.bodies), Polynomial({}))
            elif record.bodies:
                times = record.view.params["length"] if name == "scan" else 1
                total = total + self.body(record.bodies[0]) * times
            else:
                shapes, outs = (
                    [[self._length(axis) for axis in v.axes] for v in values]
                    for values in (record.ins, record.outs)
                )
                total = total + flops(record.view, shapes, outs)
        return total

    def _length(self, axis: Axis) -> Polynomial:
        product = Polynomial({(): 1.0})
        for f in axis:
            if id(f.atoms) not in self._lengths:
                self._lengths[id(f.atoms)] = (f.atoms, self._count(f.atoms))
            product = product * self._lengths[id(f.atoms)][1]
        return product

    def _count(self, atoms: np.ndarray) -> Polynomial:
        operands = self._solution.operands[self._solution.label[atoms]]
        owners = np.sort(self._owner[operands], axis=1)
        rows, counts = np.unique(owners, axis=0, return_counts=True)
        total = Polynomial({})
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            dims = tuple(d for d in row if d >= 0)
            total = total + _monomial(dims, count, self._sizes)
        return total


def _owners(found: Analysis, groups: Groups) -> np.ndarray:
    """For each class of a trace the number of its dimension, or -1."""
    label, operands = found.solution.label, found.solution.operands
    atoms = {(axis.path, axis.axis): axis.atoms for axis in found.axes}
    owner = np.full(len(operands), -1)
    for number, d in enumerate(groups):
        for m in d.members:
            places = m.positions(d.size).swapaxes(0, 1).reshape(d.size, -1)
            rows = operands[label[atoms[m.path, m.axis][places]]]
            # The class of a channel is the one that all of its positions have, and
            # that no other channel has.
            common = rows[:, 0]
            shared = (rows[:, :, None, :] == common[:, None, :, None]).any(3).all(1)
            single = shared & (common > 0)
            classes, times = np.unique(common[single], return_counts=True)
            owner[classes[times == 1]] = number
    return owner
