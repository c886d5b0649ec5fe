"""Certificates on paper: verdicts, JSON."""

import dataclasses

import numpy as np
import pytest

import sdp_jax


def certificate(gap=0.01, line=0.02, curve=0.0, **changed):
    places = np.linspace(0, 1, 3)

    def path(barrier):
        loss = np.asarray([0.1, 0.1 + gap / 2 + barrier, 0.1 + gap])
        return sdp_jax.valley.PathLoss(places, {"loss": loss}, {})

    found = sdp_jax.valley.Certificate(
        reference={"train": {"loss": 0.1}, "test": {"loss": 0.2, "accuracy": 0.9}},
        pruned={"train": {"loss": 0.1 + gap}, "test": {"loss": 0.3, "accuracy": 0.8}},
        sparsity=0.25,
        line=path(line),
        curve=path(curve),
        displacements={
            "pruned": sdp_jax.valley.Displacement(2.0, 0.01, 1e-4, {"loss": 0.1 + gap}),
            "random": sdp_jax.valley.Displacement(2.0, 0.05, 1e-2, {"loss": 1.5}),
        },
        eigenvalues=np.asarray([5.0, 2.0]),
        eigenvalue_errors=np.asarray([0.1, 0.2]),
        density=sdp_jax.valley.SpectralDensity(
            np.ones((1, 2)), np.full((1, 2), 0.5), 9
        ),
        tolerance=0.05,
        same_seed=True,
        histories={"SGD": [1.0, 0.1], "AltSDP": [1.0, 0.2]},
    )
    return dataclasses.replace(found, **changed)


@pytest.mark.parametrize(
    "gap,line,curve,in_valley,connected,verdict",
    [
        (0.01, 0.02, 0.0, True, True, "In the valley"),
        (-0.3, 0.0, 0.0, True, True, "In the valley"),
        (0.06, 0.02, 0.0, False, False, "0.0600 higher, more than 0.0500"),
        (0.01, 0.5, 0.01, False, True, "a curve leads around it"),
        (0.01, 0.5, 0.3, False, False, "one of 0.3000 on the curve"),
        # A badly trained curve is no worse than the line.
        (0.01, 0.02, 0.3, True, True, "In the valley"),
    ],
)
def test_verdicts(gap, line, curve, in_valley, connected, verdict):
    found = certificate(gap, line, curve)
    assert found.gap == pytest.approx(gap)
    assert (found.in_valley, found.connected) == (in_valley, connected)
    assert verdict in found.verdict
    assert found.verdict in str(found)


def test_a_loss_that_is_no_number_is_a_wall():
    broken = sdp_jax.valley.PathLoss(
        np.linspace(0, 1, 3), {"loss": np.asarray([0, np.nan, 0])}, {}
    )
    found = certificate()
    assert dataclasses.replace(found, line=broken).line.barrier == np.inf
    assert not dataclasses.replace(found, line=broken).in_valley
    assert dataclasses.replace(found, line=broken).connected
    assert not dataclasses.replace(found, line=broken, curve=broken).connected


def test_summary_has_every_number():
    text = certificate().summary()
    for part in ("train loss", "test accuracy", "25.0%", "pruned", "random", "5 to 2"):
        assert part in text
    assert "seed" not in text
    assert "do not share a seed" in certificate(same_seed=False).summary()


def test_json_and_back():
    for found in (certificate(), certificate(density=None, sparsity=None)):
        again = sdp_jax.valley.Certificate.from_json(found.to_json())
        assert again.summary() == found.summary()
        assert again.to_json() == found.to_json()
        assert isinstance(again.eigenvalues, np.ndarray)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"verdict": 1, "in_valley": 2}'])
def test_what_is_no_certificate_is_refused(text):
    with pytest.raises(ValueError, match="not a certificate in JSON"):
        sdp_jax.valley.Certificate.from_json(text)
