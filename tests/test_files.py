"""Saved cuts come back, or say why not."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
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


def test_numpy_arrays_and_numbers_come_back_as_they_were(tmp_path):
    params = {"w": np.ones((2, 3), np.float64), "v": jnp.ones(3), "n": 3, "x": 0.5}
    axes = {"d": [sdp_jax.Member("w", 1), sdp_jax.Member("v", 0)]}
    cut = sdp_jax.Cut(sdp_jax.groups_from_axes(params, axes), ((0, 2),))
    files.save(tmp_path / "model", cut.take(params), cut)
    found, _ = files.load(tmp_path / "model")
    assert type(found["w"]) is np.ndarray and found["w"].dtype == np.float64
    assert (found["n"], found["x"]) == (3, 0.5)
    assert found["v"].sharding.device_set == {jax.local_devices()[0]}


def test_shardings_are_those_of_small_arrays(tmp_path):
    cut = half()
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P())
    small = jax.device_put(cut.take(PARAMS), sharding)
    files.save(tmp_path / "model", small, cut)
    found, _ = files.load(tmp_path / "model", small)
    assert {x.sharding for x in jax.tree.leaves(found)} == {sharding}
    found, _ = files.load(tmp_path / "model", PARAMS)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(found))


def test_the_dense_arrays_may_lie_on_another_mesh(tmp_path):
    cut = half()
    files.save(tmp_path / "model", cut.take(PARAMS), cut)
    width = next(iter(cut.widths.values()))
    for count, good in ((width, True), (6, False)):
        mesh = jax.make_mesh((count,), ("d",), devices=jax.devices()[:count])
        dense = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P()))
        split = jax.NamedSharding(mesh, jax.P("d"))
        dense["layer0"]["bias"] = jax.device_put(PARAMS["layer0"]["bias"], split)
        if good:
            found, _ = files.load(tmp_path / "model", dense)
            assert found["layer0"]["bias"].sharding == split
            chex.assert_trees_all_equal(found, cut.take(PARAMS))
        else:
            with pytest.raises(ValueError, match="6 does not divide"):
                files.load(tmp_path / "model", dense)


def test_bad_directories(tmp_path):
    cut = half()
    with pytest.raises(FileNotFoundError, match="holds no saved cut"):
        files.load(tmp_path)
    with pytest.raises(FileExistsError, match="choose another"):
        files.save(tmp_path, cut.take(PARAMS), cut)
    (tmp_path / "model.3f.part").mkdir()
    with pytest.raises(FileNotFoundError, match="model.3f.part beside it is left of"):
        files.load(tmp_path / "model")
    files.save(tmp_path / "model", cut.take(PARAMS), cut)
    with pytest.raises(ValueError, match="neither the dense nor the small"):
        files.load(tmp_path / "model", {"w": jnp.ones(3)})


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'sdp-jax\[save\]'"):
        files.load(tmp_path)
