"""The multiple that is fast: chosen from times, remembered, the same for all."""

import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import fast
from sdp_jax.widths import powers_to, round_up


def times_of(seconds, widths):
    """Times of two kinds, alike in each of three rounds."""
    line = np.asarray([float(seconds(w)) for w in widths])
    return np.tile(line[None, :, None], (2, 1, 3))


def every_width():
    return tuple(range(1, 129))


class Clock:
    """Stands for the measurement: multiples of 4 take half as long."""

    def __init__(self):
        self.measured = 0
        self.period = 4

    def __call__(self, device, widths):
        self.measured += 1
        return times_of(lambda w: 1 if w % self.period == 0 else 2, widths)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(fast, "_times", clock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fast._remembered.cache_clear()
    yield clock
    fast._remembered.cache_clear()


def the_file(tmp_path):
    (path,) = (tmp_path / "cache" / "sdp_jax").iterdir()
    return path


@pytest.mark.parametrize("period", fast.MULTIPLES)
def test_the_smallest_multiple_that_is_as_fast_as_the_best(period):
    widths = every_width()
    times = times_of(lambda w: 1 if w % period == 0 else 2, widths)
    assert fast.choose(times, widths) == period


def test_rounding_has_to_pay_for_the_channels_that_it_keeps():
    widths = every_width()
    # A device that pads by itself, and one that gains less than it computes more.
    assert fast.choose(times_of(lambda w: -(-w // 8), widths), widths) == 1
    small = times_of(lambda w: w**2 * (1.2 if w % 32 else 1), widths)
    assert fast.choose(small, widths) == 1
    large = times_of(lambda w: w**2 * (2 if w % 4 else 1), widths)
    assert fast.choose(large, widths) == 4


def test_one_kind_alone_does_not_decide():
    widths = every_width()
    times = times_of(lambda w: 1 if w % 2 == 0 else 1.5, widths)
    times[1] = times_of(lambda w: w / 10 if w % 16 else w / 40, widths)[1]
    assert fast.choose(times, widths) == 16
    times[1] = times_of(lambda w: w, widths)[1]
    assert fast.choose(times, widths) == 2


def test_what_slows_a_round_down_changes_nothing():
    widths = every_width()
    times = times_of(lambda w: w if w % 8 else w / 3, widths)
    slow = times * np.asarray([1.0, 40.0, 7.0])
    assert fast.choose(slow, widths) == fast.choose(times, widths) == 8


def test_it_is_measured_once(clock, tmp_path):
    assert sdp_jax.fast_multiple() == sdp_jax.fast_multiple() == 4
    assert clock.measured == 1
    record = json.loads(the_file(tmp_path).read_text())
    assert record["multiple"] == 4
    assert {"cpu", f"jax {jax.__version__}"} <= set(record["key"])
    # Another process finds the file.
    fast._remembered.cache_clear()
    clock.period = 8
    assert sdp_jax.fast_multiple() == 4 and clock.measured == 1


def other_version(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.0.1")


def other_cores(monkeypatch):
    cores = set(range(97))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)


def other_processor(monkeypatch):
    monkeypatch.setattr(fast, "_processor", lambda: "another one")


def other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


@pytest.mark.parametrize(
    "change", [other_version, other_cores, other_processor, other_flags]
)
def test_what_times_depend_on_is_told_apart(clock, monkeypatch, tmp_path, change):
    sdp_jax.fast_multiple()
    change(monkeypatch)
    clock.period = 8
    assert sdp_jax.fast_multiple() == 8 and clock.measured == 2
    assert len(list((tmp_path / "cache" / "sdp_jax").iterdir())) == 2


BROKEN = {
    "empty": lambda record: "",
    "cut off": lambda record: json.dumps(record)[:-5],
    "no record": lambda record: "[4]",
    "another key": lambda record: json.dumps(record | {"key": ["cpu"]}),
    "no key": lambda record: json.dumps({"multiple": 4}),
    "no multiple": lambda record: json.dumps({"key": record["key"]}),
    "a strange multiple": lambda record: json.dumps(record | {"multiple": 3}),
    "a boolean": lambda record: json.dumps(record | {"multiple": True}),
    "a list": lambda record: json.dumps(record | {"multiple": [4]}),
    "no text": lambda record: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_measured_anew(clock, tmp_path, kind):
    sdp_jax.fast_multiple()
    path = the_file(tmp_path)
    whole = path.read_text()
    text = BROKEN[kind](json.loads(whole))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fast._remembered.cache_clear()
    assert sdp_jax.fast_multiple() == 4 and clock.measured == 2
    assert the_file(tmp_path).read_text() == whole


def test_a_directory_that_cannot_be_written_is_no_error(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for home in (str(tmp_path / "file"), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.chdir(tmp_path)
        assert sdp_jax.fast_multiple() == 4
    assert clock.measured == 2  # Remembered in the process, for each directory.
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_half_written_is_left(clock, tmp_path):
    sdp_jax.fast_multiple()
    path = the_file(tmp_path)
    path.unlink()
    path.mkdir()
    (path / "taken").write_text("")
    fast._remembered.cache_clear()
    assert sdp_jax.fast_multiple() == 4
    assert the_file(tmp_path) == path


def test_the_home_directory_is_the_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(fast._folder()) == "/home/someone/.cache/sdp_jax"


@pytest.mark.parametrize(
    ("platform", "multiple", "widths"),
    [
        ("gpu", 8, {3: 8, 8: 8, 9: 16, 130: 136}),
        ("tpu", 128, {3: 8, 100: 104, 127: 128, 128: 128, 129: 256}),
    ],
)
def test_accelerators_have_documented_multiples(
    clock, monkeypatch, platform, multiple, widths
):
    device = types.SimpleNamespace(platform=platform, device_kind="a kind")
    monkeypatch.setattr(fast, "_default_device", lambda: device)
    assert sdp_jax.fast_multiple() == multiple
    steps = fast.steps_of("fast")
    assert {kept: round_up(kept, 999, steps) for kept in widths} == widths
    assert clock.measured == 0


def test_processes_agree_on_what_the_first_has_found(clock, monkeypatch):
    def from_the_first(value):
        assert value == 4
        return np.int32(8)

    monkeypatch.setattr(fast.multihost_utils, "broadcast_one_to_all", from_the_first)
    assert fast.steps_of("fast") == powers_to(4)
    assert fast.steps_of("fast", shared=True) == powers_to(8)
    assert fast.steps_of(6, shared=True) == ((0, 6),)


def test_the_default_device_is_asked():
    devices = jax.local_devices()
    assert fast._default_device() == devices[0]
    with jax.default_device(devices[3]):
        assert fast._default_device() == devices[3]
    with jax.default_device("cpu"):
        assert fast._default_device() == devices[0]


def test_no_device_is_an_error(monkeypatch):
    def nothing(backend=None):
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "local_devices", nothing)
    with pytest.raises(ValueError, match=r"JAX has none \(no backend\): give a number"):
        fast.steps_of("fast")


@pytest.mark.parametrize("value", [0, -8, True, 2.0, None, "mesh", "quick", (8,)])
def test_bad_input_is_refused(value):
    with pytest.raises(ValueError, match="round_to must be an integer of at least 1"):
        fast.steps_of(value)


@pytest.mark.parametrize("where", ["plain", "jit", "mesh", "x64"])
def test_it_is_measured_wherever_it_is_called(monkeypatch, tmp_path, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fast, "WIDTHS", (1,))
    monkeypatch.setattr(fast, "MULTIPLES", (1, 2))
    monkeypatch.setattr(fast, "ROUNDS", 2)
    seen = []

    def watched(times, widths):
        seen.append((times, widths))
        return 2

    monkeypatch.setattr(fast, "choose", watched)
    fast._remembered.cache_clear()
    mesh = jax.make_mesh((8,), ("a",))
    if where == "jit":
        assert jax.jit(lambda x: x * sdp_jax.fast_multiple())(jnp.ones(())) == 2
    elif where == "mesh":
        with jax.set_mesh(mesh):
            assert sdp_jax.fast_multiple() == 2
    elif where == "x64":
        with jax.enable_x64(True):
            assert sdp_jax.fast_multiple() == 2
    else:
        assert sdp_jax.fast_multiple() == 2
    fast._remembered.cache_clear()
    ((times, widths),) = seen
    assert times.shape == (2, 2, 2) and widths == (1, 2) and (times > 0).all()
