from experiments.benchmarks.valley_cost import Config, main


def test_counts_memory_and_products(capsys):
    only = ("svd, bfloat16",)
    sketches, growth = main(
        Config(repeats=1, narrower=32, rank=2, examples=40, only=only)
    )
    copies = {name: row[2] for name, row in sketches.items()}
    assert copies["altsdp"] == 0
    # Half of the rank, and three more: dual, correction, shrinkage.
    assert abs(copies["svd, bfloat16"] - 4) < 0.1
    assert 1 < growth["rank"] < 4
    assert "twice the rank" in capsys.readouterr().out
