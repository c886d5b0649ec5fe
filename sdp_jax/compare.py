"""Whether two functions give the same, up to rounding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.measure import bodies
from sdp_jax.mesh import fetch
from sdp_jax.tracing.static import separate
from sdp_jax.tree import PyTree, leaf_keys


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where the results of two functions differ most, in one output."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    size: float
    largest: float


def differences(
    first: tuple[Callable[..., Any], PyTree, Sequence[Any]],
    second: tuple[Callable[..., Any], PyTree, Sequence[Any]],
    take: Callable[[str, Any], Any] = lambda path, output: output,
) -> list[Difference]:
    """The largest difference of each floating-point output of two functions.

    Each is given with its parameters and inputs.

    ``take`` cuts outputs of the first as the second gives them.
    """
    results = []
    with jax.default_matmul_precision("highest"):
        for fn, params, inputs in (first, second):
            moving, join = separate(inputs)

            def call(
                params: PyTree, moving: Any, fn: Any = fn, join: Any = join
            ) -> Any:
                return fn(params, *join(moving))

            results.append(jax.jit(call)(params, moving))
    out = []
    names = ["/".join(keys) for keys, _ in leaf_keys(results[0])]
    for path, a, b in zip(names, *map(jax.tree.leaves, results), strict=True):
        a = take(path, a)
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"output {path!r} has shape {np.shape(a)} in the dense function, but "
                f"{np.shape(b)} in the small one"
            )
        if not jnp.issubdtype(a.dtype, jnp.inexact) or not a.size:
            continue
        a, b = (fetch(x).astype(np.complex128) for x in (a, b))
        with np.errstate(invalid="ignore"):
            gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
        where = np.argmax(np.where(np.isnan(gap), np.inf, gap))
        index = tuple(int(i) for i in np.unravel_index(where, gap.shape))
        largest = np.max(np.abs(a), initial=0, where=np.isfinite(a))
        out.append(Difference(path, index, a.shape, float(gap[index]), float(largest)))
    return out


def rounding(fn: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> float:
    """The rounding error of the coarsest floating-point type in a function."""
    moving, join = separate(inputs)
    closed = jax.make_jaxpr(lambda p, m: fn(p, *join(m)))(params, moving)
    return max(_roundings(closed.jaxpr), default=0.0)


def _roundings(jaxpr: Any) -> set[float]:
    found = set()
    for v in [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]:
        dtype = getattr(v.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
            found.add(float(jnp.finfo(dtype).eps))
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            found |= _roundings(body)
    return found
