import pytest

from experiments.benchmarks.train_step import TrainStep, main


def test_times_methods_in_turns(capsys):
    options = TrainStep(
        row="dnn-mnist",
        methods=("sgd", "altsdp"),
        widths=(6, 4),
        batch_size=8,
        repeats=3,
        peak=1.0,
    )
    found = main(options)
    assert found["sgd"]["ratio"] == 1.0 and found["altsdp"]["ratio"] > 0
    one = found["altsdp"]
    assert one["images_per_second"] == pytest.approx(8e3 / one["milliseconds"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["sgd", "altsdp"]
    assert lines[2].endswith("%")


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match="'x-sgd'; rows are .'dnn-mnist'"):
        main(TrainStep(row="x"))
