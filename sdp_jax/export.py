"""export_stablehlo: a function as a StableHLO artefact for any batch size."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from sdp_jax.tracing.static import is_static
from sdp_jax.tree import PyTree, leaf_dtype

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = {"cpu", "cuda", "rocm", "tpu"}


def export_stablehlo(
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    in_axes: Any = 0,
    path: str | os.PathLike[str] | None = None,
    embed_params: bool = False,
    platforms: Sequence[str] = PLATFORMS,
    vjp_order: int = 0,
) -> export.Exported:
    """Exports a function through :mod:`jax.export`, for any batch size.

    What comes out runs without the Python code that made it, from JAX or from any
    other runtime that reads StableHLO.

    Args:
      fn: a function of parameters and inputs, most often ``sdp_jax.narrow(fn, cut)``.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: its other arguments, likewise. What is no array becomes a constant;
        give ``None`` in their place to what comes out.
      in_axes: where the batch axis of each input is, as in :func:`jax.vmap`: a number
        or ``None`` for all of them, or a tuple with an entry for each. It may have any
        length of at least 1 in the result, the same one in all inputs. All other
        lengths stay as they are.
      path: file to write, if any; ``jax.export.deserialize`` reads it.
      embed_params: whether the parameters become constants of the artefact, which then
        takes the inputs only. Otherwise they are its first argument.
      platforms: where it will run: any of ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
      vjp_order: how many times the written artefact can be differentiated.

    Returns:
      The exported function; ``.call`` runs it and ``.mlir_module()`` is its text.

    Raises:
      ValueError: if ``platforms`` are unknown, ``in_axes`` does not fit the inputs, or
        they have different batch sizes, or parameters without values are to be
        embedded.
      ImportError: if a file is asked for and flatbuffers is not installed.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> fn = lambda params, x: x @ params["w"]
      >>> exported = sdp_jax.export_stablehlo(fn, {"w": jnp.eye(3)}, jnp.ones((1, 3)))
      >>> exported.call({"w": jnp.eye(3)}, jnp.ones((5, 3))).shape
      (5, 3)
    """
    if isinstance(platforms, str) or not set(platforms) <= KNOWN_PLATFORMS:
        raise ValueError(
            f"platforms must be a tuple of names out of {sorted(KNOWN_PLATFORMS)}; got "
            f"{platforms!r}"
        )
    if path is not None:
        _check_flatbuffers()
    shapes = _with_symbol(inputs, in_axes)
    constant = jax.tree.map(lambda leaf: leaf if is_static(leaf) else None, shapes)
    moving = jax.tree.map(lambda leaf: None if is_static(leaf) else leaf, shapes)

    def call(params: PyTree, *moving: Any) -> Any:
        whole = jax.tree.map(
            lambda a, b: b if a is None else a,
            constant,
            list(moving),
            is_leaf=lambda leaf: leaf is None,
        )
        return fn(params, *whole)

    if embed_params:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            told = "embed_params=True needs parameters with values"
            raise ValueError(f"{told}; got a jax.ShapeDtypeStruct")
        function, args = functools.partial(call, params), moving
    else:
        function, args = call, [jax.tree.map(_shape, params), *moving]
    exported = export.export(jax.jit(function), platforms=tuple(platforms))(*args)
    if path is not None:
        _write(pathlib.Path(path), _serialize(exported, vjp_order))
    return exported


def _serialize(exported: export.Exported, vjp_order: int) -> bytes | bytearray:
    try:
        return exported.serialize(vjp_order=vjp_order)
    except ValueError as error:
        if "unregistered type" not in str(error):
            raise
        raise ValueError(
            f"{error}. Embed the parameters (embed_params=True), or give plain "
            "dictionaries, lists and tuples, or register the type with "
            "jax.export.register_pytree_node_serialization"
        ) from error


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf_dtype(leaf))


def _with_symbol(inputs: Sequence[Any], in_axes: Any) -> list[Any]:
    """The shapes of inputs with a symbol for the length of their batch axes."""
    if in_axes is None or isinstance(in_axes, int):
        in_axes = (in_axes,) * len(inputs)
    if not isinstance(in_axes, tuple | list) or len(in_axes) != len(inputs):
        raise ValueError(
            f"in_axes must be a number, None, or a tuple with an entry for each of the "
            f"{len(inputs)} inputs; got {in_axes!r}"
        )
    (batch,) = export.symbolic_shape("batch")
    lengths: set[int] = set()

    def replace(leaf: Any, axis: int | None) -> Any:
        if is_static(leaf):
            return leaf
        shape = list(np.shape(leaf))
        if axis is not None:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"an input of shape {tuple(shape)} has no batch axis {axis}; say "
                    "in in_axes which inputs have none"
                )
            lengths.add(shape[axis])
            shape[axis] = batch
        return jax.ShapeDtypeStruct(tuple(shape), leaf_dtype(leaf))

    shapes = [
        jax.tree.map(lambda leaf, axis=axis: replace(leaf, axis), tree)
        for axis, tree in zip(in_axes, inputs, strict=True)
    ]
    if len(lengths) > 1:
        raise ValueError(
            f"the inputs have batch axes of different lengths {sorted(lengths)}; check "
            "in_axes"
        )
    return shapes


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "jax.export writes files by flatbuffers: pip install 'sdp-jax[export]'"
        ) from error


def _write(path: pathlib.Path, data: bytes | bytearray) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
