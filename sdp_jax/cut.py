"""Cut: which channels stay, and how to slice everything accordingly.

``Cut.take`` slices any tree that is built like the parameters: the parameters, running
statistics, the optimizer state, an EMA; ``Cut.fill`` puts small trees back.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdp_jax.channels import PerChannel
from sdp_jax.dimension import Dimension, Leaf, Member, members_after
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.matching import Matcher, check_like, is_hidden
from sdp_jax.mesh import placed, sharding_of, shares
from sdp_jax.ports import ports_after
from sdp_jax.tracing.evaluate import pick_out
from sdp_jax.tree import (
    PyTree,
    leaf_dtype,
    leaf_keys,
    leaf_table,
    missing_path_message,
    owner_of,
)
from sdp_jax.zeros import at_hand


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which channels stay, and how to slice trees accordingly.

    Static, hashable and printable. Make it with :func:`plan_cut`.

    Attributes:
      dense: the groups before the cut.
      kept: for each dimension, in order, the indices of the channels that stay,
        ascending; at least one, unless the dimension is removable.
      notes: what has to be said of it: zeros that were found, and stay all the same.

    Raises:
      ValueError: if ``kept`` does not fit the groups.
    """

    dense: Groups
    kept: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # What is cached, the hash above all, is of this process.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.dense, self.kept))

    def __post_init__(self) -> None:
        """Checks that the indices fit the groups."""
        if not isinstance(self.dense, Groups):
            raise TypeError(
                f"a Cut is made of Groups; got {type(self.dense).__name__}. "
                "sdp_jax.plan_cut makes one"
            )
        if len(self.kept) != len(self.dense.dimensions):
            raise ValueError(
                f"kept has {len(self.kept)} entries, but the groups have "
                f"{len(self.dense.dimensions)} dimensions: give one tuple for each"
            )
        for d, line in zip(self.dense.dimensions, self.kept, strict=True):
            numbers = all(type(i) is int and 0 <= i < d.size for i in line)
            least = "" if d.removable else ", at least one"
            few = not line and not d.removable
            if few or not numbers or list(line) != sorted(set(line)):
                raise ValueError(
                    f"dimension {d.name!r}: kept must hold ascending channel numbers "
                    f"from 0 to {d.size - 1}{least}; got {line!r}"
                )

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Number of channels that stay, by dimension name."""
        return {
            d.name: len(k)
            for d, k in zip(self.dense.dimensions, self.kept, strict=True)
        }

    @property
    def gone_whole(self) -> list[str]:
        """A line that names the dimensions without a channel, or none."""
        gone = [name for name, width in self.widths.items() if not width]
        return [f"gone whole: {', '.join(gone)}"] if gone else []

    @functools.cached_property
    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape after the cut, by leaf path."""
        shapes = {}
        for leaf in self.dense.leaves:
            shape = list(leaf.shape)
            for axis, index in self._indices.get(leaf.path, {}).items():
                shape[axis] = len(index)
            shapes[leaf.path] = tuple(shape)
        return shapes

    @functools.cached_property
    def groups(self) -> Groups:
        """The groups of the small parameters."""
        if self.widths == self.dense.sizes:
            return self.dense
        leaves = tuple(Leaf(path, shape) for path, shape in self.small_shapes.items())
        dimensions = []
        for d, kept in zip(self.dense.dimensions, self.kept, strict=True):
            if not kept:
                continue
            members = members_after(d, kept, self._stays)
            dimensions.append(Dimension(d.name, len(kept), members, d.removable))
        places = {d.name: k for k, d in enumerate(dimensions)}
        numbers = {k: places.get(d.name) for k, d in enumerate(self.dense)}
        flops = self.dense.flops
        if flops is not None and len(dimensions) < len(self.dense):
            flops = flops.substitute(numbers, list(self.widths.values()))
        return dataclasses.replace(
            self.dense,
            dimensions=tuple(dimensions),
            leaves=leaves,
            flops=flops,
            ports=ports_after(self.dense.ports, self._alive),
            before=self.dense.dense,
        )

    def then(self, later: "Cut") -> "Cut":
        """This cut and one of what it leaves, as one cut from the dense model.

        Args:
          later: a cut of :attr:`groups`.

        Returns:
          A cut: what it takes is what ``later`` takes of what this one takes.

        Raises:
          ValueError: if ``later`` is a cut of other groups.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.ones((2, 4))}
          >>> groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
          >>> cut = sdp_jax.Cut(groups, ((0, 1, 3),))
          >>> cut.then(sdp_jax.Cut(cut.groups, ((0, 2),))).kept
          ((0, 3),)
        """
        if later.dense != self.groups:
            raise ValueError(
                "later is not a cut of what this one leaves: it was made for widths "
                f"{later.dense.sizes}, and these are {self.groups.sizes}; make it with "
                "plan_cut(cut.groups, cut.take(params))"
            )
        left = dict(zip(later.dense.sizes, later.kept, strict=True))
        pairs = zip(self.dense.sizes, self.kept, strict=True)
        kept = tuple(tuple(old[i] for i in left.get(d, ())) for d, old in pairs)
        return Cut(self.dense, kept, later.notes)

    @functools.cached_property
    def passed(self) -> list[tuple[str, int, int]]:
        """Axes of inputs and outputs that channels sit in, before and after the cut."""
        return [
            (
                f"{p.path}[{p.axis}] ({p.role})",
                len(p.channels),
                int(p.stays(self._alive).sum()),
            )
            for p in self.dense.ports
        ]

    def take(self, tree: PyTree, *, like: PyTree | None = None) -> PyTree:
        """Slices every leaf that belongs to a channel.

        Wherever in ``tree`` a subtree has the structure of the tree that the groups
        describe, or of what is below one of its top-level keys, its leaves are sliced:
        the parameters themselves, running statistics, momenta, the dual variable, an
        EMA, all of them inside a ``TrainState``. Leaves that ``optax.masked`` hides or
        that are ``None`` may be missing. A leaf may have one more leading axis than its
        parameter. Per-channel state of the transformations is cut as well. Everything
        else (counts, hyper-parameters, keys, other models) passes unchanged.

        Training goes on from there as it would have without the cut, with the same
        transformation of :attr:`groups`: targets count in the dense model, and norms
        never count what reads a channel that is zero. :class:`sdp_jax.Shrinker` cuts
        while a model trains.

        Args:
          tree: arrays or ``jax.ShapeDtypeStruct``; NumPy arrays stay NumPy arrays, and
            what a mesh shards stays sharded so.
          like: what the result has to look like, for example
            ``jax.eval_shape(small_tx.init, small_params)``.

        Returns:
          A tree of the same structure with smaller leaves.

        Raises:
          ValueError: if nothing in the tree belongs to the groups, only a part of a
            subtree does, the devices of a mesh cannot share what stays of a leaf, a
            leaf has a form that cannot be cut (as the factored state of Adafactor, or
            SM3), or the result does not look like ``like``.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[3., 0.], [4., 0.]]), "b": jnp.array([1.])}
          >>> groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
          >>> cut = sdp_jax.plan_cut(groups, params)
          >>> print(cut.take(params)["w"])
          [[3.]
           [4.]]
        """
        entries = [
            # Haiku's keys contain the separator themselves.
            (tuple("/".join(keys).split("/")) if keys else (), leaf)
            for keys, leaf in leaf_keys(tree, is_leaf=is_hidden)
        ]
        owners = self._matcher.owners(entries)
        leaves, found = [], False
        for i, (keys, leaf) in enumerate(entries):
            if keys[-1:] == PerChannel._fields:
                leaf, found = self._take_channels("/".join(keys), leaf), True
            elif i in owners:
                leaf, found = self._take_leaf("/".join(keys), owners[i], leaf), True
            elif not is_hidden(leaf) and np.ndim(leaf):
                self._matcher.check_stranger(keys, leaf)
            leaves.append(leaf)
        if not found and any(np.ndim(leaf) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                "nothing in this tree belongs to the cut; "
                + missing_path_message(
                    self.dense.leaves[0].path, list(leaf_table(tree))
                )
            )
        small = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_hidden), leaves)
        if like is not None:
            check_like(small, like)
        return small

    def fill(self, tree: PyTree) -> PyTree:
        """Puts small leaves back at their places in the dense shapes, zero elsewhere.

        Args:
          tree: a tree with the structure that the groups describe and small shapes:
            what :meth:`take` made of the parameters, or gradients of it.

        Returns:
          A tree of the same structure and dtypes with the dense shapes.

        Raises:
          ValueError: if the tree is not the small tree.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[0., 3.], [0., 4.]])}
          >>> groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
          >>> cut = sdp_jax.plan_cut(groups, params)
          >>> print(cut.fill(cut.take(params))["w"])
          [[0. 3.]
           [0. 4.]]
        """
        self.check_small(tree)
        leaves = []
        for path, leaf in leaf_table(tree).items():
            indices = self._indices.get(path, {})
            shape = self.dense.shapes[path]
            where = tuple(
                indices.get(axis, np.arange(length))
                for axis, length in enumerate(shape)
            )
            leaf = jnp.asarray(leaf)
            if at_hand(leaf):
                full = np.zeros(shape, leaf.dtype)
                full[np.ix_(*where)] = np.asarray(leaf)
                leaves.append(_put(_as(leaf, full), placed(leaf)))
                continue
            sharding, typed = placed(leaf), sharding_of(jax.typeof(leaf))
            if typed:
                leaf = jax.sharding.reshard(leaf, typed.update(spec=()))
            leaf = jnp.zeros(shape, leaf.dtype).at[np.ix_(*where)].set(leaf)
            leaf = jax.sharding.reshard(leaf, typed) if typed else leaf
            leaves.append(_put(leaf, sharding))
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def zero(self, params: PyTree) -> PyTree:
        """The dense parameters with the producers of all channels that go at zero.

        Args:
          params: the dense parameters, or gradients or the like of their shapes.

        Returns:
          A tree of the same structure, shapes and dtypes. The function that the groups
          were found on gives for it what the small function gives for :meth:`take` of
          it.

        Raises:
          ValueError: if the tree has not the producers of the groups.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[1., 3.], [1., 4.]])}
          >>> groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
          >>> print(sdp_jax.Cut(groups, ((1,),)).zero(params)["w"])
          [[0. 3.]
           [0. 4.]]
        """
        factors = jnp.asarray(self._alive.astype(float))
        return scale_channels(self.dense, params, factors)

    def take_inputs(self, *inputs: Any) -> tuple[Any, ...]:
        """The arguments behind the parameters as the small function takes them.

        Recurrent states and caches, and whatever else ``prune_inputs`` of
        :func:`sdp_jax.find_groups` named, lose the channels that are gone. What is
        small already passes unchanged, as do all other inputs.

        Args:
          *inputs: arrays or ``jax.ShapeDtypeStruct``, or trees of them.

        Returns:
          A tuple of as many.

        Raises:
          ValueError: if an input has neither its dense nor its small shape.

        Example:
          >>> import jax.numpy as jnp, sdp_jax
          >>> params = {"w": jnp.array([[3., 0.], [4., 0.]]), "u": jnp.eye(2)}
          >>> def step(params, state, x):
          ...     state = jnp.tanh(x @ params["w"]) + 0.5 * state
          ...     return state, state @ params["u"]
          >>> state, x = jnp.zeros((1, 2)), jnp.ones((1, 2))
          >>> groups = sdp_jax.find_groups(
          ...     step, params, state, x, prune_inputs=("0",), prune_outputs=("0",))
          >>> cut = sdp_jax.plan_cut(groups, params)
          >>> state, x = cut.take_inputs(state, x)
          >>> state, y = sdp_jax.narrow(step, cut)(cut.take(params), state, x)
          >>> state.shape, y.shape
          ((1, 1), (1, 2))
        """

        def take(path: str, leaf: Any) -> Any:
            axes = self._inputs.get(path, {})
            if axes and self.input_form(path, np.shape(leaf)) == "other":
                small = {axis: len(port.index) for axis, port in axes.items()}
                dense = {axis: port.length for axis, port in axes.items()}
                raise ValueError(
                    f"input {path!r} has shape {np.shape(leaf)}; expected along its "
                    f"axes the lengths {dense}, or if it is small already {small}"
                )
            for axis, port in axes.items():
                if np.shape(leaf)[axis] == port.length:
                    leaf = _take(leaf, port.index, axis)
            return leaf

        return self._each_input(take, inputs)

    def zero_inputs(self, *inputs: Any) -> tuple[Any, ...]:
        """The dense function's arguments, zero where channels of a carry are gone.

        Args:
          *inputs: arrays, or trees of them.

        Returns:
          A tuple of as many, of the same shapes. With it, and with :meth:`zero` of the
          parameters, the dense function gives what the small one gives for
          :meth:`take_inputs`.
        """

        def zero(path: str, leaf: Any) -> Any:
            for axis, port in self._inputs.get(path, {}).items():
                if port.carry:
                    stays = np.zeros(port.length, bool)
                    stays[port.index] = True
                    stays = np.expand_dims(
                        stays, [d for d in range(np.ndim(leaf)) if d != axis]
                    )
                    leaf = jnp.where(stays, leaf, jnp.zeros_like(leaf))
            return leaf

        return self._each_input(zero, inputs)

    def input_form(
        self, path: str, shape: Sequence[Any]
    ) -> Literal["whole", "small", "other"]:
        """Whether an input with channels is whole or small, by its shape."""
        axes = self._inputs.get(path, {})
        if axes and len(shape) > max(axes):
            if all(shape[axis] == port.length for axis, port in axes.items()):
                return "whole"
            if all(shape[axis] == len(port.index) for axis, port in axes.items()):
                return "small"
        return "other"

    def input_indices(self, path: str) -> dict[int, np.ndarray]:
        """Positions of an input that stay, by axis."""
        return {axis: port.index for axis, port in self._inputs.get(path, {}).items()}

    def dense_input(self, path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        """The whole of a small input."""
        shape = list(np.shape(leaf))
        for axis, port in self._inputs[path].items():
            shape[axis] = port.length
        sharding = sharding_of(jax.typeof(leaf))
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding)

    def take_output(self, path: str, output: Any) -> Any:
        """An output of the dense function as the small one gives it.

        New running statistics, known by path and shape, are cut as the old ones, and
        whatever ``prune_outputs`` of :func:`sdp_jax.find_groups` named.
        """
        dense = self.dense
        shape = np.shape(output)
        for port in dense.ports:
            length = shape[port.axis] if port.axis < len(shape) else -1
            found = port.path, port.role, len(port.channels)
            if found == (path, "output", length):
                index = np.flatnonzero(port.stays(self._alive))
                output = _take(output, index, port.axis)
        states = {m.path for d in dense for m in d.members if m.role == "state"}
        shapes = {state: dense.shapes[state] for state in states}
        owner = owner_of([path], np.shape(output), shapes)
        return self._take_leaf(path, owner, output) if owner else output

    def index(self, path: str, axis: int) -> np.ndarray | None:
        """Positions along an axis of a leaf that stay, or ``None`` if all do."""
        return self._indices.get(path, {}).get(axis)

    def check_small(self, params: PyTree) -> None:
        """Checks that a tree has the structure of the groups and the small shapes.

        Args:
          params: any tree.

        Raises:
          ValueError: if it has not.
        """
        have = {p: tuple(np.shape(x)) for p, x in leaf_table(params).items()}
        want = self.small_shapes
        odd = [p for p in {**have, **want} if have.get(p) != want.get(p)]
        if odd:
            raise ValueError(
                f"these are not the parameters of the cut: leaf {odd[0]!r} is "
                f"{have.get(odd[0])}, expected {want.get(odd[0])}; pass "
                "cut.take(params)"
            )

    def small_like(self, tree: PyTree) -> PyTree:
        """Shapes of the small parameters, in the structure of a tree.

        Args:
          tree: arrays or shapes with the structure of the dense or small parameters.

        Returns:
          A tree of ``jax.ShapeDtypeStruct``.

        Raises:
          ValueError: if the tree has another structure.
        """
        table = leaf_table(tree)
        if table.keys() != self.small_shapes.keys():
            raise ValueError(
                "the tree has the structure of neither the dense nor the small "
                f"parameters; its leaves are {list(table)[:5]}, expected "
                f"{list(self.small_shapes)[:5]}"
            )
        leaves = [
            jax.ShapeDtypeStruct(self.small_shapes[path], leaf_dtype(leaf))
            for path, leaf in table.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def to_json(self) -> str:
        """The cut as a JSON string."""
        dense = json.loads(self.dense.to_json())
        return json.dumps({"dense": dense, "kept": self.kept, "notes": self.notes})

    @classmethod
    def from_json(cls, text: str) -> "Cut":
        """Reads what :meth:`to_json` wrote.

        Args:
          text: a JSON string.

        Returns:
          A cut equal to the one that was written.

        Raises:
          ValueError: if the text is not such a JSON string.
        """
        try:
            raw = json.loads(text)
            dense = Groups.from_json(json.dumps(raw["dense"]))
            kept = tuple(tuple(line) for line in raw["kept"])
            notes = tuple(str(note) for note in raw.get("notes", ()))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"not a cut in JSON, as written by Cut.to_json: {error!r}"
            ) from error
        try:
            return cls(dense, kept, notes)
        except ValueError as error:
            raise ValueError(f"not a cut in JSON: {error}") from error

    def summary(self) -> str:
        """A table of before and after the cut: widths, entries, FLOPs; and notes."""
        rows: list[tuple[str, float, float]] = [
            (d.name, d.size, len(kept))
            for d, kept in zip(self.dense.dimensions, self.kept, strict=True)
        ]
        rows += self.passed
        before = sum(math.prod(s) for s in self.dense.shapes.values())
        after = sum(math.prod(s) for s in self.small_shapes.values())
        rows.append(("entries", before, after))
        if self.dense.flops is not None:
            flops = self.dense.flops.at
            full, left = (list(w.values()) for w in (self.dense.sizes, self.widths))
            rows.append(("FLOPs", flops(full), flops(left)))
        table = before_and_after("dimension", rows)
        return "\n".join([*table, *self.gone_whole, *self.notes])

    def __str__(self) -> str:
        return self.summary()

    @functools.cached_property
    def kept_channels(self) -> np.ndarray:
        """Numbers of the channels that stay, in a vector of all."""
        numbers = self.dense.split(np.arange(self.dense.num_channels))
        lines = zip(numbers.values(), self.kept, strict=True)
        parts = [line[list(kept)] for line, kept in lines]
        return np.concatenate([np.zeros(0, int), *parts])

    @functools.cached_property
    def _alive(self) -> np.ndarray:
        """Which of all channels stay."""
        alive = np.zeros(self.dense.num_channels, bool)
        alive[self.kept_channels] = True
        return alive

    @functools.cached_property
    def _inputs(self) -> dict[str, dict[int, "_Input"]]:
        """The axes of inputs along which channels sit, by path and axis."""
        out: dict[str, dict[int, _Input]] = {}
        for p in self.dense.ports:
            if p.role != "output":
                index = np.flatnonzero(p.stays(self._alive))
                axis = _Input(len(p.channels), index, p.role == "carry")
                out.setdefault(p.path, {})[p.axis] = axis
        return out

    def _each_input(
        self, function: Callable[[str, Any], Any], inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        leaves = [function("/".join(keys), leaf) for keys, leaf in leaf_keys(inputs)]
        return jax.tree.unflatten(jax.tree.structure(inputs), leaves)

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

    def _stays(self, m: Member) -> np.ndarray:
        """Which positions along the axis of a member stay."""
        stays = np.zeros(self.dense.shapes[m.path][m.axis], bool)
        stays[self._indices[m.path][m.axis]] = True
        return stays

    @functools.cached_property
    def _matcher(self) -> Matcher:
        return Matcher(
            self.dense, {path: set(axes) for path, axes in self._indices.items()}
        )

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
            raise ValueError(self._matcher.no_form(path, shape, owner))
        sharding = placed(leaf)
        small = list(shape)
        for axis, index in indices.items():
            small[axis + lead] = len(index)
        _check_shares(path, sharding, shape, small)
        for axis, index in indices.items():
            leaf = _take(leaf, index, axis + lead)
        return _put(leaf, sharding)

    def _take_channels(self, path: str, leaf: Any) -> Any:
        shape = tuple(np.shape(leaf))
        if shape[-1:] != (self.dense.num_channels,):
            raise ValueError(
                f"per-channel state {path!r} has shape {shape}, but the groups have "
                f"{self.dense.num_channels} channels. It was cut already, or belongs "
                "to a transformation with other groups: cut that with its own"
            )
        return _take(leaf, self.kept_channels, len(shape) - 1)


class _Input(NamedTuple):
    """An axis of an input: dense length, what stays, whether it is handed on."""

    length: int
    index: np.ndarray
    carry: bool


def _check_shares(
    path: str, sharding: Any, before: Sequence[int], after: Sequence[int]
) -> None:
    """Refuses widths that the devices cannot share."""
    for axis, count in enumerate(shares(sharding, len(after))):
        width = after[axis]
        if width % count and before[axis] % count == 0:
            good = [width // count * count, -(-width // count) * count]
            raise ValueError(
                f"leaf {path!r} is split over {count} devices along axis {axis}, "
                f"and {count} does not divide the {width} positions that stay "
                f"there; {' or '.join(str(n) for n in good if n)} would do. Choose "
                'the widths with plan_cut(..., round_to="mesh"), or place the '
                "leaf whole before it is cut"
            )


def _take(leaf: Any, index: np.ndarray, axis: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = list(leaf.shape)
        shape[axis] = len(index)
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=leaf.sharding)
    if isinstance(leaf, np.ndarray):
        return np.take(leaf, index, axis=axis)
    if at_hand(leaf):
        # NumPy compiles nothing for each new shape.
        return _as(leaf, np.take(np.asarray(leaf), index, axis=axis))
    return pick_out(leaf, index, axis)


def _as(leaf: Any, value: np.ndarray) -> jax.Array:
    """NumPy's array in place of one: bound to its devices if that is, whole on each."""
    bound = leaf.committed and leaf.sharding.is_fully_replicated
    return jax.device_put(value, leaf.sharding) if bound else jnp.asarray(value)


def _put(leaf: Any, sharding: NamedSharding | None) -> Any:
    """An array on the devices of the one that it was taken from."""
    if sharding is None or not isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, jax.core.Tracer):
        return leaf  # Its type says where it is, or the compiler decides.
    return jax.device_put(leaf, sharding)


def before_and_after(head: str, rows: Sequence[tuple[str, float, float]]) -> list[str]:
    """The lines of a table of numbers before and after, and of their ratios."""
    first = max([len(row[0]) for row in rows] + [len(head)])
    second = max([len(f"{row[1]:,.0f}") for row in rows] + [6])
    lines = [f"{head:<{first}}  {'before':>{second}}  {'after':>{second}}"]
    for name, a, b in rows:
        share = f"{b / max(a, 1e-12):7.1%}"
        lines.append(f"{name:<{first}}  {a:{second},.0f}  {b:{second},.0f}  {share}")
    return lines
