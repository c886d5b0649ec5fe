"""What is known of a primitive, in one record."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from sdp_jax.tracing.numbers import Known

Analyse: TypeAlias = Callable[[Any, Any, list[Any]], Any]
Rebuild: TypeAlias = Callable[[Any, Any, list[Any]], Sequence[Any]]
Repeat: TypeAlias = Callable[
    [Any, Any, Sequence[Any], Sequence[int], Sequence[int]], Any
]
Flops: TypeAlias = Callable[[Any, Sequence[Any], Sequence[Any]], Any]
Runs: TypeAlias = Callable[[Any, Sequence[Any]], tuple[int, list[Sequence[Any]]]]


def per_entry(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    """One operation for each entry of the first result."""
    return math.prod(outs[0]) if outs else 0


def per_operand_entry(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    """One operation for each entry of the first operand."""
    return math.prod(shapes[0])


def moves(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> int:
    """No operation: it only moves or views entries."""
    return 0


def first_once(eqn: Any, bodies: Sequence[Any]) -> tuple[int, list[Sequence[Any]]]:
    """A call runs its first body once; the others are rules of its derivatives."""
    return 1, [bodies[:1]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known of a primitive.

    Attributes:
      analyse: from the trace, the equation and the values of its operands to those of
        its results: what it asks of the atoms. In doubt it freezes, with a reason. One
        that traces bodies returns the pair of the values and the bodies.
      rebuild: from the evaluator, the record and the small operands to the small
        results, for primitives with parameters that depend on shapes; without it the
        primitive is bound again as it is.
      known: from the equation and the entries of its operands to those of its results,
        by NumPy (``numbers.py``), where the results are a function of the operands
        alone and NumPy gives exactly what JAX gives.
      picks: whether it may leave positions of its operand unused.
      even: whether what absent positions hold is known behind it, if it is before: it
        acts on each position alone and can be bound again to that, or hands it on.
      repeat: what to do where it takes more than to bind it again: from the evaluator,
        the record, the small shape of the result, the axes along which positions are
        absent, and those of them along which they differ, to what these hold.
      flops: from the equation and the shapes of its operands and results, of numbers
        or of polynomials in the widths, to a number or a polynomial of operations.
      runs: from the equation and its bodies to how often it runs them, and to the
        alternatives of which it runs one. The operations are then those of its bodies.
    """

    analyse: Analyse
    _: dataclasses.KW_ONLY
    rebuild: Rebuild | None = None
    known: Known | None = None
    picks: bool = False
    even: bool = False
    repeat: Repeat | None = None
    flops: Flops = per_entry
    runs: Runs = first_once
