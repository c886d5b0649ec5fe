import jax
import pytest

from experiments.benchmarks import update_cost
from experiments.benchmarks.valley_cost import Config, chains, main


def test_what_a_sketch_holds_between_steps():
    shapes, groups = update_cost.shapes_and_groups("vgg16", 32)
    params = update_cost.random_params(0, "float32", shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    held = {}
    for name, tx in chains(groups, 2).items():
        state = jax.tree.leaves(jax.eval_shape(tx.init, params))
        held[name] = sum(x.size * x.dtype.itemsize for x in state) / size
    copies = {name: value - held["altsdp"] for name, value in held.items()}
    assert copies.pop("altsdp") == 0 and len(copies) == 6
    # Half of the rank, and three more: dual, correction, shrinkage.
    assert copies.pop("svd, bfloat16") == pytest.approx(4, abs=0.1)
    for value in copies.values():
        assert value == pytest.approx(5, abs=0.1)


@pytest.mark.study
def test_counts_memory_and_products(capsys):
    only = ("svd, bfloat16",)
    sketches, growth = main(
        Config(repeats=1, narrower=32, rank=2, examples=40, only=only)
    )
    copies = {name: row[2] for name, row in sketches.items()}
    assert copies["altsdp"] == 0
    assert abs(copies["svd, bfloat16"] - 4) < 0.1
    assert 1 < growth["rank"] < 4
    assert "twice the rank" in capsys.readouterr().out
