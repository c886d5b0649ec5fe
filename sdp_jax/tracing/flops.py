"""FLOPs of a trace as a polynomial in the numbers of channels that stay."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.polynomial import Polynomial, monomial
from sdp_jax.tracing.analyse import Analysis, analyse_with, check_leaves
from sdp_jax.tracing.ports import class_channels
from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.trace import NO_RULE, Body
from sdp_jax.tracing.values import Axis
from sdp_jax.tree import PyTree


def count_flops(
    groups: Groups, fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> Groups:
    """The same groups with the FLOPs of ``fn(params, *inputs)``.

    :func:`sdp_jax.find_groups` counts those of the function that it is given; this is
    for groups made by hand, or for another function of the same parameters (inference,
    where the groups were found on a loss).

    Args:
      groups: the groups.
      fn: a function that JAX can trace. Of several branches the one counts that is
        dearest at full width.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: its other arguments, likewise.

    Returns:
      Groups whose ``flops`` is a polynomial in the numbers of channels that stay.

    Raises:
      ValueError: if the parameters are not those of the groups.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.Member("in", 1), sdp_jax.Member("out", 0, "consumer")]})
      >>> fn = lambda params, x: x @ params["in"] @ params["out"]
      >>> groups = sdp_jax.count_flops(groups, fn, params, jnp.ones((1, 4)))
      >>> groups.flops.at([8])  # 2 · 4 · 8 + 2 · 8 · 3
      112.0
    """
    check_leaves(groups, params)
    found = analyse_with(groups, fn, params, inputs, {}, derivatives=False)
    return dataclasses.replace(groups, flops=flop_polynomial(found, groups))


def flop_polynomial(found: Analysis, groups: Groups) -> Polynomial:
    """The FLOPs of a traced function in the widths of its groups."""
    return _Counter(found, groups).body(found.body)


class _Counter:
    """Counts the equations of a trace."""

    def __init__(self, found: Analysis, groups: Groups) -> None:
        self._sizes = [d.size for d in groups]
        self._label = found.solution.label
        # The last is that of classes without a channel.
        owner = np.append(groups.owner, -1)[class_channels(found, groups)]
        self._kind, self._dims = kinds(owner[found.solution.operands])
        # The arrays are kept alive, so that their identity stays theirs.
        self._lengths: dict[int, tuple[np.ndarray, Polynomial | int]] = {}

    def body(self, body: Body) -> Polynomial:
        parts = []
        for record in body.records:
            rule = RULES.get(record.eqn.primitive.name, NO_RULE)
            if record.bodies:
                times, choices = rule.runs(record.view, record.bodies)
                totals = [Polynomial.total(map(self.body, c)) for c in choices]
                parts.append(max(totals, key=lambda p: p.at(self._sizes)) * times)
                continue
            shapes, outs = (
                [[self._length(axis) for axis in v.axes] for v in values]
                for values in (record.ins, record.outs)
            )
            parts.append(rule.flops(record.view, shapes, outs))
        return Polynomial.total(parts)

    def _length(self, axis: Axis) -> Polynomial | int:
        product: Polynomial | int = 1
        for f in axis:
            if id(f.atoms) not in self._lengths:
                self._lengths[id(f.atoms)] = (f.atoms, self._count(f.atoms))
            product = product * self._lengths[id(f.atoms)][1]
        return product

    def _count(self, atoms: np.ndarray) -> Polynomial | int:
        """How many of these positions stay."""
        counts = np.bincount(self._kind[self._label[atoms]])
        found = np.flatnonzero(counts)
        return Polynomial.total(
            monomial(self._dims[k], n, self._sizes)
            for k, n in zip(found.tolist(), counts[found].tolist(), strict=True)
        )


def kinds(rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Numbers equal sets of dimensions: those of each row, and what they are."""
    rows = np.sort(rows, axis=1)
    kind, first = np.zeros(len(rows), np.int64), np.zeros(1, np.int64)
    for column in rows.T:
        both = kind * (rows.max() + 2) + column + 1
        _, first, kind = np.unique(both, return_index=True, return_inverse=True)
    return kind, [tuple(d for d in row if d >= 0) for row in rows[first].tolist()]
