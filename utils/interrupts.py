"""SIGINT and SIGTERM: the first one lets a run keep its state, the second one ends it at once.

`interrupts` is the process's only object of its kind; signals belong to the process. Without
`handled()` (in a notebook, in a thread) nothing changes: Ctrl-C is Python's KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was told to end by a signal; `exit_code` is what shells expect of it."""

    def __init__(self, number: int = signal.SIGINT, message: str = "Interrupted.") -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class Interrupts:
    """What signals have asked for, and when they may end the run.

    Attributes:
        number: of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False
        self._received = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Context in which this object receives the signals, if it is opened in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.number, self._received, self._deferred = None, 0, False
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            self.number = None

    @contextmanager
    def deferred(self, wait: bool = True) -> Iterator[None]:
        """Context in which the first signal is only noted; whoever opens it looks at `number`.

        Args:
            wait: False opens a part of such a context in which a signal ends the run at once.
        """
        before, self._deferred = self._deferred, wait
        try:
            if not wait:
                self.raise_if_any()
            yield
        finally:
            self._deferred = before

    def raise_if_any(self) -> None:
        """End the run if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        if self._received > 2:  # what the second one raised is being waited for
            os._exit(128 + number)
        first, self.number = self.number is None, self.number or number
        if not (first and self._deferred):
            raise Interrupted(number)
        # not by way of logging, whose buffers may be in use right now
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: ending after this update; once more ends it now.\n".encode())


interrupts = Interrupts()
