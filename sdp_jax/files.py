"""Saving small parameters together with the cut that made them."""

import importlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

from sdp_jax.cut import Cut
from sdp_jax.tree import PyTree


def save(directory: str | os.PathLike[str], params: PyTree, cut: Cut) -> None:
    """Writes small parameters (Orbax) and their cut (JSON), all or nothing."""
    cut.check_small(params)
    checkpointing = _orbax()
    path = pathlib.Path(directory).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another directory or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=path.name, dir=path.parent))
    try:
        (scratch / "cut.json").write_text(cut.to_json())
        with checkpointing.StandardCheckpointer() as checkpointer:
            checkpointer.save(scratch / "params", params)
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def load(
    directory: str | os.PathLike[str], like: PyTree | None = None
) -> tuple[Any, Cut]:
    """Reads what :func:`save` wrote, in the containers of ``like`` if it is given."""
    checkpointing = _orbax()
    path = pathlib.Path(directory).absolute()
    if not (path / "cut.json").is_file() or not (path / "params").is_dir():
        raise FileNotFoundError(
            f"{path} holds no saved cut: it needs cut.json and params/, as "
            "Pruned.save writes them"
        )
    cut = Cut.from_json((path / "cut.json").read_text())
    target = None if like is None else cut.small_like(like)
    with checkpointing.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", target)
    if like is None:
        try:
            cut.check_small(params)
        except ValueError as error:
            raise ValueError(
                "the parameters were saved in containers that are no dictionaries or "
                "lists; pass like=, a tree of arrays or shapes of that structure"
            ) from error
    cut.check_small(params)
    return params, cut


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            "saving and loading need orbax-checkpoint: pip install orbax-checkpoint"
        ) from error
