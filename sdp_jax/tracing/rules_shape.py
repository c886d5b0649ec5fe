"""Primitives that move entries: reshape, transpose, concatenate, slice, gather."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sdp_jax.tracing import numbers
from sdp_jax.tracing.evaluate import pick_out
from sdp_jax.tracing.rule import Repeat, Rule, moves
from sdp_jax.tracing.trace import Record, Trace, freeze_all
from sdp_jax.tracing.values import ZERO, Axis, Factor, Fill, Value, length, union


def _broadcast(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    fill: Fill = ZERO if x.zero else None
    axes: list[Axis | None] = [None] * len(shape)
    for axis, d in zip(x.axes, where, strict=True):
        if length(axis) == shape[d]:
            axes[d] = axis
    out = [
        _repeated(t, n, fill) if a is None else a
        for n, a in zip(shape, axes, strict=True)
    ]
    return [Value(tuple(out), x.data, x.zero)]


def _repeated(t: Trace, size: int, fill: Fill) -> Axis:
    """An axis along which an array is the same everywhere."""
    return tuple(Factor(f.atoms, fill, ZERO) for f in t.space.fresh(size, fill))


def _rebuild_broadcast(n: Any, record: Record, args: list[Any]) -> list[Any]:
    p = record.eqn.params
    where, sharding = p["broadcast_dimensions"], p["sharding"]
    shape = n.shape(record)
    return [lax.broadcast_in_dim(args[0], shape, where, out_sharding=sharding)]


def _repeat_broadcast(
    n: Any, record: Record, whole: Any, dimensions: Any, each: Any
) -> Any:
    where = list(record.eqn.params["broadcast_dimensions"])
    small = n.absent(record, 0, [where.index(d) for d in dimensions if d in where])
    shape = [1 if d in dimensions else size for d, size in enumerate(whole)]
    for d in each:
        shape[d] = small.shape[where.index(d)]
    return lax.broadcast_in_dim(small, shape, where)


def _repeat_moved(came_from: Callable[[Any], Sequence[int]]) -> Repeat:
    """For what only moves axes or leaves them out: where those of the result were."""

    def repeat(n: Any, record: Record, whole: Any, dimensions: Any, each: Any) -> Any:
        before = came_from(record)
        dimensions, each = ([before[d] for d in some] for some in (dimensions, each))
        x = n.absent(record, 0, dimensions, each)
        if record.eqn.primitive.name == "slice":
            return _rebuild_slice(n, record, [x])[0]
        return n.rebind(record, [x])[0]

    return repeat


def _blocks(
    a: Sequence[int], b: Sequence[int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The finest pairs of runs of two shapes that hold the same number of entries."""
    if math.prod(a) != math.prod(b):
        raise ValueError(
            f"a reshape needs a symbolic size to be a multiple of a number ({tuple(a)} "
            f"to {tuple(b)} at a stand-in); ask for a multiple, as in "
            'jax.export.symbolic_shape("8*batch")'
        )
    blocks, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        start, other = i, j
        left = a[i] if i < len(a) else 1
        right = b[j] if j < len(b) else 1
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while left != right:
            if left < right:
                left, i = left * a[i], i + 1
            else:
                right, j = right * b[j], j + 1
        blocks.append(((start, i), (other, j)))
    return blocks


def _reshape(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, order = ins[0], eqn.params["dimensions"]
    if order is not None:
        x = dataclasses.replace(x, axes=tuple(x.axes[i] for i in order))
    shape = eqn.outvars[0].aval.shape
    out: list[Axis] = []
    for (start, stop), (first, last) in _blocks(x.shape, shape):
        axes = t.space.regroup(x.axes[start:stop], shape[first:last])
        if axes is None:
            for axis in x.axes[start:stop]:
                t.freeze(eqn, axis, "regroups positions across channels")
            axes = [t.space.plain(n) for n in shape[first:last]]
        out += axes
    return [Value(tuple(out), x.data, x.zero)]


def _rebuild_reshape(n: Any, record: Record, args: list[Any]) -> list[Any]:
    p, shape = record.eqn.params, n.shape(record)
    return [lax.reshape(args[0], shape, p["dimensions"], out_sharding=p["sharding"])]


def _transpose(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    order = eqn.params["permutation"]
    return [Value(tuple(x.axes[i] for i in order), x.data, x.zero)]


def _squeeze(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    gone = eqn.params["dimensions"]
    axes = tuple(axis for i, axis in enumerate(x.axes) if i not in gone)
    return [Value(axes, x.data, x.zero)]


def _others(record: Record, gone: Sequence[int]) -> list[int]:
    return [d for d in range(len(record.ins[0].axes)) if d not in gone]


def pick(t: Trace, eqn: Any, axis: Axis, positions: np.ndarray) -> Axis:
    """The axis made of some positions of another one."""
    flat = t.space.flatten(axis)
    if not flat or t.space.is_plain(flat[0]):
        return t.space.plain(len(positions))
    factor = Factor(flat[0].atoms[positions], flat[0].fill)
    if len(positions) == 1:
        return t.freeze(eqn, (factor,), "takes a single position")
    return (factor,)


def take_positions(
    n: Any, x: Any, axis: Axis, dimension: int, positions: np.ndarray
) -> Any:
    """What is left of ``x`` (already cut) at dense positions along an axis."""
    n.check_fixed(x.shape[dimension])
    mask = n.mask(axis)
    rank = np.cumsum(mask) - 1
    index = rank[positions[mask[positions]]]
    return pick_out(x, index, dimension)


def _slices(eqn: Any) -> list[np.ndarray]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return [
        np.arange(a, b, s)
        for a, b, s in zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    ]


def _slice(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    axes = [
        axis if len(where) == length(axis) else pick(t, eqn, axis, where)
        for axis, where in zip(x.axes, _slices(eqn), strict=True)
    ]
    return [Value(tuple(axes), x.data, x.zero)]


def _rebuild_slice(n: Any, record: Record, args: list[Any]) -> list[Any]:
    x = args[0]
    p = record.eqn.params
    for d, where in enumerate(_slices(record.view)):
        axis = record.ins[0].axes[d]
        if len(where) == length(axis):
            continue
        if n.is_cut(axis):
            x = take_positions(n, x, axis, d, where)
        else:
            stride = p["strides"][d] if p["strides"] else 1
            first, last = p["start_indices"][d], p["limit_indices"][d]
            x = lax.slice_in_dim(x, first, last, stride, axis=d)
    return [x]


def _split(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, d = ins[0], eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    outs = []
    for size, end in zip(eqn.params["sizes"], ends, strict=True):
        axes = list(x.axes)
        axes[d] = pick(t, eqn, x.axes[d], np.arange(end - size, end))
        outs.append(Value(tuple(axes), x.data, x.zero))
    return outs


def _rebuild_split(n: Any, record: Record, args: list[Any]) -> list[Any]:
    d = record.eqn.params["axis"]
    axis = record.ins[0].axes[d]
    if not n.is_cut(axis):
        return n.rebind(record, args)
    ends = np.cumsum(record.eqn.params["sizes"])
    return [
        take_positions(n, args[0], axis, d, np.arange(end - size, end))
        for size, end in zip(record.eqn.params["sizes"], ends, strict=True)
    ]


def _reverse(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    axes = [
        pick(t, eqn, axis, np.arange(length(axis))[::-1])
        if i in eqn.params["dimensions"]
        else axis
        for i, axis in enumerate(x.axes)
    ]
    return [Value(tuple(axes), x.data, x.zero)]


def _concatenate(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    d = eqn.params["dimension"]
    axes = []
    for k in range(len(ins[0].axes)):
        lines = [v.axes[k] for v in ins]
        if k == d:
            lines = _beside(t, eqn, ins, lines)
        axes.append(_join(t, lines) if k == d else together(t, eqn, lines))
    data = any(v.data for v in ins)
    return [Value(tuple(axes), data, all(v.zero for v in ins))]


def _beside(t: Trace, eqn: Any, ins: Sequence[Value], lines: list[Axis]) -> list[Axis]:
    """Constants beside channels that become zero stay, and those can still go."""
    lost = [
        v.free and any(f.fill is None for f in a)
        for v, a in zip(ins, lines, strict=True)
    ]
    rest = [f for a, c in zip(lines, lost, strict=True) if not c for f in a]
    if not rest or any(f.fill is None for f in rest):
        return lines
    why = "is a constant beside channels"
    return [t.freeze(eqn, a, why) if c else a for a, c in zip(lines, lost, strict=True)]


def _join(t: Trace, lines: list[Axis]) -> Axis:
    flat = [t.space.flatten(line) for line in lines]
    if all(not f or t.space.is_plain(f[0]) for f in flat):
        return t.space.plain(sum(length(line) for line in lines))
    atoms = np.concatenate([f[0].atoms if f else np.zeros(1, np.int32) for f in flat])
    live = [f[0].fill for f in flat if f and not t.space.is_plain(f[0])]
    return (Factor(atoms, union(live)),)


def together(t: Trace, eqn: Any, lines: list[Axis]) -> Axis:
    """An axis that runs along all operands: zero where all of them are."""
    return tuple(
        Factor(fs[0].atoms, union(f.fill for f in fs))
        for fs in zip(*t.unify(eqn, lines), strict=True)
    )


def _tile(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    axes: list[Axis] = []
    for axis, times in zip(x.axes, eqn.params["reps"], strict=True):
        if times == 1:
            axes.append(axis)
        elif not axis:
            axes.append(t.space.fresh(times, ZERO if x.zero else None))
        else:
            axes.append(pick(t, eqn, axis, np.tile(np.arange(length(axis)), times)))
    return [Value(tuple(axes), x.data, x.zero)]


def _rebuild_tile(n: Any, record: Record, args: list[Any]) -> list[Any]:
    out = record.outs[0]
    whole = jnp.tile(args[0], record.eqn.params["reps"])
    for d, axis in enumerate(out.axes):
        # Only what was repeated out of one entry can be left out here.
        if not record.ins[0].axes[d] and n.is_cut(axis):
            n.check_fixed(whole.shape[d])
            whole = pick_out(whole, np.flatnonzero(n.mask(axis)), d)
    return [whole]


def _stack(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    d = eqn.params["axis"]
    lines = zip(*(v.axes for v in ins), strict=True)
    axes = [together(t, eqn, [*line]) for line in lines]
    axes.insert(d, t.space.plain(len(ins)))
    data = any(v.data for v in ins)
    return [Value(tuple(axes), data, all(v.zero for v in ins))]


def _unstack(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, d = ins[0], eqn.params["axis"]
    t.freeze(eqn, x.axes[d], "takes single positions")
    part = Value((*x.axes[:d], *x.axes[d + 1 :]), x.data, x.zero)
    return [part] * len(eqn.outvars)


def _pad_positions(axis: Axis, config: tuple[int, int, int]) -> np.ndarray:
    """For each position of the padded axis the one it comes from, or -1."""
    low, high, interior = config
    size = length(axis)
    spread = size + max(size - 1, 0) * interior
    whole = np.full(max(low, 0) + spread + max(high, 0), -1)
    start = max(low, 0)
    whole[start : start + spread : interior + 1] = np.arange(size)
    return whole[max(-low, 0) : len(whole) - max(-high, 0)]


def _pad(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, value = ins
    axes = []
    for axis, config in zip(x.axes, eqn.params["padding_config"], strict=True):
        if tuple(config) == (0, 0, 0):
            axes.append(axis)
            continue
        where = _pad_positions(axis, config)
        flat = t.space.flatten(axis)
        if not flat or t.space.is_plain(flat[0]):
            axes.append(t.space.plain(len(where)))
            continue
        # Padding is the same everywhere, so any part of it can be left out.
        atoms = np.where(where >= 0, flat[0].atoms[np.maximum(where, 0)], -1)
        atoms[where < 0] = t.space.atoms.fresh(int((where < 0).sum()))
        fill = flat[0].fill if value.zero else None
        axes.append((Factor(atoms, fill),))
    return [Value(tuple(axes), x.data or value.data, x.zero and value.zero)]


def _rebuild_pad(n: Any, record: Record, args: list[Any]) -> list[Any]:
    x, value = args
    configs = []
    original = record.eqn.params["padding_config"]
    for d, config in enumerate(record.view.params["padding_config"]):
        axis, out = record.ins[0].axes[d], record.outs[0].axes[d]
        if tuple(config) == (0, 0, 0) or not (n.is_cut(axis) or n.is_cut(out)):
            configs.append(tuple(original[d]))
            continue
        configs.append((0, 0, 0))
        n.check_fixed(x.shape[d])
        where = _pad_positions(axis, config)[n.mask(out)]
        rank = np.cumsum(n.mask(axis)) - 1
        shape = list(x.shape)
        index = np.where(where >= 0, rank[np.maximum(where, 0)], shape[d])
        shape[d] = 1
        both = lax.concatenate([x, jnp.broadcast_to(value, shape)], d)
        x = pick_out(both, index, d)
    return [lax.pad(x, value, configs)]


def _generate(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Arrays that do not depend on channels: any part of them can be taken."""
    for value in ins:
        for axis in value.axes:
            t.freeze(eqn, axis, "needs its operand whole")
    data = any(v.data for v in ins)
    return [t.space.fresh_value(v.aval.shape, data=data) for v in eqn.outvars]


def _rebuild_generate(n: Any, record: Record, args: list[Any]) -> list[Any]:
    outs = n.rebind(record, args)
    return [n.take(x, v) for x, v in zip(outs, record.outs, strict=True)]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": Rule(
        _broadcast,
        known=numbers.broadcast_in_dim,
        rebuild=_rebuild_broadcast,
        even=True,
        repeat=_repeat_broadcast,
        flops=moves,
    ),
    "reshape": Rule(
        _reshape, known=numbers.reshape, rebuild=_rebuild_reshape, flops=moves
    ),
    "transpose": Rule(
        _transpose,
        known=numbers.transpose,
        repeat=_repeat_moved(lambda r: r.eqn.params["permutation"]),
        flops=moves,
    ),
    "squeeze": Rule(
        _squeeze,
        known=numbers.squeeze,
        repeat=_repeat_moved(lambda r: _others(r, r.eqn.params["dimensions"])),
        flops=moves,
    ),
    "slice": Rule(
        _slice,
        known=numbers.slices,
        rebuild=_rebuild_slice,
        repeat=_repeat_moved(lambda r: _others(r, ())),
        picks=True,
        flops=moves,
    ),
    "split": Rule(
        _split, known=numbers.split, rebuild=_rebuild_split, picks=True, flops=moves
    ),
    "rev": Rule(_reverse, known=numbers.rev, flops=moves),
    "concatenate": Rule(_concatenate, known=numbers.concatenate, flops=moves),
    "tile": Rule(_tile, known=numbers.tile, rebuild=_rebuild_tile, flops=moves),
    "stack": Rule(_stack, known=numbers.stack, flops=moves),
    "unstack": Rule(_unstack, flops=moves),
    "pad": Rule(_pad, known=numbers.pad, rebuild=_rebuild_pad, picks=True, flops=moves),
    "iota": Rule(_generate, rebuild=_rebuild_generate, known=numbers.iota, flops=moves),
    "dim_as_value": Rule(_generate, rebuild=_rebuild_generate, flops=moves),
    **dict.fromkeys(
        ("random_bits", "rng_bit_generator", "rng_uniform"),
        Rule(_generate, rebuild=_rebuild_generate),
    ),
    **dict.fromkeys(
        ("random_seed", "random_wrap", "random_unwrap"),
        Rule(freeze_all, flops=moves),
    ),
}
