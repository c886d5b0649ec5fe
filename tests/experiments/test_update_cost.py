from experiments.benchmarks.update_cost import Config, main


def test_prints_the_ratio_last(capsys):
    ratios = main(Config(repeats=2, narrower=16))
    assert ratios["sgd, momentum 0.9"] == 1.0
    lines = capsys.readouterr().out.strip().splitlines()
    last = lines[-1]
    # Copies of the parameters beyond those of SGD with momentum, small arrays included.
    copies = {line[:24].strip(): float(line.split()[-1]) for line in lines[2:-1]}
    assert copies["altsdp"] < 0.1
    assert copies["altsdp, momentum 0.9"] < 1.1
    assert last.startswith("ratio to sgd with momentum: altsdp ")
    assert f"{ratios['altsdp']:.2f}" in last
