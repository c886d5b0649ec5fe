import math

import pytest

from experiments.config import Config
from experiments.pqi import plot, traces
from experiments.train import train


def test_trace_of_a_run(tmp_path):
    config = Config(widths=(12, 8), epochs=2, batch_size=256, sparsity=0.5, stop_rise=9)
    path = tmp_path / "run"
    run = train(Config(**vars(config) | {"out": path}))
    found = traces((path,))
    assert [r["epoch"] for r in found["run"]] == [1, 2]
    assert sum(run.result["widths"].values()) == 10  # It never stopped.
    for record in run.epochs:
        assert all(0 < v < 1 and math.isfinite(v) for v in record["pq_index"].values())
    plot(found, tmp_path / "pqi.png")
    assert (tmp_path / "pqi.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"holds no run of experiments\.train"):
        traces((tmp_path,))
