"""Stops a run between two dispatches when the user or the system asks for it."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["EXIT_INTERRUPTED", "StopRequest"]

EXIT_INTERRUPTED = 128 + signal.SIGINT

SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`; a second one acts as usual.

    A context manager for the main thread; it restores the previous handlers on exit.

    Attributes:
      requested: whether there was a signal.
      last_line: if there is nothing to save yet, the line to print before the first
        signal ends the process. This happens at once: Python's own handlers wait until
        XLA has compiled, whereas a thread does not.
    """

    def __init__(
        self,
        last_line: str | None = None,
        signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
    ) -> None:
        self.requested = False
        self.last_line = last_line
        self._signals = signals
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno())
        threading.Thread(target=self._watch, daemon=True).start()
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        signal.set_wakeup_fd(self._previous_descriptor)
        self._sender.close()

    def _watch(self) -> None:
        with self._receiver:
            while numbers := self._receiver.recv(1):
                if self.last_line is not None and numbers[0] in self._signals:
                    start = f"{SHOW_CURSOR}\n" if sys.stdout.isatty() else ""
                    with contextlib.suppress(OSError):  # nobody may be reading
                        # Not `print`: the main thread may hold the stream's lock.
                        os.write(1, f"{start}{self.last_line}\n".encode())
                    os._exit(EXIT_INTERRUPTED)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
