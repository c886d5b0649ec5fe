"""Entries of arrays that depend on nothing, by NumPy: nothing is compiled.

A function takes an equation and the entries of its operands, and gives those of its
result, or ``None`` where NumPy might give others than JAX: whatever is not rounded
correctly (``exp``, sums of floating-point numbers, products of complex ones) or not
defined.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax

Known: TypeAlias = Callable[..., Any]


def _plain(function: Callable[..., Any]) -> Known:
    """A function of the operands alone."""
    return lambda eqn, *xs: function(*xs)


def _zeros(function: Callable[..., Any]) -> Known:
    """One that is exact only where it is zero."""

    def known(eqn: Any, *xs: np.ndarray) -> Any:
        found = function(*xs)
        return None if np.any(found) else found

    return known


def _convert(eqn: Any, x: np.ndarray) -> Any:
    dtype = np.dtype(eqn.params["new_dtype"])
    if dtype.kind not in "iubf" and jnp.issubdtype(dtype, jnp.integer):
        return None  # Of four bits and less.
    if dtype.kind in "iu" and not _whole(x):
        # Outside of the range each device has a way of its own.
        info = np.iinfo(dtype)
        inside = (x > float(info.min) - 1) & (x < float(info.max) + 1)
        if not np.all(inside):
            return None
    return x.astype(dtype)


def _whole(x: Any) -> bool:
    return x.dtype.kind in "iub"


def _div(eqn: Any, x: np.ndarray, y: np.ndarray) -> Any:
    if not _whole(x):
        return np.divide(x, y)
    if not np.all(y):
        return None
    quotient = np.floor_divide(x, y)
    return quotient + ((np.sign(x) * np.sign(y) < 0) & (quotient * y != x))


def _rem(eqn: Any, x: np.ndarray, y: np.ndarray) -> Any:
    return None if _whole(x) and not np.all(y) else np.fmod(x, y)


def _round(eqn: Any, x: np.ndarray) -> Any:
    if eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN:
        return np.rint(x)
    down = np.trunc(x)
    return down + np.where(np.abs(x - down) >= 0.5, np.sign(x), 0).astype(x.dtype)


def _integer_pow(eqn: Any, x: np.ndarray) -> Any:
    exponent = eqn.params["y"]
    out = np.ones_like(x)
    for bit in reversed(f"{abs(exponent):b}"):
        out = out * x if bit == "1" else out
        x = x * x
    return np.ones_like(out) / out if exponent < 0 else out


def _shift(x: np.ndarray, by: np.ndarray, shift: Callable[..., Any]) -> Any:
    bits = 8 * x.dtype.itemsize
    far = (by < 0) | (by >= bits)
    return np.where(far, np.zeros_like(x), shift(x, np.where(far, 0, by)))


def _shift_right(x: np.ndarray, by: np.ndarray) -> Any:
    unsigned = x.view(f"u{x.dtype.itemsize}")
    by = by.astype(unsigned.dtype)
    return _shift(unsigned, by, np.right_shift).view(x.dtype)


def _shift_right_arithmetic(x: np.ndarray, by: np.ndarray) -> Any:
    bits = 8 * x.dtype.itemsize
    signed = x.view(f"i{x.dtype.itemsize}")
    by = np.where((by < 0) | (by >= bits), bits - 1, by).astype(signed.dtype)
    return np.right_shift(signed, by).view(x.dtype)


def _ones(x: np.ndarray) -> Any:
    return np.bitwise_count(x.view(f"u{x.dtype.itemsize}"))


def select_n(eqn: Any, which: np.ndarray, *cases: np.ndarray) -> Any:
    """Entries of the first, the second, … case."""
    out = cases[0]
    for k, case in enumerate(cases[1:], 1):
        out = np.where(which.astype(np.int32) == k, case, out)
    return out


def _clamp(low: np.ndarray, x: np.ndarray, high: np.ndarray) -> Any:
    return np.minimum(np.maximum(x, low), high)


def _bits(eqn: Any, x: np.ndarray) -> Any:
    dtype = np.dtype(eqn.params["new_dtype"])
    same = dtype.itemsize == x.dtype.itemsize and np.bool_ not in (dtype, x.dtype)
    return np.ascontiguousarray(x).view(dtype).reshape(x.shape) if same else None


_SAME = "copy copy_p name device_put stop_gradient".split()
ELEMENTWISE: dict[str, Known] = {
    "convert_element_type": _convert,
    "div": _div,
    "rem": _rem,
    "round": _round,
    "integer_pow": _integer_pow,
    "select_n": select_n,
    "bitcast_convert_type": _bits,
    "atan2": _zeros(np.arctan2),
    "igamma": _zeros(scipy.special.gammainc),
    **{
        name: _plain(function)
        for name, function in {
            **dict.fromkeys(_SAME, lambda x: x),
            **dict.fromkeys("add add_any".split(), np.add),
            "sub": np.subtract,
            "mul": np.multiply,
            "neg": np.negative,
            "square": np.square,
            "sqrt": np.sqrt,
            "abs": np.abs,
            "sign": np.sign,
            "floor": np.floor,
            "ceil": np.ceil,
            "is_finite": np.isfinite,
            "nextafter": np.nextafter,
            "max": np.maximum,
            "min": np.minimum,
            "eq": np.equal,
            "ne": np.not_equal,
            "ge": np.greater_equal,
            "gt": np.greater,
            "le": np.less_equal,
            "lt": np.less,
            "not": np.bitwise_not,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "population_count": _ones,
            "shift_left": functools.partial(_shift, shift=np.left_shift),
            "shift_right_logical": _shift_right,
            "shift_right_arithmetic": _shift_right_arithmetic,
            "clamp": _clamp,
        }.items()
    },
}


def iota(eqn: Any) -> Any:
    """Its own position along an axis."""
    p = eqn.params
    line = np.arange(p["shape"][p["dimension"]]).astype(p["dtype"])
    rest = len(p["shape"]) - p["dimension"] - 1
    return np.broadcast_to(line.reshape(-1, *(1,) * rest), p["shape"])


def broadcast_in_dim(eqn: Any, x: np.ndarray) -> Any:
    """Repetitions along new axes."""
    shape = eqn.outvars[0].aval.shape
    wide = [1] * len(shape)
    for d, size in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        wide[d] = size
    return np.broadcast_to(x.reshape(wide), shape)


def reshape(eqn: Any, x: np.ndarray) -> Any:
    """Another shape, perhaps of the transposed array."""
    order = eqn.params["dimensions"]
    x = x if order is None else x.transpose(order)
    return x.reshape(eqn.outvars[0].aval.shape)


def squeeze(eqn: Any, x: np.ndarray) -> Any:
    """Without axes of length 1."""
    return x.reshape(eqn.outvars[0].aval.shape)


def transpose(eqn: Any, x: np.ndarray) -> Any:
    """Axes in another order."""
    return x.transpose(eqn.params["permutation"])


def slices(eqn: Any, x: np.ndarray) -> Any:
    """A block, perhaps with strides."""
    p = eqn.params
    strides = p["strides"] or (1,) * x.ndim
    limits = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return x[tuple(slice(*limit) for limit in limits)]


def split(eqn: Any, x: np.ndarray) -> Any:
    """Parts along an axis."""
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    return np.split(x, ends, eqn.params["axis"])


def rev(eqn: Any, x: np.ndarray) -> Any:
    """Axes turned round."""
    return np.flip(x, eqn.params["dimensions"])


def concatenate(eqn: Any, *xs: np.ndarray) -> Any:
    """Arrays behind each other."""
    return np.concatenate(xs, eqn.params["dimension"])


def tile(eqn: Any, x: np.ndarray) -> Any:
    """An array repeated."""
    return np.tile(x, eqn.params["reps"])


def stack(eqn: Any, *xs: np.ndarray) -> Any:
    """Arrays along a new axis."""
    return np.stack(xs, eqn.params["axis"])


def pad(eqn: Any, x: np.ndarray, value: np.ndarray) -> Any:
    """Padding around, between, or less than nothing."""
    shape = [
        max(low, 0) + size + max(size - 1, 0) * inner + max(high, 0)
        for size, (low, high, inner) in zip(
            x.shape, eqn.params["padding_config"], strict=True
        )
    ]
    out = np.full(shape, value)
    inside, kept = [], []
    for size, (low, high, inner) in zip(
        shape, eqn.params["padding_config"], strict=True
    ):
        inside.append(slice(max(low, 0), size - max(high, 0), inner + 1))
        kept.append(slice(max(-low, 0), size - max(-high, 0)))
    out[tuple(inside)] = x
    return out[tuple(kept)]


def _block(x: np.ndarray, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
    found = []
    for start, size, whole in zip(starts, sizes, x.shape, strict=True):
        first = min(max(int(start), 0), whole - size)
        found.append(slice(first, first + size))
    return tuple(found)


def dynamic_slice(eqn: Any, x: np.ndarray, *starts: np.ndarray) -> Any:
    """A block that begins at a known place."""
    return x[_block(x, starts, eqn.params["slice_sizes"])]


def dynamic_update_slice(
    eqn: Any, x: np.ndarray, update: np.ndarray, *starts: np.ndarray
) -> Any:
    """An array with a block written into it."""
    out = x.copy()
    out[_block(x, starts, update.shape)] = update
    return out


def gather(eqn: Any, x: np.ndarray, indices: np.ndarray) -> Any:
    """Blocks at known places."""
    dims = eqn.params["dimension_numbers"]
    where = places(
        x.shape,
        indices,
        eqn.params["slice_sizes"],
        (dims.start_index_map, dims.collapsed_slice_dims),
        (dims.operand_batching_dims, dims.start_indices_batching_dims),
    )
    if where is None:
        return None
    rows = indices.ndim - 1
    rank = len(eqn.outvars[0].aval.shape)
    window = iter(range(rows, rank))
    row = iter(range(rows))
    order = [next(window if d in dims.offset_dims else row) for d in range(rank)]
    return x[where].transpose(order)


def scatter(eqn: Any, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> Any:
    """An array with blocks written at known places that do not meet."""
    dims = eqn.params["dimension_numbers"]
    gone = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    window = list(dims.update_window_dims)
    sizes = [1] * x.ndim
    for d, k in zip((d for d in range(x.ndim) if d not in gone), window, strict=True):
        sizes[d] = updates.shape[k]
    where = places(
        x.shape,
        indices,
        sizes,
        (dims.scatter_dims_to_operand_dims, dims.inserted_window_dims),
        (dims.operand_batching_dims, dims.scatter_indices_batching_dims),
    )
    if where is None:
        return None
    flat = np.ravel_multi_index(where, x.shape)
    if len(np.unique(flat)) < flat.size:
        return None
    rows = [d for d in range(updates.ndim) if d not in window]
    out = x.copy()
    out[where] = updates.transpose(*rows, *window)
    return out


def places(
    shape: Sequence[int],
    indices: np.ndarray,
    sizes: Sequence[int],
    dims: tuple[Sequence[int], Sequence[int]],
    batching: tuple[Sequence[int], Sequence[int]],
) -> tuple[np.ndarray, ...] | None:
    """The index of each entry of blocks of ``sizes``; ``None`` if some lie outside.

    ``dims`` are the axes that the last axis of ``indices`` speaks of, and those that
    the blocks do not have; ``batching`` axes of the array, and those of the indices
    that go with them.
    """
    rows = indices.shape[:-1]
    gone = {*dims[1], *batching[0]}
    window = [d for d in range(len(shape)) if d not in gone]
    out = []
    for d, (whole, size) in enumerate(zip(shape, sizes, strict=True)):
        start = np.zeros(rows, np.int64)
        if d in dims[0]:
            start = indices[..., list(dims[0]).index(d)].astype(np.int64)
        elif d in batching[0]:
            k = batching[1][list(batching[0]).index(d)]
            line = [1] * len(rows)
            line[k] = rows[k]
            start = np.broadcast_to(np.arange(rows[k]).reshape(line), rows)
        if start.size and not 0 <= start.min() <= start.max() <= whole - size:
            return None
        start = start.reshape(*rows, *(1,) * len(window))
        if d in window:
            line = [1] * len(window)
            line[window.index(d)] = size
            start = start + np.arange(size).reshape(line)
        out.append(start)
    return tuple(out)


def _integers(function: Callable[..., Any]) -> Known:
    """A reduction of integers, whose order does not matter."""

    def known(eqn: Any, x: np.ndarray) -> Any:
        axes = tuple(eqn.params["axes"])
        return function(x, axis=axes, dtype=x.dtype) if _whole(x) else None

    return known


def _axes(function: Callable[..., Any]) -> Known:
    return lambda eqn, x: function(x, axis=tuple(eqn.params["axes"]))


def _first(function: Callable[..., Any]) -> Known:
    def known(eqn: Any, x: np.ndarray) -> Any:
        (axis,) = eqn.params["axes"]
        return function(x, axis=axis).astype(eqn.params["index_dtype"])

    return known


def _cumulative(function: Any) -> Known:
    def known(eqn: Any, x: np.ndarray) -> Any:
        axis, back = eqn.params["axis"], eqn.params["reverse"]
        if not _whole(x):
            return None
        x = np.flip(x, axis) if back else x
        out = function.accumulate(x, axis=axis, dtype=x.dtype)
        return np.flip(out, axis) if back else out

    return known


def sort(eqn: Any, *xs: np.ndarray) -> Any:
    """Integers in order, others in the same order."""
    p = eqn.params
    if not all(map(_whole, xs)) or not (p["is_stable"] or len(xs) == 1):
        return None
    axis = p["dimension"]
    order = np.lexsort(xs[: p["num_keys"]][::-1], axis=axis)
    return [np.take_along_axis(x, order, axis) for x in xs]


REDUCTIONS: dict[str, Known] = {
    "reduce_sum": _integers(np.add.reduce),
    "reduce_prod": _integers(np.multiply.reduce),
    "reduce_and": _integers(np.bitwise_and.reduce),
    "reduce_or": _integers(np.bitwise_or.reduce),
    "reduce_xor": _integers(np.bitwise_xor.reduce),
    "reduce_max": _axes(np.max),
    "reduce_min": _axes(np.min),
    "argmax": _first(np.argmax),
    "argmin": _first(np.argmin),
    "cumsum": _cumulative(np.add),
    "cumprod": _cumulative(np.multiply),
    "cummax": _cumulative(np.maximum),
    "cummin": _cumulative(np.minimum),
}


def evaluate(
    known: Known | None, eqn: Any, operands: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    """The entries of the results of an equation, if they can be known."""
    if known is None or any(map(np.iscomplexobj, operands)):
        return None
    with np.errstate(all="ignore"):
        found = known(eqn, *operands)
    if found is None:
        return None
    several = eqn.primitive.multiple_results
    dtypes = [v.aval.dtype for v in eqn.outvars]
    outs = found if several else [found]
    return [np.asarray(x, dtype) for x, dtype in zip(outs, dtypes, strict=True)]
