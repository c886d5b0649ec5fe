"""What a function costs: parameters, FLOPs, bytes of activations, latency."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats

from sdp_jax.tracing.rules import RULES
from sdp_jax.tracing.source import user_line
from sdp_jax.tracing.static import separate
from sdp_jax.tracing.trace import NO_RULE
from sdp_jax.tree import PyTree, leaf_dtype


@dataclasses.dataclass(frozen=True)
class EquationCost:
    """Cost of one equation of a trace.

    Attributes:
      primitive: its primitive.
      where: the user's file and line, or an empty string.
      flops: floating-point operations; a multiplication and an addition are two.
      bytes: size of its results.
      repeats: how often it runs (equations inside of ``scan``).
    """

    primitive: str
    where: str
    flops: int
    bytes: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a function.

    Attributes:
      parameters: number of entries of the parameters.
      parameter_bytes: their size.
      flops: floating-point operations of one call.
      activation_bytes: size of all intermediate results, as the trace has them (a
        compiler that fuses stores fewer).
      equations: the same, equation by equation.
    """

    parameters: int
    parameter_bytes: int
    flops: int
    activation_bytes: int
    equations: tuple[EquationCost, ...]

    def summary(self, rows: int = 10) -> str:
        """The totals, and the most expensive equations."""
        lines = [
            f"{self.parameters:,} parameters ({self.parameter_bytes:,} bytes), "
            f"{self.flops:,} FLOPs, {self.activation_bytes:,} bytes of activations"
        ]
        ranked = sorted(self.equations, key=lambda e: -e.flops * e.repeats)
        for e in ranked[:rows]:
            share = e.flops * e.repeats / max(self.flops, 1)
            lines.append(
                f"{share:6.1%}  {e.flops * e.repeats:>16,}  {e.primitive}  {e.where}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def cost(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> Cost:
    """Counts what ``fn(params, *inputs)`` costs, without running it.

    Contractions and convolutions count ``2 × multiplications``, with padded positions
    of convolutions counted like others; element-wise primitives and reductions one
    operation for each entry; moves of data none. A loop counts its length, ``cond`` its
    dearest branch, ``while`` one turn, because nobody knows how many there will be.

    Args:
      fn: a function that JAX can trace.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: its other arguments, likewise; what is no array is passed as it is.

    Returns:
      A :class:`Cost`.

    Raises:
      Whatever ``fn`` raises when it is traced with these arguments.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> fn = lambda params, x: jnp.tanh(x @ params)
      >>> sdp_jax.cost(fn, jnp.ones((4, 8)), jnp.ones((2, 4))).flops  # 2·2·4·8 + 2·8
      144
    """
    moving, join = separate(inputs)
    closed = jax.make_jaxpr(lambda p, arrays: fn(p, *join(arrays)))(params, moving)
    equations = tuple(_walk(closed.jaxpr, 1))
    leaves = jax.tree.leaves(params)
    return Cost(
        sum(math.prod(np.shape(x)) for x in leaves),
        sum(math.prod(np.shape(x)) * leaf_dtype(x).itemsize for x in leaves),
        sum(e.flops * e.repeats for e in equations),
        sum(e.bytes * e.repeats for e in equations),
        equations,
    )


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a function takes, and how that compares with the first one.

    Attributes:
      seconds: median of one call.
      ratio: median of its time over that of the first function in the same round.
      low: lower end of a 95 % interval of that median.
      high: upper end. Where 1 lies between, the two cannot be told apart.
    """

    seconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def latency(
    *fns: Callable[..., Any], args: Sequence[Sequence[Any]], repeats: int = 20
) -> list[Timing]:
    """How long one call of several functions takes, compared on a busy machine.

    In each round all of them run once, in random order, and are compared with the first
    one in that round alone: what slows the machine down slows all of them down. The
    interval is that of order statistics of these ratios and supposes no distribution;
    fewer than six rounds give no 95 %, but all that was seen.

    Args:
      *fns: functions to compile and time.
      args: for each of them its arguments.
      repeats: number of timed rounds, after one that is not timed.

    Returns:
      For each function a :class:`Timing`: ``seconds``, the ``ratio`` to the first
      function, and the ends ``low`` and ``high`` of the interval of that ratio.

    Raises:
      ValueError: if there are not as many arguments as functions, or no rounds.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> x = jnp.ones((8, 8))
      >>> once, twice = sdp_jax.latency(
      ...     jnp.sin, lambda x: jnp.sin(x @ x), args=[(x,), (x,)], repeats=3)
      >>> once.seconds > 0 and twice.low <= twice.ratio <= twice.high
      True
    """
    if len(fns) != len(args) or repeats < 1:
        raise ValueError(
            f"latency needs arguments for each function and at least one round; got "
            f"{len(fns)} functions, {len(args)} arguments, {repeats} rounds"
        )
    calls = []
    for fn, given in zip(fns, args, strict=True):
        moving, join = separate(given)
        compiled = jax.jit(lambda moving, fn=fn, join=join: fn(*join(moving)))
        calls.append(functools.partial(compiled, moving))
        jax.block_until_ready(calls[-1]())
    rng = np.random.default_rng(0)
    times = np.empty((len(fns), repeats))
    for turn in range(repeats):
        for k in rng.permutation(len(fns)):
            start = time.perf_counter()
            jax.block_until_ready(calls[k]())
            times[k, turn] = time.perf_counter() - start
    return [Timing(float(np.median(t)), *_interval(t / times[0])) for t in times]


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the ends of its 95 % interval by order statistics."""
    values = np.sort(values)
    count = int(scipy.stats.binom.ppf(0.025, len(values), 0.5))
    inside = values[max(count - 1, 0) : len(values) - max(count - 1, 0)]
    return float(np.median(values)), float(inside[0]), float(inside[-1])


def _walk(jaxpr: Any, repeats: int) -> list[EquationCost]:
    out: list[EquationCost] = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        rule = RULES.get(name, NO_RULE)
        if inner := bodies(eqn):
            times, choices = rule.runs(eqn, inner)
            walks = [[e for b in c for e in _walk(b, repeats * times)] for c in choices]
            out += max(walks, key=lambda w: sum(e.flops * e.repeats for e in w))
        else:
            out.append(
                EquationCost(
                    name,
                    user_line(eqn.source_info),
                    int(rule.flops(eqn, _shapes(eqn.invars), _shapes(eqn.outvars))),
                    _bytes(eqn.outvars),
                    repeats,
                )
            )
    return out


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs that an equation runs (not once for each entry)."""
    if eqn.primitive.name == "reduce":
        return []
    if eqn.primitive.name == "custom_linear_solve":
        return [eqn.params["jaxprs"].solve.jaxpr]
    keys = ("jaxpr", "call_jaxpr", "body_jaxpr", "cond_jaxpr", "branches")
    found = []
    for key in keys:
        value = eqn.params.get(key)
        for body in value if isinstance(value, tuple) else [value]:
            body = getattr(body, "jaxpr", body)
            if hasattr(body, "eqns"):
                found.append(body)
    return found


def _bytes(variables: Sequence[Any]) -> int:
    return sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in variables
        if hasattr(v.aval, "shape")
    )


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(getattr(v.aval, "shape", ())) for v in variables]
