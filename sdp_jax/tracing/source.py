"""Where in the user's code an equation comes from."""

import pathlib
import sysconfig
from typing import Any

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_PYTHON = pathlib.Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = ("site-packages", "dist-packages")
# Of what is installed, these say nothing of the model.
_LIBRARIES = {"jax", "jaxlib", "flax", "equinox", "haiku", "optax", "chex"}


def is_jax(closed: Any) -> bool:
    """Whether a function that is called, a jaxpr, is one of JAX's own."""
    info = getattr(getattr(closed, "jaxpr", closed), "debug_info", None)
    source = str(getattr(info, "func_src_info", ""))
    return "/site-packages/jax/" in source.replace("\\", "/")


def user_line(source: Any) -> str:
    """``file:line`` of the innermost frame outside of libraries, or nothing.

    That of an installed package, from there on, is followed by the user's call.
    """
    traceback = getattr(source, "traceback", None)
    inside = ""
    for frame in traceback.frames if traceback is not None else ():
        path = pathlib.PurePath(frame.file_name)
        place = next((i for i, p in enumerate(path.parts) if p in _INSTALLED), None)
        if place is not None:
            within = pathlib.PurePath(*path.parts[place + 1 :])
            if not inside and within.parts[0] not in _LIBRARIES:
                inside = f"{within.as_posix()}:{frame.line_num}, called at "
        elif not any(path.is_relative_to(root) for root in (_PACKAGE, _PYTHON)):
            return f"{inside}{frame.file_name}:{frame.line_num}"
    return inside.removesuffix(", called at ")
