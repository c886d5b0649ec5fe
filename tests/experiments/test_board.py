import dataclasses
import struct
import sys
import time

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from experiments import data
from experiments.board import Board
from experiments.config import Config
from experiments.interrupt import Interrupted
from experiments.log import read_lines
from experiments.train import show

RECORD = {
    "epoch": 1,
    "batch_loss": 0.25,
    "channels": {"dense0": 12, "dense1": 8},
    "pq_index": {"weights": 0.5},
    "seconds": 2.0,
}


def masked(data):
    check = crc32c(data)
    return ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events_of(path):
    """Step, tag and value of all scalars in the event files of a directory.

    A record is its length, a checksum of that, its bytes and a checksum of those.
    """
    found = []
    for file in sorted(path.iterdir()):
        rest = file.read_bytes()
        while rest:
            (size,) = struct.unpack("<Q", rest[:8])
            body, end = rest[12 : 12 + size], rest[12 + size : 16 + size]
            assert struct.unpack("<I", rest[8:12])[0] == masked(rest[:8])
            assert struct.unpack("<I", end)[0] == masked(body)
            event, rest = Event.FromString(body), rest[16 + size :]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def expected(record):
    return {
        (record["epoch"], "epoch", record["epoch"]),
        (record["epoch"], "batch_loss", record["batch_loss"]),
        (record["epoch"], "channels/dense0", record["channels"]["dense0"]),
        (record["epoch"], "channels/dense1", record["channels"]["dense1"]),
        (record["epoch"], "pq_index/weights", record["pq_index"]["weights"]),
        (record["epoch"], "seconds", record["seconds"]),
    }


def test_event_files_hold_the_records(tmp_path):
    board = Board(tmp_path / "board")
    second = RECORD | {"epoch": 2, "batch_loss": 0.125}
    board.write(RECORD)
    # One may look while the run goes on.
    deadline = time.monotonic() + 30
    while not expected(RECORD) <= set(events_of(tmp_path / "board")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    board.write(second)
    board.close()
    found = events_of(tmp_path / "board")
    assert set(found) == expected(RECORD) | expected(second)
    assert len(found) == 12


def test_a_run_that_goes_on_replaces_them(tmp_path):
    path = tmp_path / "board"
    for name in ("first", "second"):
        board = Board(path)
        board.write(RECORD)
        board.close()
        # They are named by the second in which they begin.
        (file,) = path.iterdir()
        file.rename(path / f"events.out.tfevents.{name}")
    assert len(list(path.iterdir())) == 1
    assert sorted(events_of(path)) == sorted(expected(RECORD))


def test_nothing_is_replaced_before_the_first_record(tmp_path):
    path = tmp_path / "board"
    path.mkdir()
    (path / "other").write_text("of another run")
    board = Board(path)
    board.close()
    assert (path / "other").exists()
    Board(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()


def test_without_tensorboardx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="tensorboardX"):
        Board(tmp_path / "board")


def test_a_run_shows_its_records_each_once(tmp_path):
    config = Config(
        **{"method": "sgd", "widths": (4,), "epochs": 3, "batch_size": 256},
        out=tmp_path / "run",
    )
    dataset, path = data.synthetic("digits", count=512), tmp_path / "run/tensorboard"
    with pytest.raises(Interrupted):
        show(config, dataset=dataset, stop=lambda: path.exists())
    assert {step for step, *_ in events_of(path)} == {1}
    show(config, dataset=dataset)
    _, *records, _ = read_lines(tmp_path / "run/metrics.jsonl")
    found = events_of(path)
    assert len(found) == len(set(found)) == 3 * 8
    assert {step for step, *_ in found} == {1, 2, 3}
    losses = {step: value for step, tag, value in found if tag == "train_loss"}
    for record in records:
        assert losses[record["epoch"]] == pytest.approx(record["train_loss"])
    # Another run in the same directory is refused, and they stay.
    with pytest.raises(ValueError, match="another configuration"):
        show(dataclasses.replace(config, seed=1), dataset=dataset)
    assert events_of(path) == found
