"""The records of a run for TensorBoard."""

import pathlib
import shutil
from typing import Any


class Board:
    """Event files of a run, written anew from its records each time it goes on."""

    def __init__(self, path: pathlib.Path):
        """Nothing is written, and nothing replaced, before the first record.

        Args:
          path: the directory of the event files.

        Raises:
          ImportError: if tensorboardX is not installed.
        """
        from tensorboardX import SummaryWriter

        self._path, self._make = path, SummaryWriter
        self._writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record of an epoch; numbers in dictionaries get a common prefix.

        The first one replaces what is in the directory. Each is in the file a second
        later, the last one after :meth:`close`.
        """
        if self._writer is None:
            if self._path.exists():
                shutil.rmtree(self._path)
            self._writer = self._make(str(self._path), flush_secs=1)
        step = record["epoch"]
        for name, value in record.items():
            values = value if isinstance(value, dict) else {"": value}
            for part, number in values.items():
                tag = f"{name}/{part}" if part else name
                self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
