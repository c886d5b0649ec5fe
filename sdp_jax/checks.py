"""Checks of arguments: Python numbers are refused in the factory, arrays pass."""

import math
from typing import Any

import jax
import numpy as np


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, rule: str
) -> None:
    """Refuses a Python number outside ``[low, high]``; arrays pass unchecked."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise TypeError(f"{name} must be {rule}; got {value!r}")
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be {rule}; got {value!r}")


def check_whole(name: str, value: Any, *, low: int = 0, of: str = "updates") -> None:
    """Refuses what is not an integer of at least ``low``, in 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer number of {of}; got {value!r}")
    if not low <= value < 2**31:
        raise ValueError(
            f"{name} must be a number of {of}, at least {low} and below 2**31; got "
            f"{value!r}"
        )


def check_momentum(momentum: Any) -> None:
    """Refuses a Python number outside ``[0, 1)``; arrays pass unchecked."""
    high = math.nextafter(1, 0)
    check_number("momentum", momentum, low=0, high=high, rule="a number in [0, 1)")


def check_steps(begin_step: Any, end_step: Any) -> None:
    for name, step in (("begin_step", begin_step), ("end_step", end_step)):
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(
                f"{name} must be an integer number of updates; got {step!r}"
            )
    if not 0 <= begin_step < end_step < 2**31:
        raise ValueError(
            "steps must satisfy 0 <= begin_step < end_step < 2**31; got "
            f"begin_step={begin_step}, end_step={end_step}"
        )


def check_share(name: str, value: Any) -> None:
    """Refuses what is no Python number in ``[0, 1)``; arrays too."""
    check_number(name, value, low=0, rule="a number in [0, 1)")
    if isinstance(value, jax.Array) or value >= 1:
        raise ValueError(f"{name} must be a number in [0, 1); got {value!r}")
