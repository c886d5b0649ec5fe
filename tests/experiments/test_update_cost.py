import pytest

from experiments.benchmarks import update_cost
from experiments.benchmarks.update_cost import Config, main

# Those that the last line is about; all of them as a study.
NAMED = ("sgd, momentum 0.9", "altsdp", "altsdp, momentum 0.9")


@pytest.mark.parametrize(
    "names", [NAMED, pytest.param(None, marks=pytest.mark.study)], ids=str
)
def test_prints_the_ratio_last(names, capsys, monkeypatch):
    every = update_cost.optimizers

    def some(*args):
        return {k: tx for k, tx in every(*args).items() if not names or k in names}

    monkeypatch.setattr(update_cost, "optimizers", some)
    ratios = main(Config(repeats=2, narrower=16))
    assert ratios["sgd, momentum 0.9"] == 1.0
    assert len(ratios) == (len(names) if names else 8)
    lines = capsys.readouterr().out.strip().splitlines()
    last = lines[-1]
    # Copies of the parameters beyond those of SGD with momentum, small arrays included.
    copies = {line[:24].strip(): float(line.split()[-1]) for line in lines[2:-1]}
    assert copies["altsdp"] < 0.1
    assert copies["altsdp, momentum 0.9"] < 1.1
    assert last.startswith("ratio to sgd with momentum: altsdp ")
    assert f"{ratios['altsdp']:.2f}" in last
