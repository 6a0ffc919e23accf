"""Stopping a run when the user or the system asks for it, between two dispatches."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["EXIT_INTERRUPTED", "StopRequest"]

EXIT_INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`; a second one acts as usual.

    A context manager for the main thread; the handlers of before come back at its end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
