"""Widths that are fast on the device: documented, or measured once and remembered."""

import concurrent.futures
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import tempfile
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sdp_jax.widths import Steps, powers_to

MULTIPLES = (1, 2, 4, 8, 16, 32)
# Every third width of a period of the largest multiple: each remainder in its share.
WIDTHS = tuple(range(33, 65, 3))
ROUNDS = 11
# A larger multiple keeps more channels: it must be faster by more than noise.
MARGIN = 1.03

Key = tuple[str, ...]


def fast_multiple() -> int:
    """The multiple to which widths are rounded on the default device.

    On a GPU 8 and on a TPU 128, as their vendors say. Elsewhere it is measured, in a
    few seconds: 3 × 3 convolutions and products of matrices at all kinds of widths, and
    at these rounded up to multiples of 1, 2, 4, … 32, in turns. The multiple is the
    smallest one with which they take, in geometric mean, within 3 % as long as with the
    best one; 1 where rounding gains nothing. It is remembered in the process, and in
    the user's directory of caches for the same processor, number of cores, version
    of JAX and flags of XLA.

    Returns:
      The multiple, a power of two.

    Raises:
      ValueError: if JAX has no device.

    References:
      NVIDIA, "Matrix Multiplication Background User's Guide"; Google, "Cloud TPU
      performance guide".

    Example:
      >>> import sdp_jax
      >>> sdp_jax.fast_multiple() in (1, 2, 4, 8, 16, 32, 128)
      True
    """
    device = _default_device()
    known = {"gpu": 8, "tpu": 128}.get(device.platform)
    return known or _remembered(device, _key(device), _folder())


def steps_of(round_to: int | Literal["fast"], *, shared: bool = False) -> Steps:
    """What ``round_to`` means, for :func:`sdp_jax.widths.round_up`.

    Args:
      round_to: a number, of which widths are multiples; or ``"fast"``: multiples of
        :func:`fast_multiple`, and below it powers of two, so that narrow layers stay
        narrow (on a TPU below 128 multiples of 8; on a GPU always multiples of 8).
      shared: whether all processes call this and have to agree, on what the first one
        has found.

    Returns:
      Pairs ``(above, step)``.

    Raises:
      ValueError: if it is neither, or JAX has no device.

    Example:
      >>> steps_of(8)
      ((0, 8),)
    """
    check_round_to(round_to)
    if round_to != "fast":
        return ((0, int(round_to)),)
    known: dict[str, Steps] = {"gpu": ((0, 8),), "tpu": ((0, 8), (127, 128))}
    steps = known.get(_default_device().platform)
    if steps is not None:
        return steps
    multiple = fast_multiple()
    if shared:
        multiple = multihost_utils.broadcast_one_to_all(np.int32(multiple))
    return powers_to(int(multiple))


def check_round_to(round_to: Any, words: tuple[str, ...] = ("fast",)) -> None:
    """Refuses what is neither an integer of at least 1 nor one of the words."""
    if isinstance(round_to, str):
        good = round_to in words
    else:
        whole = isinstance(round_to, int | np.integer)
        good = whole and not isinstance(round_to, bool) and round_to >= 1
    if not good:
        raise ValueError(
            "round_to must be an integer of at least 1, so that every layer keeps a "
            f"channel, or {' or '.join(map(repr, words))}; got {round_to!r}"
        )


def choose(times: np.ndarray, widths: tuple[int, ...]) -> int:
    """The multiple that times of all widths speak for.

    Args:
      times: seconds ``(kinds, widths, rounds)``.
      widths: the widths; with those of ``WIDTHS`` all to which they are rounded.

    Returns:
      The smallest of ``MULTIPLES`` within a margin of the best.
    """
    place = {width: i for i, width in enumerate(widths)}
    base = times[:, [place[w] for w in WIDTHS]]
    costs = []
    for multiple in MULTIPLES:
        rounded = times[:, [place[_up(w, multiple)] for w in WIDTHS]]
        # Both in the same round: what slows the machine down slows both down.
        costs.append(np.log(np.median(rounded / base, axis=-1)).mean())
    limit = min(costs) + math.log(MARGIN)
    return next(m for m, c in zip(MULTIPLES, costs, strict=True) if c <= limit)


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


@functools.cache
def _remembered(device: Any, key: Key, folder: pathlib.Path | None) -> int:
    name = f"fast-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    path = None if folder is None else folder / name
    found = None if path is None else _read(path, key)
    if found is None:
        widths = tuple(sorted({_up(w, m) for w in WIDTHS for m in MULTIPLES}))
        # The caller may be tracing, or under a mesh: a thread has its own context.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            times = pool.submit(_times, device, widths).result()
        found = choose(times, widths)
        if path is not None:
            _write(path, key, found)
    return found


def _times(device: Any, widths: tuple[int, ...]) -> np.ndarray:
    """Seconds of convolutions and of products at each width, in random turns."""
    conv = jax.jit(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    dot = jax.jit(jnp.dot)
    shapes: list[tuple[Any, Any, Any]] = []
    shapes += [(conv, (16, 16, 16, w), (3, 3, w, w)) for w in widths]
    shapes += [(dot, (4096, w), (w, w)) for w in widths]
    calls = []
    for fn, *sizes in shapes:
        arrays = [jax.device_put(np.ones(size, np.float32), device) for size in sizes]
        calls.append((fn, arrays))
        jax.block_until_ready(fn(*arrays))
    rng = np.random.default_rng(0)
    times = np.empty((len(calls), ROUNDS))
    for turn in range(ROUNDS):
        for k in rng.permutation(len(calls)):
            fn, arrays = calls[k]
            start = time.perf_counter()
            jax.block_until_ready(fn(*arrays))
            times[k, turn] = time.perf_counter() - start
    return times.reshape(2, len(widths), ROUNDS)


def _default_device() -> Any:
    try:
        device: Any = getattr(jax.config, "jax_default_device", None)
        if device is None or isinstance(device, str):
            device = jax.local_devices(backend=device)[0]
    except RuntimeError as error:
        raise ValueError(
            f'round_to="fast" needs a device, and JAX has none ({error}): give a number'
        ) from error
    return device


def _key(device: Any) -> Key:
    """What the times depend on."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return (
        device.platform,
        device.device_kind,
        platform.machine(),
        platform.processor(),
        _processor(),
        f"{cores} cores",
        f"flags {os.environ.get('XLA_FLAGS', '')}",
        f"jax {jax.__version__}",
    )


def _processor() -> str:
    """The model and the instructions of the processor, where Linux tells."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    lines = re.findall(r"^(?:model name|flags|Features)\s*:\s*(.*)$", text, re.M)
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()[:16]


def _folder() -> pathlib.Path | None:
    """The user's directory of caches, if there is one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(home) / "sdp_jax"
    return folder if folder.is_absolute() else None


def _read(path: pathlib.Path, key: Key) -> int | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != list(key):
        return None
    multiple = record.get("multiple")
    return multiple if type(multiple) is int and multiple in MULTIPLES else None


def _write(path: pathlib.Path, key: Key, multiple: int) -> None:
    """Writes all or nothing; a directory that cannot be written is no error."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".part", delete=False
        ) as file:
            scratch = pathlib.Path(file.name)
            json.dump({"key": list(key), "multiple": multiple}, file)
        scratch.replace(path)
    except OSError:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
