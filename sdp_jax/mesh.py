"""Sums over arrays that a mesh shards, replicated on all of its devices.

With explicit axes (what ``jax.make_mesh`` gives) the type of an array says how it is
sharded: each device sums what it has, and one all-reduce joins all sums at once. With
automatic axes the compiler decides.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Line(NamedTuple):
    """What is summed along all axes of an array but one.

    Attributes:
      entry: a function of the arrays, entry by entry.
      arrays: arrays of one shape.
      axis: the axis that stays.
    """

    entry: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    axis: int


def sum_lines(
    lines: Sequence[Line],
    finish: Callable[..., list[jax.Array]],
    *given: jax.Array,
) -> list[jax.Array]:
    """Sums to lines, and what a linear function makes of these.

    Args:
      lines: what to sum; arrays of one line that are split in other ways are split
        as the first.
      finish: ``finish(sums, *given)``, linear in the sums, which are vectors along the
        axes that stay; it gives vectors.
      *given: arrays that all devices have.

    Returns:
      What ``finish`` gives, replicated.

    Raises:
      ValueError: if the arrays lie on different meshes.

    Example:
      >>> import jax.numpy as jnp
      >>> sum_lines([Line(jnp.square, (jnp.ones((3, 2)),), 1)], lambda sums: sums)[0]
      Array([3., 3.], dtype=float32)
    """
    found = (sharding_of(jax.typeof(x)) for line in lines for x in line.arrays)
    meshes = {sharding.mesh for sharding in found if sharding}
    if not meshes:
        found = finish([_along(line) for line in lines], *given)
        return [replicated(x) for x in found]
    if len(meshes) > 1:
        raise ValueError(
            f"the arrays lie on different meshes, {sorted(map(str, meshes))}; put "
            "parameters, gradients and optimizer state on one mesh"
        )
    (mesh,) = meshes
    lines = [line._replace(arrays=_alike(line.arrays)) for line in lines]
    arrays = [x for line in lines for x in line.arrays]
    shardings = [sharding_of(jax.typeof(x)) for x in arrays]
    specs = [PartitionSpec() if s is None else s.spec for s in shardings]
    pairs = zip(specs, arrays, strict=True)
    names = [names_along(spec, jnp.ndim(x)) for spec, x in pairs]
    # One order for all processes: sums depend on it.
    used = sorted({name for parts in names for part in parts for name in part})

    def local(*local_arrays: jax.Array) -> list[jax.Array]:
        left = iter(zip(local_arrays[len(given) :], names, strict=True))
        sums = []
        for line in lines:
            pairs = list(itertools.islice(left, len(line.arrays)))
            mine, parts = tuple(x for x, _ in pairs), pairs[0][1]
            length = line.arrays[0].shape[line.axis]
            sums.append(_share(line._replace(arrays=mine), parts, used, length))
        found = finish(sums, *local_arrays[: len(given)])
        sizes = [x.size for x in found]
        whole = jax.lax.psum(jnp.concatenate(found), tuple(used))
        parts = jnp.split(whole, list(itertools.accumulate(sizes))[:-1])
        return [part.astype(x.dtype) for part, x in zip(parts, found, strict=True)]

    whole = (PartitionSpec(),) * len(given)
    everywhere = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*whole, *specs),
        out_specs=PartitionSpec(),
        axis_names=set(used),
    )
    # Outside of jit each of its operations would be compiled alone.
    return jax.jit(everywhere, inline=True)(*given, *arrays)


def replicated(array: jax.Array, *beside: jax.Array) -> jax.Array:
    """The whole array on all devices, on those of other arrays if it is on no mesh."""
    everywhere = replicated_sharding(array, *beside)
    if everywhere is not None:
        return jax.sharding.reshard(array, everywhere)
    if AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types:
        # Else the compiler spreads sorts and sums over the channels, too.
        return jax.lax.with_sharding_constraint(array, PartitionSpec())
    return array


def replicated_sharding(*arrays: jax.Array) -> NamedSharding | None:
    """The ``out_sharding`` of a product that all devices shall have."""
    for sharding in (sharding_of(jax.typeof(x)) for x in arrays):
        if sharding is not None:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def sharded_like(array: jax.Array, leaf: jax.Array) -> jax.Array:
    """An array that all devices have, cut up as a leaf that it broadcasts to."""
    sharding = sharding_of(jax.typeof(leaf))
    if sharding is None:
        return array
    names = names_along(sharding.spec, jnp.ndim(leaf))
    sizes = zip(jnp.shape(array), jnp.shape(leaf), names, strict=True)
    spec = PartitionSpec(*(part if n == m and part else None for n, m, part in sizes))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def zero_like(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """Where factors that all devices have are 0, in shape and sharding of a leaf.

    Compared before they are spread, they might be by each device for its part of one
    leaf, and sent to all for the next.
    """
    return factors * jnp.ones_like(leaf, factors.dtype) == 0


def placed(leaf: Any) -> NamedSharding | None:
    """How a mesh shards an array, or a shape that says so; ``None`` if it does not."""
    return sharding_of(jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) else leaf)


def shares(sharding: NamedSharding | None, rank: int) -> list[int]:
    """Over how many devices each axis of an array is split."""
    if sharding is None:
        return [1] * rank
    return split_over(sharding.mesh, sharding.spec, rank)


def split_over(mesh: Any, spec: Any, rank: int) -> list[int]:
    """Over how many devices of a mesh a specification splits each axis."""
    return [math.prod(mesh.shape[n] for n in part) for part in names_along(spec, rank)]


def fetch(array: Any) -> np.ndarray:
    """The whole array as NumPy's, also where other processes hold parts of it."""
    if not getattr(array, "is_fully_addressable", True):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def sharding_of(found: Any) -> NamedSharding | None:
    """The sharding of a type or an array that is split over devices, or None."""
    sharding = getattr(found, "sharding", None)
    return sharding if any(getattr(sharding, "spec", ())) else None


def names_along(spec: Any, rank: int) -> list[tuple[str, ...]]:
    """The axes of the mesh over which each axis of an array is split."""
    nothing = (None, PartitionSpec.UNCONSTRAINED)
    names = [() if n in nothing else n if isinstance(n, tuple) else (n,) for n in spec]
    return names + [()] * (rank - len(names))


def _alike(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """All of them split as the first is that is split at all."""
    split = [x for x in arrays if sharding_of(jax.typeof(x))]
    return tuple(sharded_like(x, split[0]) for x in arrays) if split else arrays


def _share(
    line: Line, names: Sequence[tuple[str, ...]], used: Sequence[str], length: int
) -> jax.Array:
    """What this device adds to the whole line."""
    found = _along(line)
    along = names[line.axis]
    if along:
        start = jax.lax.axis_index(along) * found.shape[0]
        whole = jnp.zeros((length,), found.dtype)
        found = jax.lax.dynamic_update_slice(whole, found, (start,))
    # Devices that hold the same entries: one of them counts.
    alike = tuple(n for n in used if not any(n in part for part in names))
    if alike:
        found = jnp.where(jax.lax.axis_index(alike) == 0, found, 0)
    return found


def _along(line: Line) -> jax.Array:
    """Sums all axes but one, the longest first (a quarter faster on the CPU)."""
    x = line.entry(*line.arrays)
    rest = sorted(
        (a for a in range(x.ndim) if a != line.axis), key=lambda a: x.shape[a]
    )
    if not rest:
        return x
    x = jnp.sum(x, axis=rest[-1], keepdims=True)
    return jnp.sum(x, axis=tuple(rest)) if len(rest) > 1 else x.reshape(-1)
