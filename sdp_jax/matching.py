"""Which leaves of a tree belong to the parameters that groups describe."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from sdp_jax.groups import Groups
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table

Keys = tuple[str, ...]


def is_hidden(node: Any) -> bool:
    """Whether ``optax.masked`` or ``None`` stands in a leaf's place."""
    return node is None or isinstance(node, optax.MaskedNode)


class Matcher:
    """Finds the owners of leaves by structure, keys and shapes."""

    def __init__(self, dense: Groups, cut: Mapping[str, set[int]]) -> None:
        """Takes the groups and, by path, the axes that are cut."""
        self._dense, self._cut = dense, cut
        # Optimizers have no leaves for running statistics, keys and counts.
        self._needed = {m.path for d in dense for m in d.members if m.role != "state"}
        whole = {
            tuple(leaf.path.split("/")) if leaf.path else (): leaf.path
            for leaf in dense.leaves
        }
        # Owner by keys: of the whole tree (""), and of what is below each top key.
        self._templates: dict[str, dict[Keys, str]] = {"": whole}
        for keys, path in whole.items():
            if len(keys) > 1:
                self._templates.setdefault(keys[0], {})[keys[1:]] = path

    def owners(self, entries: list[tuple[Keys, Any]]) -> dict[int, str]:
        """The path of the parameter to which each leaf belongs, by its number."""
        owners: dict[int, str] = {}
        self._find(entries, list(range(len(entries))), 0, owners)
        return owners

    def _find(
        self,
        entries: list[tuple[Keys, Any]],
        subtree: list[int],
        depth: int,
        owners: dict[int, str],
    ) -> None:
        """Finds, from the root down, subtrees that are built like the dense one."""
        leaves = [(entries[i][0][depth:], entries[i][1]) for i in subtree]
        hidden = [keys for keys, leaf in leaves if is_hidden(leaf)]
        shown = {keys: leaf for keys, leaf in leaves if not is_hidden(leaf)}
        where = entries[subtree[0]][0][:depth] if subtree else ()
        found = {
            name: template
            for name, template in self._templates.items()
            if shown
            and shown.keys() <= template.keys()
            and all(
                template[keys] not in self._needed
                or any(keys[: len(h)] == h for h in hidden)
                for keys in template.keys() - shown.keys()
            )
            and ((not name and () not in template) or self._fits(shown, template))
        }
        if found:
            # The whole before a part, then the part of that name, then what is cut.
            names = [n for n in ("", where[-1] if where else "") if n in found]
            names += [
                n for n, t in found.items() if any(p in self._cut for p in t.values())
            ]
            if not names:
                return
            if len(set(names)) > 1 and names[0] not in ("", *where[-1:]):
                raise ValueError(
                    f"the subtree {'/'.join(where)!r} could be any of {sorted(names)} "
                    "in the tree that the groups describe; pass it below its key"
                )
            for i, (keys, _) in zip(subtree, leaves, strict=True):
                if keys in shown:
                    owners[i] = found[names[0]][keys]
            return
        children: dict[str, list[int]] = {}
        for i, (keys, _) in zip(subtree, leaves, strict=True):
            if keys:
                children.setdefault(keys[0], []).append(i)
        for child in children.values():
            self._find(entries, child, depth + 1, owners)

    def _fits(self, shown: Mapping[Keys, Any], template: Mapping[Any, str]) -> bool:
        shapes = (
            (tuple(np.shape(leaf)), self._dense.shapes[template[keys]])
            for keys, leaf in shown.items()
        )
        return all(a == b or a[1:] == b or math.prod(a) <= 1 for a, b in shapes)

    def check_stranger(self, keys: Keys, leaf: Any) -> None:
        """Refuses leaves that seem to belong to the parameters but cannot be cut."""
        shape, path = tuple(np.shape(leaf)), "/".join(keys)
        for owner, axes in self._cut.items():
            dense = self._dense.shapes[owner]
            # Below its top key, too, if that leaves more than a name like "kernel".
            below = owner.partition("/")[2]
            names = [name for name in (owner, below if "/" in below else "") if name]
            if shape[-len(dense) :] == dense and any(
                f"/{path}".endswith(f"/{name}") for name in names
            ):
                raise ValueError(
                    f"leaf {path!r} has the name and shape of {owner!r} in the "
                    "groups of this cut, but the tree around it has other leaves or "
                    "shapes: it belongs to another model, or is a part; pass whole "
                    "trees to take"
                )
            lengths = {dense[axis] for axis in axes}
            within = any(f"/{name}/" in f"/{path}/" for name in names)
            if within and lengths & set(shape):
                raise ValueError(self.no_form(path, shape, owner))
        total = sum(math.prod(s) for s in self._dense.shapes.values())
        if shape == (total,) and len(self._dense.leaves) > 1:
            raise ValueError(
                f"leaf {path!r} has as many entries as all parameters together; "
                "flattened optimizer state (optax.flatten) has to be initialised anew "
                "on the small parameters"
            )

    def no_form(self, path: str, shape: tuple[int, ...], owner: str) -> str:
        """Says that a leaf has a form that cannot be cut."""
        return (
            f"leaf {path!r} has shape {shape}, but {owner!r}, to which it belongs, has "
            f"{self._dense.shapes[owner]}: it cannot be cut. Factored or compressed "
            "optimizer state (Adafactor, SM3) has to be initialised anew on the small "
            "parameters; a tree that is already cut needs no second cut"
        )


def check_like(small: PyTree, like: PyTree) -> None:
    """Refuses a cut tree that does not look like another one."""
    have, want = jax.tree.structure(small), jax.tree.structure(like)
    if have != want:
        raise ValueError(
            f"the cut tree has another structure than `like`:\n{have}\n{want}"
        )
    shapes: Mapping[str, Any] = leaf_table(like)
    for path, leaf in leaf_table(small).items():
        a = (tuple(np.shape(leaf)), leaf_dtype(leaf))
        b = (tuple(np.shape(shapes[path])), leaf_dtype(shapes[path]))
        if a != b:
            raise ValueError(
                f"leaf {path!r} of the cut tree is {a}, but `like` has {b}; initialise "
                "this part of the state anew on the small parameters"
            )
