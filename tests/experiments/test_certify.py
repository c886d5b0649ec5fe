import dataclasses
import json

import pytest

import sdp_jax
from experiments.certify import Certify, main
from experiments.config import Config
from experiments.train import train

TINY = Config(widths=(12, 8), epochs=2, batch_size=256, method="altsdp", sparsity=0.3)
FAST = {"examples": 100, "curvature_examples": 50, "rank": 2, "points": 3}
FAST |= {"curve_steps": 3, "density_steps": 3}


def run(path, **changed):
    train(dataclasses.replace(TINY, out=path, **changed))
    return path


def test_certifies_a_run_and_trains_its_twin(tmp_path, capsys):
    # With batch normalisation, so that statistics are estimated anew.
    changed = {"model": "conv", "widths": (4, 6), "compute": "bfloat16"}
    path = run(tmp_path / "run", evaluate_every=2, **changed)
    found = main(Certify(run=path, **FAST))
    assert found.sparsity == pytest.approx(0.3, abs=0.05)
    assert found.same_seed
    assert len(found.histories["SGD"]) == len(found.histories["altsdp"]) == 2
    kept = sdp_jax.valley.Certificate.from_json((path / "certificate.json").read_text())
    assert kept.summary() == found.summary()
    assert (path / "certificate.png").stat().st_size > 10_000
    assert found.verdict in capsys.readouterr().out
    config = json.loads((path / "twin/metrics.jsonl").read_text().splitlines()[0])
    assert config["config"]["method"] == "sgd"


@pytest.mark.study
def test_a_given_twin_must_be_one(tmp_path):
    path = run(tmp_path / "run")
    other = run(tmp_path / "other", method="sgd", learning_rate=0.2)
    with pytest.raises(ValueError, match="it differs in learning_rate"):
        main(Certify(run=path, twin=other, **FAST))
    with pytest.raises(ValueError, match="the method, which must be sgd"):
        main(Certify(run=path, twin=path, **FAST))
    seed = run(tmp_path / "seed", method="sgd", seed=1)
    found = main(
        Certify(run=path, twin=seed, **FAST | {"density_steps": 0, "curve_steps": 0})
    )
    result = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.pruned["test"]["accuracy"] == pytest.approx(result["test_accuracy"])
    assert not found.same_seed and "do not share a seed" in found.summary()


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        main(Certify(run=tmp_path))
