"""Contractions and reductions: where absent terms must be zero."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sdp_jax.tracing import numbers
from sdp_jax.tracing.evaluate import pick_out, subsets
from sdp_jax.tracing.rule import Analyse, Rule, per_operand_entry
from sdp_jax.tracing.rules_elementwise import joint_fill
from sdp_jax.tracing.trace import INEXACT, Record, Trace, freeze_all, need_zero
from sdp_jax.tracing.values import ZERO, Axis, Factor, Value, agree, refill


def _contract(
    t: Trace, eqn: Any, left: Axis, right: Axis, data: tuple[bool, bool]
) -> None:
    """Sums over an axis of both operands: one of them must be zero where absent."""
    a, b = t.unify(eqn, [left, right])
    for f, g in zip(a, b, strict=True):
        if t.space.is_plain(f) or f.fill == ZERO or g.fill == ZERO:
            continue
        if f.fill is None and g.fill is None:
            t.freeze(eqn, (f,), INEXACT)
        elif g.fill is None or (f.fill is not None and (data[0] or not data[1])):
            t.settle(f.fill)
        else:
            t.settle(g.fill)


def _either(t: Trace, eqn: Any, left: Axis, right: Axis, data: bool) -> Axis:
    """An axis that runs along both operands: zero where either is."""
    return tuple(
        Factor(f.atoms, joint_fill(t, [f.fill, g.fill], "any", data))
        for f, g in zip(*t.unify(eqn, [left, right]), strict=True)
    )


def _dot(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, y = ins
    (left, right), (rows, columns) = eqn.params["dimension_numbers"]
    for i, j in zip(left, right, strict=True):
        _contract(t, eqn, x.axes[i], y.axes[j], (x.data, y.data))
    axes = [
        _either(t, eqn, x.axes[i], y.axes[j], x.data or y.data)
        for i, j in zip(rows, columns, strict=True)
    ]
    axes += [a for i, a in enumerate(x.axes) if i not in (*left, *rows)]
    axes += [a for i, a in enumerate(y.axes) if i not in (*right, *columns)]
    return [Value(tuple(axes), x.data or y.data, x.zero or y.zero)]


def _dot_flops(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    (left, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(outs[0]) * math.prod(shapes[0][i] for i in left)


def _ragged_dot(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Rows are told apart by sizes of run time: those axes stay whole."""
    x, y = ins[:2]
    p = eqn.params["ragged_dot_dimension_numbers"]
    (left, right), (rows, columns) = p.dot_dimension_numbers
    why = "is grouped by sizes that are known only at run time"
    for v, dims in ((x, p.lhs_ragged_dimensions), (y, p.rhs_group_dimensions)):
        for d in dims:
            t.freeze(eqn, v.axes[d], why)
    # An operand of the other side runs along with the ragged axis.
    (ragged,) = p.lhs_ragged_dimensions
    if ragged in left:
        t.freeze(eqn, y.axes[right[left.index(ragged)]], why)
    for value in ins[2:]:
        for axis in value.axes:
            t.freeze(eqn, axis, why)
    for i, j in zip(left, right, strict=True):
        _contract(t, eqn, x.axes[i], y.axes[j], (x.data, y.data))
    data = x.data or y.data
    axes = [
        _either(t, eqn, x.axes[i], y.axes[j], data)
        for i, j in zip(rows, columns, strict=True)
    ]
    gone = (*right, *columns, *p.rhs_group_dimensions)
    axes += [a for i, a in enumerate(x.axes) if i not in (*left, *rows)]
    axes += [a for i, a in enumerate(y.axes) if i not in gone]
    if ragged in left:
        axes.insert(0, t.space.plain(eqn.outvars[0].aval.shape[0]))
    return [Value(tuple(axes), data or ins[2].data, x.zero or y.zero)]


def _ragged_flops(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    p = eqn.params["ragged_dot_dimension_numbers"]
    left, _ = p.dot_dimension_numbers[0]
    # Each row of the ragged axis is in one group.
    out = outs[0][1:] if p.lhs_ragged_dimensions[0] in left else outs[0]
    return 2 * math.prod(out) * math.prod(shapes[0][i] for i in left)


def _conv_groups(t: Trace, eqn: Any, ins: list[Value]) -> tuple[Axis, ...] | None:
    """Feature axes as (groups, features) of input, output; and of the kernel."""
    x, kernel = ins
    spec = eqn.params["dimension_numbers"]
    count = eqn.params["feature_group_count"]
    inputs, outputs = x.axes[spec.lhs_spec[1]], kernel.axes[spec.rhs_spec[0]]
    a = t.space.regroup([inputs], [count, x.shape[spec.lhs_spec[1]] // count])
    b = t.space.regroup([outputs], [count, kernel.shape[spec.rhs_spec[0]] // count])
    return None if a is None or b is None else (a[0], a[1], b[0], b[1])


def _conv(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, kernel = ins
    spec = eqn.params["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    axes = [t.space.plain(n) for n in shape]
    for d, e, f in zip(spec.lhs_spec, spec.rhs_spec, spec.out_spec, strict=True):
        if d in spec.lhs_spec[2:]:
            operands = [(x, d, spec.lhs_spec[1]), (kernel, e, spec.rhs_spec[1])]
            axes[f] = _along(t, eqn, operands, shape[f])
    axes[spec.out_spec[0]] = x.axes[spec.lhs_spec[0]]
    groups = _conv_groups(t, eqn, ins)
    if eqn.params["batch_group_count"] > 1 or groups is None:
        why = "groups channels in a way that no cut keeps"
        for axis in (*x.axes, *kernel.axes):
            t.freeze(eqn, axis, why)
        axes[spec.out_spec[0]] = t.space.plain(shape[spec.out_spec[0]])
        return [Value(tuple(axes), x.data or kernel.data)]
    group, inputs, other, outputs = groups
    _contract(t, eqn, inputs, kernel.axes[spec.rhs_spec[1]], (x.data, kernel.data))
    data = x.data or kernel.data
    axes[spec.out_spec[1]] = (*_either(t, eqn, group, other, data), *outputs)
    return [Value(tuple(axes), data, x.zero or kernel.zero)]


def _along(
    t: Trace, eqn: Any, operands: Sequence[tuple[Value, int, int]], size: int
) -> Axis:
    """Convolves along an axis: activations along channels are padded with their zeros.

    So that is what absent channels must be; any part of the result can be taken. An
    axis beside channels, or one that holds other places, too, is one of an image.
    """
    padded = False
    for value, d, features in operands:
        plain = [t.space.is_plain(f) for f in value.axes[d]]
        if all(plain):
            continue
        beside = not all(map(t.space.is_plain, value.axes[features]))
        lost = any(f.fill is None for f in value.axes[d])
        if value.data and not (any(plain) or beside or lost):
            need_zero(t, eqn, value.axes[d])
            padded = True
        else:
            t.freeze(eqn, value.axes[d], "convolves along this axis")
    return t.space.fresh(size, None) if padded else t.space.plain(size)


def _pad_channels(n: Any, x: Any, value: Value, dims: Sequence[int]) -> Any:
    """Zeros where channels are absent along some axes."""
    for d in dims:
        if n.is_cut(value.axes[d]):
            mask = n.mask(value.axes[d])
            shape = list(x.shape)
            shape[d] = 1
            index = np.where(mask, np.cumsum(mask) - 1, x.shape[d])
            x = pick_out(lax.concatenate([x, jnp.zeros(shape, x.dtype)], d), index, d)
    return x


def _rebuild_conv(n: Any, record: Record, args: list[Any]) -> list[Any]:
    eqn = record.eqn
    both = eqn.params["dimension_numbers"]
    dims = (both.lhs_spec[2:], both.rhs_spec[2:])
    args = [
        _pad_channels(n, x, v, d)
        for x, v, d in zip(args, record.ins, dims, strict=True)
    ]
    count = eqn.params["feature_group_count"]
    if count > 1:
        spec = eqn.params["dimension_numbers"]
        inputs = args[1].shape[spec.rhs_spec[1]]
        count = args[0].shape[spec.lhs_spec[1]] // inputs
    changed = {"feature_group_count": count}
    for name, arg in (("lhs_shape", args[0]), ("rhs_shape", args[1])):
        if name in eqn.params:
            changed[name] = arg.shape
    (out,) = n.rebind(record, args, **changed)
    for d in both.out_spec[2:]:
        if n.is_cut(axis := record.outs[0].axes[d]):
            out = pick_out(out, np.flatnonzero(n.mask(axis)), d)
    return [out]


def _conv_flops(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    spec, out_spec = (
        getattr(eqn.params["dimension_numbers"], k) for k in ("rhs_spec", "out_spec")
    )
    kernel, out = (v.aval.shape for v in (eqn.invars[1], eqn.outvars[0]))
    # Convolutions along channels run along all of them.
    window = math.prod(kernel[d] for d in spec[2:]) * shapes[1][spec[1]]
    places = math.prod(outs[0][d] for d in out_spec[:2]) * math.prod(
        out[d] for d in out_spec[2:]
    )
    # Zeros that only spread a transposed convolution's input do not count.
    spread = math.prod(eqn.params["lhs_dilation"])
    share = 1 / (eqn.params["batch_group_count"] * spread)
    return 2 * places * window * share


def _sum(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    _even_out(t, eqn, x, eqn.params["axes"])
    return [_drop(x, eqn.params["axes"])]


def _even_out(t: Trace, eqn: Any, x: Value, dimensions: Sequence[int]) -> None:
    """Reduces over axes whose absent entries are zero, or can be computed."""
    for d in dimensions:
        live = [f for f in x.axes[d] if not t.space.is_plain(f)]
        rest = live[0].rest if len(live) == 1 and live[0].fill is None else None
        if rest is None:
            need_zero(t, eqn, x.axes[d])
        else:
            t.settle(rest)


def _rebuild_sum(n: Any, record: Record, args: list[Any]) -> list[Any]:
    return [_add_up(n, record, args[0])]


def _repeat_sum(n: Any, record: Record, whole: Any, dimensions: Any, each: Any) -> Any:
    where, each = _before(record, dimensions), _before(record, each)
    return _add_up(n, record, n.absent(record, 0, where, each), where, each)


def _before(record: Record, dimensions: Sequence[int]) -> list[int]:
    """Where axes of what is reduced were."""
    rank, gone = len(record.ins[0].axes), record.eqn.params["axes"]
    left = [d for d in range(rank) if d not in gone]
    return [left[d] for d in dimensions]


def _add_up(
    n: Any, record: Record, x: Any, where: Sequence[int] = (), each: Sequence[int] = ()
) -> Any:
    """Sums what is there and what is absent, of what is absent along other axes."""
    (out,) = n.rebind(record, [x])
    axes, shape = record.ins[0].axes, record.eqn.invars[0].aval.shape
    for some in subsets(d for d in record.eqn.params["axes"] if n.is_lost(axes[d])):
        (rest,) = n.rebind(record, [n.absent(record, 0, [*where, *some], each)])
        times = [
            shape[d] - n.size(axes[d], shape[d])
            for d in some
            if not n.varies(record.ins[0], d)
        ]
        out = out + rest * jnp.asarray(math.prod(times), out.dtype)
    return out


def _psum(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Over axes of the mesh, or of the arrays, as ``vmap`` makes of names."""
    axes = [axis for axis in eqn.params["axes"] if isinstance(axis, int)]
    for x in ins:
        for d in axes:
            need_zero(t, eqn, x.axes[d])
    return [_drop(x, axes) for x in ins]


def _extreme(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    _even_out(t, eqn, ins[0], eqn.params["axes"])
    return [_drop(ins[0], eqn.params["axes"])]


def _rebuild_extreme(n: Any, record: Record, args: list[Any]) -> list[Any]:
    return [_outermost(n, record, args[0])]


def _repeat_extreme(
    n: Any, record: Record, whole: Any, dimensions: Any, each: Any
) -> Any:
    where, each = _before(record, dimensions), _before(record, each)
    return _outermost(n, record, n.absent(record, 0, where, each), where, each)


def _outermost(
    n: Any, record: Record, x: Any, where: Sequence[int] = (), each: Sequence[int] = ()
) -> Any:
    join = lax.max if record.eqn.primitive.name == "reduce_max" else lax.min
    (out,) = n.rebind(record, [x])
    axes = record.ins[0].axes
    for some in subsets(d for d in record.eqn.params["axes"] if n.is_cut(axes[d])):
        out = join(
            out, n.rebind(record, [n.absent(record, 0, [*where, *some], each)])[0]
        )
    return out


def _bits(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    for d in eqn.params["axes"]:
        need_zero(t, eqn, ins[0].axes[d])
    return [_drop(ins[0], eqn.params["axes"])]


def _drop(x: Value, axes: Any) -> Value:
    left = tuple(axis for i, axis in enumerate(x.axes) if i not in axes)
    return Value(left, x.data, x.zero)


def _reduce(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    for d in eqn.params["axes"]:
        t.freeze(eqn, x.axes[d], "compares all channels")
    return [_drop(x, eqn.params["axes"])]


def _argument(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    out = _reduce(t, eqn, ins)[0]
    return [Value(tuple(refill(a, None) for a in out.axes), out.data)]


def _cumulate(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, d = ins[0], eqn.params["axis"]
    axes = list(x.axes)
    if eqn.primitive.name == "cumsum":
        need_zero(t, eqn, axes[d])
        axes[d] = refill(axes[d], None)
    else:
        axes[d] = t.freeze(eqn, axes[d], "accumulates over all channels")
    if eqn.primitive.name == "cumlogsumexp":
        axes = [refill(axis, None) for axis in axes]
    return [Value(tuple(axes), x.data)]


def _sort(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    d = eqn.params["dimension"]
    outs = [list(v.axes) for v in ins]
    for k in range(len(ins[0].axes)):
        lines = [v.axes[k] for v in ins]
        if k == d:
            lines = [t.freeze(eqn, line, "compares all channels") for line in lines]
        else:
            lines = t.unify(eqn, lines)
        for out, line in zip(outs, lines, strict=True):
            out[k] = line
    data = any(v.data for v in ins)
    return [Value(tuple(axes), data) for axes in outs]


def _fft(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x = ins[0]
    first = len(x.axes) - len(eqn.params["fft_lengths"])
    for axis in x.axes[first:]:
        t.freeze(eqn, axis, "transforms along this axis")
    shape = eqn.outvars[0].aval.shape
    axes = (*x.axes[:first], *(t.space.plain(n) for n in shape[first:]))
    return [Value(axes, x.data, x.zero)]


def _top_k(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    x, rank = ins[0], len(ins[0].axes)
    d = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1)) % rank
    t.freeze(eqn, x.axes[d], "compares all channels")
    outs = []
    for k, var in enumerate(eqn.outvars):
        # The largest of zeros is zero; where it is, is anywhere.
        axes = list(x.axes) if k == 0 else [refill(axis, None) for axis in x.axes]
        axes[d] = t.space.plain(var.aval.shape[d])
        outs.append(Value(tuple(axes), x.data))
    return outs


def _reduce_by(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Any reduction of several arrays: nobody knows what it makes of zeros."""
    arrays = ins[: len(ins) // 2]
    axes = []
    for d in range(len(arrays[0].axes)):
        lines = [v.axes[d] for v in arrays]
        if d in eqn.params["dimensions"]:
            for line in lines:
                t.freeze(eqn, line, "compares all channels")
        else:
            axes.append(refill(t.unify(eqn, lines)[0], None))
    return [Value(tuple(axes), any(v.data for v in ins)) for _ in eqn.outvars]


def _window(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    p = eqn.params
    x = ins[0]
    shape = eqn.outvars[0].aval.shape
    rank = len(x.axes)
    ones = (1,) * rank
    axes = []
    for d in range(rank):
        trivial = (
            p["window_dimensions"][d] == 1
            and (p["window_strides"] or ones)[d] == 1
            and tuple(p["padding"][d]) == (0, 0)
            and (p.get("base_dilation") or ones)[d] == 1
            and (p.get("window_dilation") or ones)[d] == 1
        )
        lines = [v.axes[d] for v in ins if v.axes]
        if not trivial:
            for line in lines:
                t.freeze(eqn, line, "pools along this axis")
            axes.append(t.space.plain(shape[d]))
            continue
        axis = agree(t.unify(eqn, lines))
        known = eqn.primitive.name != "reduce_window"
        axes.append(axis if known else refill(axis, None))
    return [Value(tuple(axes), any(v.data for v in ins))]


def _window_flops(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    return math.prod(outs[0]) * math.prod(eqn.params["window_dimensions"])


WINDOWS = "reduce_window_sum reduce_window_max reduce_window_min reduce_window \
select_and_scatter_add select_and_gather_add".split()


def _reductions(names: Sequence[str], analyse: Analyse, **more: Any) -> dict[str, Rule]:
    more["flops"] = per_operand_entry
    known = numbers.REDUCTIONS
    return {n: Rule(analyse, known=known.get(n), **more) for n in names}


RULES: dict[str, Rule] = {
    "dot_general": Rule(_dot, flops=_dot_flops),
    "ragged_dot_general": Rule(_ragged_dot, flops=_ragged_flops),
    "conv_general_dilated": Rule(_conv, rebuild=_rebuild_conv, flops=_conv_flops),
    "psum": Rule(_psum, flops=per_operand_entry),
    **_reductions(["reduce_sum"], _sum, rebuild=_rebuild_sum, repeat=_repeat_sum),
    **_reductions(["reduce_or", "reduce_xor"], _bits),
    **_reductions(
        ["reduce_max", "reduce_min"],
        _extreme,
        rebuild=_rebuild_extreme,
        repeat=_repeat_extreme,
    ),
    **_reductions(["reduce_prod", "reduce_and"], _reduce),
    **_reductions(["argmax", "argmin"], _argument),
    **_reductions("cumsum cumprod cummax cummin cumlogsumexp".split(), _cumulate),
    "sort": Rule(_sort, known=numbers.sort),
    **dict.fromkeys(("top_k", "approx_top_k"), Rule(_top_k)),
    "reduce": Rule(_reduce_by, flops=per_operand_entry),
    "fft": Rule(_fft),
    **dict.fromkeys(WINDOWS, Rule(_window, flops=_window_flops)),
    "select_and_scatter": Rule(freeze_all, flops=_window_flops),
}
