"""RunEnds: coroutines that wait for runs to end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from orchestrator.errors import UnavailableError
from orchestrator.ledger import Ledger, keys
from orchestrator.runs import RunState
from orchestrator.service import Service

#: What is told may be lost with a connection, so what is waited for is looked at that often besides.
_LOOK_EVERY_S = 2.0
_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class RunEnds:
    """One subscription for all who wait."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._waiters: dict[str, list[_Waiter]] = {}
        self._is_released = False
        self._service = Service("run-ends", self._loop)

    def start(self) -> None:
        """Begin; returns at once."""
        self._service.start()

    def stop(self) -> None:
        """End."""
        self._service.stop()

    def release(self) -> None:
        """Let all who wait go on, and whoever comes yet, for no more will be told."""
        with self._lock:
            self._is_released = True
            runs = list(self._waiters)
        for run in runs:
            self._tell(run)

    def outcome(self, run: str) -> tuple[str, str, str]:
        """Return state, payload of the output and JSON of the error of a run. Raises UnavailableError."""
        return self._ledger.outcome(run)

    def state(self, run: str) -> str:
        """Return the state of a run, empty if there is none. Raises UnavailableError."""
        return self.outcome(run)[0]

    @contextmanager
    def expect(self, run: str) -> Iterator[asyncio.Future[None]]:
        """Give what is done when the run ends, whether it is there already or comes to be."""
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        with self._lock:
            self._waiters.setdefault(run, []).append(waiter)
            if self._is_released:
                _settle(waiter[1])
        try:
            yield waiter[1]
        finally:
            with self._lock:
                left = [one for one in self._waiters[run] if one is not waiter]
                if left:
                    self._waiters[run] = left
                else:
                    del self._waiters[run]

    def _loop(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                with self._ledger.client.pubsub(ignore_subscribe_messages=True) as listener:
                    listener.subscribe(keys.RUN_ENDED)
                    look_at = 0.0
                    while not stopping.is_set():
                        message = listener.get_message(timeout=0.5)
                        if message is not None:
                            self._tell(json.loads(message["data"])["run"])
                        if time.monotonic() >= look_at:
                            self._look()
                            look_at = time.monotonic() + _LOOK_EVERY_S
            except (redis.RedisError, OSError, UnavailableError):
                stopping.wait(1.0)  # who waits is told at their limit where to look

    def _look(self) -> None:
        with self._lock:
            runs = list(self._waiters)
        for run in runs:
            state = self._ledger.outcome(run)[0]
            if state and RunState(state).is_end:
                self._tell(run)

    def _tell(self, run: str) -> None:
        with self._lock:
            waiters = list(self._waiters.get(run, ()))
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_settle, future)
            except RuntimeError:  # the server has ended meanwhile
                continue


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
