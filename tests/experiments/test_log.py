import dataclasses
import json

import pytest

from experiments.config import Config
from experiments.log import Log, environment, read_lines

CONFIG = Config(widths=(12, 8), epochs=3)
RESULT = {"test_accuracy": 0.5, "widths": {"dense0": 3}}


@pytest.fixture
def path(tmp_path):
    """A finished run."""
    path = tmp_path / "run/metrics.jsonl"
    log = Log(path, CONFIG)
    log.truncate(0)
    for epoch in (1, 2, 3):
        log.epoch({"epoch": epoch, "batch_loss": 1 / epoch})
    log.finish(RESULT)
    return path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_new_log_writes_nothing_before_the_first_record(tmp_path):
    path = tmp_path / "deep/down/metrics.jsonl"
    log = Log(path, CONFIG)
    assert log.epochs == [] and log.result is None
    assert path.parent.is_dir() and not path.exists()
    log.truncate(0)
    (header,) = read_lines(path)
    assert header["config"] == CONFIG.key()
    assert header.keys() == {"config", *environment()}
    assert header["versions"].keys() == {"jax", "sdp_jax"} and header["cores"] >= 1
    assert header["device"].startswith("cpu")


def test_what_is_written_is_read(path):
    log = Log(path, CONFIG)
    assert [record["epoch"] for record in log.epochs] == [1, 2, 3]
    assert log.epochs[1] == {"epoch": 2, "batch_loss": 0.5}
    assert log.result == RESULT
    assert len(read_lines(path)) == 5


def test_a_torn_last_line_is_left_out(path):
    text = path.read_text()
    for lines, cut in [(4, 1), (4, 20), (2, 3)]:
        kept = text.splitlines(keepends=True)
        path.write_text("".join(kept[:lines]) + kept[lines][:cut])
        log = Log(path, CONFIG)
        assert len(log.epochs) == lines - 1 and log.result is None
        # The next record begins on a line of its own.
        log.truncate(len(log.epochs))
        log.finish(RESULT)
        assert [len(x) > 0 for x in read_lines(path)] == [True] * (lines + 1)
        assert Log(path, CONFIG).result == RESULT


def test_without_its_last_newline_a_line_is_complete(path):
    path.write_text(path.read_text()[:-1])
    log = Log(path, CONFIG)
    assert log.result == RESULT
    log.truncate(3)
    assert path.read_text().endswith("}\n") and len(read_lines(path)) == 5


def test_a_torn_header_begins_anew(path):
    path.write_text(path.read_text()[:30])
    log = Log(path, CONFIG)
    assert log.epochs == [] and log.result is None
    log.truncate(0)
    assert [line["config"] for line in read_lines(path)] == [CONFIG.key()]


def test_truncate_forgets_later_epochs_and_the_result(path):
    header = read_lines(path)[0]
    log = Log(path, CONFIG)
    log.truncate(2)
    assert log.result is None and [r["epoch"] for r in log.epochs] == [1, 2]
    lines = read_lines(path)
    assert lines[0] == header and [r["epoch"] for r in lines[1:]] == [1, 2]
    assert [x.name for x in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncate_keeps_the_result_of_a_finished_run(path):
    text = path.read_text()
    log = Log(path, CONFIG)
    log.truncate(3)
    assert log.result == RESULT and path.read_text() == text


def test_the_last_result_counts(path):
    timed = RESULT | {"milliseconds": 2.0}
    Log(path, CONFIG).finish(timed)
    log = Log(path, CONFIG)
    assert log.result == timed
    log.truncate(3)
    assert [line for line in read_lines(path) if "test_accuracy" in line] == [timed]


def test_another_run_is_refused_and_left_alone(path):
    text = path.read_text()
    other = dataclasses.replace(CONFIG, epochs=4, sparsity=0.5)
    with pytest.raises(ValueError) as error:
        Log(path, other)
    message = str(error.value)
    assert "differs in epochs (3, not 4), sparsity (None, not 0.5)." in message
    assert str(path.parent) in message and "--out, or delete" in message
    assert path.read_text() == text


def test_where_and_how_a_run_is_made_does_not_matter(path, tmp_path):
    changed = {"loop": "scan", "devices": 2, "timed": True, "data_dir": tmp_path}
    log = Log(path, dataclasses.replace(CONFIG, out=tmp_path, twin=True, **changed))
    assert len(log.epochs) == 3


def test_what_an_earlier_version_did_not_name_had_its_default(path):
    lines = read_lines(path)
    for name in ("warmup", "augment"):
        del lines[0]["config"][name]
    write(path, lines)
    log = Log(path, CONFIG)
    assert len(log.epochs) == 3
    with pytest.raises(ValueError, match=r"differs in warmup \(0\.0, not 1\.0\)\."):
        Log(path, dataclasses.replace(CONFIG, warmup=1.0))


def test_an_option_that_is_no_longer_there_makes_another_run(path):
    lines = read_lines(path)
    lines[0]["config"]["forgotten"] = 7
    write(path, lines)
    with pytest.raises(ValueError, match=r"differs in forgotten \(7, not None\)"):
        Log(path, CONFIG)
