"""Two processes on loopback that run a script together."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import sdp_jax

CANNOT = 77  # The exit status of a process that cannot be joined with the other.


def joined(initialize, *args):
    """In a process: ``jax.distributed.initialize``, or the end of it."""
    try:
        initialize(*args)
    except Exception as error:
        print(error)
        sys.exit(CANNOT)


def free_port():
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no loopback: {error}")


@contextlib.contextmanager
def two(script, options, devices, *, flags=(), **env):
    """Both of them; ``options`` gives the arguments of each by its number."""
    root = pathlib.Path(sdp_jax.__file__).parents[1]
    count = f"--xla_force_host_platform_device_count={devices}"
    env = env | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = " ".join([*flags, count])
    processes = [
        subprocess.Popen(
            [sys.executable, script, *options(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        for number in (0, 1)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def said(processes):
    """What they have written, once they are done, and their exit statuses."""
    told = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    if CANNOT in codes:
        pytest.skip(f"two processes cannot be joined here: {told}")
    return told, codes
