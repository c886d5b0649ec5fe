"""Who stays in the valley: certificates of several ways to prune one network.

``python -m experiments.valley runs/SGD --pruned runs/ALTSDP runs/PROX --other runs/B``

All are compared with one reference, a finished run of plain SGD: runs that pruned while
they trained (of the same seed), and from the reference itself, at the share of channels
of the first of them, magnitude pruning and SDP in one shot; then two counter-examples,
pruning far past the limit and a run of another seed. A table is printed; the
certificates are written to ``--out``, each when it is done, and are not computed again.
"""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import tyro

import sdp_jax
from experiments.certify import (
    ALIKE,
    Reporter,
    config_of,
    dataset_of,
    load_run,
    make_task,
)
from experiments.config import Config
from experiments.files import write_whole
from experiments.train import Run, progress_bars


@dataclasses.dataclass(frozen=True)
class Valley:
    """What to compare.

    Attributes:
      reference: directory of a run of plain SGD.
      pruned: directories of runs of the same seed that pruned; those that pruned less
        than the first lose their smallest channels, those that pruned more stay so.
      other: directory of a run of plain SGD of another seed.
      far: share of channels that is far past the limit.
      data_dir: directory of the data, as for experiments.train.
      examples: training examples along the paths; 0 for all.
      curvature_examples: training examples for the curvature; 0 for all.
      rank: number of sharp directions for the certificates.
      sdp_rank: number of sharp directions for SDP in one shot, at least ``rank``.
      points: points of each path.
      curve_steps: steps of training a curve.
      out: directory of the certificates.
    """

    reference: tyro.conf.Positional[pathlib.Path]
    pruned: tuple[pathlib.Path, ...]
    other: pathlib.Path | None = None
    far: float = 0.9
    data_dir: pathlib.Path | None = None
    examples: int = 5000
    curvature_examples: int = 1000
    rank: int = 10
    sdp_rank: int = 20
    points: int = 9
    curve_steps: int = 200
    out: pathlib.Path = pathlib.Path("valley")


def prune_to(groups: sdp_jax.Groups, params: Any, sparsity: float) -> Any:
    """Sets the channels of smallest norm to zero.

    Args:
      groups: the channel dimensions.
      params: the parameters.
      sparsity: share of all channels that shall be zero.

    Returns:
      The parameters.
    """
    cut = sdp_jax.plan_cut(
        groups, params, scores=sdp_jax.channel_norms(groups, params), sparsity=sparsity
    )
    keep = {
        d.name: jnp.zeros(d.size).at[jnp.asarray(kept)].set(1)
        for d, kept in zip(groups, cut.kept, strict=True)
    }
    return sdp_jax.scale_channels(groups, params, groups.join(keep))


def sparsity_of(groups: sdp_jax.Groups, params: Any) -> float:
    """Share of the channels that are zero."""
    alive = int(sdp_jax.channels_alive(groups, params).sum())
    return 1 - alive / groups.num_channels


def solutions(
    options: Valley, reference: Run, pairs: sdp_jax.valley.Eigenpairs
) -> dict[str, tuple[Any, bool]]:
    """Parameters by name, and whether they come from the seed of the reference.

    Args:
      options: what to compare.
      reference: the run of SGD.
      pairs: its sharp directions.

    Returns:
      In the order of the table.
    """
    groups, dense = reference.groups.at("params"), reference.state.params
    found: dict[str, tuple[Any, bool]] = {}
    sparsity = None
    for path in options.pruned:
        run = load_run(path, options.data_dir)
        config = config_of(path, options.data_dir)
        params, name = run.state.params, config.method
        if config.method == "altsdp":
            name = "altsdp" if config.valley == "none" else "altsdp, explicit"
        if name in found:
            name = f"{name}, {path.name}"
        _check_twin(path, config, same_seed=True, of=options)
        if sparsity is None:
            sparsity = sparsity_of(groups, params)
        elif sparsity_of(groups, params) < sparsity:
            params, name = prune_to(groups, params, sparsity), f"{name}, then magnitude"
        found[name] = params, True
    assert sparsity is not None
    found["magnitude"] = prune_to(groups, dense, sparsity), True
    for method in ("exact", "first_order"):
        for restore in (False, True):
            result = sdp_jax.valley.sdp(
                dense,
                groups,
                None,
                pairs.vectors,
                sparsity=sparsity,
                method=method,
                restore=restore,
            )
            name = f"one-shot SDP, {method.replace('_', ' ')}"
            found[name + (", restored" if restore else "")] = result.params, True
    far = sdp_jax.valley.sdp(
        dense, groups, None, pairs.vectors, sparsity=options.far, restore=True
    )
    found[f"one-shot SDP, restored, {options.far:.0%}"] = far.params, True
    if options.other is not None:
        config = config_of(options.other, options.data_dir)
        _check_twin(options.other, config, same_seed=False, of=options)
        other = load_run(options.other, options.data_dir)
        found["SGD, another seed"] = other.state.params, False
    return found


def _check_twin(
    path: pathlib.Path, config: Config, *, same_seed: bool, of: Valley
) -> None:
    """Refuses runs of another model, or of the wrong seed."""
    reference = config_of(of.reference, of.data_dir)
    other = [k for k in ALIKE if getattr(config, k) != getattr(reference, k)]
    if other:
        raise ValueError(
            f"{path} differs from the reference in {', '.join(other)}; they cannot be "
            "compared"
        )
    if (config.seed == reference.seed) != same_seed:
        raise ValueError(
            f"{path} has seed {config.seed} and the reference {reference.seed}; "
            + ("pruned runs need the same" if same_seed else "the other run another")
        )


def main(options: Valley) -> dict[str, sdp_jax.valley.Certificate]:
    """Certifies all solutions and prints the table.

    Args:
      options: what to compare.

    Returns:
      The certificates by name.

    Raises:
      ValueError: if a run is not finished, or none is given.
    """
    if not options.pruned:
        raise ValueError("give at least one run that pruned with --pruned")
    console = rich.console.Console()
    reference = load_run(options.reference, options.data_dir)
    config = config_of(options.reference, options.data_dir)
    dataset = dataset_of(config, options.data_dir)
    task = make_task(
        reference,
        dataset,
        examples=options.examples,
        curvature_examples=options.curvature_examples,
    )
    groups, dense = reference.groups.at("params"), reference.state.params
    _check_options(options)
    certificates: dict[str, sdp_jax.valley.Certificate] = {}
    with progress_bars(console) as progress:
        pairs = sdp_jax.valley.top_eigenpairs(
            task.loss_fn,
            dense,
            task.curvature,
            max(options.rank, options.sdp_rank),
            tol=0.01,
            progress=Reporter(progress),
        )
        few = sdp_jax.valley.Eigenpairs(
            pairs.values[: options.rank],
            jax.tree.map(lambda u: u[: options.rank], pairs.vectors),
            pairs.errors[: options.rank],
            pairs.angles[: options.rank],
            pairs.products,
        )
        for name, (params, same_seed) in solutions(options, reference, pairs).items():
            slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
            file = options.out / f"{slug}.json"
            if file.is_file():
                text = file.read_text()
                certificates[name] = sdp_jax.valley.Certificate.from_json(text)
                continue
            certificate = sdp_jax.valley.certify(
                task.loss_fn,
                dense,
                params,
                task.training,
                test_data=task.test,
                groups=groups,
                eigenpairs=few,
                curvature_data=task.curvature,
                points=options.points,
                curve_steps=options.curve_steps,
                same_seed=same_seed,
                progress=Reporter(progress, f"{name}: "),
                **task.keywords,
            )
            write_whole(file, certificate.to_json() + "\n")
            certificates[name] = certificate
    console.print(markdown(certificates), soft_wrap=True, highlight=False)
    return certificates


def _check_options(options: Valley) -> None:
    """Certificates that were made with other options are not taken for these."""
    raw = {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "out"}
    file = options.out / "options.json"
    if file.is_file() and json.loads(file.read_text()) != raw:
        raise ValueError(
            f"{options.out} holds certificates that were made with other options; give "
            "another --out, or delete it"
        )
    write_whole(file, json.dumps(raw) + "\n")


def markdown(certificates: dict[str, sdp_jax.valley.Certificate]) -> str:
    """The certificates as a Markdown table.

    Args:
      certificates: by name.

    Returns:
      Markdown.
    """
    lines = [
        "| | channels zero | test accuracy | training loss | gap | barrier, line "
        "| barrier, curve | move in sharp directions | in the valley |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(certificates.values()))
    lines.append(
        f"| SGD | 0 % | {first.reference['test']['accuracy']:.2%} "
        f"| {first.reference['train']['loss']:.4f} | | | | | |"
    )
    for name, c in certificates.items():
        lines.append(
            f"| {name} | {c.sparsity:.0%} | {c.pruned['test']['accuracy']:.2%} "
            f"| {c.pruned['train']['loss']:.4f} | {c.gap:.4f} | {c.line.barrier:.4f} "
            f"| {c.curve.barrier:.4f} | {c.displacements['pruned'].sharp_share:.4f} "
            f"| {'yes' if c.in_valley else 'no'} |"
        )
    some = [c.displacements["random"].sharp_share for c in certificates.values()]
    lines.append(
        f"\nA random move has a share of {min(some):.4f} to {max(some):.4f} in the "
        f"sharp directions; the tolerance is {first.tolerance:.4f}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(tyro.cli(Valley))
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
