"""Ctrl-C and SIGTERM while a run trains: a checkpoint first, then the exit code of the signal.

The run stops between two batches. Where none ends within PATIENCE seconds, or before the disk needs what is left of the time
for the checkpoint, or a second signal comes, what waits for it is broken off: nothing of the step was applied yet, so the start of the step is what is saved.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from veneer.errors import EXIT_TERMINATED

PATIENCE = 4.0  # seconds at most; whoever sent SIGTERM waits WAITED, and the checkpoint is still to be written
WAITED, LEAST, SPARE = 10.0, 0.05, 2.0  # SPARE: for the program to end


class StopNow(BaseException):
    """Raised in the middle of a batch when its end takes too long."""


class StopSignals:
    """A context: `asked` is true once one of the signals came. Outside the main thread nothing is caught.

    Args:
        saving: seconds that the checkpoint will take: on a slow disk nothing is waited for.
    """

    def __init__(self, saving: Callable[[], float] = lambda: 0.0) -> None:
        self.saving = saving
        self.number: int | None = None
        self._breakable = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.number is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {
                signal.SIGINT: self._came,
                signal.SIGTERM: self._came,
                signal.SIGALRM: self._late,
            }
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before and self.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """What may be broken off with StopNow: it changes nothing that is kept."""
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    def leave(self) -> None:
        """End the program as the signal asks for."""
        if self.number == signal.SIGTERM:
            raise SystemExit(EXIT_TERMINATED)
        raise KeyboardInterrupt

    def _came(self, number: int, _: object) -> None:
        if self.asked:
            return self._late()
        self.number = number
        patience = max(LEAST, min(PATIENCE, WAITED - SPARE - self.saving()))
        signal.setitimer(signal.ITIMER_REAL, patience, 0.5)  # again, as an exception is lost where nobody can raise one

    def _late(self, *_: object) -> None:
        if self._breakable and self.asked:
            raise StopNow
