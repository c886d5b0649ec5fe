"""Arguments that are no arrays: they are passed to a function as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def is_static(leaf: Any) -> bool:
    """Whether an argument is no array: a Python number, a string, a function."""
    return not (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def written(leaf: Any) -> tuple[type, str] | None:
    """How a value is written that never changes; ``None`` for any other object.

    It tells 1, 1.0 and True apart, and 0.0 and -0.0, which are equal.
    """
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else None


def separate(args: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and a function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if not is_static(leaf)]

    def join(arrays: Sequence[Any]) -> Any:
        full = list(leaves)
        for i, leaf in zip(dynamic, arrays, strict=True):
            full[i] = leaf
        return jax.tree.unflatten(treedef, full)

    return [leaves[i] for i in dynamic], join
