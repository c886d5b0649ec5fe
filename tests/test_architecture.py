"""Imports go forward only, and the core depends on little."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sdp_jax

PACKAGE = pathlib.Path(sdp_jax.__file__).parent
ROOT = PACKAGE.parent
# What each module may import from the package.
ALLOWED = {
    "groups": set(),
    "polynomial": set(),
    "prox": {"groups"},
    "counts": {"groups", "polynomial", "tracing"},
    "strength": {"groups", "prox", "counts"},
    "transforms": {"groups", "prox", "strength"},
    "valley": {"groups", "prox", "strength", "transforms"},
    "altsdp": {"groups", "strength", "transforms", "valley"},
    "tracing": {"groups", "polynomial"},
    "cut": {"groups", "measure"},
    "narrow": {"groups", "tracing", "cut"},
    "files": {"groups", "cut"},
    "export": {"groups", "tracing"},
    "measure": {"groups", "tracing"},
    "plan": {"groups", "cut", "narrow", "measure", "counts"},
    "methods": {"groups", "prox", "strength", "transforms", "altsdp", "valley"}
    | {"cut", "narrow", "measure", "plan"},
}
# Inside a folder, the modules in the order in which they may import one another.
FOLDERS = {
    "tracing": ["source", "static", "atoms", "sizes", "values", "rule", "trace"]
    + ["evaluate", "rules_elementwise", "rules_shape", "rules_contract"]
    + ["rules_control", "rules", "analyse", "flops", "members", "find"],
    "valley": ["vectors", "sketch", "project", "curvature", "sdp", "statistics"]
    + ["path", "figure", "certificate", "certify"],
    # No method but the common ground is imported by another one.
    "methods": ["hosted", "filter_norm", "taylor", "random_score", "depgraph"]
    + ["scales", "network_slimming", "gate_decorator", "discriminant"]
    + ["remove", "dpm", "half_space", "hspg", "hesso"]
    + ["spp", "increg", "perspective", "pqi", "sap"],
}
OPTIONAL = {"export": {"flatbuffers"}, "figure": {"matplotlib"}}
CORE = {"jax", "jaxlib", "optax", "numpy", "scipy", "chex"}


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= names if node.module == "sdp_jax" else {node.module}
    return found


def test_imports_go_forward():
    modules = {p.stem: [p] for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    modules |= {name: list((PACKAGE / name).glob("*.py")) for name in FOLDERS}
    assert set(modules) == set(ALLOWED)
    for name, paths in modules.items():
        for path in paths:
            found = {i.split(".")[1] for i in imports(path) if i.startswith("sdp_jax.")}
            allowed = ALLOWED[name] | {name}
            assert found <= allowed, f"{path} imports {found - allowed}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_folders_go_forward(folder):
    order = FOLDERS[folder]
    paths = {p.stem: p for p in (PACKAGE / folder).glob("*.py")}
    assert set(paths) - {"__init__"} == set(order)
    for i, name in enumerate(order):
        for module in imports(paths[name]):
            if module.startswith(f"sdp_jax.{folder}."):
                assert module.split(".")[2] in order[:i], f"{name} imports {module}"


def test_the_core_imports_only_its_dependencies():
    for path in PACKAGE.rglob("*.py"):
        tops = {i.split(".")[0] for i in imports(path)}
        tops -= OPTIONAL.get(path.stem, set())
        foreign = tops - CORE - {"sdp_jax"} - set(sys.stdlib_module_names)
        assert not foreign, f"{path} imports {foreign}"


def test_importing_the_package_does_not_import_flax():
    code = (
        "import sys, sdp_jax; print({'flax', 'orbax', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "set()"


def test_every_public_name_is_documented():
    for name in sdp_jax.__all__:
        assert getattr(sdp_jax, name).__doc__, name


def test_a_test_file_beside_each_module():
    tests = {p.stem for p in (ROOT / "tests").rglob("test_*.py")}
    folders = ["valley", "methods"]
    modules = set(ALLOWED) - set(folders) | {m for f in folders for m in FOLDERS[f]}
    assert {f"test_{name}" for name in modules} <= tests
