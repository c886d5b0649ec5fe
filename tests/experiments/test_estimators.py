import json
import types

import pytest

from experiments.estimators import STREAMS, Estimators, main


@pytest.mark.study
def test_compares_every_estimate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.estimators.STREAMS", STREAMS[2:4])
    configs = []

    def quick(config):
        configs.append(config)
        return types.SimpleNamespace(epochs=[{"train_loss": 1.0 + config.seed}])

    # How these train is tested beside it.
    monkeypatch.setattr("experiments.estimators.train", quick)
    options = Estimators(
        widths=(6, 4), epochs=1, rank=2, seeds=2, out=tmp_path / "out.json"
    )
    figures = main(options)
    names = ["svd, decay 0.5", "frequent_directions, decay 0.99"]
    for share in figures["overlap"]:
        assert list(share) == [*names, "hessian, of the check before"]
        assert all(0 <= value <= 1 + 1e-6 for value in share.values())
    assert all(values == [1.0, 2.0] for values in figures["loss"].values())
    assert {(c.valley, c.valley_rank, c.valley_decay) for c in configs} >= {
        ("svd", 2, 0.5),
        ("svd", 16, 0.9),
        ("hessian", 2, 0.5),
        ("frequent_directions", 2, 0.99),
    }
    assert {"plain", "hessian, rank 2, every 50", *names} <= set(figures["loss"])
    written = json.loads(options.out.read_text())
    assert {k: written[k] for k in ("overlap", "loss")} == {
        k: figures[k] for k in ("overlap", "loss")
    }
    assert capsys.readouterr().out.count("|\n") > 6
