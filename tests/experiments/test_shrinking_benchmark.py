import dataclasses
import re

import jax
import pytest

import sdp_jax
from experiments import data
from experiments.benchmarks import shrinking
from experiments.config import Config

TOY = Config(
    **{"dataset": "digits", "model": "conv", "widths": (4, 6, 8), "examples": 128},
    **{"epochs": 2, "batch_size": 32, "target": "flops", "sparsity": 0.6},
    **{"begin": 0.0, "end": 0.5, "evaluate_every": 9, "loop": "step"},
)


@pytest.fixture
def cache():
    """Sets where compiled programs are kept."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda path: jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_compilation_cache_dir", before)


def test_in_small(monkeypatch, capsys, cache):
    cache(None)
    monkeypatch.setattr(shrinking, "NETWORKS", {"toy": TOY})
    monkeypatch.setattr("experiments.shrink.ROUND_TO", 1)
    # Too short for a cut to pay: it is made when four of eight steps are done.
    ask = sdp_jax.Shrinker.__call__

    def at_four(self, step, params):
        assert ask(self, step, params) is None
        return self.now(step, params) if step == 4 else None

    monkeypatch.setattr(sdp_jax.Shrinker, "__call__", at_four)
    found = shrinking.main(shrinking.Shrinking(networks=("toy",), seeds=(0,)))["toy"]
    dense, pruned, shrunk = (found[way][0] for way in ("dense", "pruned", "shrunk"))
    assert dense["flops"] == pruned["flops"] == dense["step"] == 1
    assert 0 < shrunk["step"] <= 0.4 and shrunk["cuts"] == [4]
    assert shrunk["flops"] == pytest.approx((1 + shrunk["step"]) / 2)
    assert shrunk["bytes"] < 0.8 * pruned["bytes"]
    assert shrunk["loss"] == pytest.approx(pruned["loss"], rel=1e-3)
    assert dense["seconds"] > 0
    last = capsys.readouterr().out.splitlines()[-1]
    ratio = float(re.fullmatch(r"toy: time of the runs .*: (\d+\.\d+)", last)[1])
    assert ratio == pytest.approx(shrunk["seconds"] / dense["seconds"], abs=1e-3)


def test_the_networks_are_runs():
    options = shrinking.Shrinking()
    assert list(shrinking.NETWORKS)[-1] == "vgg"
    for name, config in shrinking.NETWORKS.items():
        for way in shrinking.WAYS:
            made = shrinking.run_of(options, name, way, 1)
            assert made.examples % made.batch_size == 0 and made.seed == 1
            assert (made.method == "sgd") == (way == "dense")
            assert (made.shrink == ()) == (way == "shrunk")
        assert config.sparsity == 0.7 and config.dataset in data.INFO
        twin = dataclasses.replace(config.twin_of(), out=None)
        assert shrinking.run_of(options, name, "dense", 0) == twin
    with pytest.raises(ValueError, match="got 'vgg' and 'thin'"):
        shrinking.run_of(options, "vgg", "thin", 0)


def test_what_is_compiled_already_is_refused(tmp_path, cache):
    cache(str(tmp_path))
    with pytest.raises(ValueError, match="unset JAX_COMPILATION_CACHE_DIR"):
        shrinking.main(shrinking.Shrinking())
