import pytest

from experiments.benchmarks import update_cost
from experiments.benchmarks.update_cost import Config, main

NAMED = ("altsdp", "altsdp, momentum 0.9", "altsdp, after the ramp")


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("vgg16", NAMED),
        pytest.param("vgg16", (), marks=pytest.mark.study),
        pytest.param("vit_b", NAMED, marks=pytest.mark.study),
    ],
    ids=str,
)
def test_prints_the_ratios_last(network, names, capsys):
    narrower = 16 if network == "vgg16" else 4
    config = Config(network=network, names=names, repeats=2, narrower=narrower)
    ratios = main(config)
    assert ratios["sgd, momentum 0.9"] == 1.0
    assert len(ratios) == (len(names) + 1 if names else 8)
    lines = capsys.readouterr().out.strip().splitlines()
    last = lines[-1]
    # Copies of the parameters beyond those of SGD with momentum, small arrays included.
    copies = {line[:24].strip(): float(line.split()[-1]) for line in lines[2:-1]}
    assert copies["altsdp"] < 0.1
    assert copies["altsdp, momentum 0.9"] < 1.1
    # What the ranking needs, whether it takes place or not.
    assert copies["altsdp, after the ramp"] < 1.1
    assert last.startswith("ratio to sgd with momentum: altsdp ")
    assert f"altsdp {ratios['altsdp']:.2f};" in last


def test_the_groups_of_both_networks():
    _, groups = update_cost.shapes_and_groups("vgg16")
    assert len(groups) == 14
    _, groups = update_cost.shapes_and_groups("vit_b", 4)
    assert groups.flops is not None and len(groups) >= 12
