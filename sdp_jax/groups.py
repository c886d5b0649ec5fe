"""Groups: which slices of which parameters form a channel, and the hot path on them.

A *channel dimension* is a set of interchangeable channels (the filters of one
convolution, the neurons of one hidden layer, the heads of one attention layer). Its
*members* say where each channel lives: in which leaf, along which axis, at which
positions. Channel ``c`` of a member occupies, along its axis, the positions ::

    offset + o * period + c * inner + i      for o < outer, i < inner

which covers a plain axis (``outer = inner = 1``), a flattened convolution
(``outer = height * width``), an attention head (``inner = head_dim``), a
concatenation (``offset``) and their combinations (``period``).

:class:`Groups` holds only Python integers and strings: it is static, hashable,
printable, serialises to JSON, and never keeps an array alive.
"""

import collections
import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

Role = Literal["producer", "consumer", "state"]
Norm = Literal["plain", "size", "cost"]
PyTree: TypeAlias = Any


class PerChannel(NamedTuple):
    """A pytree node of per-channel numbers, so that a cut can recognise them.

    The attribute's name marks it also where a checkpoint has turned the node into a
    dictionary.

    Attributes:
      per_channel: one vector for all channels, dimension after dimension,
        ``(num_channels,)``.
    """

    per_channel: jax.Array


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the channels of one dimension sit along one axis of one leaf.

    Attributes:
      path: path of the leaf, its keys joined by ``/``.
      axis: axis of the leaf; non-negative once it is part of a :class:`Groups`.
      role: ``"producer"`` if zeroing these entries zeroes the channel's activation
        (filter, bias, scale and bias of a normalisation), ``"consumer"`` if they
        only read it (the input slices of the next layer), ``"state"`` for running
        statistics. Producers are thresholded; all three are cut.
      outer: how often the whole set of channels is repeated along the axis.
      inner: how many neighbouring positions belong to one channel.
      offset: the position of the first entry of channel 0.
      period: distance between two repetitions, at least ``size * inner``;
        ``None`` stands for "the axis divided by ``outer``".
    """

    path: str
    axis: int
    role: Role = "producer"
    outer: int = 1
    inner: int = 1
    offset: int = 0
    period: int | None = None

    def positions(self, size: int) -> np.ndarray:
        """Positions along the axis, an integer array ``(outer, size, inner)``."""
        period = size * self.inner if self.period is None else self.period
        return (
            self.offset
            + period * np.arange(self.outer)[:, None, None]
            + self.inner * np.arange(size)[None, :, None]
            + np.arange(self.inner)[None, None, :]
        )


def producer(
    path: str,
    axis: int,
    *,
    outer: int = 1,
    inner: int = 1,
    offset: int = 0,
    period: int | None = None,
) -> Member:
    """A member that makes the channel: zero here means zero activation.

    Args:
      path: path of the leaf, its keys joined by ``/``.
      axis: axis that holds the channels; negative counts from the end.
      outer: repetitions of the whole set of channels along the axis.
      inner: neighbouring positions that belong to one channel.
      offset: position of the first entry of channel 0.
      period: distance between repetitions; default: axis length over ``outer``.
        Giving it also says that positions which no member covers are meant to stay.

    Returns:
      A :class:`Member`, to be checked by :func:`groups_from_axes`.

    Example:
      >>> import sdp_jax
      >>> m = sdp_jax.producer("conv/kernel", 3)
      >>> (m.role, m.axis)
      ('producer', 3)
    """
    return Member(path, axis, "producer", outer, inner, offset, period)


def consumer(
    path: str,
    axis: int,
    *,
    outer: int = 1,
    inner: int = 1,
    offset: int = 0,
    period: int | None = None,
) -> Member:
    """A member that only reads the channel; cut, never thresholded.

    Args:
      path: as for :func:`producer`.
      axis: as for :func:`producer`.
      outer: as for :func:`producer`.
      inner: as for :func:`producer`.
      offset: as for :func:`producer`.
      period: as for :func:`producer`.

    Returns:
      A :class:`Member`.

    Example:
      >>> import sdp_jax
      >>> # Behind the flattening of 4 × 4 positions each channel is read 16 times.
      >>> sdp_jax.consumer("dense/kernel", 0, outer=16).outer
      16
    """
    return Member(path, axis, "consumer", outer, inner, offset, period)


def running_state(path: str, axis: int, *, offset: int = 0) -> Member:
    """Running statistics of the channel; cut, never thresholded.

    Args:
      path: as for :func:`producer`.
      axis: as for :func:`producer`.
      offset: as for :func:`producer`.

    Returns:
      A :class:`Member`.

    Example:
      >>> import sdp_jax
      >>> sdp_jax.running_state("batch_stats/norm/mean", 0).role
      'state'
    """
    return Member(path, axis, "state", offset=offset)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A set of interchangeable channels.

    Attributes:
      name: its name, unique within a :class:`Groups`.
      size: how many channels it has.
      members: where they live.
    """

    name: str
    size: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that are thresholded."""
        return tuple(m for m in self.members if m.role == "producer")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Path and shape of one leaf of the tree that the groups describe."""

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An axis of a leaf that has to stay whole, or partly so.

    Attributes:
      path: path of the leaf.
      axis: axis of the leaf.
      positions: how many positions of it are fixed.
      reasons: what fixes them.
    """

    path: str
    axis: int
    positions: int
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Groups:
    """A static description of all channel dimensions of a tree of parameters.

    :func:`sdp_jax.find_groups` finds it in a function; :func:`groups_from_axes` builds
    it by hand. It compares and hashes by value, prints
    as a table, and goes to JSON and back with :meth:`to_json` and :meth:`from_json`.

    Attributes:
      dimensions: the channel dimensions.
      leaves: path and shape of every leaf of the tree, also of those that no
        dimension touches.
      frozen: axes that cannot be cut, and why, as far as a trace has found out.
      prune_inputs: whether channels of the function's inputs are among them.
      prune_outputs: whether channels of its outputs are.
    """

    dimensions: tuple[Dimension, ...]
    leaves: tuple[Leaf, ...]
    frozen: tuple[Frozen, ...] = ()
    prune_inputs: bool = False
    prune_outputs: bool = False

    def __len__(self) -> int:
        return len(self.dimensions)

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.dimensions)

    def __getitem__(self, name: str) -> Dimension:
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise KeyError(
            f"no channel dimension {name!r}; there are {', '.join(self.sizes)}"
        )

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Number of channels by dimension name."""
        return {d.name: d.size for d in self.dimensions}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by leaf path."""
        return {leaf.path: leaf.shape for leaf in self.leaves}

    @property
    def num_channels(self) -> int:
        """Number of channels of all dimensions together."""
        return sum(d.size for d in self.dimensions)

    def entries(self, dimension: Dimension, *, roles: Sequence[Role]) -> int:
        """Number of parameter entries of one channel in members of these roles."""
        total = 0
        for m in dimension.members:
            if m.role in roles:
                shape = self.shapes[m.path]
                total += m.outer * m.inner * math.prod(shape) // shape[m.axis]
        return total

    @functools.cached_property
    def prunable_entries(self) -> int:
        """Number of entries that belong to a channel of some dimension."""
        rest: dict[str, dict[int, np.ndarray]] = {}
        for d in self.dimensions:
            for m in d.members:
                length = self.shapes[m.path][m.axis]
                axes = rest.setdefault(m.path, {})
                mask = axes.setdefault(m.axis, np.ones(length, bool))
                mask[m.positions(d.size)] = False
        total = 0
        for path, axes in rest.items():
            shape = self.shapes[path]
            fixed = [
                int(axes[k].sum()) if k in axes else n for k, n in enumerate(shape)
            ]
            total += math.prod(shape) - math.prod(fixed)
        return total

    def at(self, prefix: str) -> "Groups":
        """The same groups as seen from a subtree, for example ``"params"``.

        A Flax training loop hands ``variables["params"]`` to the optimizer, while
        groups with running statistics are built on all ``variables``.

        Args:
          prefix: path of the subtree, its keys joined by ``/``.

        Returns:
          Groups whose paths start below ``prefix``; members elsewhere are left out.

        Raises:
          ValueError: if no leaf lies below ``prefix``, or a dimension would lose a
            producer.
        """
        start = prefix.rstrip("/") + "/"
        leaves = tuple(
            Leaf(leaf.path.removeprefix(start), leaf.shape)
            for leaf in self.leaves
            if leaf.path.startswith(start)
        )
        if not leaves:
            tops = sorted({leaf.path.split("/")[0] for leaf in self.leaves})
            raise ValueError(
                f"no leaf lies below {prefix!r}; the top-level keys are {tops}"
            )
        dimensions = []
        for d in self.dimensions:
            inside = [m for m in d.members if m.path.startswith(start)]
            lost = [m.path for m in d.producers if not m.path.startswith(start)]
            if lost and inside:
                raise ValueError(
                    f"dimension {d.name!r} has producers outside {prefix!r}: {lost}; "
                    "a group cannot be split over two optimizers"
                )
            if lost:
                continue
            members = tuple(
                dataclasses.replace(m, path=m.path.removeprefix(start)) for m in inside
            )
            dimensions.append(dataclasses.replace(d, members=members))
        frozen = tuple(
            dataclasses.replace(f, path=f.path.removeprefix(start))
            for f in self.frozen
            if f.path.startswith(start)
        )
        return dataclasses.replace(
            self, dimensions=tuple(dimensions), leaves=leaves, frozen=frozen
        )

    def to_json(self) -> str:
        """The groups as a JSON string."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Groups":
        """Reads what :meth:`to_json` wrote.

        Args:
          text: a JSON string.

        Returns:
          Groups equal to the ones that were written.

        Raises:
          ValueError: if the text is not such a JSON string, or its members do not
            fit its leaves.
        """
        try:
            raw = json.loads(text)
            leaves = tuple(
                Leaf(_text(x["path"]), tuple(_count(n) for n in x["shape"]))
                for x in raw["leaves"]
            )
            dimensions = tuple(
                Dimension(
                    _text(d["name"]),
                    _count(d["size"]),
                    tuple(_member_from_json(m) for m in d["members"]),
                )
                for d in raw["dimensions"]
            )
            frozen = tuple(
                Frozen(
                    _text(f["path"]),
                    _count(f["axis"]),
                    _count(f["positions"]),
                    tuple(_text(r) for r in f["reasons"]),
                )
                for f in raw.get("frozen", ())
            )
            flags = {k: bool(raw.get(k)) for k in ("prune_inputs", "prune_outputs")}
            if len({leaf.path for leaf in leaves}) != len(leaves):
                raise TypeError("two leaves have the same path")
            if not all(d.producers for d in dimensions):
                raise TypeError("a dimension has no producer")
        except (
            AttributeError,
            KeyError,
            TypeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(
                f"not groups in JSON, as written by Groups.to_json: {error!r}"
            ) from error
        groups = cls(dimensions, leaves, frozen, **flags)
        _check_groups(groups)
        return groups

    def summary(self) -> str:
        """A table of the dimensions: sizes, costs, members; and of what is frozen."""
        name_width = max([len(d.name) for d in self.dimensions] + [9])
        lines = [f"{'dimension':<{name_width}}  channels  entries/channel  members"]
        for d in self.dimensions:
            entries = self.entries(d, roles=("producer", "consumer"))
            members = ", ".join(
                f"{m.path}[{m.axis}]" + ("" if m.role == "producer" else f" ({m.role})")
                for m in d.members
            )
            lines.append(
                f"{d.name:<{name_width}}  {d.size:8d}  {entries:15d}  {members}"
            )
        total = sum(math.prod(shape) for shape in self.shapes.values())
        share = self.prunable_entries / max(total, 1)
        lines.append(
            f"{len(self)} dimensions, {self.num_channels} channels; they hold "
            f"{self.prunable_entries:,} of {total:,} entries ({share:.1%})"
        )
        if self.frozen:
            lines.append("cannot be cut:")
        for f in self.frozen:
            why = "; ".join(f.reasons)
            lines.append(f"  {f.path}[{f.axis}], {f.positions} positions: {why}")
        return "\n".join(lines)

    def draw(self) -> str:
        """A picture of layers and couplings, in the language of Graphviz.

        Layers (boxes) point to the channels they make, channels (ellipses) to the
        layers that read them. ``dot -Tsvg`` makes an image of it.

        Returns:
          The source text.
        """
        lines = ["digraph groups {", "  rankdir=LR;"]
        for d in self.dimensions:
            lines.append(f'  "{d.name}" [label="{d.name}: {d.size}"];')
            edges: dict[tuple[str, str], None] = {}
            for m in d.members:
                layer = m.path.rpartition("/")[0] or m.path
                # A layer may bear the name of its channels.
                layer = f"{layer} " if layer in self.sizes else layer
                pair = (layer, d.name) if m.role != "consumer" else (d.name, layer)
                edges[pair] = None
            for a, b in edges:
                box = a if b == d.name else b
                lines.append(f'  "{box}" [shape=box];')
                lines.append(f'  "{a}" -> "{b}";')
        return "\n".join([*dict.fromkeys(lines), "}"])

    def __str__(self) -> str:
        return self.summary()

    @functools.cached_property
    def _producers(self) -> tuple[tuple[str, Member, int], ...]:
        """(dimension name, producer, dimension size), in order."""
        return tuple((d.name, m, d.size) for d in self.dimensions for m in d.producers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a non-negative integer, got {value!r}")
    return value


def _member_from_json(raw: dict[str, Any]) -> Member:
    numbers = ("axis", "outer", "inner", "offset")
    period = raw.get("period")
    return Member(
        _text(raw["path"]),
        role=raw["role"],
        period=None if period is None else _count(period),
        **{k: _count(raw[k]) for k in numbers},
    )


def groups_from_axes(
    params: PyTree,
    axes: Mapping[str, Sequence[Member]],
    *,
    sizes: Mapping[str, int] | None = None,
) -> Groups:
    """Builds groups by hand: for each dimension, where its channels live.

    Args:
      params: the parameters (any pytree of arrays or ``jax.ShapeDtypeStruct``).
      axes: for each dimension name its members, made by :func:`producer`,
        :func:`consumer` and :func:`running_state`. A dimension needs at least one
        producer. Its producers together must be *zero-invariant*: when their entries
        of a channel are all zero, so is the channel's activation. For a convolution
        with batch normalisation these are the filter, its bias, and the scale and
        bias of the normalisation.
      sizes: numbers of channels, by dimension name; needed only where no producer
        fills its axis from offset 0.

    Returns:
      The checked :class:`Groups`.

    Raises:
      ValueError: if a path is not in ``params``, an axis or its factors do not fit
        the shape, a dimension has no producer or no channel, members disagree on the
        size, or producers overlap.
      TypeError: if a producer is not an array of floating-point or complex numbers,
        or a member is not a :class:`Member`.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
      ...           "out": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}
      >>> groups = sdp_jax.groups_from_axes(params, {"hidden": [
      ...     sdp_jax.producer("in/kernel", 1), sdp_jax.producer("in/bias", 0),
      ...     sdp_jax.consumer("out/kernel", 0)]})
      >>> groups.sizes
      {'hidden': 8}
    """
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"axes must map dimension names to their members; got {type(axes).__name__}"
        )
    if not axes:
        raise ValueError("axes names no dimension; give at least one, with a producer")
    table = leaf_table(params)
    leaves = tuple(Leaf(p, tuple(np.shape(x))) for p, x in table.items())
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    given = {
        name: int(size) if isinstance(size, np.integer) else size
        for name, size in (sizes or {}).items()
    }
    unknown = sorted(set(given) - set(axes))
    if unknown:
        raise ValueError(f"sizes names dimensions that axes does not have: {unknown}")
    dimensions = []
    axes = {k: [m] if isinstance(m, Member) else list(m) for k, m in axes.items()}
    for name, members in axes.items():
        members = [_normalise(name, m, shapes) for m in members]
        if not any(m.role == "producer" for m in members):
            raise ValueError(
                f"dimension {name!r} has no producer; name the parameters whose zeros "
                "make the channel zero with sdp_jax.producer(path, axis)"
            )
        size = given[name] if name in given else _infer_size(name, members, shapes)
        for m in members:
            dtype = leaf_dtype(table[m.path])
            if m.role == "producer" and not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"dimension {name!r}: producer {m.path!r} has dtype {dtype}; only "
                    "floating-point and complex parameters can be thresholded"
                )
        members = [
            m
            if m.period is not None
            else dataclasses.replace(
                m,
                period=shapes[m.path][m.axis] // m.outer
                if m.outer > 1
                else size * m.inner,
            )
            for m in members
        ]
        dimensions.append(Dimension(name, size, tuple(members)))
    groups = Groups(tuple(dimensions), leaves)
    _check_groups(groups)
    _check_overlap(groups)
    _check_coverage(groups, axes, shapes)
    return groups


def leaf_table(tree: PyTree) -> dict[str, Any]:
    """All leaves of a tree by path.

    A path is the leaf's keys joined by ``/``. The ``value`` attribute of a
    ``flax.nnx`` variable is left out (see :func:`leaf_keys`), because nnx passes the
    optimizer its variables at ``init`` and plain arrays at ``update``.

    Args:
      tree: any pytree.

    Returns:
      The leaves by path, in the order of the tree.

    Raises:
      ValueError: if two leaves have the same path.
    """
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

    An attribute ``value`` at the end is left out, as in :func:`leaf_table`, unless it
    has siblings: then it is a field of the user's, and no variable of nnx.

    Args:
      tree: any pytree.
      is_leaf: as for ``jax.tree.flatten``.

    Returns:
      Pairs of keys and leaf.
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
    if any(path == f"{p.split('/')[0]}/{q}" for p in [path] for q in paths):
        hint = (
            f"the tree has {path.split('/', 1)[1]!r}: use "
            f"groups.at({path.split('/')[0]!r}) here"
        )
    else:
        near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
        hint = f"did you mean {near}?" if near else f"the tree has {list(paths)[:5]}"
    return f"no leaf {path!r} in the tree; {hint}"


def _normalise(name: str, member: Any, shapes: Mapping[str, tuple[int, ...]]) -> Member:
    if not isinstance(member, Member):
        raise TypeError(
            f"dimension {name!r}: {member!r} is not a member; make it with "
            "sdp_jax.producer, sdp_jax.consumer or sdp_jax.running_state"
        )
    if member.path not in shapes:
        raise ValueError(
            f"dimension {name!r}: {missing_path_message(member.path, list(shapes))}"
        )
    counts = ["axis", "outer", "inner", "offset"]
    counts += [] if member.period is None else ["period"]
    plain = {}
    for field in counts:
        value = getattr(member, field)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"dimension {name!r}, member {member.path!r}: {field} must be an "
                f"integer; got {value!r}"
            )
        plain[field] = int(value)
    member = dataclasses.replace(member, **plain)
    rank = len(shapes[member.path])
    if not -rank <= member.axis < rank:
        raise ValueError(
            f"dimension {name!r}: axis {member.axis} of {member.path!r} does not "
            f"exist; its shape is {shapes[member.path]}"
        )
    return dataclasses.replace(member, axis=member.axis % rank)


def _infer_size(
    name: str, members: Sequence[Member], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    for m in members:
        if m.role == "producer" and m.offset == 0 and m.period is None:
            length, each = shapes[m.path][m.axis], m.outer * m.inner
            if each < 1 or length % each:
                raise ValueError(
                    f"dimension {name!r}: axis {m.axis} of {m.path!r} has length "
                    f"{length}, which outer * inner = {m.outer} * {m.inner} does not "
                    "divide"
                )
            return length // each
    raise ValueError(
        f"dimension {name!r}: its size cannot be read off, because every producer has "
        f"an offset or a period; pass sizes={{{name!r}: number_of_channels}}"
    )


def _check_groups(groups: Groups) -> None:
    names = [d.name for d in groups.dimensions]
    if len(set(names)) != len(names):
        raise ValueError(f"dimension names are not unique: {sorted(names)}")
    for d in groups.dimensions:
        if not isinstance(d.size, int) or d.size < 1:
            raise ValueError(
                f"dimension {d.name!r} has size {d.size!r}; it needs at least 1 channel"
            )
        for m in d.members:
            _check_member(groups, d, m)


def overlaps(groups: Groups) -> Iterator[tuple[str, Dimension, Dimension]]:
    """Where two dimensions share entries of a producer.

    Args:
      groups: the channel dimensions.

    Yields:
      The path of the leaf and the two dimensions, the earlier first.
    """
    taken: dict[str, list[tuple[Dimension, int, np.ndarray]]] = {}
    for d in groups.dimensions:
        for m in d.producers:
            mask = np.zeros(groups.shapes[m.path][m.axis], bool)
            mask[m.positions(d.size)] = True
            for other, axis, other_mask in taken.setdefault(m.path, []):
                if axis != m.axis or (mask & other_mask).any():
                    yield m.path, other, d
            taken[m.path].append((d, m.axis, mask))


def _check_overlap(groups: Groups) -> None:
    for path, first, second in overlaps(groups):
        axes = [
            next(m.axis for m in d.producers if m.path == path) for d in (first, second)
        ]
        raise ValueError(
            f"producers overlap: {path!r} belongs to dimension {first.name!r} along "
            f"axis {axes[0]} and to {second.name!r} along axis {axes[1]}; an entry can "
            "be thresholded by one dimension only"
        )


def _check_member(groups: Groups, d: Dimension, m: Member) -> None:
    where = f"dimension {d.name!r}, member {m.path!r}"
    if m.role not in get_args(Role):
        raise ValueError(f"{where}: role {m.role!r} is not one of {get_args(Role)}")
    if m.path not in groups.shapes:
        raise ValueError(
            f"{where}: {missing_path_message(m.path, list(groups.shapes))}"
        )
    shape = groups.shapes[m.path]
    if not 0 <= m.axis < len(shape):
        raise ValueError(f"{where}: axis {m.axis} does not exist; the shape is {shape}")
    if m.outer < 1 or m.inner < 1 or m.offset < 0:
        raise ValueError(
            f"{where}: outer and inner must be at least 1 and offset at least 0; got "
            f"outer={m.outer}, inner={m.inner}, offset={m.offset}"
        )
    block = d.size * m.inner
    period = block if m.period is None else m.period
    if m.outer > 1 and period < block:
        raise ValueError(
            f"{where}: period {period} is shorter than {d.size} channels of {m.inner}; "
            f"axis {m.axis} has length {shape[m.axis]}"
        )
    end = m.offset + (m.outer - 1) * period + block
    if end > shape[m.axis]:
        raise ValueError(
            f"{where}: {d.size} channels need {end} positions, but axis {m.axis} has "
            f"length {shape[m.axis]} (shape {shape}, outer={m.outer}, inner={m.inner}, "
            f"offset={m.offset})"
        )


def _check_coverage(
    groups: Groups, axes: Mapping[str, Sequence[Member]], shapes: Mapping[str, Any]
) -> None:
    """Refuses axes that are partly described without saying so."""
    covered: dict[tuple[str, int], np.ndarray] = {}
    declared: set[tuple[str, int]] = set()
    for d in groups.dimensions:
        for given, m in zip(axes[d.name], d.members, strict=True):
            key = (m.path, m.axis)
            covered.setdefault(key, np.zeros(shapes[m.path][m.axis], bool))
            covered[key][m.positions(d.size)] = True
            if given.period is not None:
                declared.add(key)
    for key, mask in covered.items():
        if not mask.all() and key not in declared:
            path, axis = key
            raise ValueError(
                f"the members on axis {axis} of {path!r} cover {mask.sum()} of its "
                f"{mask.size} positions (shape {shapes[path]}); correct outer, inner "
                "or offset, or give period= to say that the rest is meant to stay"
            )


# --- the hot path -------------------------------------------------------------


def channel_weights(
    groups: Groups, norm: Norm | Mapping[str, float] = "plain"
) -> dict[str, float]:
    """The factor ``k`` by which a channel's threshold is multiplied.

    Args:
      groups: the channel dimensions.
      norm: ``"plain"`` for 1; ``"size"`` for the square root of the number of
        producer entries of a channel, as in the group lasso (Yuan and Lin 2006);
        ``"cost"`` for the number of parameters that go with the channel, divided by
        the mean over all channels; or a positive number for each dimension name,
        for example FLOPs per channel.

    Returns:
      A positive number for each dimension.

    Raises:
      ValueError: if ``norm`` is none of these, lacks a dimension, or is not positive.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((9, 2))}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> sdp_jax.channel_weights(groups, "size")  # √9
      {'hidden': 3.0}
    """
    if isinstance(norm, Mapping):
        if set(norm) != set(groups.sizes):
            raise ValueError(
                "norm must give a number for each dimension; it lacks "
                f"{sorted(set(groups.sizes) - set(norm))} and has no use for "
                f"{sorted(set(norm) - set(groups.sizes))}"
            )
        for name, value in norm.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"norm of dimension {name!r} is {value!r}; it must be a positive "
                    "finite number"
                )
        return {name: float(norm[name]) for name in groups.sizes}
    if norm == "plain":
        return {d.name: 1.0 for d in groups}
    if norm == "size":
        return {d.name: groups.entries(d, roles=("producer",)) ** 0.5 for d in groups}
    if norm == "cost":
        cost = {
            d.name: groups.entries(d, roles=("producer", "consumer")) for d in groups
        }
        mean = sum(cost[d.name] * d.size for d in groups) / groups.num_channels
        return {name: value / mean for name, value in cost.items()}
    raise ValueError(
        f"norm is {norm!r}; use one of {get_args(Norm)} or a number for each dimension"
    )


def channel_norms(
    groups: Groups,
    tree: PyTree,
    *,
    norm: Norm | Mapping[str, float] = "plain",
) -> dict[str, jax.Array]:
    """Euclidean norm of each channel over its producers, divided by its weight.

    Each leaf is reduced in one pass; half-precision leaves are summed in float32.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves (parameters,
        gradients, a dual variable).
      norm: the weighting, see :func:`channel_weights`.

    Returns:
      For each dimension an array ``(size,)``, float32 or wider.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0.], [4., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> print(sdp_jax.channel_norms(groups, params)["hidden"])
      [5. 1.]
    """
    weights = channel_weights(groups, norm)
    squares = _reduce_channels(groups, tree, _square, jnp.sum, jnp.add)
    return {
        name: jnp.sqrt(value) / jnp.asarray(weights[name], value.dtype)
        for name, value in squares.items()
    }


def channel_products(
    groups: Groups, first: PyTree, second: PyTree
) -> dict[str, jax.Array]:
    """Real inner product of two trees over the producers of each channel.

    Args:
      groups: the channel dimensions.
      first: a tree that has the producers of ``groups`` as leaves.
      second: another one of the same shapes.

    Returns:
      For each dimension an array ``(size,)``, float32 or wider.

    Raises:
      ValueError: if a producer is missing or has another shape.
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        value = jnp.conj(a.astype(dtype)) * b.astype(dtype)
        return value.real if jnp.iscomplexobj(value) else value

    products = jax.tree.map(product, first, second)
    return _reduce_channels(groups, products, lambda x: x, jnp.sum, jnp.add)


def member_sums(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    *,
    roles: Sequence[Role] = ("producer",),
) -> dict[str, list[tuple[Member, jax.Array]]]:
    """Sums ``entry(leaf)`` over each channel, member by member.

    What a method weighs in its own way (only matrices, only scales, also what reads the
    channel) is told apart by the member; :func:`channel_norms` is the common case.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the members of these roles as leaves.
      entry: a function of one leaf, in the leaf's shape and at least float32.
      roles: which members count.

    Returns:
      For each dimension pairs of a member and its sums ``(size,)``.

    Raises:
      ValueError: if a member is missing or has another shape.
    """
    table = producer_leaves(groups, tree)
    lines: dict[tuple[str, int], jax.Array] = {}
    out: dict[str, list[tuple[Member, jax.Array]]] = {}
    for d in groups:
        out[d.name] = []
        for m in d.members:
            if m.role not in roles:
                continue
            if m.path not in table or np.shape(table[m.path]) != groups.shapes[m.path]:
                raise ValueError(
                    f"dimension {d.name!r}: the tree has no leaf {m.path!r} of shape "
                    f"{groups.shapes[m.path]}, which is counted here; give groups and "
                    "parameters of the same model"
                )
            key = (m.path, m.axis)
            if key not in lines:
                leaf = entry(jnp.asarray(table[m.path]))
                lines[key] = _reduce_to_axis(leaf, m.axis, jnp.sum)
            value = jnp.sum(_blocks(lines[key], m, d.size), axis=(0, 2))
            out[d.name].append((m, value))
    return out


def channels_alive(groups: Groups, tree: PyTree) -> dict[str, jax.Array]:
    """Which channels have a producer entry that is not exactly zero.

    Args:
      groups: the channel dimensions.
      tree: the parameters.

    Returns:
      For each dimension a Boolean array ``(size,)``.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[1., 0.], [2., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> print(sdp_jax.channels_alive(groups, params)["hidden"])
      [ True False]
    """
    return _reduce_channels(groups, tree, lambda x: x != 0, jnp.any, jnp.logical_or)


def scale_channels(
    groups: Groups, tree: PyTree, factors: Mapping[str, jax.Array]
) -> PyTree:
    """Multiplies the producers of each channel by the channel's factor.

    One fused multiplication per leaf; leaves without a producer pass unchanged.

    Args:
      groups: the channel dimensions.
      tree: a tree that has the producers of ``groups`` as leaves.
      factors: for each dimension an array ``(size,)``.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: if a producer is missing or has another shape.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.ones((2, 2))}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> factors = {"hidden": jnp.array([1., 0.])}
      >>> print(sdp_jax.scale_channels(groups, params, factors)["w"])
      [[1. 0.]
       [1. 0.]]
    """
    table = producer_leaves(groups, tree)
    scales: dict[str, jax.Array] = {}
    for name, member, size in groups._producers:
        leaf = table[member.path]
        length = leaf.shape[member.axis]
        spread = _spread(
            factors[name].astype(_real_dtype(leaf.dtype)), member, size, length
        )
        shape = [1] * leaf.ndim
        shape[member.axis] = length
        spread = spread.reshape(shape)
        scales[member.path] = (
            scales[member.path] * spread if member.path in scales else spread
        )

    leaves = [
        leaf * scales[path] if path in scales else leaf for path, leaf in table.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def producer_leaves(groups: Groups, tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, after checking the producers of ``groups``.

    Args:
      groups: the channel dimensions.
      tree: any pytree.

    Returns:
      All leaves by path.

    Raises:
      ValueError: if a producer is missing or has another shape.
    """
    table = leaf_table(tree)
    for name, member, _ in groups._producers:
        if member.path not in table:
            raise ValueError(
                f"dimension {name!r}: {missing_path_message(member.path, list(table))}"
                " (a mask hides leaves: it must keep or hide a group as a whole)"
            )
        shape = tuple(np.shape(table[member.path]))
        if shape != groups.shapes[member.path]:
            raise ValueError(
                f"dimension {name!r}: leaf {member.path!r} has shape {shape}, but the "
                f"groups were built for {groups.shapes[member.path]}; after a cut use "
                "cut.groups"
            )
    return table


def join_channels(values: Mapping[str, jax.Array]) -> jax.Array:
    """One vector ``(num_channels,)`` from one vector for each dimension."""
    return jnp.concatenate(list(values.values()))


def split_channels(vector: jax.Array, sizes: Mapping[str, int]) -> dict[str, jax.Array]:
    """Inverse of :func:`join_channels`; the channels are on the last axis."""
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = vector[..., start : start + size]
        start += size
    return parts


def probe_channels(groups: Groups, tree: PyTree) -> dict[str, jax.Array]:
    """The largest magnitude of each channel in the small producers of its dimension.

    It looks at vectors (biases, scales) only, or at the smallest producer where there
    is none: reading a large leaf here would make XLA copy it when it is donated.

    Args:
      groups: the channel dimensions.
      tree: the parameters.

    Returns:
      For each dimension an array ``(size,)``.
    """
    table = producer_leaves(groups, tree)
    probes: dict[str, jax.Array] = {}
    for d in groups:
        vectors = [m for m in d.producers if len(groups.shapes[m.path]) == 1]
        smallest = min(d.producers, key=lambda m: math.prod(groups.shapes[m.path]))
        for m in vectors or [smallest]:
            leaf = jnp.asarray(table[m.path])
            line = _reduce_to_axis(jnp.abs(leaf), m.axis, jnp.max)
            value = jnp.max(_blocks(line, m, d.size), axis=(0, 2))
            probes[d.name] = (
                jnp.maximum(probes[d.name], value) if d.name in probes else value
            )
    return probes


def _square(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def _real_dtype(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


def _reduce_channels(
    groups: Groups,
    tree: PyTree,
    entry: Callable[[jax.Array], jax.Array],
    reduce: Callable[..., jax.Array],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Reduces ``entry(leaf)`` to one number per channel, one pass per leaf."""
    table = producer_leaves(groups, tree)
    lines: dict[tuple[str, int], jax.Array] = {}
    out: dict[str, jax.Array] = {}
    for name, member, size in groups._producers:
        key = (member.path, member.axis)
        if key not in lines:
            leaf = jnp.asarray(table[member.path])
            lines[key] = _reduce_to_axis(entry(leaf), member.axis, reduce)
        value = reduce(_blocks(lines[key], member, size), axis=(0, 2))
        out[name] = combine(out[name], value) if name in out else value
    return out


def _reduce_to_axis(
    x: jax.Array, axis: int, reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Reduces all axes but one, the longest first (a quarter faster on the CPU)."""
    axes = sorted(range(x.ndim), key=lambda a: x.shape[a])
    rest = [a for a in axes if a != axis]
    if not rest:
        return x
    x = reduce(x, axis=rest[-1], keepdims=True)
    return reduce(x, axis=tuple(rest)) if len(rest) > 1 else x.reshape(-1)


def _blocks(line: jax.Array, member: Member, size: int) -> jax.Array:
    """The entries of a vector along the axis as ``(outer, size, inner)``."""
    block = size * member.inner
    if member.outer == 1:
        line = line[member.offset : member.offset + block]
        return line.reshape(1, size, member.inner)
    period = member.period or block
    line = line[member.offset : member.offset + member.outer * period]
    line = jnp.pad(line, (0, member.outer * period - line.shape[0]))
    line = line.reshape(member.outer, period)[:, :block]
    return line.reshape(member.outer, size, member.inner)


def _spread(factor: jax.Array, member: Member, size: int, length: int) -> jax.Array:
    """Inverse of :func:`_blocks`: factors along the axis, 1 where nobody is."""
    block = size * member.inner
    shape = (member.outer, size, member.inner)
    line = jnp.broadcast_to(factor[None, :, None], shape).reshape(member.outer, block)
    if member.outer > 1:
        period = member.period or block
        line = jnp.pad(line, ((0, 0), (0, period - block)), constant_values=1)
    line = line.reshape(-1)[: length - member.offset]
    after = length - member.offset - line.shape[0]
    return jnp.pad(line, (member.offset, after), constant_values=1)
