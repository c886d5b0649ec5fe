"""Symbolic sizes, as ``jax.export`` traces them: rules see a number in their place."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

_FUNCTIONS = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": max,
    "min": min,
    "non_negative": lambda a: max(a, 0),
}
_FIRST = 1009


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A variable of a jaxpr with numbers for symbolic sizes."""

    aval: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation as the rules see it, with numbers for symbolic sizes."""

    original: Any
    params: dict[str, Any]
    invars: list[Any]
    outvars: list[Any]

    @property
    def primitive(self) -> Any:
        """The primitive."""
        return self.original.primitive

    @property
    def source_info(self) -> Any:
        """Where the user wrote it."""
        return self.original.source_info


class Sizes:
    """Numbers that stand for symbolic sizes: a prime for each symbol."""

    def __init__(self) -> None:
        self._active = False
        self._known: dict[Any, int] = {}
        self._symbols: dict[str, int] = {}
        self._taken: set[int] = set()

    def start(self, sizes: Iterable[Any]) -> None:
        """Looks at the sizes of all that goes into a function."""
        for n in sizes:
            if isinstance(n, int):
                self._taken.add(n)
            else:
                self._active = True

    def of(self, size: Any) -> int:
        """The number for a size."""
        if isinstance(size, int):
            return size
        if not jax.export.is_symbolic_dim(size):
            return int(size)
        if size not in self._known:
            text = str(size)
            for name in re.findall(r"[A-Za-z_]\w*", text):
                if name not in _FUNCTIONS and name not in self._symbols:
                    self._symbols[name] = self._prime()
            # The text is what jax.export.symbolic_shape reads.
            scope = {"__builtins__": {}, **_FUNCTIONS, **self._symbols}
            self._known[size] = eval(text.replace("^", "**"), scope)
        return self._known[size]

    def _prime(self) -> int:
        number = max([_FIRST - 2, *self._symbols.values()]) + 2
        while any(number % d == 0 for d in range(3, int(number**0.5) + 1, 2)) or any(
            n and n % number == 0 for n in self._taken
        ):
            number += 2
        return number

    def shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """Numbers for a shape."""
        numbers = tuple(map(self.of, shape))
        for size, number in zip(shape, numbers, strict=True):
            if number < 1 and not isinstance(size, int):
                raise ValueError(
                    f"the symbolic size {size} is {number} where {self._symbols}: this "
                    "function needs longer inputs; ask for a multiple, as in "
                    'jax.export.symbolic_shape("1024*length")'
                )
        return numbers

    def view(self, eqn: Any) -> Any:
        """An equation as the rules see it; itself if no size is symbolic."""
        if not self._active:
            return eqn
        variables = [*eqn.invars, *eqn.outvars]
        params = {k: self._replace(v) for k, v in eqn.params.items()}
        if all(params[k] is v for k, v in eqn.params.items()) and not any(
            jax.export.is_symbolic_dim(n)
            for v in variables
            for n in getattr(v.aval, "shape", ())
        ):
            return eqn
        views = [self._variable(v) for v in variables]
        count = len(eqn.invars)
        return Equation(eqn, params, views[:count], views[count:])

    def _replace(self, param: Any) -> Any:
        if jax.export.is_symbolic_dim(param):
            return self.of(param)
        if type(param) is tuple:
            parts = tuple(map(self._replace, param))
            if any(a is not b for a, b in zip(parts, param, strict=True)):
                return parts
        return param

    def _variable(self, variable: Any) -> Any:
        shape = getattr(variable.aval, "shape", None)
        if isinstance(variable, Literal) or shape is None:
            return variable
        return Variable(jax.ShapeDtypeStruct(self.shape(shape), variable.aval.dtype))


def original(eqn: Any) -> Any:
    """The equation of the jaxpr."""
    return eqn.original if isinstance(eqn, Equation) else eqn
