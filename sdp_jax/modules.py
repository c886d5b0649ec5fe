"""Modules that hold their arrays (nnx, Equinox) as functions of them."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.tree import PyTree, leaf_dtype, leaf_table


@dataclasses.dataclass(frozen=True, eq=False)
class NnxFunction:
    """An nnx module as a function of its state."""

    graph: Any

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        return sys.modules["flax.nnx"].merge(self.graph, params)(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class EquinoxFunction:
    """An Equinox module as a function of its arrays."""

    rest: Any

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        return sys.modules["equinox"].combine(params, self.rest)(*args, **kwargs)


def take_apart(
    fn: Any, args: Sequence[Any]
) -> tuple[Callable[..., Any], PyTree, tuple[Any, ...]]:
    """Function, parameters and inputs, from a function or a module and what follows."""
    found = split_module(fn)
    if found is not None:
        return *found, tuple(args)
    if not callable(fn):
        hint = (
            ". It is no function itself: give its method apply, and the parameters "
            "that its method init makes"
        )
        raise TypeError(
            "expected a function of parameters and inputs, a flax.nnx module or an "
            f"equinox.Module; got {type(fn).__name__}{hint * hasattr(fn, 'apply')}"
        )
    if not args:
        raise TypeError(
            f"expected parameters behind the function {fn!r}: only modules that hold "
            "their arrays (flax.nnx, Equinox) go without"
        )
    return fn, args[0], tuple(args[1:])


def split_module(model: Any) -> tuple[Callable[..., Any], PyTree] | None:
    """A module as a function and its arrays; ``None`` for anything else."""
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and isinstance(model, nnx.Module):
        graph, params = nnx.split(model)
        _check_arrays(params, model)
        return NnxFunction(graph), params
    if equinox is not None and isinstance(model, equinox.Module):
        params, rest = equinox.partition(model, equinox.is_array)
        # What only wraps a function (filter_jit) is one.
        if any(_is_trained(leaf) for leaf in jax.tree.leaves(params)):
            return EquinoxFunction(rest), params
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(model, linen.Module):
        raise TypeError(
            f"the flax.linen module {type(model).__name__} holds no arrays: give its "
            "method apply, and the variables that its method init makes"
        )
    return None


def _is_trained(leaf: Any) -> bool:
    return jnp.issubdtype(leaf_dtype(leaf), jnp.inexact)


def _check_arrays(params: PyTree, model: Any) -> None:
    for path, leaf in leaf_table(params).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"the state {path!r} of {type(model).__name__} is {leaf!r}, no array; "
                "make it an array, or a plain attribute instead of an nnx.Variable"
            )
