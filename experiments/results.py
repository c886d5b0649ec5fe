"""Keeps the records of finished runs, and writes ``RESULTS.md`` from them alone.

``python -m experiments.results collect runs/lenet-mnist-*`` copies what a table needs
of each run into ``docs/results``, one file for each;
``python -m experiments.results write`` makes ``RESULTS.md`` of all these files.

The directory of a run is named by its configuration and its seed,
``lenet-mnist-sgd-seed0``. A label may follow, ``lenet-mnist-sgd-seed0-gpu``, so that a
configuration and seed can be there twice, on other hardware or with other options.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tyro

from experiments.config import PRUNING, Config
from experiments.configs import CONFIGS, ROWS, VARIANTS
from experiments.files import write_whole
from experiments.log import read_finished

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DEFAULT = Config().key()
# Runs of one configuration that differ in any of these are never averaged.
APART = ("options", "device", "cores", "versions", "commit")

_ENVIRONMENT = ("versions", "device", "cores", "commit")
_RESULT = (
    *("small_test_accuracy", "parameters", "small_parameters"),
    *("flops", "small_flops", "milliseconds", "small_milliseconds"),
)
_FIELDS = (
    *("run", "name", "seed", "command", "config", *_ENVIRONMENT),
    *("epochs", "seconds", "last", "result"),
)
_DIRECTORY = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)(?P<label>-[\w.]+)?")


class Published(NamedTuple):
    """What a paper reports.

    Attributes:
      method: its name.
      accuracy: test accuracy in %.
      arxiv: number of the paper on arXiv.
      flops: FLOPs left in %.
      parameters: parameters left in %.
      note: what else has to be known.
    """

    method: str
    accuracy: float
    arxiv: str
    flops: float | None = None
    parameters: float | None = None
    note: str = ""


PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "vgg16-cifar10": (
        Published(
            "SDP/AltSDP", 93.97, "2107.05328", note="no fine-tuning, sizes not stated"
        ),
        Published("OTOv2", 93.27, "2303.06862", 26.6, 5.0),
        Published("DPM on OTOv2", 93.8, "2406.03879", 25.8, 4.8, "dense 93.2 %"),
        Published("DPM on Gate Decorator", 91.74, "2406.03879", 9.8, 2.0),
    ),
    "vgg19-cifar100": (
        Published(
            "DepGraph",
            70.39,
            "2301.12900",
            11.2,
            note="fine-tuned, dense 73.50 %",
        ),
    ),
    "resnet56-cifar10": (
        Published(
            "DepGraph",
            93.77,
            "2301.12900",
            47,
            note="fine-tuned, dense 93.53 %",
        ),
        Published(
            "DepGraph",
            93.64,
            "2301.12900",
            39,
            note="fine-tuned, dense 93.53 %",
        ),
        Published("DPM on DepGraph", 94.13, "2406.03879", 45.8, 47.2, "fine-tuned"),
    ),
    "resnet50-cifar10": (Published("OTOv2", 94.39, "2303.06862", 10.0, 3.6),),
    "wrn28_10-cifar100": (
        Published(
            "gRDA",
            76.81,
            "2006.09358",
            note="unstructured, 90.3 % of single weights zero, SGD 76.6 %",
        ),
    ),
}
TITLES: Mapping[str, str] = {
    "dnn-mnist": "784-300-100-10, MNIST",
    "vgg16-cifar10": "VGG-16, CIFAR-10",
    "vgg19-cifar100": "VGG-19, CIFAR-100",
    "resnet56-cifar10": "ResNet-56, CIFAR-10",
    "resnet50-cifar10": "ResNet-50, CIFAR-10",
    "wrn28_10-cifar10": "WRN-28-10, CIFAR-10",
    "wrn28_10-cifar100": "WRN-28-10, CIFAR-100",
    "lenet-mnist": "LeNet, MNIST",
    "airbench-cifar10": "Airbench network, CIFAR-10 on a CPU",
    "vgg_small-cifar10": "Small VGG, CIFAR-10 at 16×16",
    "resnet20_narrow-cifar10": "ResNet-20 of widths 8, 16, 32, CIFAR-10 at 16×16",
}

_INTRO = """\
# Results

`python -m experiments.results write` makes this file from those in [{where}]({where}),
one for each finished run, and from nothing else but the published numbers; seeds link
to their files. Do not edit it by hand.

One command makes a line of a table, once for each seed; it stands below the table. Add
`--data-dir DIRECTORY` with the data set in it, or let tensorflow-datasets fetch it.
`python -m experiments.results collect RUN...` then copies what is needed of finished
runs, whose directories are named `NAME-seedK`, to {where}.

- Test accuracy is that of the network after the cut, as it is when training ends: no
  fine-tuning follows. The training loss is that of the whole training set.
- FLOPs are those of one image, counted equation by equation by `sdp_jax.cost` before
  and after the cut.
- Milliseconds are medians for a batch of 200 test images, dense and small network
  timed in turns.
- Over several seeds numbers are means, with ± the sample deviation. The difference from
  sgd is in points of test accuracy, from the unpruned run of the same seed, hardware
  and options of training.
- Runs with other options, on other hardware, with other versions or of another commit
  are lines of their own.
- Published numbers are what the papers state, with their own training and their own way
  of counting, on the original images. Runs on CIFAR here used a copy of the images
  stored as JPEG; the records do not hold where the images came from. So accuracies can
  be compared within a table, not with published ones.
"""


@dataclasses.dataclass(frozen=True)
class Collect:
    """Copies what is needed of finished runs.

    Attributes:
      runs: directories of runs.
      out: directory of the copies.
    """

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    out: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Write:
    """Writes the tables of all copies.

    Attributes:
      results: directory of the copies.
      out: Markdown file to write.
    """

    results: pathlib.Path = RESULTS
    out: pathlib.Path = ROOT / "RESULTS.md"


def record(run: pathlib.Path) -> dict[str, Any]:
    """What is kept of a finished run.

    Args:
      run: its directory.

    Returns:
      Name of directory and configuration, seed, command, the whole configuration,
      versions, device, cores, commit, the number of epochs and their seconds, record of
      the last epoch, and result.

    Raises:
      ValueError: if the run is not finished, or it cannot be told what it is.
    """
    lines = read_finished(run)
    header, result = lines[0], lines[-1]
    lacking = [k for k in ("config", *_ENVIRONMENT) if k not in header]
    if lacking:
        raise ValueError(
            f"{run} does not say its {', '.join(lacking)}, which experiments.train now "
            "records first; train it again in a new directory"
        )
    config = _whole(header["config"], run)
    directory = pathlib.Path(run).absolute().name
    name, seed = _name(directory, config, run), config["seed"]
    epochs = [line for line in lines if "epoch" in line]
    if len(epochs) != config["epochs"]:
        raise ValueError(
            f"{run} has records of {len(epochs)} epochs, not of {config['epochs']}; "
            "train it again in a new directory"
        )
    lacking = [k for k in _RESULT if k not in result]
    if lacking:
        raise ValueError(
            f"the result of {run} lacks {', '.join(lacking)}; train it again in a new "
            "directory, with --timed"
        )
    last = epochs[-1]
    return {
        "run": directory,
        "name": name,
        "seed": seed,
        "command": _command(name, config, directory),
        "config": config,
        **{k: header[k] for k in _ENVIRONMENT},
        "epochs": len(epochs),
        "seconds": sum(e["seconds"] for e in epochs),
        # The channels that are left are in the result, too.
        "last": {k: v for k, v in last.items() if k != "channels"},
        "result": result,
    }


def collect(config: Collect) -> list[pathlib.Path]:
    """Copies what is needed of finished runs: all of them, or none.

    Args:
      config: the runs.

    Returns:
      The files.

    Raises:
      ValueError: if a run cannot be used, or its file holds another run.
    """
    if not config.runs:
        raise ValueError("no run was given; name the directories of finished runs")
    texts: dict[pathlib.Path, str] = {}
    for run in config.runs:
        found = record(run)
        path = config.out / f"{found['run']}.json"
        lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        known = path.read_text() if path.is_file() else text
        if texts.setdefault(path, known) != text:
            raise ValueError(
                f"{path} holds another run than {run}; delete it if it is out of date, "
                f"or add a label to the name of the directory: {found['run']}-LABEL"
            )
    for path, text in texts.items():
        write_whole(path, text)
    return list(texts)


def read(results: pathlib.Path) -> list[dict[str, Any]]:
    """All that was collected.

    Args:
      results: directory of the copies.

    Returns:
      The records, in the order of configurations and seeds.

    Raises:
      ValueError: if a file is not one that :func:`collect` made for a configuration
        that is still there, or a run is there twice.
    """
    found = []
    for path in results.glob("*.json"):
        try:
            one = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); delete it and collect its run again"
            ) from error
        if not isinstance(one, dict) or tuple(one) != _FIELDS:
            raise ValueError(
                f"{path} was not made by experiments.results collect; it must hold "
                f"{', '.join(_FIELDS)}"
            )
        one["config"] = _whole(one["config"], path)
        if path.stem != one["run"]:
            raise ValueError(
                f"{path} holds the run {one['run']}; a file is named by its run"
            )
        if _name(one["run"], one["config"], path) != one["name"]:
            raise ValueError(
                f"{path} says it is of {one['name']}; its name says otherwise"
            )
        found.append(one)
    order = list(CONFIGS)
    found.sort(key=lambda r: (order.index(r["name"]), r["seed"], r["run"]))
    seen: dict[Any, str] = {}
    for one in found:
        key = (one["name"], one["seed"], _apart(one))
        if key in seen:
            raise ValueError(
                f"{seen[key]} and {one['run']} are the same run; delete one of their "
                f"files in {results}"
            )
        seen[key] = one["run"]
    return found


def rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for all seeds of what is the same in all that :data:`APART` names.

    Args:
      records: what :func:`read` returned.

    Returns:
      Lines with row, method, options, environment, command, runs and seeds; pairs of
      mean and sample deviation (none for one seed) of numbers in %, milliseconds and
      units of loss; the difference from sgd and its seeds.
    """
    records = list(records)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in records:
        groups.setdefault((one["name"], _apart(one)), []).append(one)
    found = []
    for group in groups.values():
        first, results = group[0], [r["result"] for r in group]
        row, _, method = first["name"].rpartition("-")
        pairs = [(r, _twin(r, records)) for r in group] if method != "sgd" else []
        paired = [(r, twin) for r, twin in pairs if twin is not None]
        differences = [_accuracy(r) - _accuracy(twin) for r, twin in paired]
        found.append(
            {
                "row": row,
                "method": method,
                "options": _options(first["name"], first["config"]),
                "environment": _environment(group),
                "command": _command(first["name"], first["config"], first["run"]),
                "runs": [r["run"] for r in group],
                "seeds": [r["seed"] for r in group],
                "epochs": first["epochs"],
                "accuracy": _spread(map(_accuracy, group)),
                "train_loss": _spread(r["last"]["train_loss"] for r in group),
                "flops_left": _spread(
                    100 * r["small_flops"] / r["flops"] for r in results
                ),
                "parameters_left": _spread(
                    100 * r["small_parameters"] / r["parameters"] for r in results
                ),
                "milliseconds": _spread(r["milliseconds"] for r in results),
                "small_milliseconds": _spread(r["small_milliseconds"] for r in results),
                "difference": _spread(differences) if paired else None,
                "difference_seeds": [r["seed"] for r, _ in paired],
            }
        )
    return found


def markdown(records: Iterable[dict[str, Any]], where: str = "docs/results") -> str:
    """The text of ``RESULTS.md``.

    Args:
      records: what :func:`read` returned.
      where: their directory as links name it.

    Returns:
      Markdown: an introduction, and a section for each of ``configs.ROWS``.
    """
    lines = rows(records)
    parts = [_INTRO.format(where=where)]
    for row in ROWS:
        parts.append(f"## {TITLES[row]}\n")
        if row in PUBLISHED:
            parts.append(f"Published: {'; '.join(map(_cite, PUBLISHED[row]))}.\n")
        ours = [line for line in lines if line["row"] == row]
        if ours:
            parts += [_table(ours, where), _provenance(ours)]
        there = {line["method"] for line in ours}
        commands = ", ".join(
            f"`python -m experiments.train {row}-{method} --seed 0`"
            for method in VARIANTS
            if method not in there
        )
        if commands:
            why = ""
            if not ours and ROWS[row].get("compute") == "bfloat16":
                why = (
                    " The row asks for an accelerator: "
                    f"{ROWS[row]['epochs']} epochs on whole images, in bfloat16."
                )
            parts.append(f"Not run: {commands}.{why}\n")
    return "\n".join(parts)


def write(config: Write) -> pathlib.Path:
    """Writes the tables of all that was collected.

    Args:
      config: where it lies.

    Returns:
      The file.

    Raises:
      ValueError: if nothing was collected, or :func:`read` refuses what was.
    """
    records = read(config.results)
    if not records:
        raise ValueError(
            f"nothing was collected in {config.results}; first give finished runs to "
            "python -m experiments.results collect"
        )
    where = os.path.relpath(config.results.resolve(), config.out.resolve().parent)
    write_whole(config.out, markdown(records, pathlib.Path(where).as_posix()))
    return config.out


def main(config: Collect | Write) -> None:
    """Collects, or writes, and prints the names of the files.

    Args:
      config: what to do.
    """
    done = collect(config) if isinstance(config, Collect) else [write(config)]
    print("\n".join(map(str, done)))


def parse(arguments: list[str]) -> Collect | Write:
    """What a command line asks for.

    Args:
      arguments: ``collect`` or ``write``, and options.

    Returns:
      It.
    """
    return tyro.cli(Collect | Write, args=arguments, prog="experiments.results")


def _whole(config: Any, where: pathlib.Path) -> dict[str, Any]:
    """A recorded configuration; what an earlier version did not name had its default.

    Raises:
      ValueError: if it is none of this version.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} holds no configuration, but {config!r}")
    unknown = sorted(config.keys() - DEFAULT.keys())
    if unknown:
        raise ValueError(
            f"{where} has options that experiments.train does not know: "
            f"{', '.join(unknown)}; train it again with this version"
        )
    return DEFAULT | config


def _name(directory: str, config: dict[str, Any], where: pathlib.Path) -> str:
    """The name of a configuration in that of a directory.

    Raises:
      ValueError: if there is none, or the seed is another one.
    """
    match, seed = _DIRECTORY.fullmatch(directory), config["seed"]
    if match and match["name"] in CONFIGS and match["seed"] == str(seed):
        return match["name"]
    same = [n for n, c in CONFIGS.items() if c.key() | {"seed": seed} == config]
    advice = (
        f"it holds the run {same[0]}-seed{seed}: rename it to that"
        if same
        else f"expected NAME-seed{seed} or NAME-seed{seed}-LABEL with a NAME of "
        "experiments.configs"
    )
    raise ValueError(
        f"{where}: {directory!r} does not name a configuration and the seed {seed} of "
        f"the run; {advice}"
    )


def _options(name: str, config: dict[str, Any]) -> str:
    """Options by which a configuration differs from the one of that name."""
    usual = CONFIGS[name].key()
    changed = [k for k in usual if k != "seed" and config[k] != usual[k]]
    return " ".join(
        " ".join([f"--{k.replace('_', '-')}", *map(str, _listed(config[k]))])
        for k in changed
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _command(name: str, config: dict[str, Any], directory: str) -> str:
    parts = [f"python -m experiments.train {name} --seed {config['seed']}"]
    options = _options(name, config)
    if options:
        parts.append(options)
    if directory != f"{name}-seed{config['seed']}":
        parts.append(f"--out runs/{directory}")
    return " ".join(parts)


def _apart(one: dict[str, Any]) -> str:
    """What :data:`APART` names, as one key."""
    known = one | {"options": {k: v for k, v in one["config"].items() if k != "seed"}}
    return json.dumps([known[k] for k in APART], sort_keys=True)


def _twin(one: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The only unpruned run of the same seed, training and hardware.

    One of the same commit comes first; between several others nothing is chosen.
    """

    def shared(r: dict[str, Any]) -> Any:
        training = {
            k: v for k, v in r["config"].items() if k not in (*PRUNING, "method")
        }
        return training, r["device"], r["cores"], r["versions"]

    name = one["name"].rpartition("-")[0] + "-sgd"
    found = [r for r in records if r["name"] == name and shared(r) == shared(one)]
    found = [r for r in found if r["commit"] == one["commit"]] or found
    return found[0] if len(found) == 1 else None


def _accuracy(one: dict[str, Any]) -> float:
    return 100 * one["result"]["small_test_accuracy"]


def _spread(values: Iterable[float]) -> tuple[float, float | None]:
    known = np.asarray(list(values), float)
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    return float(known.mean()), deviation


def _environment(group: list[dict[str, Any]]) -> str:
    """Hardware, versions and commits of a group."""
    first = group[0]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    commits = dict.fromkeys(r["commit"] or "not known" for r in group)
    return (
        f"{first['device']}, {first['cores']} cores; {versions}; "
        f"commit {', '.join(commits)}"
    )


def _cite(entry: Published) -> str:
    """A published number as text."""
    sizes = [
        f"{value} % of the {what}"
        for value, what in ((entry.flops, "FLOPs"), (entry.parameters, "parameters"))
        if value is not None
    ]
    at = f" at {' and '.join(sizes)}" if sizes else ""
    link = f"[arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"
    note = f"{entry.note}; " if entry.note else ""
    return f"{entry.method} {entry.accuracy} %{at} ({note}{link})"


def _marks(lines: list[dict[str, Any]]) -> dict[str, str]:
    """A mark for each environment of a table; empty if there is but one."""
    environments = list(dict.fromkeys(line["environment"] for line in lines))
    if len(environments) == 1:
        return {environments[0]: ""}
    return {text: str(i + 1) for i, text in enumerate(environments)}


def _table(lines: list[dict[str, Any]], where: str) -> str:
    """The table of a row."""
    marks = _marks(lines)
    out = [
        "| method | seeds | test accuracy, % | training loss | FLOPs left, % | "
        "parameters left, % | ms dense → small | difference from sgd | epochs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        method = line["method"]
        if line["options"]:
            method += f", `{line['options']}`"
        if marks[line["environment"]]:
            method += f" ({marks[line['environment']]})"
        seeds = ", ".join(
            f"[{seed}]({where}/{run}.json)"
            for seed, run in zip(line["seeds"], line["runs"], strict=True)
        )
        difference = "" if line["method"] == "sgd" else "–"
        if line["difference"] is not None:
            difference = _number(line["difference"], "+.2f")
            if line["difference_seeds"] != line["seeds"]:
                of = ", ".join(map(str, line["difference_seeds"]))
                difference += f" (seeds {of})"
        out.append(
            f"| {method} | {seeds} | {_number(line['accuracy'], '.2f')} "
            f"| {_number(line['train_loss'], '.4f')} "
            f"| {line['flops_left'][0]:.1f} | {line['parameters_left'][0]:.1f} "
            f"| {line['milliseconds'][0]:.2f} → {line['small_milliseconds'][0]:.2f} "
            f"| {difference} | {line['epochs']} |"
        )
    return "\n".join(out) + "\n"


def _number(pair: tuple[float, float | None], form: str) -> str:
    """Mean and, if there is one, deviation."""
    mean, deviation = pair
    text = format(mean, form).replace("-", "−")
    if deviation is not None:
        text += f" ± {deviation:{form.replace('+', '')}}"
    return text


def _provenance(lines: list[dict[str, Any]]) -> str:
    """Where the lines of a table were made, and by which commands."""
    out = []
    for environment, mark in _marks(lines).items():
        out.append(f"{f'({mark}) ' if mark else ''}{environment}:\n\n```bash")
        for line in lines:
            if line["environment"] == environment:
                others = ", ".join(map(str, line["seeds"][1:]))
                out.append(line["command"] + (f"  # also {others}" if others else ""))
        out.append("```\n")
    return "\n".join(out)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
