"""Cutting: from zero channels to smaller arrays.

``plan_cut`` decides which channels go; ``Cut.take`` slices any tree that is built like
the parameters: the parameters, running statistics, the optimizer state, an EMA.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import (
    Dimension,
    Groups,
    Leaf,
    PerChannel,
    channels_alive,
    leaf_table,
    missing_path_message,
    path_string,
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which channels stay, and how to slice trees accordingly.

    Static, hashable and printable. Make it with :func:`plan_cut`.

    Attributes:
      dense: the groups before the cut.
      kept: for each dimension, in order, the indices of the channels that stay.
    """

    dense: Groups
    kept: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Number of channels that stay, by dimension name."""
        return {
            d.name: len(k) for d, k in zip(self.dense.dimensions, self.kept, strict=True)
        }

    @functools.cached_property
    def groups(self) -> Groups:
        """The groups of the small parameters."""
        leaves = tuple(
            Leaf(
                leaf.path,
                tuple(
                    length
                    if (axis not in self._indices.get(leaf.path, {}))
                    else len(self._indices[leaf.path][axis])
                    for axis, length in enumerate(leaf.shape)
                ),
            )
            for leaf in self.dense.leaves
        )
        dimensions = []
        for d, kept in zip(self.dense.dimensions, self.kept, strict=True):
            members = []
            for m in d.members:
                # Kept positions are counted from 0 among what stays on the axis.
                stays = np.zeros(self.dense.shapes[m.path][m.axis], int)
                stays[self._axis_index(m.path, m.axis)] = 1
                rank = np.cumsum(stays) - stays
                old = m.positions(d.size)
                new = rank[old[:, list(kept), :]]
                offset = int(new[0, 0, 0])
                period = (
                    int(new[1, 0, 0]) - offset if m.outer > 1 else len(kept) * m.inner
                )
                members.append(dataclasses.replace(m, offset=offset, period=period))
            dimensions.append(Dimension(d.name, len(kept), tuple(members)))
        return Groups(tuple(dimensions), leaves)

    def take(
        self, tree: chex.ArrayTree, *, like: chex.ArrayTree | None = None
    ) -> chex.ArrayTree:
        """Slices every leaf that belongs to a channel.

        A leaf belongs to the parameter whose path its own path ends with: the
        parameters themselves, running statistics, momenta, the dual variable, an
        EMA, a whole ``TrainState``. A leaf may have one more leading axis than its
        parameter. Per-channel state of the transformations is cut as well. Everything
        else (counts, hyper-parameters, keys) passes unchanged.

        Args:
          tree: arrays or ``jax.ShapeDtypeStruct``; NumPy arrays stay NumPy arrays.
          like: what the result has to look like, for example
            ``jax.eval_shape(small_tx.init, small_params)``.

        Returns:
          A tree of the same structure with smaller leaves.

        Raises:
          ValueError: if nothing in the tree belongs to the groups, a leaf that does
            has a shape that cannot be cut (as the factored state of Adafactor), or the
            result does not look like ``like``.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[3., 0.], [4., 0.]]), "b": jnp.array([1.])}
          >>> groups = sdp_jax.groups_from_axes(
          ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
          >>> cut = sdp_jax.plan_cut(groups, params)
          >>> print(cut.take(params)["w"])
          [[3.]
           [4.]]
        """
        found = False
        unknown = False

        def slice_leaf(keys: Any, leaf: Any) -> Any:
            nonlocal found, unknown
            if isinstance(leaf, PerChannel):
                found = True
                return self._take_channels(leaf)
            path = path_string(keys)
            owner = self._owner(path)
            if owner is None:
                unknown |= np.ndim(leaf) > 0
                return leaf
            found = True
            return self._take_leaf(path, owner, leaf)

        small = jax.tree_util.tree_map_with_path(
            slice_leaf, tree, is_leaf=lambda x: isinstance(x, PerChannel)
        )
        if unknown and not found:
            raise ValueError(
                "nothing in this tree belongs to the cut; "
                + missing_path_message(
                    self.dense.leaves[0].path, list(leaf_table(tree))
                )
            )
        if like is not None:
            _check_like(small, like)
        return small

    def summary(self) -> str:
        """A table of widths and parameters before and after."""
        width = max([len(name) for name in self.widths] + [9])
        lines = [f"{'dimension':<{width}}  before   after"]
        for d, kept in zip(self.dense.dimensions, self.kept, strict=True):
            lines.append(f"{d.name:<{width}}  {d.size:6d}  {len(kept):6d}")
        before = sum(math.prod(s) for s in self.dense.shapes.values())
        after = sum(math.prod(s) for s in self.groups.shapes.values())
        lines.append(
            f"{'entries':<{width}}  {before:6d}  {after:6d}  ({after / max(before, 1):.1%})"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    @functools.cached_property
    def _indices(self) -> dict[str, dict[int, np.ndarray]]:
        """Positions that stay, by leaf path and axis."""
        masks: dict[str, dict[int, np.ndarray]] = {}
        for d, kept in zip(self.dense.dimensions, self.kept, strict=True):
            gone = np.ones(d.size, bool)
            gone[list(kept)] = False
            for m in d.members:
                length = self.dense.shapes[m.path][m.axis]
                mask = masks.setdefault(m.path, {}).setdefault(
                    m.axis, np.ones(length, bool)
                )
                mask[m.positions(d.size)[:, gone, :]] = False
        return {
            path: {axis: np.flatnonzero(mask) for axis, mask in axes.items()}
            for path, axes in masks.items()
        }

    def _axis_index(self, path: str, axis: int) -> np.ndarray:
        return self._indices[path][axis]

    @functools.cached_property
    def _owners(self) -> dict[str, str]:
        """Leaf path by what a state's path may end with."""
        owners = {leaf.path: leaf.path for leaf in self.dense.leaves}
        short: dict[str, list[str]] = {}
        for path in owners:
            _, _, rest = path.partition("/")
            if rest and rest not in owners:
                short.setdefault(rest, []).append(path)
        # ``opt_state/trace/conv/kernel`` belongs to ``params/conv/kernel``.
        return owners | {k: v[0] for k, v in short.items() if len(v) == 1}

    def _owner(self, path: str) -> str | None:
        parts = path.split("/")
        for start in range(len(parts)):
            owner = self._owners.get("/".join(parts[start:]))
            if owner is not None:
                return owner
        return None

    def _take_leaf(self, path: str, owner: str, leaf: Any) -> Any:
        indices = self._indices.get(owner)
        if not indices:
            return leaf
        shape, dense = tuple(np.shape(leaf)), self.dense.shapes[owner]
        if shape == dense:
            lead = 0
        elif shape[1:] == dense and len(shape) == len(dense) + 1:
            lead = 1
        elif math.prod(shape) <= 1:
            return leaf  # the placeholder of an optimizer that does not use this leaf
        else:
            raise ValueError(
                f"leaf {path!r} has shape {shape}, but {owner!r}, to which it belongs, "
                f"has {dense}: it cannot be cut. Factored or compressed optimizer state "
                "(Adafactor, SM3) has to be initialised anew on the small parameters; a "
                "tree that is already cut needs no second cut"
            )
        for axis, index in indices.items():
            leaf = _take(leaf, index, axis + lead)
        return leaf

    def _take_channels(self, node: PerChannel) -> PerChannel:
        shape = tuple(np.shape(node.values))
        if shape[-1:] != (self.dense.num_channels,):
            raise ValueError(
                f"per-channel state has shape {shape}, expected "
                f"{self.dense.num_channels} channels; was it cut already?"
            )
        index, start = [], 0
        for d, kept in zip(self.dense.dimensions, self.kept, strict=True):
            index += [start + i for i in kept]
            start += d.size
        index = np.asarray(index, int)
        return PerChannel(_take(node.values, index, len(shape) - 1))


def plan_cut(groups: Groups, params: chex.ArrayTree, *, floor: int = 1) -> Cut:
    """Finds the channels whose producers are all exactly zero.

    Args:
      groups: the channel dimensions.
      params: the parameters, concrete arrays.
      floor: a dimension with fewer non-zero channels keeps its first zero channels up
        to this number, because a layer of width 0 cannot be built. Zero channels that
        are kept do not change the function.

    Returns:
      A :class:`Cut`.

    Raises:
      ValueError: if ``params`` does not match the groups, ``floor`` is below 1, or a
        producer is not a number.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [4., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> sdp_jax.plan_cut(groups, params).widths
      {'hidden': 1}
    """
    if isinstance(floor, bool) or not isinstance(floor, int) or floor < 1:
        raise ValueError(
            f"floor must be an integer of at least 1, so that every layer keeps a "
            f"channel; got {floor!r}"
        )
    table = leaf_table(params)
    for d in groups:
        for m in d.members:
            if m.path not in table:
                raise ValueError(
                    f"dimension {d.name!r}: "
                    f"{missing_path_message(m.path, list(table))}; plan_cut needs all "
                    "members, also consumers and running statistics"
                )
        for m in d.producers:
            if bool(jnp.any(jnp.isnan(jnp.asarray(table[m.path])))):
                raise ValueError(
                    f"dimension {d.name!r}: {m.path!r} contains NaN; a diverged model "
                    "cannot be cut"
                )
    kept = []
    for name, alive in channels_alive(groups, params).items():
        chosen = np.asarray(alive).copy()
        missing = min(floor, groups.sizes[name]) - int(chosen.sum())
        if missing > 0:
            chosen[np.flatnonzero(~chosen)[:missing]] = True
        kept.append(tuple(int(i) for i in np.flatnonzero(chosen)))
    return Cut(groups, tuple(kept))


def _take(leaf: Any, index: np.ndarray, axis: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = list(leaf.shape)
        shape[axis] = len(index)
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return np.take(leaf, index, axis=axis)
    return jnp.take(leaf, index, axis=axis)


def _check_like(small: chex.ArrayTree, like: chex.ArrayTree) -> None:
    have, want = jax.tree.structure(small), jax.tree.structure(like)
    if have != want:
        raise ValueError(
            f"the cut tree has another structure than `like`:\n{have}\n{want}"
        )
    shapes: Mapping[str, Any] = leaf_table(like)
    for path, leaf in leaf_table(small).items():
        a = (tuple(np.shape(leaf)), jnp.result_type(leaf))
        b = (tuple(np.shape(shapes[path])), jnp.result_type(shapes[path]))
        if a != b:
            raise ValueError(
                f"leaf {path!r} of the cut tree is {a}, but `like` has {b}; initialise "
                "this part of the state anew on the small parameters"
            )
