"""Arrays on several devices: what their types say, and how to keep that."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sdp_jax.mesh import split_over


def divides(sharding: Any, shape: Sequence[Any]) -> bool:
    """Whether the devices can hold equal shares of an array."""
    if not isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(shape)
        except ValueError:
            return False
        return True
    counts = split_over(sharding.mesh, sharding.spec, len(shape))
    pairs = zip(shape, counts, strict=True)
    return not any(isinstance(n, int) and n % count for n, count in pairs)


def pick_shares(array: Any, index: np.ndarray, axis: int, sharding: Any) -> Any:
    """Positions along an axis of an array whose type says how devices share it.

    Where each device keeps as much, they go on sharing the axis.
    """
    shape, mesh, spec = array.shape, sharding.mesh, list(sharding.spec)
    (count,) = split_over(mesh, spec[axis : axis + 1], 1)
    size = shape[axis] // count
    parts = index.reshape(count, -1) if len(index) % count == 0 else index[None]
    parts = parts - np.arange(len(parts))[:, None] * size
    if count > 1 and (len(parts) == 1 or (parts != parts[0]).any()):
        spec[axis] = None
        whole = NamedSharding(mesh, PartitionSpec(*spec))
        return pick_shares(jax.sharding.reshard(array, whole), index, axis, whole)
    both = PartitionSpec(*spec[: axis + 1], None, *spec[axis + 1 :])
    shared = NamedSharding(mesh, both)
    split = (*shape[:axis], count, size, *shape[axis + 1 :])
    array = lax.reshape(array, split, out_sharding=shared)
    array = array.at[(slice(None),) * (axis + 1) + (parts[0],)].get(out_sharding=shared)
    whole = (*shape[:axis], len(index), *shape[axis + 1 :])
    return lax.reshape(array, whole, out_sharding=sharding)


def varying(aval: Any) -> frozenset[str]:
    """The axes of a mesh along which an array differs from device to device."""
    found = getattr(aval, "manual_axis_type", None)  # Before JAX 0.10 under "vma".
    return getattr(aval, "vma", frozenset()) if found is None else found.varying


def vary(x: Any, names: frozenset[str]) -> Any:
    """The same on every device, as an array that might not be."""
    more = tuple(sorted(names - varying(jax.typeof(x))))
    if not more:
        return x
    if not hasattr(lax, "pcast"):  # before JAX 0.9
        return lax.pvary(x, more)  # pyright: ignore[reportAttributeAccessIssue]
    return lax.pcast(x, more, to="varying")


def alike(args: Sequence[Any]) -> list[Any]:
    """Operands that differ along the same axes of a mesh, as JAX wants them."""
    every = frozenset[str]().union(*(varying(jax.typeof(x)) for x in args))
    return [vary(x, every) for x in args] if every else list(args)
