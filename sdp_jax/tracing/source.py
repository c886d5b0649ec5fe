"""Where in the user's code an equation comes from."""

import pathlib
from typing import Any

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def is_jax(closed: Any) -> bool:
    """Whether a function that is called, a jaxpr, is one of JAX's own."""
    info = getattr(getattr(closed, "jaxpr", closed), "debug_info", None)
    source = str(getattr(info, "func_src_info", ""))
    return "/site-packages/jax/" in source.replace("\\", "/")


def user_line(source: Any) -> str:
    """``file:line`` of the innermost frame outside of libraries, or nothing."""
    traceback = getattr(source, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        path = pathlib.PurePath(frame.file_name)
        if "site-packages" not in path.parts and not path.is_relative_to(_PACKAGE):
            return f"{frame.file_name}:{frame.line_num}"
    return ""
