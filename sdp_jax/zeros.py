"""Looking for zeros from outside of ``jit``, without compiling anything for it.

What a CPU holds NumPy looks at; for an accelerator all is one program.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.mesh import fetch


class Line(NamedTuple):
    """Along an axis: where all entries are zero, and whether one is not a number."""

    zero: np.ndarray
    nan: bool


def at_hand(leaf: Any) -> bool:
    """Whether NumPy can read an array where it lies.

    Args:
      leaf: an array.

    Returns:
      Whether it can.
    """
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return isinstance(leaf, np.ndarray)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    cpu = all(device.platform == "cpu" for device in leaf.devices())
    return leaf.is_fully_addressable and cpu


def look_along(leaves: Sequence[Any], axes: Sequence[int]) -> list[Line]:
    """Looks along axes of arrays.

    Args:
      leaves: arrays.
      axes: for each of them an axis.

    Returns:
      For each a line.
    """
    pairs = list(zip(leaves, axes, strict=True))
    here = [at_hand(leaf) for leaf in leaves]
    far = [pair for pair, near in zip(pairs, here, strict=True) if not near]
    found = iter(
        _look_far(tuple(a for _, a in far), [x for x, _ in far]) if far else ()
    )
    lines = (
        _look(np, np.asarray(leaf), axis) if near else next(found)
        for (leaf, axis), near in zip(pairs, here, strict=True)
    )
    return [Line(fetch(zero), bool(fetch(nan))) for zero, nan in lines]


def zero_channels(groups: Groups, table: Mapping[str, Any]) -> np.ndarray:
    """Which channels have no producer entry that is not exactly zero.

    Args:
      groups: the channel dimensions.
      table: leaves by path, those of the producers among them.

    Returns:
      A Boolean vector ``(num_channels,)``.

    Raises:
      ValueError: if a producer is not a number somewhere.
    """
    places = dict.fromkeys((m.path, m.axis) for _, m, _ in groups.producers)
    lines = look_along([table[path] for path, _ in places], [a for _, a in places])
    by_place = dict(zip(places, lines, strict=True))
    zero = {d.name: np.ones(d.size, bool) for d in groups}
    for name, m, size in groups.producers:
        line = by_place[m.path, m.axis]
        if line.nan:
            raise ValueError(
                f"dimension {name!r}: {m.path!r} contains NaN; a diverged model "
                "cannot be cut"
            )
        zero[name] &= line.zero[m.positions(size)].all(axis=(0, 2))
    return np.concatenate([np.zeros(0, bool), *zero.values()])


def _look(on: Any, leaf: Any, axis: int) -> tuple[Any, Any]:
    rest = tuple(d for d in range(leaf.ndim) if d != axis)
    return on.all(leaf == 0, axis=rest), on.any(leaf != leaf)


@functools.partial(jax.jit, static_argnums=0)
def _look_far(axes: tuple[int, ...], leaves: list[Any]) -> list[tuple[Any, Any]]:
    return [_look(jnp, leaf, a) for leaf, a in zip(leaves, axes, strict=True)]
