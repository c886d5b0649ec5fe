"""The benchmark of widths, at a small size."""

import jax.numpy as jnp
import pytest

import sdp_jax
from experiments.benchmarks import widths
from sdp_jax import fast


def test_ratios_come_last(capsys, monkeypatch):
    monkeypatch.setattr(fast, "fast_multiple", lambda: 4)
    monkeypatch.setattr(widths.sdp_jax, "fast_multiple", lambda: 4)
    monkeypatch.setattr(widths, "NETWORKS", {"tiny": ("vgg_small", (5, 6, 7))})
    config = widths.Config(left=(0.6,), cuts=1, batch_size=1, side=8, repeats=1)
    found = widths.main(config)
    assert list(found) == [str(way) for way in widths.WAYS]
    assert found["1"]["uneven"] == 1 and found["fast"]["dense"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "fast multiple 4" in lines[0] and lines[1].startswith("tiny, widths [")
    assert [line.split(":")[0] for line in lines[2:]] == [
        f"round_to {way}" for way in widths.WAYS
    ]


@pytest.mark.parametrize("left", [0.05, 0.95])
def test_widths_lie_between_one_channel_and_all(left):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 64))}
    axes = {name: [sdp_jax.Member(name, 1)] for name in params}
    groups = sdp_jax.groups_from_axes(params, axes)
    found = widths.cut_at_random(groups, left, seed=1)
    assert 1 <= found["a"] <= 4 and abs(found["b"] - 64 * left) <= 64 * 0.15 + 1
    rounded = widths.make_cut(groups, {"a": 3, "b": 33}, 8)
    assert rounded.widths == {"a": 4, "b": 40}
