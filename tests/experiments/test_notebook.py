"""The notebook runs from the first cell to the last, in small."""

import base64
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import sdp_jax
from experiments import data, models

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments/altsdp_colab_tpu.ipynb"
PREFIX = "SDP_JAX_NOTEBOOK_"
SMALL = {"CONFIG": "digits", "WIDTHS": "8,64", "EPOCHS": "3", "EXAMPLES": "100"}
SMALL |= {"CURVATURE_EXAMPLES": "50", "RANK": "2", "POINTS": "3", "CURVE_STEPS": "3"}
SMALL |= {"REPEATS": "2"}
PNG = b"\x89PNG"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this Python, whatever others are installed, with nothing at home."""
    folder = tmp_path / "jupyter/kernels/here"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "here", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    flags = "--xla_force_host_platform_device_count=2"
    flags += " --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags)
    return folder.name


def source(notebook, name):
    return next(cell.source for cell in notebook.cells if cell.id == name)


def printed(notebook, name):
    cell = next(cell for cell in notebook.cells if cell.id == name)
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.study
def test_the_notebook_runs(notebook, kernel, tmp_path, monkeypatch):
    for name, value in (SMALL | {"OUT": str(tmp_path / "runs")}).items():
        monkeypatch.setenv(PREFIX + name, value)
    NotebookClient(
        notebook,
        timeout=180,
        kernel_name=kernel,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name == "digits-3epochs-8-64"
    assert "2 × cpu" in printed(notebook, "devices")
    lines = printed(notebook, "train").splitlines()
    assert [sum(m in line for line in lines) for m in ("sgd ", "altsdp ")] == [3, 3]

    # Three quarters of 8 + 64 channels went, and training was no sham.
    result = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    twin = json.loads((out / "twin/metrics.jsonl").read_text().splitlines()[-1])
    assert sum(result["widths"].values()) == 18
    assert f"{result['small_test_accuracy']:.2%}" in lines[-1]
    assert f"{twin['test_accuracy']:.2%}" in lines[-2]
    assert min(result["test_accuracy"], twin["test_accuracy"]) > 0.5
    table = printed(notebook, "cut")
    assert re.search(r"^conv0 +8 +\d", table, re.MULTILINE) and "FLOPs" in table

    text = (out / "certificate.json").read_text()
    certificate = sdp_jax.valley.Certificate.from_json(text)
    assert certificate.same_seed and certificate.sparsity == pytest.approx(0.75)
    # The ends of the path are the two runs.
    for found, expected in (
        (certificate.reference["test"]["accuracy"], twin["test_accuracy"]),
        (certificate.pruned["test"]["accuracy"], result["test_accuracy"]),
    ):
        assert found == pytest.approx(expected, abs=0.02)
    assert certificate.verdict in printed(notebook, "certificate")
    for name, picture in (("certificate", "certificate"), ("curves", "training")):
        assert (out / f"{picture}.png").read_bytes().startswith(PNG)
        (shown,) = (
            output.data["image/png"]
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if cell.id == name and "image/png" in output.get("data", {})
        )
        assert base64.b64decode(shown).startswith(PNG)

    for name in ("cut", "export", "save"):
        (match,) = re.findall(
            r"largest difference (\S+), of outputs up to (\S+)", printed(notebook, name)
        )
        difference, size = map(float, match)
        assert difference < 1e-4 < 0.1 < size
    assert re.search(r"[\d.]+ times as fast", printed(notebook, "time"))

    # What is left on disk is the pruned network: in the artefact and in the folder.
    test = data.load("digits").test
    artefact = (out / "small.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(artefact))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    logits = np.asarray(exported.call(test.images))
    accuracy = np.mean(logits.argmax(-1) == test.labels)
    assert accuracy == pytest.approx(result["small_test_accuracy"], abs=0.01)
    model = models.make_model("conv", 10, (8, 64))
    loaded = sdp_jax.load(out / "small", model.apply)
    assert loaded.cut.widths == result["widths"]
    params = jax.tree.leaves(loaded.params["params"])
    assert sum(x.size for x in params) == result["small_parameters"]


def test_what_is_committed_is_clean(notebook):
    raw = json.loads(NOTEBOOK.read_text())
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    nbformat.validate(raw)
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not re.search(r"/(work|home|root|tmp|Users|mnt)\b", NOTEBOOK.read_text())


def test_the_environment_overrides_every_parameter(notebook, monkeypatch):
    defaults = {}
    exec(source(notebook, "parameters"), defaults)
    del defaults["__builtins__"]
    assert len(defaults) > 5 and all(name.isupper() for name in defaults)
    wanted = {}
    for name, value in defaults.items():
        wanted[name] = 17 if isinstance(value, int) else f"other {name}"
        monkeypatch.setenv(PREFIX + name, str(wanted[name]))
    names = dict(defaults)
    exec(source(notebook, "overrides"), names)
    assert {name: names[name] for name in defaults} == wanted
    monkeypatch.setenv(PREFIX + "RANK", "many")
    with pytest.raises(ValueError, match=f"{PREFIX}RANK must be an integer; got 'many"):
        exec(source(notebook, "overrides"), names)
    for name in defaults:
        assert f"`{name}`" in source(notebook, "parameters-text")


def configure(notebook, **changed):
    names = {"jax": jax, "pathlib": pathlib, "CONFIG": "auto", "EPOCHS": 0}
    names |= {"WIDTHS": "", "DATA_DIR": "", "OUT": "runs", **changed}
    exec(source(notebook, "config"), names)
    return names["config"]


def test_the_configuration_on_a_cpu(notebook):
    config = configure(notebook)
    assert config.dataset == "digits" and config.method == "altsdp"
    changed = configure(notebook, EPOCHS=7, WIDTHS="4, 8")
    assert (changed.epochs, changed.widths) == (7, (4, 8))
    assert changed.out != config.out and not changed.timed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"CONFIG": "vgg16"}, r"must be auto or one of \['digits', .*; got 'vgg16'"),
        ({"CONFIG": "vgg16-cifar10-sgd"}, "must be auto or one of"),
        ({"EPOCHS": -1}, "EPOCHS must be at least 1, or 0 for the default; got -1"),
        ({"WIDTHS": "4;8"}, "WIDTHS must be integers with commas .*; got '4;8'"),
    ],
)
def test_a_wrong_parameter_is_refused(notebook, changed, message):
    with pytest.raises(ValueError, match=message):
        configure(notebook, **changed)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A folder outside of the checkout, where nothing but libtpu is installed.

    Commands are recorded instead of run; a clone makes the files of ``clone``.
    """

    class Bare:
        def __init__(self):
            self.commands = []
            self.code = 0
            self.clone = ["sdp_jax/__init__.py", "experiments/train.py"]
            self.clone += ["pyproject.toml"]

        def run(self, command, **options):
            self.commands.append(list(command))
            for name in self.clone if command[0] == "git" else ():
                file = tmp_path / "sdp_jax" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            return subprocess.CompletedProcess(command, self.code, "", "no network")

    bare = Bare()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", bare.run)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == "libtpu" else None
    )
    return bare


def test_installation_needs_a_source(notebook, bare):
    with pytest.raises(ValueError, match="SOURCE is empty; set SOURCE to the address"):
        exec(source(notebook, "install"), {"SOURCE": ""})
    assert bare.commands == []


def test_installation_clones_once(notebook, bare, tmp_path):
    address = "https://example.org/sdp_jax.git"
    clone = str(tmp_path / "sdp_jax")
    install = [sys.executable, "-m", "pip", "install", "jax[tpu]"]
    install += ["-e", f"{clone}[experiments,export,tfds]"]
    exec(source(notebook, "install"), {"SOURCE": address})
    assert bare.commands == [["git", "clone", "--depth", "1", address, clone], install]
    assert sys.path[0] == clone
    # The second time the clone is there already.
    exec(source(notebook, "install"), {"SOURCE": ""})
    assert bare.commands[2:] == [install]


def test_a_source_that_is_another_repository_is_refused(notebook, bare):
    bare.clone = ["README.md"]
    with pytest.raises(ValueError, match="no repository of sdp_jax: it has no sdp_jax"):
        exec(source(notebook, "install"), {"SOURCE": "https://example.org/other.git"})
    assert len(bare.commands) == 1


def test_what_a_failing_command_said_is_shown(notebook, bare):
    bare.code = 128
    with pytest.raises(RuntimeError, match="git clone (.|\n)*no network"):
        exec(source(notebook, "install"), {"SOURCE": "https://example.org/sdp_jax.git"})
    assert len(bare.commands) == 1
