"""Service: a loop in a thread of its own, with a start and a stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

_STOP_S = 15.0


class Service:
    """Runs `loop` in a named thread until it is stopped.

    `loop` gets an event that is set when it shall return. Start and stop are idempotent, and stop before start is fine;
    a service that was stopped can be started again.
    """

    def __init__(self, name: str, loop: Callable[[threading.Event], None]) -> None:
        self._name = name
        self._loop = loop
        self.stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; returns at once."""
        if self._thread is None:
            self.stopping.clear()
            self._thread = threading.Thread(target=self._loop, args=(self.stopping,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End; returns when what the loop has in work is done, or after 15 s."""
        self.stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_S)
            self._thread = None
