"""Paths of leaves: how the package names the arrays of a tree."""

import collections
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

PyTree: TypeAlias = Any


def leaf_table(tree: PyTree) -> dict[str, Any]:
    """All leaves by path, in order; a path is the leaf's keys joined by ``/``."""
    table: dict[str, Any] = {}
    for keys, leaf in leaf_keys(tree):
        path = "/".join(keys)
        if path in table:
            raise ValueError(
                f"two leaves have the path {path!r}; rename a key that contains '/'"
            )
        table[path] = leaf
    return table


def leaf_keys(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a tree in order, each with its keys as strings.

    A last attribute ``value`` is left out: nnx passes variables at ``init``, and plain
    arrays at ``update``. With siblings it is a field of the user's, and stays.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    families = collections.Counter(keys[:-1] for keys, _ in found if keys)
    out = []
    for keys, leaf in found:
        if keys and families[keys[:-1]] == 1 and _is_value(keys[-1]):
            keys = keys[:-1]
        names = (jax.tree_util.keystr((k,), simple=True) for k in keys)
        out.append((tuple(names), leaf))
    return out


def leaf_dtype(leaf: Any) -> Any:
    """Dtype of an array, a ``ShapeDtypeStruct`` or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _is_value(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


def missing_path_message(path: str, paths: Sequence[str]) -> str:
    """Says that a path is not in a tree, and which ones are near it."""
    top, below, rest = path.partition("/")
    if below and rest in paths:
        hint = f"the tree has {rest!r}: use groups.at({top!r}) here"
    else:
        near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
        hint = f"did you mean {near}?" if near else f"the tree has {list(paths)[:5]}"
    return f"no leaf {path!r} in the tree; {hint}"


def owner_of(
    keys: Sequence[str], shape: Sequence[int], shapes: Mapping[str, Sequence[int]]
) -> str:
    """The leaf of which an output is the new value, by path and shape, or ``""``."""
    found = {0: ""}
    keys = "/".join(keys).split("/")  # Haiku has slashes in its keys.
    for path, old in shapes.items():
        parts = path.split("/")
        # Without its first key only if that leaves more than a name like "mean".
        for tail in (parts, parts[1:] if len(parts) > 2 else []):
            if tail and keys[-len(tail) :] == tail and tuple(old) == tuple(shape):
                found.setdefault(len(tail), path)
    return found[max(found)]


def replace_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths.

    Args:
      tree: any pytree.
      leaves: leaves by path; a path that the tree has not is ignored.

    Returns:
      A tree of the same structure.
    """
    table = leaf_table(tree)
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves.get(p, x) for p, x in table.items()]
    )
