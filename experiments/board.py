"""The records of a run for TensorBoard."""

import pathlib
import shutil
from typing import Any


class Board:
    """Event files of a run, written anew from its records each time it goes on."""

    def __init__(self, path: pathlib.Path):
        """Begins a directory of event files.

        Args:
          path: the directory; what is in it is replaced.

        Raises:
          ImportError: if tensorboardX is not installed.
        """
        from tensorboardX import SummaryWriter

        if path.exists():
            shutil.rmtree(path)
        self._writer = SummaryWriter(str(path))

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record of an epoch; numbers in dictionaries get a common prefix."""
        step = record["epoch"]
        for name, value in record.items():
            values = value if isinstance(value, dict) else {"": value}
            for part, number in values.items():
                tag = f"{name}/{part}" if part else name
                self._writer.add_scalar(tag, number, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
