"""Two processes on loopback train, die, go on, cut and save; others load."""

import functools
import json
import os
import signal
import sys

import jax
import numpy as np
import pytest
import tyro

import sdp_jax
from experiments import multihost
from tests import processes

TINY = ("--steps", "20", "--every", "5", "--width", "16", "--batch", "16")
# Ends at widths that 4 devices share, and 8 do not.
TINY += ("--sparsity", "0.2", "--model", "4")


def child(kill):
    """The script; ``kill`` says when this process ends by SIGKILL."""
    config = tyro.cli(multihost.Config)
    what, _, which = kill.partition(" ")

    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    def renamed(event, args):
        """A save is complete when its directory gets its name."""
        if event == "os.rename" and os.fsdecode(args[1]).endswith(which):
            end()

    if what == "save":
        sys.addaudithook(renamed)
    if what == "train" and config.process == 1:
        calls, together = [], multihost.together

        def counted(*args):
            calls.append(args)
            if len(calls) == int(which):
                end()
            return together(*args)

        multihost.together = counted
    jax.distributed.initialize = functools.partial(
        processes.joined, jax.distributed.initialize
    )
    multihost.main(config)


def two(directory, kill="", wait=0):
    """The records of two processes; of a kill, what process 0 said.

    ``wait`` is the number of the process that is killed.
    """
    address = f"127.0.0.1:{processes.free_port()}"
    common = [str(directory), *TINY, "--coordinator", address, "--processes", "2"]
    given = os.environ.get("XLA_FLAGS", "").split()
    with processes.two(
        __file__,
        lambda number: [*common, "--process", str(number)],
        devices=4,
        flags=[flag for flag in given if "device_count" not in flag],
        KILL=kill,
    ) as both:
        if kill:
            both[wait].wait(timeout=120)
            both[1 - wait].kill()
        told, codes = processes.said(both)
    if kill:
        assert codes[wait] == -signal.SIGKILL, told
        return told[0][1]
    assert codes == [0, 0], told
    records = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert records[0] == records[1]
    return records[0] | {"said": told[0][1]}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return directory, two(directory)


def config(directory, *options):
    return tyro.cli(multihost.Config, args=[str(directory), *TINY, *options])


def test_one_process_and_two_find_the_same(unbroken, tmp_path):
    directory, record = unbroken
    alone = multihost.run(config(tmp_path))
    for name in ("zeros", "widths", "accuracy", "small_accuracy"):
        assert alone[name] == record[name]
    assert alone["zeros"] > 0
    ours, theirs = (
        sdp_jax.load(d / "small", multihost.apply) for d in (tmp_path, directory)
    )
    assert ours.cut == theirs.cut
    for name, leaf in ours.params.items():
        np.testing.assert_allclose(leaf, theirs.params[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["2", "4"])
def test_one_process_loads_also_on_another_mesh(unbroken, model):
    directory, record = unbroken
    found = multihost.run(config(directory, "--load", "--model", model))
    for name in ("widths", "small_hash", "small_accuracy"):
        assert found[name] == record[name]


def test_a_mesh_that_cannot_share_what_stays_says_so(unbroken):
    with pytest.raises(ValueError, match="'mid' is split over 8 devices along axis 1"):
        multihost.run(config(unbroken[0], "--load", "--model", "1"))


def test_killed_in_training_it_ends_with_the_same_bits(unbroken, tmp_path):
    two(tmp_path, "train 13", wait=1)
    assert_ends_alike(unbroken, tmp_path, (5, 10))


@pytest.mark.study
def test_killed_while_saving_it_ends_with_the_same_bits(unbroken, tmp_path):
    two(tmp_path, "save /training/10")
    names = {p.name for p in (tmp_path / "training").iterdir()}
    assert "5" in names and "10" not in names
    assert any(name.startswith("10.") for name in names)
    assert "goes on behind step 5\n" in two(tmp_path, "save /small")
    with pytest.raises(FileNotFoundError, match=r"small\.\w+\.part beside it is left"):
        multihost.run(config(tmp_path, "--load"))
    assert_ends_alike(unbroken, tmp_path, (20,))


def assert_ends_alike(unbroken, directory, steps):
    """Goes on behind one of the steps; the last save may have been under way."""
    found = two(directory)
    said = found.pop("said")
    assert any(f"goes on behind step {n}\n" in said for n in steps)
    assert found == {k: v for k, v in unbroken[1].items() if k != "said"}


def test_devices_must_share(tmp_path):
    with pytest.raises(ValueError, match="--model 3 must divide the 8 devices"):
        multihost.run(config(tmp_path, "--model", "3"))


if __name__ == "__main__":
    child(os.environ["KILL"])
