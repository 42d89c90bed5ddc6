"""GroupCommit: many deliveries on the bus in one publish, for clients that each wait for their own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.events import Event
from orchestrator.service import Service
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

_THREADS = 2
_BATCH_EVENTS = 200
_BATCH_BYTES = 4_000_000
#: Deliveries that wait at a time; who comes then is told to come again.
_WAITING = 2000
#: Who has waited this long is told to come again, too.
_PATIENCE_S = 10.0


@dataclass(slots=True, eq=False)
class _Delivery:
    events: Sequence[Event]
    size: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[bool]] = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.loop.create_future()

    def settle(self, outcome: list[bool] | OrchestratorError) -> None:
        if self.done.done():
            return
        if isinstance(outcome, OrchestratorError):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class GroupCommit:
    """Threads that publish what coroutines hand in; what comes while one is at it goes into the next publish.

    `known` says of each event whether it was dealt with before, as far as that can be told; it must not raise.
    """

    def __init__(
        self, publish: Callable[[Sequence[Event]], None], known: Callable[[Sequence[Event]], list[bool]]
    ) -> None:
        self._publish = publish
        self._known = known
        self._waiting: deque[_Delivery] = deque()
        self._there_is = threading.Condition()
        self._outage = Outage(log, "webhooks")
        self._services = [Service(f"webhooks-{number}", self._loop) for number in range(_THREADS)]

    def start(self) -> None:
        """Begin; returns at once."""
        for service in self._services:
            service.start()

    def stop(self) -> None:
        """End; returns when nothing is being published any more."""
        for service in self._services:
            service.stopping.set()
        with self._there_is:
            self._there_is.notify_all()
        for service in self._services:
            service.stop()

    async def commit(self, events: Sequence[Event], size: int) -> list[bool]:
        """Return when the broker has the events, of about `size` bytes, which of them are known to have come before.

        Raises UnavailableError.
        """
        delivery = _Delivery(events, size, asyncio.get_running_loop())
        with self._there_is:
            if len(self._waiting) >= _WAITING:
                raise UnavailableError("too many deliveries wait for the broker")
            self._waiting.append(delivery)
            self._there_is.notify()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await delivery.done
        except TimeoutError:
            raise UnavailableError(f"the broker took no events for {_PATIENCE_S:g} s") from None

    def _loop(self, stopping: threading.Event) -> None:
        while batch := self._take(stopping):
            outcome = self._commit([event for delivery in batch for event in delivery.events])
            at = 0
            for delivery in batch:
                count = len(delivery.events)
                own = outcome if isinstance(outcome, OrchestratorError) else outcome[at : at + count]
                at += count
                try:
                    delivery.loop.call_soon_threadsafe(delivery.settle, own)
                except RuntimeError:  # the server has ended meanwhile, and nobody waits
                    continue

    def _commit(self, events: Sequence[Event]) -> list[bool] | OrchestratorError:
        try:
            known = self._known(events)
            self._publish(events)
            self._outage.ends()
            return known
        except OrchestratorError as exc:
            self._outage.begins(exc)
            return exc
        except Exception as exc:
            log.exception("webhooks_not_published", events=len(events))
            return UnavailableError(f"publishing failed: {type(exc).__name__}")

    def _take(self, stopping: threading.Event) -> list[_Delivery]:
        """Wait for deliveries and take some, without those whose clients have gone; none: it is time to end."""
        with self._there_is:
            batch: list[_Delivery] = []
            while not batch:
                while not self._waiting:
                    if stopping.is_set():
                        return []
                    self._there_is.wait()
                events = size = 0
                while self._waiting and (
                    not batch or (events < _BATCH_EVENTS and size + self._waiting[0].size <= _BATCH_BYTES)
                ):
                    delivery = self._waiting.popleft()
                    if delivery.done.cancelled():
                        continue
                    batch.append(delivery)
                    events += len(delivery.events)
                    size += delivery.size
            return batch
