"""Programs for several devices: shard_map, and what talks across a mesh.

All devices run one program. So where an axis is split over them, the positions at the
same place of every share are one channel, and a cut leaves shares of one length.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from sdp_jax.mesh import split_over
from sdp_jax.tracing.rule import Rule, moves, per_operand_entry
from sdp_jax.tracing.trace import Nested, Record, Trace, freeze_all
from sdp_jax.tracing.values import Axis, Value


def _gathered(t: Trace, axis: Axis, count: int) -> Axis:
    """The axis that such shares make."""
    return (*t.space.plain(count), *axis)


def _replace(x: Value, axes: Sequence[Axis]) -> Value:
    """Other axes; the entries may differ from device to device."""
    return dataclasses.replace(x, axes=tuple(axes), known=None)


def _shard_map(t: Trace, eqn: Any, ins: list[Value]) -> Nested:
    p = eqn.params
    t.devices |= p["mesh"].shape
    args = []
    for x, spec in zip(ins, p["in_specs"], strict=True):
        counts = split_over(p["mesh"], spec, len(x.axes))
        axes = [t.share(eqn, a, n)[1] for a, n in zip(x.axes, counts, strict=True)]
        args.append(x if max(counts, default=1) == 1 else _replace(x, axes))
    bodies = []

    def inside() -> tuple[()]:
        # Here, rules of derivatives find the axes of the mesh.
        bodies.append(t.run(p["jaxpr"], (), args))
        return ()

    jax.eval_shape(_mapped(eqn, inside, (), ()))
    (body,) = bodies
    outs = []
    for x, spec in zip(body.outs, p["out_specs"], strict=True):
        counts = split_over(p["mesh"], spec, len(x.axes))
        axes = [_gathered(t, a, n) for a, n in zip(x.axes, counts, strict=True)]
        outs.append(_replace(x, axes))
    return outs, (body,)


def _mapped(eqn: Any, function: Any, in_specs: Any, out_specs: Any) -> Any:
    p = eqn.params
    return jax.shard_map(
        function,
        mesh=p["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(_manual(eqn)),
        check_vma=p["check_vma"],
    )


def _manual(eqn: Any) -> frozenset[str]:
    """The axes of the mesh that the body sees; before JAX 0.9 the name was shorter."""
    p = eqn.params
    return p["newly_manual_axes" if "newly_manual_axes" in p else "manual_axes"]


def _rebuild_shard_map(n: Any, record: Record, args: list[Any]) -> list[Any]:
    p = record.eqn.params
    body = record.bodies[0]

    def function(*args: Any) -> tuple[Any, ...]:
        return tuple(n.run(body, args))

    small = _mapped(record.eqn, function, p["in_specs"], p["out_specs"])
    return list(small(*args))


def _on_each(eqn: Any, bodies: Sequence[Any]) -> tuple[int, list[Sequence[Any]]]:
    """Every device runs the body."""
    return math.prod(eqn.params["mesh"].shape[n] for n in _manual(eqn)), [bodies]


def _across(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    """Position by position, over axes of the mesh; not over those of the arrays."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    if any(isinstance(axis, int) for axis in (axes if type(axes) is tuple else ())):
        return freeze_all(t, eqn, ins)
    return [_replace(x, x.axes) for x in ins]


def _as_it_is(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    return list(ins)


def _axis_index(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    return [Value((), data=False)]


def _all_gather(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    p = eqn.params
    outs = []
    for x in ins:
        axes, d = list(x.axes), p["all_gather_dimension"]
        if p["tiled"]:
            axes[d] = _gathered(t, axes[d], p["axis_size"])
        else:
            axes.insert(d, t.space.plain(p["axis_size"]))
        outs.append(_replace(x, axes))
    return outs


def _reduce_scatter(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    p = eqn.params
    outs = []
    for x in ins:
        axes, d = list(x.axes), p["scatter_dimension"]
        axes[d] = t.share(eqn, axes[d], p["axis_size"])[1]
        if not p["tiled"]:
            del axes[d]
        outs.append(_replace(x, axes))
    return outs


def _all_to_all(t: Trace, eqn: Any, ins: list[Value]) -> list[Value]:
    p = eqn.params
    names = p["axis_name"] if isinstance(p["axis_name"], tuple) else (p["axis_name"],)
    if not t.devices.keys() >= set(names):
        return freeze_all(t, eqn, ins, "moves entries over an axis of unknown size")
    count = math.prod(t.devices[name] for name in names)
    if p["axis_index_groups"] is not None:
        count = len(p["axis_index_groups"][0])
    outs = []
    for x in ins:
        axes, d, to = list(x.axes), p["split_axis"], p["concat_axis"]
        axes[d] = t.share(eqn, axes[d], count)[1]
        axes[to] = _gathered(t, axes[to], count)
        outs.append(_replace(x, axes))
    return outs


SUMS = "psum_invariant unreduced_psum pmax pmin".split()
SENDS = "ppermute pbroadcast".split()
# They say of an array how it may differ between devices.
CASTS = "pvary preduced reduced_vary_cast_p vary_unreduced_cast_p".split()
GATHERS = "all_gather all_gather_invariant all_gather_reduced".split()
SCATTERS = "reduce_scatter unreduced_reduce_scatter".split()

RULES: dict[str, Rule] = {
    "shard_map": Rule(
        _shard_map, rebuild=_rebuild_shard_map, picks=True, runs=_on_each
    ),
    **dict.fromkeys(SUMS, Rule(_across, flops=per_operand_entry)),
    **dict.fromkeys(SENDS, Rule(_across, flops=moves)),
    **dict.fromkeys(CASTS, Rule(_as_it_is, even=True, flops=moves)),
    "axis_index": Rule(_axis_index, flops=moves),
    **dict.fromkeys(GATHERS, Rule(_all_gather, flops=moves)),
    **dict.fromkeys(SCATTERS, Rule(_reduce_scatter, flops=per_operand_entry)),
    "all_to_all": Rule(_all_to_all, flops=moves),
}
