"""Ctrl-C and the signal of a scheduler as a wish to stop, not as an exception."""

import signal
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was stopped, and saved."""


class Interrupt:
    """Inside ``with``, the first SIGINT or SIGTERM only sets a flag; called, it tells.

    The second one raises ``KeyboardInterrupt`` as usual.
    """

    def __init__(self) -> None:
        """Nothing has been asked for yet."""
        self._asked = False
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._asked

    def __enter__(self) -> "Interrupt":
        """Takes the signals over; only the main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
