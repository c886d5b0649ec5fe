"""Saving small parameters together with the cut that made them."""

import contextlib
import glob
import importlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sdp_jax.cut import Cut
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table, replace_leaves


def save(directory: str | os.PathLike[str], params: PyTree, cut: Cut) -> None:
    """Writes small parameters (Orbax) and their cut (JSON), all or nothing.

    Of several processes all call it. They go by the path of the first one, which also
    writes the JSON; arrays of one process are taken to be the same in all of them.
    """
    path = pathlib.Path(_broadcast(str(pathlib.Path(directory).absolute())))
    # Not by tempfile, whose directories nobody else may read.
    scratch = path.with_name(_broadcast(f"{path.name}.{uuid.uuid4().hex}.part"))
    first = jax.process_index() == 0
    try:
        with _together():
            cut.check_small(params)
            checkpointing = _orbax()
            if first:
                _begin(path, scratch, params, cut)
        with _together():
            if not scratch.is_dir():
                raise FileNotFoundError(
                    f"process {jax.process_index()} does not see {scratch}, which the "
                    "first process has made: save into a directory that all of them "
                    "share"
                )
        with _together(), checkpointing.StandardCheckpointer() as checkpointer:
            solid = jax.tree.map(lambda x: _everywhere(_solid(x)), params)
            checkpointer.save(scratch / "params", solid)
        with _together():
            if first:
                scratch.rename(path)
    except BaseException:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _begin(path: pathlib.Path, scratch: pathlib.Path, params: PyTree, cut: Cut) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another directory or remove it")
    dtypes = {p: str(leaf_dtype(x)) for p, x in leaf_table(params).items()}
    record = json.loads(cut.to_json()) | {"dtypes": dtypes}
    scratch.mkdir(parents=True)
    (scratch / "cut.json").write_text(json.dumps(record))


def load(
    directory: str | os.PathLike[str], like: PyTree | None = None
) -> tuple[Any, Cut]:
    """Reads what :func:`save` wrote, in the containers of ``like`` if it is given.

    Arrays lie where those of ``like`` do, dense or small, else on a device of this
    process, however many processes have saved them.
    """
    checkpointing = _orbax()
    path = pathlib.Path(directory).absolute()
    if not (path / "cut.json").is_file() or not (path / "params").is_dir():
        parts = sorted(
            p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*.part")
        )
        cut_off = f"; {', '.join(parts)} beside it is left of saves that were cut off"
        raise FileNotFoundError(
            f"{path} holds no saved cut: it needs cut.json and params/, as "
            f"Pruned.save writes them{cut_off if parts else ''}"
        )
    text = (path / "cut.json").read_text()
    cut = Cut.from_json(text)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with checkpointing.StandardCheckpointer() as checkpointer:
        if like is None:
            saved = checkpointer.metadata(path / "params").item_metadata.tree
            target = jax.tree.map(lambda leaf: _as_saved(leaf, here), saved)
        else:
            dtypes = json.loads(text).get("dtypes", {})
            shapes = _of_dtypes(cut.small_like(like), dtypes)
            places = _places(cut, like, here)
            target = jax.tree.map(
                lambda x, y: jax.ShapeDtypeStruct(
                    tuple(n or 1 for n in x.shape), x.dtype, sharding=y
                ),
                shapes,
                places,
            )
        params = _hollow(checkpointer.restore(path / "params", target), cut)
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


def _solid(leaf: Any) -> Any:
    """What stands for an array without entries, which Orbax does not save."""
    shape = np.shape(leaf)
    return leaf if 0 not in shape else np.zeros([n or 1 for n in shape], leaf.dtype)


def _hollow(params: PyTree, cut: Cut) -> PyTree:
    """Arrays without entries again where layers are gone."""
    leaves = {
        path: leaf[tuple(slice(n) for n in cut.small_shapes[path])]
        for path, leaf in leaf_table(params).items()
        if 0 in cut.small_shapes.get(path, ())
    }
    return replace_leaves(params, leaves)


def _as_saved(leaf: Any, here: jax.sharding.Sharding) -> Any:
    """What stands for an array, or for a NumPy array or number, that was saved."""
    if leaf.sharding is None:
        empty = np.zeros(leaf.shape, leaf.dtype)
        number = isinstance(leaf, _orbax().metadata.ScalarMetadata)
        return empty.item() if number else empty
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


def _places(cut: Cut, like: PyTree, here: jax.sharding.Sharding) -> PyTree:
    """Where the small arrays are to lie: as those of a dense or small tree do."""
    places = jax.tree.map(lambda x: getattr(x, "sharding", None) or here, like)
    shapes = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(np.shape(x), leaf_dtype(x), sharding=y),
        like,
        places,
    )
    try:
        cut.check_small(shapes)
    except ValueError:
        cut.take(shapes)  # Says where devices cannot share what stays.
    return places


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Waits for all processes behind what they do; if one fails, all do."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.asarray(error is None))
        if error is None and not fine.all():
            raise RuntimeError(
                f"saving failed in process {int(np.argmin(fine))}, whose error says why"
            )
    if error is not None:
        raise error


def _broadcast(text: str) -> str:
    """The text of the first process."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(own))))
    own = np.resize(own, size)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own))).decode()


def _everywhere(leaf: Any) -> Any:
    """An array of this process as one of all processes, each of which has it."""
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    if jax.process_count() == 1 or not local:
        return leaf
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    whole = jax.sharding.PartitionSpec()
    return multihost_utils.host_local_array_to_global_array(leaf, mesh, whole)


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
