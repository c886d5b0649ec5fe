"""Saved cuts come back, or say why not."""

import sys

import chex
import jax
import jax.numpy as jnp
import pytest

import sdp_jax
from sdp_jax import files
from tests import toy

PARAMS = toy.mlp_params()
GROUPS = toy.mlp_groups(PARAMS)


def half():
    scores = sdp_jax.channel_norms(GROUPS, PARAMS)
    return sdp_jax.plan_cut(GROUPS, PARAMS, scores=scores, sparsity=0.5)


def test_round_trip(tmp_path):
    cut = half()
    small = cut.take(PARAMS)
    files.save(tmp_path / "deep" / "model", small, cut)
    for like in (None, PARAMS, jax.eval_shape(lambda: small)):
        params, again = files.load(tmp_path / "deep" / "model", like)
        assert again == cut
        chex.assert_trees_all_equal(params, small)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    cut = half()
    with pytest.raises(ValueError, match="not the parameters of the cut"):
        files.save(tmp_path / "model", PARAMS, cut)
    monkeypatch.setattr(sdp_jax.Cut, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.save(tmp_path / "model", cut.take(PARAMS), cut)
    assert not list(tmp_path.iterdir())


def test_bad_directories(tmp_path):
    cut = half()
    with pytest.raises(FileNotFoundError, match="holds no saved cut"):
        files.load(tmp_path)
    with pytest.raises(FileExistsError, match="choose another"):
        files.save(tmp_path, cut.take(PARAMS), cut)
    files.save(tmp_path / "model", cut.take(PARAMS), cut)
    with pytest.raises(ValueError, match="neither the dense nor the small"):
        files.load(tmp_path / "model", {"w": jnp.ones(3)})


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'sdp-jax\[save\]'"):
        files.load(tmp_path)
