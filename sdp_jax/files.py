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
    """Writes small parameters (Orbax) and their cut (JSON) into a new directory.

    The directory appears when everything is written, or not at all.

    Args:
      directory: where to write; it must not exist.
      params: what ``cut.take`` made of the parameters.
      cut: the cut.

    Raises:
      FileExistsError: if the directory exists.
      ValueError: if the parameters are not those of the cut.
      ImportError: if orbax-checkpoint is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import files
      >>> params = {"w": jnp.array([[1., 0.], [2., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> cut = sdp_jax.plan_cut(groups, params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     files.save(f"{folder}/small", cut.take(params), cut)
    """
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
    """Reads what :func:`save` wrote.

    Args:
      directory: where it is.
      like: a tree of arrays or shapes with the structure of the dense or small
        parameters; without it dictionaries and lists come back. Trees of other
        containers (nnx state, Equinox modules) need it.

    Returns:
      The small parameters and the cut.

    Raises:
      FileNotFoundError: if there is nothing, or not all of it.
      ValueError: if the files do not belong together.
      ImportError: if orbax-checkpoint is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import files
      >>> params = {"w": jnp.array([[1., 0.], [2., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> cut = sdp_jax.plan_cut(groups, params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     files.save(folder + "/pruned", cut.take(params), cut)
      ...     small, again = files.load(folder + "/pruned", like=params)
      >>> print(small["w"].shape, again == cut)
      (2, 1) True
    """
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
