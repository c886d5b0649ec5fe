"""Saving small parameters together with the cut that made them."""

import importlib
import json
import os
import pathlib
import shutil
import uuid
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.cut import Cut
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table


def save(directory: str | os.PathLike[str], params: PyTree, cut: Cut) -> None:
    """Writes small parameters (Orbax) and their cut (JSON), all or nothing."""
    cut.check_small(params)
    checkpointing = _orbax()
    path = pathlib.Path(directory).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another directory or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = leaf_table(params)
    dtypes = {p: str(leaf_dtype(x)) for p, x in table.items()}
    record = json.loads(cut.to_json()) | {"dtypes": dtypes}
    # Not by tempfile, whose directories nobody else may read.
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    scratch.mkdir()
    try:
        (scratch / "cut.json").write_text(json.dumps(record))
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
    text = (path / "cut.json").read_text()
    cut = Cut.from_json(text)
    target = None
    if like is not None:
        dtypes = json.loads(text).get("dtypes", {})
        target = _of_dtypes(cut.small_like(like), dtypes)
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


def _of_dtypes(shapes: PyTree, dtypes: dict[str, str]) -> PyTree:
    """Shapes with the dtypes that were saved."""
    leaves = []
    for path, leaf in leaf_table(shapes).items():
        if path in dtypes and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaf = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtypes[path]))
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            "saving and loading need orbax-checkpoint: pip install 'sdp-jax[save]'"
        ) from error
