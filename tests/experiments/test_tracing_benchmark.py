import math

from experiments.benchmarks.tracing import Config, main


def test_all_columns_are_filled(capsys):
    figures = main(Config(repeats=1, image=32, layers=2, full=False))
    assert set(figures) == {
        "ResNet-50",
        "DenseNet-121",
        "ViT-S/16",
        "ViT-B/16",
        "decoder",
    }
    # Differences of two times may come out negative on a busy machine.
    values = [value for key in figures for value in figures[key].values()]
    assert len(values) > 15 and all(map(math.isfinite, values))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 6 and lines[-1].startswith("decoder, 2 layers")
