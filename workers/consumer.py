"""Celery's consumer, which waits for a broker that is away, or that refuses, without giving up and without much ado."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import structlog
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.state import maybe_shutdown

from orchestrator.telemetry import Outage

log = structlog.get_logger(__name__)

#: Pause before a broker that is away is tried again: the first, what is added each time, the longest.
_PAUSES_S = (0.2, 0.3, 2.0)
#: How often to look for children that have died. Celery waits 5 s, or for a pipe that a sibling may hold open.
_REPLACE_S = 0.5


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """Comes back within two seconds of the broker (Celery: up to 30) and logs one line when it goes and one after."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outage = Outage(log, "consumer")
        # Celery's own lines about it: one for each try, and one for each message in work, which then comes again.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
        logging.getLogger("celery.worker.request").addFilter(lambda record: "ack" not in str(record.msg)[:14])
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_REPLACE_S, self.pool.maintain_pool)

    def ensure_connected(self, conn: Any) -> Any:
        """Return the connection when it is there; blocks until then, or until the worker is told to stop."""
        first, step, longest = _PAUSES_S
        conn.ensure_connection(
            lambda exc, _: self._outage.begins(exc),
            None,
            interval_start=first,
            interval_step=step,
            interval_max=longest,
            callback=maybe_shutdown,
        )
        return conn

    def on_ready(self) -> None:
        super().on_ready()
        self._outage.ends()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._pause(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._pause(exc)
        super().on_connection_error_after_connected(exc)

    def _pause(self, exc: Exception) -> None:
        """A server that can be reached and lets nobody work would be tried again without end, and at once."""
        if self._outage.is_on:
            time.sleep(_PAUSES_S[-1])
        self._outage.begins(exc)
