"""Writing files."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, also beside other processes.

    Args:
      path: the file; its directory is made if it is not there.
      text: all of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
