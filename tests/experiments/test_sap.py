import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments import sap
from experiments.sap import Config, main, turns

ROOT = pathlib.Path(__file__).parents[2]
TINY = Config(widths=(12, 8), rounds=3, epochs=2, batch_size=128, p=0.5, q=1.0, eta=0.1)


class Killed(Exception):
    pass


def strip(results):
    """Without what the clock says."""
    return {
        name: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
        for name, records in results["methods"].items()
    }


@pytest.mark.study
def test_a_run_and_one_that_was_killed(tmp_path, capsys):
    whole = main(dataclasses.replace(TINY, out=tmp_path / "whole"))
    for name, records in whole["methods"].items():
        assert [r["round"] for r in records] == [0, 1, 2, 3]
        kept = [r["kept"] for r in records]
        assert kept[0] == 1 and kept[-1] < 1 and all(np.diff(kept) <= 0)
        assert records[-1]["pruned_index"] is None
        assert set(records[0]["pruned_index"]) == {"0.5,1", "1,2"}
        for record in records:
            assert all(0 <= v < 1 for v in record["index"].values())
        # Removing the smallest makes what is left more even.
        if name != "sap_channels":
            for a in records[:-1]:
                assert a["pruned_index"]["1,2"] < a["index"]["1,2"]
    ticket = [r["kept"] for r in whole["methods"]["lottery_ticket"]]
    np.testing.assert_allclose(ticket, 0.8 ** np.arange(4), atol=2e-3)
    assert (tmp_path / "whole" / "digits.png").stat().st_size > 10_000
    assert "one_shot  3" in capsys.readouterr().out

    both = ("sap_channels", "one_shot")
    config = dataclasses.replace(TINY, out=tmp_path / "killed", methods=both)
    for method in both:
        seen = []

        def kill(record, method=method, seen=seen):
            seen.append(record)
            if len(seen) == 2:
                raise Killed

        with pytest.raises(Killed):
            main(dataclasses.replace(config, methods=(method,)), kill)
    again = main(config)
    assert strip(again) == {k: v for k, v in strip(whole).items() if k in both}
    # A loop that is done is not trained again.
    seconds = [r["seconds"] for r in again["methods"]["one_shot"]]
    rerun = main(config)
    assert [r["seconds"] for r in rerun["methods"]["one_shot"]] == seconds
    with pytest.raises(ValueError, match=r"another configuration.*sparsity"):
        main(dataclasses.replace(config, sparsity=0.3))


def test_turns():
    assert turns([5.0, 3.0, 1.0, 2.0, 4.0, 0.0, 1.0]) == (2, 4)
    assert turns([3.0, 2.0, 1.0]) == (0, 0)
    assert turns([1.0, 2.0]) == (0, 1)


@pytest.mark.parametrize(
    ("method", "least"), [("sap", 0), ("lottery_ticket", 0.002), ("one_shot", 0)]
)
@pytest.mark.parametrize("series", ["index", "pruned_index"])
def test_the_index_falls_rises_and_falls(method, least, series):
    """The paper's finding, on the stored run.

    Of the lottery ticket the last rounds, with less than 0.2 % of the weights, are left
    out: the index of so few retrained weights jumps up and down.
    """
    stored = json.loads((ROOT / "docs" / "sap" / "mnist.json").read_text())
    records = stored["methods"][method]
    records = [r for r in records if r["weights"] >= least]
    values = [r[series]["1,2"] for r in records if r[series] is not None]
    valley, peak = turns(values)
    assert 3 <= valley < peak - 2 and peak < len(values) - 1
    assert values[valley] < 0.7 * values[0]
    assert values[peak] > 1.04 * values[valley]
    assert values[-1] < 0.75 * values[peak]
    # It rises once the network no longer fits as well as before.
    loss = [r["train_loss"] for r in records]
    assert min(loss) < loss[0] and np.argmin(loss) <= valley + 1
    assert records[peak]["test_accuracy"] < max(r["test_accuracy"] for r in records)


def test_the_stored_run_is_that_of_the_defaults():
    stored = json.loads((ROOT / "docs" / "sap" / "mnist.json").read_text())
    assert stored["config"] == Config(dataset="mnist").key()
    assert list(stored["methods"]) == list(sap.METHODS)
    assert sap.rounded(stored) == stored
