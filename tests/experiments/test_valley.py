import dataclasses

import jax
import pytest

import sdp_jax
from experiments.config import Config
from experiments.train import train
from experiments.valley import Valley, main, prune_to, sparsity_of
from tests import toy
from tests.valley.test_certificate import certificate


def test_prunes_the_smallest():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    pruned = prune_to(groups, params, 0.5)
    assert sparsity_of(groups, pruned) == pytest.approx(round(0.5 * 11) / 11)
    norms = jax.device_get(sdp_jax.channel_norms(groups, params))
    alive = jax.device_get(sdp_jax.channels_alive(groups, pruned))
    assert max(norms[~alive]) <= min(norms[alive])


@pytest.mark.study
def test_compares_all_ways(tmp_path, capsys, monkeypatch):
    def quick(loss_fn, reference, params, batches, *, groups, same_seed, **keywords):
        assert keywords["eigenpairs"].values.shape == (1,)
        return certificate(
            sparsity=sparsity_of(groups, params),
            same_seed=same_seed,
        )

    # What it certifies is tested beside it.
    monkeypatch.setattr(sdp_jax.valley, "certify", quick)
    config = Config(widths=(12, 8), epochs=1, batch_size=256)
    for name, changed in {
        "sgd": {"method": "sgd"},
        "altsdp": {"sparsity": 0.3},
        "prox": {"method": "prox_sgd", "penalty": 0.001},
        "other": {"method": "sgd", "seed": 1},
    }.items():
        train(dataclasses.replace(config, out=tmp_path / name, **changed))
    options = Valley(
        reference=tmp_path / "sgd",
        pruned=(tmp_path / "altsdp", tmp_path / "prox"),
        other=tmp_path / "other",
        far=0.7,
        examples=200,
        curvature_examples=100,
        rank=1,
        sdp_rank=2,
        points=3,
        curve_steps=2,
        out=tmp_path / "out",
    )
    found = main(options)
    assert list(found) == [
        "altsdp, full",
        "prox_sgd, then magnitude",
        "magnitude",
        "one-shot SDP, exact",
        "one-shot SDP, exact, restored",
        "one-shot SDP, first order",
        "one-shot SDP, first order, restored",
        "one-shot SDP, restored, 70%",
        "SGD, another seed",
    ]
    for name in list(found)[:7]:
        assert found[name].sparsity == pytest.approx(0.3)
    assert not found["SGD, another seed"].same_seed
    table = capsys.readouterr().out
    assert table.count("| no |") + table.count("| yes |") == 9
    # What is written is not computed again.
    (tmp_path / "out/magnitude.json").write_text(
        dataclasses.replace(found["magnitude"], sparsity=0.123).to_json()
    )
    assert main(options)["magnitude"].sparsity == 0.123
    with pytest.raises(ValueError, match="made with other options"):
        main(dataclasses.replace(options, points=4))
    for changed, message in (
        ({"pruned": (tmp_path / "other",)}, "pruned runs need the same"),
        ({"other": tmp_path / "prox"}, "the other run another"),
    ):
        with pytest.raises(ValueError, match=message):
            main(dataclasses.replace(options, **changed, out=tmp_path / message))


def test_needs_a_pruned_run(tmp_path):
    with pytest.raises(ValueError, match="at least one run that pruned"):
        main(Valley(reference=tmp_path, pruned=()))
