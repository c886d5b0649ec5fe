"""Imports go forward only, the core depends on little, and what is public is told."""

import ast
import dataclasses
import inspect
import pathlib
import subprocess
import sys

import pytest

import sdp_jax

PACKAGE = pathlib.Path(sdp_jax.__file__).parent
ROOT = PACKAGE.parent
# What training and cutting share, in the order in which modules may import one another.
COMMON = ["tree", "checks", "widths", "fast", "segments", "polynomial", "ports"]
COMMON += ["dimension", "groups", "axes", "mesh", "channels", "factors"]
COMMON += ["activations"]
# Each goes on from there, and neither imports the other.
TRAINING = ["entries", "importance", "prox", "strength", "target", "base"]
TRAINING += ["transforms", "_altsdp"]
CUTTING = ["modules", "tracing", "matching", "zeros", "cut", "_narrow", "calibration"]
CUTTING += ["measure", "compare", "remains", "layers", "plan", "shrinking", "files"]
CUTTING += ["export", "report", "_prune"]
# Behind doors of their own; both train.
DOORS = ["valley", "methods"]
# Inside a folder, the modules in the order in which they may import one another.
FOLDERS = {
    "tracing": ["source", "static", "devices", "atoms", "sizes", "values", "numbers"]
    + ["rule", "trace", "evaluate", "rules_elementwise", "rules_shape", "rules_index"]
    + ["rules_contract", "rules_control", "rules_linalg", "rules_mesh", "rules"]
    + ["analyse", "ports", "origins", "readings", "watch", "flops", "members"]
    + ["scaling", "scaling_elementwise", "scaling_moves", "invariance", "removable"]
    + ["find"],
    "valley": ["vectors", "sketch", "project", "curvature", "_sdp", "statistics"]
    + ["path", "figure", "certificate", "_certify"],
    # No method but the common ground is imported by another one.
    "methods": ["score", "scales", "penalty", "ranking", "pqi"]
    + ["_hosted"]
    + ["filter_norm", "_taylor", "_random_score", "depgraph", "network_slimming"]
    + ["_minitron", "_wanda", "_flap", "_activation_taylor"]
    + ["_gate_decorator", "discriminant", "remove", "dpm", "half_space", "_hspg"]
    + ["_hesso", "_spp", "_increg", "_perspective", "_until_compressed", "_sap"],
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


def modules():
    """The files of each module, and of each folder."""
    found = {p.stem: [p] for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    return found | {name: list((PACKAGE / name).glob("*.py")) for name in FOLDERS}


def imported(paths):
    """The modules of the package that files import."""
    found = set().union(*map(imports, paths))
    return {name.split(".")[1] for name in found if name.startswith("sdp_jax.")}


def test_imports_go_forward():
    found = modules()
    assert set(found) == {*COMMON, *TRAINING, *CUTTING, *DOORS}
    for order in (COMMON + TRAINING, COMMON + CUTTING):
        for i, name in enumerate(order):
            foreign = imported(found[name]) - {*order[:i], name}
            assert not foreign, f"{name} imports {foreign}"
    for name in DOORS:
        foreign = imported(found[name]) - {*COMMON, *TRAINING, name}
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize(
    ("start", "never"),
    [
        ("transforms _altsdp channels", "tracing cut plan measure _narrow"),
        ("base strength target prox methods", "tracing cut plan measure _narrow"),
        ("cut plan _narrow tracing", "transforms strength target methods valley"),
    ],
)
def test_training_and_cutting_meet_in_groups_and_channels_only(start, never):
    found = modules()
    reached, new = set(), set(start.split())
    while new:
        reached |= new
        new = set().union(*(imported(found[name]) for name in new)) - reached
    assert not reached & set(never.split())


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


def lacking(name, value, *, example):
    """Which parts the docstring of something public lacks."""
    told = inspect.getdoc(value) or ""
    parts = [] if told else ["docstring"]
    if inspect.isclass(value):
        record = hasattr(value, "_fields") or dataclasses.is_dataclass(value)
        parts += ["Attributes:"] if record else []
        for member, own in vars(value).items():
            own = getattr(own, "func", getattr(own, "fget", own))
            if inspect.isfunction(own) and own.__module__ == value.__module__:
                if not member.startswith("_") and not own.__doc__:
                    parts.append(f"docstring of {member}")
    elif inspect.isfunction(value):
        signature = inspect.signature(value)
        parts += ["Args:"] if signature.parameters else []
        parts += ["Returns:"] if signature.return_annotation is not None else []
        parts += ["Example:"] if example else []
    return [f"{name}: {part}" for part in parts if part not in told]


@pytest.mark.parametrize("door", [sdp_jax, sdp_jax.methods, sdp_jax.valley])
def test_every_public_name_is_documented(door):
    values = {name: getattr(door, name) for name in door.__all__}
    found = [lacking(name, value, example=True) for name, value in values.items()]
    assert not sum(found, [])


@pytest.mark.parametrize("kit", [sdp_jax.base, sdp_jax.channels, sdp_jax.prox])
def test_what_authors_use_is_documented(kit):
    found = []
    for name, value in vars(kit).items():
        own = getattr(value, "__module__", None) == kit.__name__
        if own and not name.startswith("_"):
            found += lacking(name, value, example=False)
    assert not found


def test_a_test_file_beside_each_module():
    tests = {p.stem for p in (ROOT / "tests").rglob("test_*.py")}
    names = [*COMMON, *TRAINING, *CUTTING]
    names += [module for folder in DOORS for module in FOLDERS[folder]]
    assert {f"test_{name.strip('_')}" for name in names} <= tests


def test_files_are_short():
    folders = [ROOT / name for name in ("sdp_jax", "tests", "experiments")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] < 700, f"{longest} has {lengths[longest]} lines"
