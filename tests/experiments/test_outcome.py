import dataclasses

import jax
import numpy as np
import pytest

import sdp_jax
from experiments import data, outcome
from experiments.config import Config
from experiments.outcome import make_watch
from experiments.train import make_setup

CONFIG = Config(method="sgd", widths=(6, 5))
DATASET = data.synthetic("digits", count=40)


@pytest.fixture(scope="module")
def pruned():
    """A network of which some channels are zero, its groups and variables."""
    made = make_setup(CONFIG, DATASET, 10)
    params = jax.tree.map(lambda x: np.array(x) + 0.25, made.state.params)
    for layer, gone in {"dense0": [1], "dense1": [0, 4]}.items():
        params[layer]["kernel"][:, gone] = 0
        params[layer]["bias"][gone] = 0
    return made.model, made.groups, {"params": params}


def index_of(x, p=0.5, q=1.0):
    x = np.abs(np.asarray(x, np.float64))
    norms = [np.sum(x**e) ** (1 / e) for e in (p, q)]
    return 1 - len(x) ** (1 / q - 1 / p) * norms[0] / norms[1]


def test_a_record_counts_channels_and_how_sparse_they_are(pruned):
    _, groups, variables = pruned
    record = make_watch(groups)(variables)
    assert record["channels"] == {"dense0": 5, "dense1": 3}
    params = variables["params"]
    every = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    assert record["pq_index"]["weights"] == pytest.approx(index_of(every), rel=1e-4)
    # Of the channels that are left.
    norms = np.concatenate(
        [
            np.sqrt((params[k]["kernel"] ** 2).sum(0) + params[k]["bias"] ** 2)
            for k in ("dense0", "dense1")
        ]
    )
    expected = index_of(norms[norms > 0])
    assert record["pq_index"]["norms"] == pytest.approx(expected, rel=1e-3)


def test_the_result_of_a_run(pruned):
    model, groups, variables = pruned
    result = outcome.outcome(CONFIG, model, groups, variables, DATASET)
    assert result["widths"] == {"dense0": 5, "dense1": 3}
    assert result["dense_widths"] == {"dense0": 6, "dense1": 5}
    assert result["parameters"] == 65 * 6 + 7 * 5 + 6 * 10
    assert result["small_parameters"] == 65 * 5 + 6 * 3 + 4 * 10
    ratio = result["small_flops"] / result["flops"]
    assert ratio == pytest.approx((64 * 5 + 5 * 3 + 30) / (64 * 6 + 30 + 50), rel=0.05)
    # The network in NumPy.
    x = DATASET.test.images.reshape(40, -1).astype(np.float64)
    for name in ("dense0", "dense1", "head"):
        layer = variables["params"][name]
        x = x @ layer["kernel"] + layer["bias"]
        x = x if name == "head" else np.maximum(x, 0)
    rows = np.log(np.exp(x).sum(-1)) - x[np.arange(40), DATASET.test.labels]
    for name in ("test_loss", "small_test_loss"):
        assert result[name] == pytest.approx(rows.mean(), rel=1e-4)
    right = np.mean(x.argmax(-1) == DATASET.test.labels)
    assert result["test_accuracy"] == result["small_test_accuracy"] == right
    assert result["largest_difference"] < 1e-4
    assert "milliseconds" not in result


def test_a_timed_run_says_how_long_both_take(pruned):
    model, groups, variables = pruned
    config = dataclasses.replace(CONFIG, timed=True)
    result = outcome.outcome(config, model, groups, variables, DATASET)
    assert result["milliseconds"] > 0 and result["small_milliseconds"] > 0


@pytest.mark.parametrize(
    ("compute", "error", "refused"),
    [
        ("float32", 1e-5, False),
        ("float32", 0.02, True),
        ("bfloat16", 0.02, False),
        ("bfloat16", 0.3, True),
        ("float32", float("nan"), True),
    ],
)
def test_a_small_network_that_computes_something_else_is_refused(
    compute, error, refused, pruned, monkeypatch
):
    model, groups, variables = pruned
    narrow = sdp_jax.narrow

    def worse(fn, cut):
        small = narrow(fn, cut)
        return lambda *args: small(*args) * (1 + error)

    monkeypatch.setattr(sdp_jax, "narrow", worse)
    config = dataclasses.replace(CONFIG, compute=compute)
    if not refused:
        outcome.outcome(config, model, groups, variables, DATASET)
        return
    with pytest.raises(AssertionError, match="differs from the dense one by"):
        outcome.outcome(config, model, groups, variables, DATASET)
