import dataclasses
import json
import pathlib
import re
import shlex

import pytest

from experiments import results, train
from experiments.configs import CONFIGS, ROWS, VARIANTS

ROOT = pathlib.Path(__file__).parents[2]


def fabricate(directory, name, *, seed=0, accuracy=0.9, changed=None, header=None):
    """A run directory as training leaves it, with the numbers that a test needs."""
    config = CONFIGS[name].key() | {"seed": seed} | (changed or {})
    first = {
        "config": config,
        "versions": {"jax": "0.10.2", "sdp_jax": "0.1.0"},
        "device": "cpu cpu",
        "cores": 2,
        "commit": "aaaaaaa",
    } | (header or {})
    lines = [{k: v for k, v in first.items() if v is not ...}]
    for epoch in range(1, config["epochs"] + 1):
        lines.append({"epoch": epoch, "channels": {"dense": 5}, "seconds": 2.0})
    lines[-1]["train_loss"] = 0.01 * (seed + 1)
    dense = config["method"] == "sgd"
    lines.append(
        {
            "test_accuracy": 0.123,
            "small_test_accuracy": accuracy,
            "widths": {"dense": 5},
            "parameters": 1000,
            "small_parameters": 1000 if dense else 400,
            "flops": 8000,
            "small_flops": 8000 if dense else 2000,
            "milliseconds": 4.0,
            "small_milliseconds": 4.0 if dense else 1.5,
        }
    )
    directory.mkdir(parents=True)
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def make_runs(tmp_path, runs):
    """Run directories by name; values are the arguments of ``fabricate``."""
    found = []
    for directory, options in runs.items():
        name, seed = re.fullmatch(r"(.+)-seed(\d+).*", directory).groups()
        run = tmp_path / "runs" / directory
        found.append(fabricate(run, name, seed=int(seed), **options))
    return tuple(found)


def make_records(tmp_path, runs):
    """The records of fabricated runs, collected and read."""
    out = tmp_path / "kept"
    results.collect(results.Collect(make_runs(tmp_path, runs), out))
    return results.read(out)


def cells(text, row):
    """The lines of the table of a row."""
    section = text.split(f"## {results.TITLES[row]}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_a_run_of_train_is_collected(tmp_path):
    config = dataclasses.replace(
        CONFIGS["dnn-mnist-sgd"],
        dataset="digits",
        widths=(12, 8),
        epochs=2,
        evaluate_every=2,
        batch_size=256,
        seed=3,
        out=tmp_path / "dnn-mnist-sgd-seed3-tiny",
    )
    run = train.train(config)
    (path,) = results.collect(results.Collect((config.directory(),), tmp_path / "kept"))
    kept = json.loads(path.read_text())
    assert path.name == "dnn-mnist-sgd-seed3-tiny.json"
    assert kept["config"] == config.key() and kept["result"] == run.result
    assert kept["last"]["train_loss"] == run.epochs[-1]["train_loss"]
    assert "channels" not in kept["last"]
    assert kept["seconds"] == pytest.approx(sum(r["seconds"] for r in run.epochs))
    assert (kept["epochs"], kept["seed"]) == (2, 3)
    assert kept["device"].startswith("cpu") and kept["cores"] >= 1
    assert kept["command"] == (
        "python -m experiments.train dnn-mnist-sgd --seed 3 --dataset digits "
        "--widths 12 8 --epochs 2 --batch-size 256 --evaluate-every 2 "
        "--out runs/dnn-mnist-sgd-seed3-tiny"
    )
    (line,) = results.rows(results.read(tmp_path / "kept"))
    assert line["accuracy"] == (100 * run.result["small_test_accuracy"], None)
    assert line["flops_left"] == line["parameters_left"] == (100, None)


@pytest.mark.parametrize(
    ("directory", "changed"),
    [
        ("lenet-mnist-altsdp-seed5", {}),
        ("resnet20_narrow-cifar10-l2-seed0", {"widths": [], "sparsity": None}),
        (
            "vgg_small-cifar10-otov2-seed11-slow",
            {"learning_rate": 1e-5, "release_rate": 0.0, "schedule": "step"},
        ),
    ],
)
def test_the_command_of_a_record_names_its_run(tmp_path, directory, changed):
    (run,) = make_runs(tmp_path, {directory: {"changed": changed}})
    kept = results.record(run)
    config = train.parse(shlex.split(kept["command"])[3:])
    assert config.key() == kept["config"] and config.timed
    assert config.directory() == pathlib.Path("runs") / directory


def test_means_deviations_and_differences(tmp_path):
    records = make_records(
        tmp_path,
        {
            "lenet-mnist-sgd-seed0": {"accuracy": 0.98},
            "lenet-mnist-sgd-seed1": {"accuracy": 0.96},
            "lenet-mnist-altsdp-seed0": {"accuracy": 0.97},
            "lenet-mnist-altsdp-seed1": {"accuracy": 0.98},
            "lenet-mnist-altsdp-seed2": {"accuracy": 0.93},
            "lenet-mnist-l2-seed7": {"accuracy": 0.95},
        },
    )
    altsdp, sgd, l2 = results.rows(records)
    # 97, 98 and 93 lie 1, 2 and 3 from 96: the variance is (1 + 4 + 9) / 2.
    assert altsdp["accuracy"] == pytest.approx((96, 7**0.5))
    # 0.01, 0.02 and 0.03.
    assert altsdp["train_loss"] == pytest.approx((0.02, 0.01))
    # -1 and 2 points.
    assert altsdp["difference"] == pytest.approx((0.5, 4.5**0.5))
    assert altsdp["difference_seeds"] == [0, 1]
    assert sgd["accuracy"] == pytest.approx((97, 2**0.5))
    assert sgd["difference"] is l2["difference"] is l2["accuracy"][1] is None

    def links(method, *seeds):
        file = f"docs/results/lenet-mnist-{method}-seed"
        return ", ".join(f"[{k}]({file}{k}.json)" for k in seeds)

    text = results.markdown(records)
    assert cells(text, "lenet-mnist") == [
        ["altsdp", links("altsdp", 0, 1, 2), "96.00 ± 2.65", "0.0200 ± 0.0100"]
        + ["25.0", "40.0", "4.00 → 1.50", "+0.50 ± 2.12 (seeds 0, 1)", "8"],
        ["sgd", links("sgd", 0, 1), "97.00 ± 1.41", "0.0150 ± 0.0071"]
        + ["100.0", "100.0", "4.00 → 4.00", "", "8"],
        ["l2", links("l2", 7), "95.00", "0.0800", "25.0", "40.0", "4.00 → 1.50"]
        + ["–", "8"],
    ]
    assert "cpu cpu, 2 cores; jax 0.10.2, sdp_jax 0.1.0; commit aaaaaaa:\n" in text
    command = "python -m experiments.train lenet-mnist-"
    assert f"\n{command}altsdp --seed 0  # also 1, 2\n" in text
    assert f"\n{command}l2 --seed 7\n" in text
    lacking = ("depgraph", "gradual", "otov2")
    missing = ", ".join(f"`{command}{m} --seed 0`" for m in lacking)
    assert f"\nNot run: {missing}.\n" in text


def test_what_is_not_the_same_is_not_averaged(tmp_path):
    gpu = {"header": {"device": "gpu H100"}}
    records = make_records(
        tmp_path,
        {
            "lenet-mnist-sgd-seed0": {"accuracy": 0.9},
            "lenet-mnist-sgd-seed0-gpu": {"accuracy": 0.8, **gpu},
            "lenet-mnist-l2-seed0": {"accuracy": 0.7},
            "lenet-mnist-l2-seed1": {"header": {"commit": "bbbbbbb"}},
            "lenet-mnist-l2-seed0-gpu": {"accuracy": 0.7, **gpu},
            "lenet-mnist-l2-seed0-big": {"header": {"cores": 16}},
            "lenet-mnist-l2-seed0-old": {"header": {"versions": {"jax": "0.8.0"}}},
            "lenet-mnist-l2-seed0-late": {"changed": {"end": 0.75}},
            "lenet-mnist-l2-seed0-fast": {"changed": {"learning_rate": 0.5}},
        },
    )
    text = results.markdown(records)
    found = {(line[0], line[7]) for line in cells(text, "lenet-mnist")}
    assert found == {
        ("sgd (1)", ""),
        ("sgd (2)", ""),
        # Each from the twin on its own hardware.
        ("l2 (1)", "−20.00"),
        ("l2 (2)", "−10.00"),
        ("l2 (3)", "–"),
        ("l2 (4)", "–"),
        ("l2 (5)", "–"),
        # What bears on pruning alone leaves the twin, the learning rate does not.
        ("l2, `--end 0.75` (1)", "+0.00"),
        ("l2, `--learning-rate 0.5` (1)", "–"),
    }
    marks = dict(re.findall(r"^\((\d)\) (.*):$", text, re.MULTILINE))
    assert len(marks) == 5
    assert marks["2"] == "gpu H100, 2 cores; jax 0.10.2, sdp_jax 0.1.0; commit aaaaaaa"
    assert {"jax 0.8.0", "commit bbbbbbb", "cpu cpu, 16 cores"} <= {
        part for mark in "345" for part in marks[mark].split("; ")
    }
    late = "python -m experiments.train lenet-mnist-l2 --seed 0 --end 0.75"
    assert f"\n{late} --out runs/lenet-mnist-l2-seed0-late\n" in text


def test_a_twin_of_another_commit_serves_if_it_is_the_only_one(tmp_path):
    other = {"header": {"commit": "bbbbbbb"}}
    runs = {
        "lenet-mnist-sgd-seed0": {"accuracy": 0.9, **other},
        "lenet-mnist-l2-seed0": {"accuracy": 0.8},
    }
    *_, l2 = results.rows(make_records(tmp_path / "one", runs))
    assert l2["difference"] == pytest.approx((-10, None))
    runs["lenet-mnist-sgd-seed0-b"] = {"header": {"commit": "ccccccc"}}
    *_, l2 = results.rows(make_records(tmp_path / "two", runs))
    assert l2["difference"] is None
    runs["lenet-mnist-sgd-seed0-c"] = {"accuracy": 0.7}
    *_, l2 = results.rows(make_records(tmp_path / "three", runs))
    assert l2["difference"] == pytest.approx((10, None))


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("vgg-mnist-sgd-seed0", {}, "it holds the run lenet-mnist-sgd-seed0: rename"),
        ("lenet-mnist-sgd", {}, "it holds the run lenet-mnist-sgd-seed0: rename"),
        ("lenet-mnist-sgd-seed1", {}, "does not name a configuration and the seed 0"),
        ("odd", {"changed": {"epochs": 3}}, "expected NAME-seed0 or NAME-seed0-LABEL"),
        ("lenet-mnist-sgd-seed0", {"header": {"cores": ...}}, "does not say its cores"),
        ("lenet-mnist-sgd-seed0", {"header": {"config": ...}}, "not say its config"),
        ("lenet-mnist-sgd-seed0", {"header": {"config": 3}}, "no configuration, but 3"),
        ("lenet-mnist-sgd-seed0", {"changed": {"beta": 1}}, "does not know: beta"),
    ],
)
def test_a_run_that_cannot_be_told_is_refused(tmp_path, directory, options, message):
    good = make_runs(tmp_path, {"lenet-mnist-l2-seed0": {}})
    bad = fabricate(tmp_path / "bad" / directory, "lenet-mnist-sgd", **options)
    with pytest.raises(ValueError, match=message):
        results.collect(results.Collect((*good, bad), tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "no finished run"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "no finished run"),
        (lambda lines: [], "no finished run"),
        (lambda lines: [*lines[:4], *lines[5:]], "records of 7 epochs, not of 8"),
        (
            lambda lines: [*lines[:-1], lines[-1].replace('"milli', '"centi')],
            "lacks milliseconds; .* with --timed",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_refused(tmp_path, change, message):
    run = fabricate(tmp_path / "lenet-mnist-sgd-seed0", "lenet-mnist-sgd")
    path = run / "metrics.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        results.record(run)
    path.unlink()
    with pytest.raises(ValueError, match="no finished run"):
        results.record(run)


def test_collecting_again_changes_nothing_and_replaces_nothing(tmp_path):
    kept = tmp_path / "kept"
    (run,) = make_runs(tmp_path, {"lenet-mnist-sgd-seed0": {}})
    (path,) = results.collect(results.Collect((run, run), kept))
    before = path.read_bytes()
    results.collect(results.Collect((run,), kept))
    assert path.read_bytes() == before and list(kept.iterdir()) == [path]
    other = fabricate(tmp_path / run.name, "lenet-mnist-sgd", accuracy=0.5)
    with pytest.raises(ValueError, match="holds another run than .*seed0-LABEL"):
        results.collect(results.Collect((other,), kept))
    with pytest.raises(ValueError, match="holds another run than"):
        results.collect(results.Collect((run, other), tmp_path / "new"))
    assert path.read_bytes() == before and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no run was given"):
        results.collect(results.Collect((), kept))


def test_the_commands(tmp_path, capsys):
    (run,) = make_runs(tmp_path, {"lenet-mnist-sgd-seed0": {}})
    kept, out = tmp_path / "kept", tmp_path / "RESULTS.md"
    writing = ["write", "--results", str(kept), "--out", str(out)]
    with pytest.raises(ValueError, match="nothing was collected"):
        results.main(results.parse(writing))
    assert not out.exists()
    results.main(results.parse(["collect", str(run), "--out", str(kept)]))
    results.main(results.parse(writing))
    files = [str(kept / "lenet-mnist-sgd-seed0.json"), str(out)]
    assert capsys.readouterr().out.split() == files
    before = out.read_bytes()
    results.main(results.parse(writing))
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "kept", "RESULTS.md"}
    assert "](kept/lenet-mnist-sgd-seed0.json)" in out.read_text()
    assert results.parse(["write"]) == results.Write(
        ROOT / "docs/results", ROOT / "RESULTS.md"
    )


def test_an_option_that_a_run_does_not_name_had_its_default(tmp_path):
    (run,) = make_runs(tmp_path, {"lenet-mnist-sgd-seed0": {}})
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace(', "stop_rise": null', ""))
    file = tmp_path / "kept" / "lenet-mnist-sgd-seed0.json"
    results.collect(results.Collect((run,), file.parent))
    assert json.loads(file.read_text())["config"]["stop_rise"] is None
    file.write_text(file.read_text().replace(', "warmup": 0.0', ""))
    (kept,) = results.read(file.parent)
    assert kept["config"] == CONFIGS["lenet-mnist-sgd"].key()


def spoil(kept, **changed):
    path = kept / "lenet-mnist-sgd-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: (kept / "x.json").write_text("{"), "x.json is not JSON"),
        (lambda kept: (kept / "x.json").write_text("[]"), "not made by .* collect"),
        (lambda kept: spoil(kept, extra=1), "not made by .* collect"),
        (lambda kept: spoil(kept, run="lenet-mnist-sgd-seed1"), "named by its run"),
        (lambda kept: spoil(kept, name="lenet-mnist-l2"), "its name says otherwise"),
        (lambda kept: spoil(kept, config={"seed": 1}), "does not name a configuration"),
        (lambda kept: spoil(kept, config={"beta": 1}), "does not know: beta"),
    ],
)
def test_files_changed_by_hand_are_refused(tmp_path, change, message):
    make_records(tmp_path, {"lenet-mnist-sgd-seed0": {}})
    change(tmp_path / "kept")
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path / "kept")


def test_the_same_run_twice_is_refused(tmp_path):
    runs = {"lenet-mnist-sgd-seed0": {}, "lenet-mnist-sgd-seed0-again": {}}
    with pytest.raises(ValueError, match="are the same run"):
        make_records(tmp_path, runs)


def test_every_row_has_a_section_and_published_numbers_have_a_source(tmp_path):
    runs = {"lenet-mnist-sgd-seed0": {}, "vgg19-cifar100-sgd-seed0": {}}
    text = results.markdown(make_records(tmp_path, runs))
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [results.TITLES[row] for row in ROWS]
    assert set(results.TITLES) == set(ROWS) and set(results.PUBLISHED) < set(ROWS)
    section = text.split("## VGG-16, CIFAR-10\n")[1].split("\n## ")[0]
    assert (
        "OTOv2 93.27 % at 26.6 % of the FLOPs and 5.0 % of the parameters "
        "([arXiv 2303.06862](https://arxiv.org/abs/2303.06862)); "
    ) in section
    assert "(no fine-tuning, sizes not stated; [arXiv 2107.05328]" in section
    assert "200 epochs on whole images, in bfloat16." in section
    for method in VARIANTS:
        assert f"`python -m experiments.train vgg16-cifar10-{method} --seed 0`" in text
    assert text.count("The row asks for an accelerator") == 5
    assert text.count("](https://arxiv.org/abs/") == sum(
        map(len, results.PUBLISHED.values())
    )


def test_the_results_here_are_what_their_files_say():
    records = results.read(ROOT / "docs/results")
    path = ROOT / "RESULTS.md"
    assert path.exists() == bool(records)
    if records:
        text = path.read_text()
        assert text == results.markdown(records)
        linked = re.findall(r"\]\((docs/results/[^)]+\.json)\)", text)
        files = {f"docs/results/{p.name}" for p in (ROOT / "docs/results").iterdir()}
        assert sorted(linked) == sorted(files)
