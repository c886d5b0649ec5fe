"""Modules that hold their arrays (nnx, Equinox) as functions of them."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.tree import PyTree, leaf_dtype, leaf_table


@dataclasses.dataclass(frozen=True)
class NnxFunction:
    """A method of an nnx module as a function of its state."""

    graph: Any
    method: str = "__call__"

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with this state."""
        module = sys.modules["flax.nnx"].merge(self.graph, params)
        return getattr(module, self.method)(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class EquinoxFunction:
    """An Equinox module as a function of its arrays."""

    rest: Any

    def __call__(self, params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with these arrays."""
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
    """A module as a function and its arrays; ``None`` for anything else.

    A method of an nnx module, and a module with some arguments given
    (``functools.partial``), are modules as well.
    """
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if isinstance(model, functools.partial):
        found = split_module(model.func)
        if found is None:
            return None
        fn, params = found

        def with_arguments(params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
            return fn(params, *model.args, *args, **model.keywords | kwargs)

        return with_arguments, params
    if nnx is not None:
        bound = inspect.ismethod(model) and isinstance(model.__self__, nnx.Module)
        owner = model.__self__ if bound else model
        if isinstance(owner, nnx.Module):
            graph, params = nnx.split(owner)
            _check_arrays(params, owner)
            method = model.__name__ if bound else "__call__"
            return NnxFunction(graph, method), params
    if equinox is not None and isinstance(model, equinox.Module):
        params, rest = equinox.partition(model, equinox.is_array)
        # What only wraps a function (filter_jit) is one.
        if any(_is_trained(leaf) for leaf in jax.tree.leaves(params)):
            return EquinoxFunction(rest), params
    inner = getattr(model, "__wrapped__", None)
    if inner is not None and split_module(inner) is not None:
        raise TypeError(
            f"{model!r} wraps a module, whose arrays it hides (as jax.vmap and jax.jit "
            "do): give the module itself, or a function of its arrays and these"
        )
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
