"""Polynomials in the widths of dimensions."""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """A polynomial in the widths of dimensions, in a form that is unique.

    Monomials, sorted tuples of dimension numbers, in order, with non-zero coefficients.
    """

    terms: tuple[tuple[tuple[int, ...], float], ...] = ()

    @staticmethod
    def of(terms: Mapping[tuple[int, ...], float]) -> "Polynomial":
        """The polynomial of coefficients by monomials, in any order."""
        found: dict[tuple[int, ...], float] = {}
        for key, value in terms.items():
            key = tuple(sorted(key))
            found[key] = found.get(key, 0.0) + value
        return _made(found)

    @staticmethod
    def total(parts: Iterable["Polynomial | float"]) -> "Polynomial":
        """The sum of many polynomials and numbers, in one pass."""
        found: dict[tuple[int, ...], float] = {}
        for part in parts:
            for key, value in _terms(part):
                found[key] = found.get(key, 0.0) + value
        return _made(found)

    def __add__(self, other: "Polynomial | float") -> "Polynomial":
        """Sum with a polynomial or a number."""
        return Polynomial.total((self, other))

    def __mul__(self, other: "Polynomial | float") -> "Polynomial":
        """Product with a polynomial or a number."""
        found: dict[tuple[int, ...], float] = {}
        for a, x in self.terms:
            for b, y in _terms(other):
                key = tuple(sorted(a + b)) if a and b else a or b
                found[key] = found.get(key, 0.0) + x * y
        return _made(found)

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, widths: Sequence[int]) -> float:
        """Its value where the dimensions have these widths."""
        return sum(
            value * math.prod(widths[d] for d in key) for key, value in self.terms
        )

    def share(self, sizes: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
        """A function from widths ``(dimensions,)`` to the share of the full value."""
        degree = max((len(key) for key, _ in self.terms), default=0)
        # One more entry, 1, pads the monomials of lower degree.
        index = np.full((len(self.terms), degree), len(sizes))
        values = np.zeros(len(self.terms))
        for row, (key, value) in enumerate(self.terms):
            index[row, : len(key)] = key
            values[row] = value * math.prod(sizes[d] for d in key)
        values /= max(values.sum(), 1e-300)

        def evaluate(widths: jax.Array) -> jax.Array:
            shares = jnp.append(widths / np.asarray(sizes, widths.dtype), 1)
            return jnp.sum(jnp.prod(shares[index], axis=1) * values)

        return evaluate

    def substitute(
        self, numbers: Mapping[int, int | None], sizes: Sequence[int]
    ) -> "Polynomial":
        """The polynomial in new numbers; a dimension without one stays at its size."""
        found: dict[tuple[int, ...], float] = {}
        for key, value in self.terms:
            new = [(numbers[d], sizes[d]) for d in key]
            kept = tuple(sorted(number for number, _ in new if number is not None))
            value *= math.prod(size for number, size in new if number is None)
            found[kept] = found.get(kept, 0.0) + value
        return _made(found)

    def to_list(self) -> list[Any]:
        """Its terms as plain lists and numbers: ``[[dimensions], coefficient]``."""
        return [[list(key), float(value)] for key, value in self.terms]

    @staticmethod
    def from_list(data: Any, dimensions: int) -> "Polynomial":
        """The polynomial of what :meth:`to_list` gives, checked."""
        found: dict[tuple[int, ...], float] = {}
        for term in _entries(data, "a polynomial"):
            term = _entries(term, "a term")
            if len(term) != 2:
                raise ValueError(f"a term is [dimensions, coefficient]; got {term!r}")
            key, value = _entries(term[0], "a monomial"), term[1]
            if not all(type(d) is int for d in key):
                raise TypeError(f"a monomial holds numbers of dimensions; got {key!r}")
            if not all(0 <= d < dimensions for d in key):
                raise ValueError(
                    f"a monomial has the dimensions {key!r}, but there are {dimensions}"
                )
            if type(value) not in (int, float):
                raise TypeError(f"a coefficient is a number; got {value!r}")
            if not abs(value) <= sys.float_info.max:
                raise ValueError(f"a coefficient is finite; got {value!r}")
            key = tuple(sorted(key))
            if key in found:
                raise ValueError(f"a polynomial has the monomial {list(key)} twice")
            found[key] = float(value)
        return _made(found)


def monomial(dims: tuple[int, ...], count: float, sizes: Sequence[int]) -> Polynomial:
    """How many of ``count`` positions stay that need a channel of each of ``dims``."""
    out = Polynomial.of({(): count})
    for d, times in Counter(dims).items():
        for k in range(times):
            # Different channels of one dimension: n (n - 1) … of size (size - 1) …
            out = out * Polynomial.of({(d,): 1.0, (): -float(k)}) * (1 / (sizes[d] - k))
    return out


def _made(terms: Mapping[tuple[int, ...], float]) -> Polynomial:
    return Polynomial(tuple(sorted(item for item in terms.items() if item[1])))


def _terms(other: Polynomial | float) -> Iterable[tuple[tuple[int, ...], float]]:
    return other.terms if isinstance(other, Polynomial) else (((), other),)


def _entries(data: Any, what: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        raise TypeError(f"{what} is a list; got {data!r}")
    return data
