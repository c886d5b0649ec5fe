"""Contractions and reductions: where absent terms must be zero."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sdp_jax.tracing.evaluate import subsets
from sdp_jax.tracing.rule import Rule, per_operand_entry
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
    for value, dims in ((x, spec.lhs_spec), (kernel, spec.rhs_spec)):
        for d in dims[2:]:
            t.freeze(eqn, value.axes[d], "convolves along this axis")
    shape = eqn.outvars[0].aval.shape
    axes = [t.space.plain(n) for n in shape]
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


def _rebuild_conv(n: Any, record: Record, args: list[Any]) -> list[Any]:
    eqn = record.eqn
    count = eqn.params["feature_group_count"]
    if count > 1:
        spec = eqn.params["dimension_numbers"]
        inputs = args[1].shape[spec.rhs_spec[1]]
        count = args[0].shape[spec.lhs_spec[1]] // inputs
    changed = {"feature_group_count": count}
    for name, arg in (("lhs_shape", args[0]), ("rhs_shape", args[1])):
        if name in eqn.params:
            changed[name] = arg.shape
    return n.rebind(record, args, **changed)


def _conv_flops(eqn: Any, shapes: Sequence[Any], outs: Sequence[Any]) -> Any:
    spec = eqn.params["dimension_numbers"].rhs_spec
    window = math.prod(shapes[1][d] for d in spec[1:])
    # Zeros that only spread a transposed convolution's input do not count.
    spread = math.prod(eqn.params["lhs_dilation"])
    share = 1 / (eqn.params["batch_group_count"] * spread)
    return 2 * math.prod(outs[0]) * window * share


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
    x = ins[0]
    d = eqn.params.get("axis", len(x.axes) - 1) % len(x.axes)
    t.freeze(eqn, x.axes[d], "compares all channels")
    outs = []
    for var in eqn.outvars:
        axes = [refill(axis, None) for axis in x.axes]
        axes[d] = t.space.plain(var.aval.shape[d])
        outs.append(Value(tuple(axes), x.data))
    return outs


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

RULES: dict[str, Rule] = {
    "dot_general": Rule(_dot, flops=_dot_flops),
    "conv_general_dilated": Rule(_conv, rebuild=_rebuild_conv, flops=_conv_flops),
    "psum": Rule(_psum, known=False, flops=per_operand_entry),
    "reduce_sum": Rule(
        _sum, rebuild=_rebuild_sum, repeat=_repeat_sum, flops=per_operand_entry
    ),
    **dict.fromkeys(("reduce_or", "reduce_xor"), Rule(_bits, flops=per_operand_entry)),
    **dict.fromkeys(
        ("reduce_max", "reduce_min"),
        Rule(
            _extreme,
            rebuild=_rebuild_extreme,
            repeat=_repeat_extreme,
            flops=per_operand_entry,
        ),
    ),
    **dict.fromkeys(
        ("reduce_prod", "reduce_and"), Rule(_reduce, flops=per_operand_entry)
    ),
    **dict.fromkeys(("argmax", "argmin"), Rule(_argument, flops=per_operand_entry)),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), Rule(_cumulate)
    ),
    "sort": Rule(_sort),
    "top_k": Rule(_top_k),
    "fft": Rule(_fft),
    **dict.fromkeys(WINDOWS, Rule(_window, flops=_window_flops)),
    "select_and_scatter": Rule(freeze_all, known=False, flops=_window_flops),
    **dict.fromkeys(
        ("reduce_scatter", "reduce_scatter_start", "reduce_scatter_done"),
        Rule(freeze_all, known=False, flops=per_operand_entry),
    ),
}
