import json

import numpy as np
import pytest

from experiments import data, models, networks
from experiments.config import Config

TINY = {
    **{"dataset": "digits", "epochs": 2, "batch_size": 256, "learning_rate": 0.1},
    **{"target": "flops", "begin": 0.1, "end": 0.5, "loop": "scan"},
}


@pytest.fixture
def small(monkeypatch):
    chosen = {"one": TINY | {"widths": (12, 8)}, "two": TINY | {"widths": (9,)}}
    monkeypatch.setattr(networks, "NETWORKS", chosen)


def test_the_study_goes_on_where_it_was(tmp_path, small, capsys):
    config = networks.Networks(
        out=tmp_path,
        methods=("AltSDP",),
        seeds=(0,),
        targets=(0.5,),
    )
    networks.main(config)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    kept = tmp_path / "one" / "altsdp-0.5-seed0" / "compared.json"
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps(found | {"accuracy": 0.4321}))
    more = ("AltSDP", "gradual magnitude", "SGD, dense", "from scratch")
    other = networks.Networks(
        out=tmp_path, methods=more, networks=("one",), seeds=(0,), targets=(0.5,)
    )
    networks.main(other)
    records = json.loads((tmp_path / "results.json").read_text())
    assert len(records) == 5
    by = {(r["network"], r["name"]): r for r in records}
    assert by["one", "AltSDP"]["accuracy"] == 0.4321
    assert by["one", "from scratch"]["widths"] == found["widths"]
    assert by["one", "SGD, dense"]["flops_left"] == 1
    assert all(0.3 < r["flops_left"] <= 0.5 for r in records if r["sparsity"])
    text = (tmp_path / "table.md").read_text()
    assert "| one | 50% | 1 |" in text and "43.21" in text
    assert "one, AltSDP 50%, seed 0: 43.21%" in capsys.readouterr().out


def test_from_scratch_needs_the_widths(tmp_path, small):
    config = networks.Networks(out=tmp_path, methods=("from scratch",), seeds=(0,))
    with pytest.raises(ValueError, match="altsdp-0.5-seed0.*run the method 'AltSDP'"):
        networks.main(config)
    with pytest.raises(ValueError, match=r"unknown networks \['three'\]; there are"):
        networks.comparisons(networks.Networks(out=tmp_path, networks=("three",)))


def record(network, name, sparsity, seed, accuracy):
    return {
        **{"network": network, "name": name, "sparsity": sparsity, "seed": seed},
        **{"accuracy": accuracy, "test_loss": 1 - accuracy},
        "flops_left": 1 - (sparsity or 0),
    }


def test_the_table_by_hand():
    records = [record("dnn", "SGD, dense", None, s, 0.99) for s in (0, 1)]
    for network, accuracies in {
        "dnn": {"AltSDP": (0.9, 0.92), "L2": (0.8, 0.84), "from scratch": (0.93, 0.95)},
        "decoder": {"AltSDP": (0.5, 0.7), "random": (0.5, 0.9)},
    }.items():
        for name, pair in accuracies.items():
            records += [record(network, name, 0.5, s, a) for s, a in enumerate(pair)]
    lines = networks.table(records, "score", "higher").splitlines()
    assert lines[0].startswith(
        "| network | FLOPs to go | seeds | dense | AltSDP | L2 | random"
    )
    # √(1² / 2 · 2 + …): errors of 1 and 2 per cent, of 1 and 1, of 0.1 and 0.2.
    assert lines[2] == (
        "| dnn | 50% | 2 | 99 ± 0 | 91 ± 1.41 | 82 ± 2.83 |  | **94 ± 1.41** "
        "| +4.0 | -2.1 |"
    )
    assert lines[3] == (
        "| decoder | 50% | 2 |  | 0.4 ± 0.141 |  | **0.3 ± 0.283** |  | -0.4 |  |"
    )
    assert (
        lines[4] == "| mean place |  |  |  | 2.00 | 3.00 | 1.00 | 1.00 | +1.8 | -2.1 |"
    )


def test_what_misses_its_target_has_no_place():
    records = [
        record("dnn", name, 0.5, 0, accuracy)
        for name, accuracy in {"AltSDP": 0.8, "L2": 0.7, "DHSPG": 0.9}.items()
    ]
    records[-1]["flops_left"] = 0.6
    lines = networks.table(records, "score", "higher").splitlines()
    assert lines[2].startswith("| dnn | 50% | 1 | **80** | 70 | (90) |")
    assert lines[3].startswith("| mean place |  |  | 1.00 | 2.00 |  |")


def test_a_table_without_places():
    records = [record("dnn", "L2", 0.5, 0, 0.9), record("dnn", "random", 0.5, 0, 0.8)]
    lines = networks.table(records, "accuracy", "neither").splitlines()
    assert lines[0] == "| network | FLOPs to go | seeds | L2 | random |"
    assert lines[2:] == ["| dnn | 50% | 1 | 0.9 | 0.8 |"]


def test_places():
    means = {"a": 3.0, "b": 1.0, "c": 3.0, "d": 4.0}
    assert networks.ranks(means, lower=True) == {"a": 2.5, "b": 1, "c": 2.5, "d": 4}
    assert networks.ranks(means, lower=False) == {"a": 2.5, "b": 4, "c": 2.5, "d": 1}


def test_standard_errors():
    one, other = np.array([1.0, 3.0]), np.array([0.0, 0.0, 3.0])
    # Variances 2 and 3.
    assert networks.standard_errors(one, other) == pytest.approx(1 / 2**0.5)
    assert np.isnan(networks.standard_errors(one, np.array([1.0])))
    same = np.array([1.0, 1.0])
    assert np.isnan(networks.standard_errors(same, same))


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_can_be_trained(name, tmp_path):
    config = networks.Networks(out=tmp_path, networks=(name,))
    comparison = networks.comparisons(config)[name]
    info = data.INFO[comparison.dataset]
    model = models.make_model(comparison.model, info.classes, comparison.widths)
    assert model.widths
    count = comparison.examples or info.train
    steps = comparison.epochs * (count // comparison.batch_size)
    assert 200 <= steps <= 1000
    planned = networks.compare.runs(comparison)
    assert all(isinstance(run, Config) and run.out is not None for _, run in planned)
    methods = {entry for entry, _ in planned}
    without = {"slimming"} if comparison.model in ("dnn", "lenet", "mixer") else set()
    assert methods == set(networks.METHODS) - without
    assert len(planned) == 3 * (1 + 2 * (len(methods) - 1))
