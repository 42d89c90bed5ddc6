"""Threads: what runs the steps of a worker of kind `threads`: for what waits for others, not for the processor.

As many messages run at once as there are permits; sizing.py grants and takes them, as it starts and ends children. A
thread is not ended: an idle one costs nothing. Each has a slot, as a child has.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.worker.state import task_ready

from orchestrator.telemetry import get_logger
from workers.slots import Slots

log = get_logger(__name__)

#: How often a worker that waits for its last steps lets Celery do what keeps its connection alive.
_TEND_S = 0.5


class Threads(BasePool):  # type: ignore[misc]  # celery has no types
    """Celery's pool of threads, with permits, and its callbacks in the event loop instead of the threads."""

    body_can_be_buffer = True
    signal_safe = False
    #: Set by `pool_of`. `begin` is called in each thread with its slot, before all else.
    slots: Slots
    begin: Callable[[int], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed_starts: list[str] = []
        self.has_started = False
        self._permits = self._running = self._leaving = 0
        self._queue: deque[tuple[Any, Callable[[], None]]] = deque()
        self._ended: deque[Callable[[], None]] = deque()
        self._futures: set[Future[None]] = set()
        self._hub: Any = None
        #: Where threads say that one of them has ended. The hub has `call_soon` for that, but what its callbacks have
        #: called soon in their turn, as acks are, waits there for the next timer.
        self._told, self._tell_end = os.pipe()
        for end in (self._told, self._tell_end):
            os.set_blocking(end, False)
        numbers = itertools.count()
        self._executor = ThreadPoolExecutor(
            max_workers=self.slots.count, thread_name_prefix="step", initializer=lambda: type(self).begin(next(numbers))
        )

    @property
    def processes(self) -> Threads | None:
        """What sizing.py sizes, while the pool is open."""
        return self if self._state == self.RUN else None

    # What there is

    @property
    def size(self) -> int:
        """How many threads may run a message or still do."""
        return self._permits + self._leaving

    @property
    def staying(self) -> int:
        """How many may."""
        return self._permits

    @property
    def busy(self) -> int:
        """How many of those do."""
        return self._running - self._leaving

    @property
    def busy_leaving(self) -> int:
        """How many do and may not go on with another."""
        return self._leaving

    @property
    def waiting(self) -> int:
        """How many messages have been taken that no thread has yet."""
        return len(self._queue)

    # What sizing.py asks for

    def start_one(self) -> None:
        """Let one more message run at a time."""
        self._permits += 1
        self._go_on()

    def leave(self, count: int) -> None:
        """Let so many fewer run at a time."""
        idle = self._permits - self.busy
        self._permits -= count
        self._leaving += max(0, count - idle)

    def keep(self, count: int) -> int:
        """Have up to so many of those that leave stay after all; answers how many."""
        kept = min(count, self._leaving)
        self._leaving -= kept
        self._permits += kept
        return kept

    def end_leaving(self) -> None:
        """Nothing: a thread is not ended."""

    def give_back(self, count: int) -> None:
        """Give back the last messages that no thread has: others may have room for them."""
        for _ in range(min(count, len(self._queue))):
            request, _call = self._queue.pop()
            task_ready(request)
            request.reject(requeue=True)

    def maintain_pool(self, *_: Any) -> None:
        """Have what has ended in threads known here."""
        while self._ended:
            self._ended.popleft()()
        self._go_on()

    # What Celery calls

    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        loop.add_reader(self._told, self._on_ended)

    def _on_ended(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._told, 4096)
        self.maintain_pool()

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        **_: Any,
    ) -> None:
        def call() -> None:
            accept_callback(os.getpid(), time.monotonic())
            work = partial(target, *args, **(kwargs or {}))
            future = self._executor.submit(self._run, work, callback, error_callback)
            self._futures.add(future)
            future.add_done_callback(self._futures.discard)

        self._queue.append((accept_callback.__self__, call))
        self._go_on()

    def flush(self) -> None:
        """Forget what has not begun: the connection is lost, and it is delivered again."""
        self._queue.clear()

    def _go_on(self) -> None:
        while self._queue and self.busy < self._permits and self._state == self.RUN:
            _request, call = self._queue.popleft()
            self._running += 1
            call()

    def _run(self, work: Callable[[], Any], callback: Any, error_callback: Any) -> None:
        try:
            tell = partial(callback, work())
        except BaseException as exc:  # one thread's end must not be that of the others
            log.exception("thread_failed")
            try:
                raise WorkerLostError(repr(exc)) from exc
            except WorkerLostError:
                tell = partial(error_callback, ExceptionInfo())
        self._ended.append(partial(self._end, tell))
        with suppress(BlockingIOError):  # it is full of that
            os.write(self._tell_end, b".")

    def _end(self, tell: Callable[[], None]) -> None:
        self._running -= 1
        self._leaving = max(0, self._leaving - 1)
        tell()

    def on_stop(self) -> None:
        """Wait for what runs; what has not begun goes back with the connection."""
        self._queue.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)
        while self._futures:
            wait(tuple(self._futures), timeout=_TEND_S)
            self._hub.fire_timers()
            self._acknowledge()
        if self._hub is not None:  # it was told to stop before it had begun
            self._acknowledge()

    def _acknowledge(self) -> None:
        self.maintain_pool()
        _run_ready_callbacks(self._hub)

    def on_terminate(self) -> None:
        """End at once: nothing else ends a thread. Its steps' leases run out."""
        log.warning("threads_are_cut_off", steps=self._running)
        os._exit(1)

    @property
    def num_processes(self) -> int:
        return self._permits


def pool_of(slots: Slots, begin: Callable[[int], None]) -> type[Any]:
    """Return a pool of threads for Celery which have these slots."""
    return type("SlotThreads", (Threads,), {"slots": slots, "begin": staticmethod(begin)})
