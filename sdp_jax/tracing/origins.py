"""Which leaf an array of a trace is, however it was moved, converted or sliced."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sdp_jax.tracing.trace import Body, Record

# They change neither the order of entries nor what they stand for.
_ALIKE = frozenset(
    "convert_element_type copy copy_p reduce_precision sharding_constraint reshard "
    "mesh_cast device_put pvary optimization_barrier".split()
)
# Their first body takes their operands and gives their results.
CALLS = frozenset(
    "jit pjit closed_call core_call composite remat2 checkpoint remat custom_jvp_call "
    "custom_vjp_call".split()
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The leaf that an array is.

    Attributes:
      path: path of the leaf.
      axes: for each axis the axis of the leaf, ``None`` if it is new.
      loops: for each loop that takes a slice of it in every step, outermost first, its
        number and the axis of the leaf.
    """

    path: str
    axes: tuple[int | None, ...]
    loops: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A body where it is called, and what is known of its arrays.

    Attributes:
      body: the body.
      parent: the frame around it.
      call: the equation that calls it, if it only does that.
      origins: the leaves that arrays are.
      steps: for each array the numbers of the loops of whose steps it depends.
      uses: the equations that read an array.
    """

    body: Body
    parent: "Frame | None"
    call: Record | None
    origins: dict[Any, Origin]
    steps: dict[Any, frozenset[int]]
    uses: dict[Any, list[Record]]


def frame_of(
    body: Body,
    parent: Frame | None,
    call: Record | None,
    origins: Sequence[Origin | None],
    steps: Sequence[frozenset[int]],
) -> Frame:
    """A frame of which nothing is known but its operands."""
    pairs = zip(body.jaxpr.invars, origins, strict=True)
    known = {var: origin for var, origin in pairs if origin is not None}
    uses: dict[Any, list[Record]] = {}
    for record in body.records:
        for var in {id(v): v for v in record.eqn.invars}.values():
            if not hasattr(var, "val"):
                uses.setdefault(var, []).append(record)
    moving = dict(zip(body.jaxpr.invars, steps, strict=True))
    return Frame(body, parent, call, known, moving, uses)


def moved(
    record: Record, axes: Sequence[int | None], operand: int = 0
) -> tuple[int | None, ...] | None:
    """The axes of a result, from those of an operand that it only moves."""
    name, params = record.eqn.primitive.name, record.eqn.params
    shape = record.eqn.invars[operand].aval.shape
    if name in _ALIKE and len(record.eqn.outvars) == 1:
        return tuple(axes)
    if name == "transpose":
        return tuple(axes[d] for d in params["permutation"])
    if name == "squeeze":
        gone = params["dimensions"]
        return tuple(a for d, a in enumerate(axes) if d not in gone)
    after = getattr(record.eqn.outvars[0].aval, "shape", ())
    if name == "broadcast_in_dim":
        out: list[int | None] = [None] * len(after)
        for d, e in enumerate(params["broadcast_dimensions"]):
            if shape[d] == after[e]:
                out[e] = axes[d]
        return tuple(out)
    if name == "reshape":
        long = [a for a, n in zip(axes, shape, strict=True) if n != 1]
        if [n for n in shape if n != 1] == [n for n in after if n != 1]:
            left = iter(long)
            return tuple(None if n == 1 else next(left) for n in after)
    return None


def added(
    frame: Frame, record: Record, axes: Sequence[int | None]
) -> tuple[Origin, tuple[int | None, ...], int] | None:
    """The leaf that is added to the result of an equation, before anything else is.

    With it come the labels of the axes of the sum, and -1 if it is subtracted.
    """
    var = record.eqn.outvars[0]
    labels = tuple(axes)
    while True:
        using = frame.uses.get(var, [])
        places = [i for i, v in enumerate(frame.body.jaxpr.outvars) if v is var]
        if places:
            if using or len(places) > 1 or frame.call is None or frame.parent is None:
                return None
            var = frame.call.eqn.outvars[places[0]]
            frame = frame.parent
            continue
        if len(using) != 1:
            return None
        (user,) = using
        if user.eqn.primitive.name in ("add", "sub"):
            first, second = user.eqn.invars
            other = second if first is var else first
            origin = None if hasattr(other, "val") else frame.origins.get(other)
            minus = user.eqn.primitive.name == "sub"
            if origin is None or first is second or (minus and first is not var):
                return None
            # An axis of length 1 may be spread along one of the product.
            sizes = zip(origin.axes, other.aval.shape, var.aval.shape, strict=True)
            alike = tuple(a if n == size else None for a, n, size in sizes)
            origin = dataclasses.replace(origin, axes=alike)
            return origin, labels, -1 if minus else 1
        after = moved(user, labels)
        if after is None:
            return None
        var, labels = user.eqn.outvars[0], after
