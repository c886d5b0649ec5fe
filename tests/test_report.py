"""The report says what was counted, timed and compared."""

import dataclasses

import jax.numpy as jnp
import pytest

import sdp_jax
from sdp_jax import methods
from sdp_jax.measure import Timing
from tests import toy

X = toy.batch()[0]


@pytest.fixture(scope="module")
def pruned():
    params = toy.mlp_params(widths=(4, 8, 3))
    return sdp_jax.prune(
        toy.mlp_apply, params, X, scores=methods.l2_norm(), sparsity=0.5
    )


@pytest.fixture(scope="module")
def uneven():
    params = toy.mlp_params(widths=(4, 8, 3))
    return sdp_jax.prune(
        toy.mlp_apply, params, X, scores=methods.l2_norm(), sparsity=0.25
    )


def test_its_numbers_are_those_of_cost_and_cut(pruned):
    report = pruned.report(X, repeats=1)
    dense = sdp_jax.cost(toy.mlp_apply, pruned.fill(), X)
    small = sdp_jax.cost(pruned.apply, pruned.params, X)
    assert (report.dense.flops, report.small.flops) == (dense.flops, small.flops)
    # 4 → 8 → 3 becomes 4 → 4 → 3.
    assert (report.dense.parameters, report.small.parameters) == (67, 35)
    text = str(report)
    assert "layer0" in text and "50.0%" in text and "microseconds" in text


@pytest.mark.parametrize(
    ("ratio", "low", "high", "said"),
    [(0.9, 0.7, 1.1, "no faster"), (1.3, 1.2, 1.4, "slower"), (0.6, 0.5, 0.99, None)],
)
def test_it_says_when_nothing_was_gained(uneven, ratio, low, high, said):
    report = uneven.report(X, repeats=1)
    timed = dataclasses.replace(report, small_time=Timing(1e-3, ratio, low, high))
    *lines, before, last = str(timed).splitlines()
    assert not any("here:" in line for line in [*lines, before])
    if said is None:
        assert last.startswith("largest difference")
    else:
        assert last == (
            f"the small function is {said} here: a width of 6 may be slow on this "
            'device; prune(..., round_to="fast") leaves widths that are fast'
        )


def test_widths_that_are_even_are_not_to_blame(pruned):
    report = pruned.report(X, repeats=1)
    slow = dataclasses.replace(report, small_time=Timing(1e-3, 1.3, 1.2, 1.4))
    assert str(slow).splitlines()[-1] == (
        "the small function is slower here: the model may be too small for its FLOPs "
        "to matter"
    )


def test_the_time_left_is_told_with_its_interval(pruned):
    report = pruned.report(X, repeats=1)
    fast = dataclasses.replace(report, small_time=Timing(1e-3, 0.61, 0.55, 0.66))
    assert "61.0%, between 55.0% and 66.0%" in str(fast)


def test_without_inputs_it_counts(pruned):
    report = pruned.report()
    assert report.dense is None and str(report) == pruned.cut.summary()
    assert "FLOPs" in str(report)


def test_bad_input(pruned):
    with pytest.raises(ValueError, match="at least one round"):
        pruned.report(X, repeats=0)
    with pytest.raises(TypeError, match="shape"):
        pruned.report(jnp.ones((2, 5)))
