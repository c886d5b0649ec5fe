import dataclasses

import pytest

from experiments.config import Config
from experiments.table import markdown, rows
from experiments.train import train


def test_one_row_for_all_seeds_of_a_configuration(tmp_path):
    base = Config(widths=(12, 8), epochs=1, batch_size=256)
    runs = []
    for changed in ({"method": "sgd"}, {"sparsity": 0.5, "end": 0.5}):
        for seed in (0, 1):
            out = tmp_path / f"{changed.get('method', 'altsdp')}{seed}"
            config = dataclasses.replace(base, seed=seed, out=out, **changed)
            runs.append((out, train(config)))
    table = rows(tuple(out for out, _ in runs))
    assert [row["seeds"] for row in table] == [2, 2]
    assert table[1]["settings"] == "sparsity=0.5 end=0.5 widths=12-8"
    a, b = (run.result["small_test_accuracy"] for _, run in runs[:2])
    mean, deviation = table[0]["small_test_accuracy"]
    assert mean == pytest.approx((a + b) / 2)
    assert deviation == pytest.approx(abs(a - b) / 2**0.5)
    assert sum(table[1]["left"][0]) == pytest.approx(10)
    text = markdown(table)
    assert text.count("\n") == 3
    assert "| sgd widths=12-8 | 2 |" in text


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        rows((tmp_path,))
