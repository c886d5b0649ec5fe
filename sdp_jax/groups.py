"""Groups: which slices of which parameters form a channel.

:class:`Groups` holds only Python integers and strings: it is static, hashable,
printable, serialises to JSON, and never keeps an array alive.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.dimension import (
    Dimension,
    Frozen,
    Leaf,
    Member,
    Role,
    as_count,
    as_flag,
    as_text,
    check_member,
    member_from_json,
)
from sdp_jax.polynomial import Polynomial, monomial
from sdp_jax.ports import Port, check_ports, ports_among

Ranking = Literal["global", "dimension", "isomorphic"]


def need_groups(groups: Any) -> None:
    """Refuses what is not :class:`Groups`."""
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups must be sdp_jax.Groups, as find_groups makes them; got {groups!r}"
        )


def check_ranking(ranking: Any) -> None:
    """Refuses what is no ranking."""
    if ranking not in get_args(Ranking):
        raise ValueError(
            f"ranking is {ranking!r}; use 'global', 'dimension' or 'isomorphic'"
        )


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
      prune_inputs: patterns of the function's inputs whose channels are among them.
      prune_outputs: patterns of its outputs whose channels are.
      flops: FLOPs of the function as a polynomial in the numbers of channels that
        stay, as :func:`sdp_jax.find_groups` counted them (at widths of 0 a bound from
        above); ``None`` for groups that were made by hand.
      ports: where channels sit in inputs and outputs.
      before: for what a cut has left, the groups of the dense model: targets and
        weights count in these, whatever has been cut since.
    """

    dimensions: tuple[Dimension, ...]
    leaves: tuple[Leaf, ...]
    frozen: tuple[Frozen, ...] = ()
    prune_inputs: tuple[str, ...] = ()
    prune_outputs: tuple[str, ...] = ()
    flops: Polynomial | None = None
    ports: tuple[Port, ...] = ()
    before: "Groups | None" = None

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # What is cached, the hash above all, is of this process.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _hash(self) -> int:
        fields = dataclasses.fields(self)
        return hash(tuple(getattr(self, field.name) for field in fields))

    def __len__(self) -> int:
        return len(self.dimensions)

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.dimensions)

    def __contains__(self, name: object) -> bool:
        return name in self.sizes or name in self.dimensions

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
    def dense(self) -> "Groups":
        """The groups of the dense model: these, if nothing has been cut yet."""
        return self if self.before is None else self.before

    @functools.cached_property
    def dense_dimensions(self) -> tuple[Dimension, ...]:
        """These dimensions as the dense model has them, in the order that they have."""
        by_name = {d.name: d for d in self.dense.dimensions}
        return tuple(by_name[name] for name in self.sizes)

    def widths_in(self, names: "Groups") -> list[int]:
        """The sizes in the order of other groups, 0 for dimensions that are gone."""
        return [self.sizes.get(name, 0) for name in names.sizes]

    @property
    def num_channels(self) -> int:
        """Number of channels of all dimensions together."""
        return sum(d.size for d in self.dimensions)

    def need_flops(self) -> Polynomial:
        """The polynomial of FLOPs.

        Raises:
          ValueError: if these groups have none.
        """
        if self.flops is None:
            raise ValueError(
                "these groups know no FLOPs, because they were made by hand: "
                "sdp_jax.find_groups counts them, and so does "
                "sdp_jax.count_flops(groups, fn, params, x)"
            )
        return self.flops

    def entries(self, dimension: Dimension, *, roles: Sequence[Role]) -> int:
        """Number of parameter entries of one channel in members of these roles."""
        total = 0
        for m in dimension.members:
            if m.role in roles:
                shape = self.shapes[m.path]
                total += m.outer * m.inner * math.prod(shape) // shape[m.axis]
        return total

    @functools.cached_property
    def producers(self) -> tuple[tuple[str, Member, int], ...]:
        """All producers: dimension name, member, dimension size, in order."""
        return tuple((d.name, m, d.size) for d in self.dimensions for m in d.producers)

    @functools.cached_property
    def shrinking(self) -> tuple[tuple[str, Member, int], ...]:
        """The producers that a threshold counts and shrinks, see :class:`Member`.

        Those that are not scale-invariant; of a dimension that has no other, all.
        """
        return tuple((d.name, m, d.size) for d in self.dimensions for m in d.shrinking)

    @functools.cached_property
    def covered(self) -> dict[tuple[str, int], dict[str, np.ndarray]]:
        """Where channels sit: ``{(path, axis): {dimension: Boolean mask}}``."""
        out: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        for d in self.dimensions:
            for m in d.members:
                masks = out.setdefault((m.path, m.axis), {})
                length = self.shapes[m.path][m.axis]
                mask = masks.setdefault(d.name, np.zeros(length, bool))
                mask[m.positions(d.size)] = True
        return out

    def split(self, vector: Any) -> dict[str, Any]:
        """Takes a vector of all channels apart.

        Args:
          vector: an array ``(…, num_channels)``.

        Returns:
          For each dimension name an array ``(…, size)``.

        Raises:
          ValueError: if the last axis has another length.
        """
        self.check_vector(vector)
        parts, start = {}, 0
        for name, size in self.sizes.items():
            parts[name] = vector[..., start : start + size]
            start += size
        return parts

    def check_vector(self, vector: Any) -> None:
        """Refuses what has not one number for each channel on its last axis."""
        if np.shape(vector)[-1:] != (self.num_channels,):
            raise ValueError(
                f"expected one number for each of {self.num_channels} channels on the "
                f"last axis; got an array of shape {np.shape(vector)}"
            )

    def join(self, parts: Mapping[str, Any]) -> jax.Array:
        """Puts one vector of all channels together, the inverse of :meth:`split`.

        Args:
          parts: for each dimension name an array ``(size,)``, in any order.

        Returns:
          An array ``(num_channels,)``.

        Raises:
          ValueError: if names or sizes are not those of the dimensions.
        """
        if set(parts) != set(self.sizes):
            raise ValueError(
                "expected an array for each dimension; lacking are "
                f"{sorted(set(self.sizes) - set(parts))}, and there is no use for "
                f"{sorted(set(parts) - set(self.sizes))}"
            )
        for name, size in self.sizes.items():
            if np.shape(parts[name]) != (size,):
                raise ValueError(
                    f"dimension {name!r} has {size} channels, but an array of shape "
                    f"{np.shape(parts[name])} was given"
                )
        if not self.dimensions:
            return jnp.zeros((0,))
        return jnp.concatenate([jnp.asarray(parts[name]) for name in self.sizes])

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """The number of the dimension of each channel, int32 ``(num_channels,)``."""
        return np.repeat(np.arange(len(self), dtype=np.int32), [*self.sizes.values()])

    def blocks(self, ranking: Ranking) -> np.ndarray:
        """Which channels a ranking compares with each other.

        Args:
          ranking: ``"global"`` for all of them, ``"dimension"`` for those of each
            dimension, ``"isomorphic"`` for those of dimensions that are built alike.

        Returns:
          For each channel the number of its block, int32 ``(num_channels,)``.

        Raises:
          ValueError: if the ranking is unknown.
        """
        check_ranking(ranking)
        found: dict[Any, int] = {}
        numbers = []
        for d in self.dense_dimensions:
            key: Any = {"global": None, "dimension": d.name}.get(ranking)
            if ranking == "isomorphic":
                key = tuple(
                    sorted(
                        (m.role, m.axis, len(self.dense.shapes[m.path]))
                        + (m.outer > 1, m.inner > 1)
                        for m in d.members
                    )
                )
            numbers.append(found.setdefault(key, len(found)))
        return np.asarray(numbers, np.int32)[self.owner]

    @functools.cached_property
    def prunable_entries(self) -> int:
        """Number of entries that belong to a channel of some dimension."""
        total = 0
        for path, shape in self.shapes.items():
            fixed = [
                n - int(np.any(list(self.covered[path, k].values()), axis=0).sum())
                if (path, k) in self.covered
                else n
                for k, n in enumerate(shape)
            ]
            total += math.prod(shape) - math.prod(fixed)
        return total

    @functools.cached_property
    def parameters(self) -> Polynomial:
        """The number of entries of all leaves, as a polynomial in the widths."""
        sizes = [d.size for d in self.dimensions]
        numbers = {d.name: k for k, d in enumerate(self.dimensions)}
        parts = []
        for path, shape in self.shapes.items():
            product = Polynomial.of({(): 1.0})
            for axis, length in enumerate(shape):
                masks = self.covered.get((path, axis), {})
                table = np.stack([*masks.values(), np.ones(length, bool)])
                columns, counts = np.unique(table, axis=1, return_counts=True)
                kept = [
                    monomial(
                        tuple(
                            numbers[n]
                            for n, is_in in zip(masks, column, strict=False)
                            if is_in
                        ),
                        count,
                        sizes,
                    )
                    for column, count in zip(columns.T, counts.tolist(), strict=True)
                ]
                product = product * Polynomial.total(kept)
            parts.append(product)
        return Polynomial.total(parts)

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
            self,
            dimensions=tuple(dimensions),
            leaves=leaves,
            frozen=frozen,
            flops=self._flops_of(dimensions),
            ports=self._ports_of(dimensions),
            before=self.before and self.before.at(prefix),
        )

    def without(self, *names: str) -> "Groups":
        """The same groups less some dimensions, which stay at their full width.

        Args:
          *names: names of dimensions.

        Returns:
          Groups of the same leaves.

        Raises:
          KeyError: if there is no dimension of that name.
        """
        gone = {self[name].name for name in names}
        dimensions = tuple(d for d in self.dimensions if d.name not in gone)
        return dataclasses.replace(
            self,
            dimensions=dimensions,
            flops=self._flops_of(dimensions),
            ports=self._ports_of(dimensions),
            before=self.before and self.before.without(*names),
        )

    def _ports_of(self, dimensions: Sequence[Dimension]) -> tuple[Port, ...]:
        """The ports in the channels of some of the dimensions."""
        names = {d.name for d in dimensions}
        inside = [
            name in names for name, size in self.sizes.items() for _ in range(size)
        ]
        return ports_among(self.ports, np.asarray(inside, bool))

    def _flops_of(self, dimensions: Sequence[Dimension]) -> Polynomial | None:
        """The FLOPs in the widths of some of the dimensions."""
        if self.flops is None:
            return None
        places = {d.name: k for k, d in enumerate(dimensions)}
        numbers = {k: places.get(d.name) for k, d in enumerate(self.dimensions)}
        return self.flops.substitute(numbers, list(self.sizes.values()))

    def to_json(self) -> str:
        """The groups as a JSON string."""
        raw = dataclasses.asdict(dataclasses.replace(self, flops=None, before=None))
        before = self.before and json.loads(self.before.to_json())
        flops = self.flops and self.flops.to_list()
        return json.dumps(raw | {"flops": flops, "before": before})

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
                Leaf(as_text(x["path"]), tuple(as_count(n) for n in x["shape"]))
                for x in raw["leaves"]
            )
            dimensions = tuple(
                Dimension(
                    as_text(d["name"]),
                    as_count(d["size"]),
                    tuple(member_from_json(m) for m in d["members"]),
                    as_flag(d.get("removable", False)),
                )
                for d in raw["dimensions"]
            )
            frozen = tuple(
                Frozen(
                    as_text(f["path"]),
                    as_count(f["axis"]),
                    as_count(f["positions"]),
                    tuple(as_text(r) for r in f["reasons"]),
                )
                for f in raw.get("frozen", ())
            )
            flags = {
                name: tuple(as_text(p) for p in raw.get(name, ()))
                for name in ("prune_inputs", "prune_outputs")
            }
            ports = tuple(
                Port(
                    as_text(p["path"]),
                    as_count(p["axis"]),
                    p["role"],
                    tuple(tuple(as_count(c) for c in row) for row in p["channels"]),
                )
                for p in raw.get("ports", ())
            )
            flops = raw.get("flops")
            if flops is not None:
                flops = Polynomial.from_list(flops, len(dimensions))
            before = raw.get("before")
            if before is not None:
                before = cls.from_json(json.dumps(before))
                if not {d.name for d in dimensions} <= set(before.sizes):
                    raise TypeError("a cut has left dimensions that were not there")
                wider = any(d.size > before.sizes[d.name] for d in dimensions)
                if before.before or wider:
                    raise TypeError("what was before a cut is not the dense model")
            if len({leaf.path for leaf in leaves}) != len(leaves):
                raise TypeError("two leaves have the same path")
            if not all(d.producers for d in dimensions):
                raise TypeError("a dimension has no producer")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not groups in JSON, as written by Groups.to_json: {error!r}"
            ) from error
        groups = cls(
            dimensions,
            leaves,
            frozen,
            flops=flops,
            ports=ports,
            before=before,
            **flags,
        )
        check_groups(groups)
        return groups

    def summary(self) -> str:
        """A table of the dimensions: sizes, costs, members; and of what is frozen."""
        name_width = max([len(d.name) for d in self.dimensions] + [9])
        lines = [f"{'dimension':<{name_width}}  channels  entries/channel  members"]
        for d in self.dimensions:
            entries = self.entries(d, roles=("producer", "consumer"))
            members = ", ".join(
                f"{m.path}[{m.axis}]"
                + ("" if m.role == "producer" else f" ({m.role})")
                + (" (scale-invariant)" if m.scale_invariant else "")
                for m in d.members
            )
            members += "; may vanish" if d.removable else ""
            lines.append(
                f"{d.name:<{name_width}}  {d.size:8d}  {entries:15d}  {members}"
            )
        total = sum(math.prod(shape) for shape in self.shapes.values())
        share = self.prunable_entries / max(total, 1)
        lines.append(
            f"{len(self)} dimensions, {self.num_channels} channels; they hold "
            f"{self.prunable_entries:,} of {total:,} entries ({share:.1%})"
        )
        names = [name for name, size in self.sizes.items() for _ in range(size)]
        for p in self.ports:
            rows = {names[c] for row in p.channels for c in row}
            lines.append(
                f"  {p.path}[{p.axis}] ({p.role}), {len(p.channels)} positions: of "
                f"{', '.join(sorted(rows))}"
            )
        if self.frozen:
            lines.append("cannot be cut:")
        lines += [f"  {line}" for line in self._frozen_lines()]
        return "\n".join(lines)

    def _frozen_lines(self) -> list[str]:
        """What is frozen, by leaf; leaves of a layer with the same reasons as one."""
        leaves: dict[str, list[Frozen]] = {}
        for f in self.frozen:
            leaves.setdefault(f.path, []).append(f)
        lines: dict[tuple[str, str, str], list[str]] = {}
        for path, parts in leaves.items():
            layer, slash, name = path.rpartition("/")
            axes = []
            for f in parts:
                length = self.shapes[path][f.axis]
                some = "" if f.positions == length else f": {f.positions} of {length}"
                axes.append(f"{f.axis}{some}")
            why = "; ".join(dict.fromkeys(r for f in parts for r in f.reasons))
            key = (layer + slash, "" if layer else path, why)
            lines.setdefault(key, []).append(f"{name}[{', '.join(axes)}]")
        return [f"{k[0]}{', '.join(names)}: {k[2]}" for k, names in lines.items()]

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


def check_groups(groups: Groups) -> None:
    names = [d.name for d in groups.dimensions]
    if len(set(names)) != len(names):
        raise ValueError(f"dimension names are not unique: {sorted(names)}")
    for d in groups.dimensions:
        if not isinstance(d.size, int) or d.size < 1:
            raise ValueError(
                f"dimension {d.name!r} has size {d.size!r}; it needs at least 1 channel"
            )
        for m in d.members:
            check_member(groups.shapes, d, m)
    check_ports(groups.ports, groups.num_channels)


def overlaps(groups: Groups) -> Iterator[tuple[str, Dimension, Dimension]]:
    """Where two dimensions share entries of a producer: the leaf, and both in order."""
    taken: dict[str, list[tuple[Dimension, int, np.ndarray]]] = {}
    for d in groups.dimensions:
        for m in d.producers:
            mask = np.zeros(groups.shapes[m.path][m.axis], bool)
            mask[m.positions(d.size)] = True
            for other, axis, other_mask in taken.setdefault(m.path, []):
                if axis != m.axis or (mask & other_mask).any():
                    yield m.path, other, d
            taken[m.path].append((d, m.axis, mask))
