from experiments.benchmarks.valley_cost import Config, main


def test_counts_memory_and_products(capsys):
    only = ("svd", "svd, bfloat16")
    sketches, growth = main(
        Config(repeats=2, narrower=16, rank=4, examples=100, only=only)
    )
    copies = {name: row[2] for name, row in sketches.items()}
    assert copies["altsdp"] == 0
    # Rank and three more: dual, correction, shrinkage; half of the rank in bfloat16.
    assert abs(copies["svd"] - 7) < 0.1
    assert abs(copies["svd, bfloat16"] - 5) < 0.1
    # Within a step the narrow directions are not held in float32 all at once.
    assert sketches["svd, bfloat16"][3] < sketches["svd"][3] + 5
    assert 1 < growth["rank"] < 4
    assert "twice the rank" in capsys.readouterr().out
