"""Primitives that read and write at places: dynamic slices, gather, scatter."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sdp_jax.tracing import numbers
from sdp_jax.tracing.evaluate import pick_out
from sdp_jax.tracing.rule import Rule, moves
from sdp_jax.tracing.rules_shape import pick, take_positions, together
from sdp_jax.tracing.sizes import Equation
from sdp_jax.tracing.trace import Record, Trace, need_zero
from sdp_jax.tracing.values import ZERO, Axis, Factor, Value, length, refill, union


def _starts(eqn: Any, ins: Sequence[Value]) -> list[np.ndarray | None]:
    """The positions that a dynamic slice takes along each axis, where known."""
    out: list[np.ndarray | None] = []
    for axis, start, size in zip(
        ins[0].axes, ins[1:], eqn.params["slice_sizes"], strict=True
    ):
        if start.known is None:
            out.append(None)
            continue
        first = min(max(int(start.known), 0), length(axis) - size)
        out.append(np.arange(first, first + size))
    return out


def _dynamic_slice(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    axes = []
    for axis, where, size in zip(
        x.axes, _starts(eqn, ins), eqn.params["slice_sizes"], strict=True
    ):
        if size != length(axis) and where is not None:
            axis = pick(t, eqn, axis, where)
        elif size != length(axis):
            t.freeze(eqn, axis, "slices at a place that is known only at run time")
            axis = t.space.plain(size)
        axes.append(axis)
    return [Value(tuple(axes), any(v.data for v in ins), x.zero)]


def _rebuild_dynamic_slice(n: Any, record: Record, args: list[Any]) -> list[Any]:
    x, starts, sizes = args[0], args[1:], list(n.shape(record))
    for d, where in enumerate(_starts(record.view, record.ins)):
        axis = record.ins[0].axes[d]
        if where is not None and len(where) != length(axis) and n.is_cut(axis):
            x = take_positions(n, x, axis, d, where)
            sizes[d] = x.shape[d]
    return [lax.dynamic_slice(x, starts, sizes)]


def _dynamic_update_slice(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    where = _written(eqn, ins)
    if where is not None:
        return [_write(t, eqn, ins, where)]
    x, update = ins[:2]
    axes = []
    for a, b in zip(x.axes, update.axes, strict=True):
        if length(a) != length(b):
            why = "is written at a place that is known only at run time"
            t.freeze(eqn, a, why)
            t.freeze(eqn, b, why)
            axes.append(t.space.plain(length(a)))
            continue
        axes.append(together(t, eqn, [a, b]))
    zero = x.zero and update.zero
    return [Value(tuple(axes), any(v.data for v in ins), zero)]


def _written(eqn: Any, ins: Sequence[Value]) -> list[np.ndarray | None] | None:
    """Along each axis the positions that an update at known places is written to.

    ``None`` stands for all of them, and for the list if the places are not known, not
    inside, or not one block or positions along one axis.
    """
    x, update = ins[0], _update(eqn, ins)
    sizes = [length(axis) for axis in x.axes]
    if isinstance(eqn, Equation) or update is None:
        return None
    blocks = [length(axis) for axis in update]
    if eqn.primitive.name == "dynamic_update_slice":
        starts = [v.known for v in ins[2:] if v.known is not None]
        if len(starts) < len(sizes):
            return None
        first = [
            min(max(int(s), 0), n - m)
            for s, n, m in zip(starts, sizes, blocks, strict=True)
        ]
    else:
        dims, indices = eqn.params["dimension_numbers"], ins[1].known
        if indices is None:
            return None
        if indices.ndim == 2:
            (d,) = dims.inserted_window_dims
            line = indices[:, 0]
            inside = line.size and 0 <= line.min() <= line.max() < sizes[d]
            if not inside or len(np.unique(line)) < len(line):
                return None
            return [line if k == d else None for k in range(len(sizes))]
        places = dict(zip(dims.scatter_dims_to_operand_dims, indices, strict=True))
        first = [int(places.get(d, 0)) for d in range(len(sizes))]
    if any(f < 0 or f + m > n for f, m, n in zip(first, blocks, sizes, strict=True)):
        return None
    return [
        None if m == n else np.arange(f, f + m)
        for f, m, n in zip(first, blocks, sizes, strict=True)
    ]


def _update(eqn: Any, ins: Sequence[Value]) -> list[Axis] | None:
    """The axes of an update as they lie along the array, if they are so many."""
    if eqn.primitive.name == "dynamic_update_slice":
        return list(ins[1].axes)
    dims, rank = eqn.params["dimension_numbers"], len(ins[1].axes)
    gone = tuple(dims.inserted_window_dims)
    axes = [ins[2].axes[d] for d in dims.update_window_dims]
    single = len(gone) == 1 and gone == tuple(dims.scatter_dims_to_operand_dims)
    if dims.operand_batching_dims or not (rank == 1 or (rank == 2 and single)):
        return None
    if rank == 1:
        for d in gone:
            axes.insert(d, ())
        return axes
    (other,) = {*range(len(ins[2].axes))} - {*dims.update_window_dims}
    axes.insert(gone[0], ins[2].axes[other])
    whole = all(
        d == gone[0] or length(a) == length(b)
        for d, (a, b) in enumerate(zip(axes, ins[0].axes, strict=True))
    )
    return axes if whole else None


def _replaced(eqn: Any, where: Sequence[np.ndarray | None]) -> int | None:
    """The only axis along which single positions are overwritten."""
    partial = [d for d, line in enumerate(where) if line is not None]
    sets = eqn.primitive.name in ("scatter", "dynamic_update_slice")
    return partial[0] if sets and len(partial) == 1 else None


def _write(
    t: Trace, eqn: Any, ins: Sequence[Value], where: Sequence[np.ndarray | None]
) -> Value:
    x, update = ins[0], _update(eqn, ins)
    assert update is not None
    axes = []
    for d, (axis, new, line) in enumerate(zip(x.axes, update, where, strict=True)):
        if line is None:
            axes.append(together(t, eqn, [axis, new]))
            continue
        mine, theirs = t.space.flatten(axis), t.space.flatten(new)
        scaled = eqn.primitive.name.endswith("mul")
        lost = not scaled and any(f.fill is None for f in theirs)
        if lost and all(f.fill is not None for f in mine):
            theirs = t.freeze(eqn, theirs, "is written between channels")
        atoms = np.zeros(length(axis), np.int32) if not mine else mine[0].atoms.copy()
        if d == _replaced(eqn, where):
            atoms[line] = theirs[0].atoms if theirs else 0
        else:
            plain = not mine or t.space.is_plain(mine[0])
            part = (Factor(atoms[line], ZERO),)
            if len(line) == 1:
                t.freeze(eqn, part, "is written by index")
            else:
                t.unify(eqn, [t.space.plain(len(line)) if plain else part, theirs])
        fill = union([f.fill for f in (*mine, *(() if scaled else theirs))])
        whole = not atoms.any()
        axes.append(t.space.plain(len(atoms)) if whole else (Factor(atoms, fill),))
    block = eqn.primitive.name == "dynamic_update_slice"
    zero = x.zero and ins[1 if block else 2].zero
    return Value(tuple(axes), any(v.data for v in ins), zero)


def _rebuild_write(n: Any, record: Record, args: list[Any]) -> Sequence[Any]:
    where = _written(record.view, record.ins)
    if where is None:
        return n.rebind(record, args)
    eqn, x = record.eqn, args[0]
    blocks = eqn.primitive.name == "dynamic_update_slice"
    axes, d = _update(eqn, record.ins), _replaced(eqn, where)
    assert axes is not None
    update = args[1 if blocks else 2]
    if d is not None:
        line = where[d]
        assert line is not None
        if not blocks:
            dims = eqn.params["dimension_numbers"]
            if len(record.ins[1].axes) == 2:
                (other,) = {*range(update.ndim)} - {*dims.update_window_dims}
                update = jnp.moveaxis(update, other, d)
            else:
                update = lax.expand_dims(update, dims.inserted_window_dims)
        index = np.cumsum(n.mask(record.ins[0].axes[d])) - 1
        index[line] = x.shape[d] + np.cumsum(n.mask(axes[d])) - 1
        kept = index[n.mask(record.outs[0].axes[d])]
        return [pick_out(lax.concatenate([x, update.astype(x.dtype)], d), kept, d)]
    # Places among what is kept; what is written is kept where it is written to.
    ranks = [
        None if line is None else (np.cumsum(n.mask(axis)) - n.mask(axis))[line]
        for axis, line in zip(record.ins[0].axes, where, strict=True)
    ]
    if blocks:
        starts = [
            s if r is None else int(r[0]) for s, r in zip(args[2:], ranks, strict=True)
        ]
        return n.rebind(record, [x, update, *map(jnp.int32, starts)])
    dims = eqn.params["dimension_numbers"]
    line = [ranks[d] for d in dims.scatter_dims_to_operand_dims]
    if len(record.ins[1].axes) == 2:
        kept = n.mask(axes[dims.inserted_window_dims[0]])
        index = args[1] if line[0] is None else line[0][kept][:, None]
    else:
        index = np.array([0 if r is None else r[0] for r in line])
    return n.rebind(record, [x, jnp.asarray(index, args[1].dtype), update])


def _window(eqn: Any, ins: Sequence[Value]) -> list[np.ndarray | None] | None:
    """Along each axis the positions of a gather of one block at a known place.

    ``None`` stands for all of them, and for the list if it is no such gather.
    """
    x, indices = ins
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if indices.known is None or indices.known.ndim != 1 or not _has_channels(eqn, ins):
        return None
    starts = dict(zip(dims.start_index_map, indices.known.tolist(), strict=True))
    out: list[np.ndarray | None] = []
    for d, (axis, size) in enumerate(zip(x.axes, sizes, strict=True)):
        first = starts.get(d, 0)
        if not 0 <= first <= length(axis) - size:
            return None
        whole = size == length(axis)
        out.append(None if whole else np.arange(first, first + size))
    return out


def _lookup(eqn: Any, ins: Sequence[Value]) -> tuple[int, np.ndarray] | None:
    """The axis and the positions of a gather that takes known ones along an axis."""
    x, indices = ins
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if indices.known is None or indices.known.ndim < 2 or not _has_channels(eqn, ins):
        return None
    d, where = dims.start_index_map[0], indices.known[..., 0]
    inside = np.all((where >= 0) & (where < length(x.axes[d])))
    whole = all(
        size == (1 if k == d else length(axis))
        for k, (axis, size) in enumerate(zip(x.axes, sizes, strict=True))
    )
    single = dims.start_index_map == dims.collapsed_slice_dims == (d,)
    return (d, where) if single and whole and inside and where.size else None


def _has_channels(eqn: Any, ins: Sequence[Value]) -> bool:
    """Whether a gather indexes an axis that could be cut."""
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    if dims.operand_batching_dims:
        return False
    symbolic = isinstance(eqn, Equation)
    if symbolic and mode != lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        return False
    return any(f.atoms.any() for d in dims.start_index_map for f in ins[0].axes[d])


def _static_gather(
    t: Trace, eqn: Any, x: Value, d: int, where: np.ndarray
) -> list[Value]:
    line = pick(t, eqn, x.axes[d], where.reshape(-1))
    rows = t.space.regroup([line], where.shape)
    if rows is None:
        t.freeze(eqn, line, "regroups positions across channels")
        rows = [t.space.plain(n) for n in where.shape]
    window = [axis for k, axis in enumerate(x.axes) if k != d]
    offsets = eqn.params["dimension_numbers"].offset_dims
    out = [
        window.pop(0) if k in offsets else rows.pop(0)
        for k in range(len(eqn.outvars[0].aval.shape))
    ]
    return [Value(tuple(out), x.data, x.zero)]


def _rebuild_static_gather(
    n: Any, record: Record, x: Any, d: int, where: np.ndarray
) -> list[Any]:
    x = take_positions(n, x, record.ins[0].axes[d], d, where.reshape(-1))
    shape = n.shape(record)
    offsets = record.eqn.params["dimension_numbers"].offset_dims
    places = [k for k in range(len(shape)) if k not in offsets]
    sizes = [shape[k] for k in places]
    x = lax.reshape(x, [*x.shape[:d], *sizes, *x.shape[d + 1 :]])
    return [jnp.moveaxis(x, range(d, d + len(places)), places)]


def _rebuild_window(
    n: Any, record: Record, x: Any, window: list[np.ndarray | None]
) -> list[Any]:
    p = record.eqn.params
    for d, where in enumerate(window):
        axis = record.ins[0].axes[d]
        if where is not None and n.is_cut(axis):
            x = take_positions(n, x, axis, d, where)
        elif where is not None:
            first = int(where[0])
            x = lax.slice_in_dim(x, first, first + p["slice_sizes"][d], axis=d)
    return [lax.squeeze(x, p["dimension_numbers"].collapsed_slice_dims)]


def _gather(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, indices = ins
    known = _lookup(eqn, ins)
    if known is not None:
        return _static_gather(t, eqn, x, *known)
    dims = eqn.params["dimension_numbers"]
    place = _window(eqn, ins)
    if place is not None:
        axes = [
            axis if where is None else pick(t, eqn, axis, where)
            for axis, where in zip(x.axes, place, strict=True)
        ]
        gone = dims.collapsed_slice_dims
        axes = tuple(axis for d, axis in enumerate(axes) if d not in gone)
        return [Value(axes, x.data, x.zero)]
    sizes = eqn.params["slice_sizes"]
    rows = list(indices.axes[:-1])
    t.freeze(eqn, indices.axes[-1], "holds indices")
    window = []
    for d, axis in enumerate(x.axes):
        if d in dims.operand_batching_dims:
            k = dims.start_indices_batching_dims[dims.operand_batching_dims.index(d)]
            mine, theirs = t.unify(eqn, [axis, rows[k]])
            rows[k] = refill(theirs, None) if mine else theirs
            continue
        if sizes[d] != length(axis):
            t.freeze(eqn, axis, "is looked up by index")
            axis = t.space.plain(sizes[d])
        if d not in dims.collapsed_slice_dims:
            window.append(axis)
    rows = [refill(axis, None) for axis in rows]
    outside = eqn.params.get("fill_value")
    if outside is not None and outside == outside and outside != 0:
        # What lies outside reads as this number, also where a channel is absent. (Not
        # a number, the default, spoils all channels alike.)
        window = [refill(axis, None) for axis in window]
    out = [
        window.pop(0) if d in dims.offset_dims else rows.pop(0)
        for d in range(len(eqn.outvars[0].aval.shape))
    ]
    return [Value(tuple(out), x.data or indices.data, x.zero)]


def _rebuild_gather(n: Any, record: Record, args: list[Any]) -> list[Any]:
    known = _lookup(record.view, record.ins)
    if known is not None:
        return _rebuild_static_gather(n, record, args[0], *known)
    window = _window(record.view, record.ins)
    if window is not None:
        return _rebuild_window(n, record, args[0], window)
    x = record.ins[0]
    sizes = tuple(
        n.size(axis, size) if number == length(axis) and number > 1 else size
        for axis, number, size in zip(
            x.axes,
            record.view.params["slice_sizes"],
            record.eqn.params["slice_sizes"],
            strict=True,
        )
    )
    return n.rebind(record, args, slice_sizes=sizes)


def _scatter(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    where = _written(eqn, ins)
    if where is not None:
        return [_write(t, eqn, ins, where)]
    x, indices, updates = ins
    dims = eqn.params["dimension_numbers"]
    t.freeze(eqn, indices.axes[-1], "holds indices")
    window = [updates.axes[d] for d in dims.update_window_dims]
    rows = [
        axis for d, axis in enumerate(updates.axes) if d not in dims.update_window_dims
    ]
    why = "is written by index"
    adds = eqn.primitive.name.endswith(("add", "sub"))
    for a, b in zip(rows, indices.axes[:-1], strict=True):
        a, _ = t.unify(eqn, [a, b])
        # A row that is absent writes nothing: that must make no difference.
        if adds:
            need_zero(t, eqn, a)
        else:
            t.freeze(eqn, a, why)
    out = []
    for d, axis in enumerate(x.axes):
        if d in dims.operand_batching_dims:
            k = dims.scatter_indices_batching_dims[dims.operand_batching_dims.index(d)]
            axis = t.unify(eqn, [axis, indices.axes[k]])[0]
            out.append(refill(axis, None))
        elif d in dims.inserted_window_dims:
            out.append(t.freeze(eqn, axis, why))
        else:
            other = window.pop(0)
            if length(other) != length(axis):
                t.freeze(eqn, other, why)
                out.append(t.freeze(eqn, axis, why))
                continue
            out.append(together(t, eqn, [axis, other]))
    return [Value(tuple(out), any(v.data for v in ins))]


def _updates(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    """One operation for each entry that is written."""
    return math.prod(shapes[2])


SCATTERS = "scatter scatter_add scatter-add scatter_sub scatter-sub scatter_mul \
scatter-mul scatter_min scatter-min scatter_max scatter-max".split()

RULES: dict[str, Rule] = {
    "dynamic_slice": Rule(
        _dynamic_slice,
        known=numbers.dynamic_slice,
        rebuild=_rebuild_dynamic_slice,
        picks=True,
        flops=moves,
    ),
    "dynamic_update_slice": Rule(
        _dynamic_update_slice,
        rebuild=_rebuild_write,
        picks=True,
        known=numbers.dynamic_update_slice,
        flops=moves,
    ),
    "gather": Rule(
        _gather, known=numbers.gather, rebuild=_rebuild_gather, picks=True, flops=moves
    ),
    **{
        name: Rule(
            _scatter,
            rebuild=_rebuild_write,
            known=numbers.scatter if name == "scatter" else None,
            picks=name == "scatter",
            flops=moves if name == "scatter" else _updates,
        )
        for name in SCATTERS
    },
}
