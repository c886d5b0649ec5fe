import json
import pathlib

import pytest

from experiments.compare import ENTRIES, Compare, front, main, markdown, rows, runs


def test_a_comparison_goes_on_where_it_was(tmp_path, capsys):
    config = Compare(
        out=tmp_path,
        methods=("SGD, dense", "L2", "AltSDP"),
        targets=(0.5,),
        widths=(12, 8),
        epochs=2,
        batch_size=256,
    )
    table = main(config)
    assert [(r["name"], r["sparsity"]) for r in table] == [
        ("SGD, dense", None),
        ("AltSDP", 0.5),
        ("L2", 0.5),
    ]
    dense, *pruned = table
    assert dense["flops_left"][0] == 1.0
    assert all(0.3 < r["flops_left"][0] <= 0.5 for r in pruned)
    files = {p.name for p in tmp_path.iterdir()}
    assert {"results.json", "table.md", "pareto.png", "l2-0.5-seed0"} <= files
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    # What is finished is read, what was lost is done again from its checkpoint.
    lost = tmp_path / "l2-0.5-seed0" / "compared.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    kept = tmp_path / "sgd-dense-seed0" / "compared.json"
    kept.write_text(kept.read_text().replace('"seed": 0', '"seed": 7'))
    main(config)
    after = json.loads(lost.read_text())
    assert after["accuracy"] == before["accuracy"]
    assert any(
        r["seed"] == 7 for r in json.loads((tmp_path / "results.json").read_text())
    )
    assert "3 of 3" in capsys.readouterr().out


def line(name, accuracy, flops, seed=0):
    numbers = {
        "test_loss": 0.2,
        "train_loss": 0.1,
        "parameters_left": flops,
        "latency_left": flops,
    }
    return {
        "name": name,
        "sparsity": 1 - flops,
        "seed": seed,
        "accuracy": accuracy,
        "flops_left": flops,
    } | numbers


def test_the_front_and_the_table():
    records = [
        line("a", 0.9, 0.5),
        line("a", 0.8, 0.5, seed=1),
        line("b", 0.84, 0.5),
        line("c", 0.7, 0.25),
        line("d", 0.6, 0.3),
    ]
    table = rows(records)
    assert table[0]["accuracy"] == pytest.approx((0.85, 0.0707106), abs=1e-6)
    assert [r["name"] for r in front(table, "flops_left")] == ["c", "a"]
    text = markdown(table)
    assert "| a ● | 2 | 85.00 ± 7.07 % |" in text
    assert text.index("| a ●") < text.index("| b |")


def test_settings_are_shared_and_methods_have_their_own():
    config = Compare(
        out=pathlib.Path("out"), targets=(0.5, 0.9), seeds=(0, 3), model="conv"
    )
    planned = runs(config)
    assert len(planned) == 2 * (3 + 2 * (len(ENTRIES) - 3))
    assert len({run.out for _, run in planned}) == len(planned)
    assert {run.learning_rate for _, run in planned} == {0.1}
    dnn = {name for name, _ in runs(Compare(out=pathlib.Path("out"), model="dnn"))}
    assert set(ENTRIES) - dnn == {"slimming"}  # It has no scales to penalise.
    with pytest.raises(ValueError, match=r"unknown methods \['magic'\]"):
        runs(Compare(out=pathlib.Path("out"), methods=("magic",)))
