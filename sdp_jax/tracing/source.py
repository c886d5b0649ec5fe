"""Where in the user's code an equation comes from."""

import pathlib
from typing import Any


def user_line(source: Any) -> str:
    """File and line of the innermost frame outside of libraries.

    Args:
      source: source information of an equation, or ``None``.

    Returns:
      ``"file:line"``, or an empty string.
    """
    traceback = getattr(source, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        parts = pathlib.PurePath(frame.file_name).parts
        if not {"site-packages", "sdp_jax"} & set(parts):
            return f"{frame.file_name}:{frame.line_num}"
    return ""
