"""Widths that a layer may have: counts of channels, rounded up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Pairs (above, step): widths above the first number are multiples of the second one.
Steps = tuple[tuple[int, int], ...]


def round_up(kept: Any, sizes: Any, steps: int | Steps) -> Any:
    """The widths at which layers end that have so many channels to keep.

    Args:
      kept: how many channels are to stay: a number, or an array of numbers, traced or
        not. None stays none.
      sizes: how many there are, likewise; a layer never gets more.
      steps: a number of which widths are multiples; or pairs ``(above, step)``, the
        first number rising: what is above it, and not above the next, becomes a
        multiple of the step.

    Returns:
      The widths: a number for numbers, else an array.

    Example:
      >>> round_up(17, 64, 8), round_up(17, 20, 8), round_up(3, 64, powers_to(8))
      (24, 20, 4)
    """
    pairs = ((0, steps),) if isinstance(steps, int | np.integer) else steps
    if isinstance(kept, int) and isinstance(sizes, int):
        step = next((step for above, step in reversed(pairs) if kept > above), 1)
        return min(-(-kept // step) * step, sizes)
    on: Any = jnp if isinstance(kept, jax.Array) or isinstance(sizes, jax.Array) else np
    wanted = kept
    for above, step in pairs:
        wanted = on.where(kept > above, -(-kept // step) * step, wanted)
    return on.minimum(wanted, sizes)


def powers_to(multiple: int) -> Steps:
    """Powers of two up to a power of two, and its multiples above.

    Args:
      multiple: the power of two.

    Returns:
      The steps for :func:`round_up`.

    Example:
      >>> powers_to(4)
      ((0, 1), (1, 2), (2, 4))
    """
    found = [(0, 1)]
    while found[-1][1] < multiple:
        step = found[-1][1]
        found.append((step, 2 * step))
    return tuple(found)
