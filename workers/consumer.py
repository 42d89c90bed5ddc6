"""Celery's consumer, with two things that a worker must outlive: a broker that is away or refuses, and bad messages."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.state import maybe_shutdown

from orchestrator.engine import now_ms
from orchestrator.ledger import Ledger
from orchestrator.messages import bytes_of, fault_of, keep_bytes
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

#: Pause before a broker that is away is tried again: the first, what is added each time, the longest.
_PAUSES_S = (0.2, 0.3, 2.0)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line of Celery's says what ours do not: not of a lost connection, nor of a lost child."""
    return not str(record.msg).startswith("Couldn't ack") and "WorkerLostError" not in repr(record.args)


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """Comes back within two seconds of the broker (Celery: up to 30) and logs one line when it goes and one after.

    A message that is no step's is set aside in the ledger: Celery would forget most of them, and die of some.
    """

    def __init__(self, ledger: Ledger, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = ledger
        self._outage = Outage(log, "consumer")
        #: Whether it takes no messages for now: so it begins (sizing.py).
        self.is_standing_by = True
        # Celery's own lines about it: one for each try, and one for each message in work, which then comes again.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
        logging.getLogger("celery.worker.request").addFilter(_is_news)
        logging.getLogger("multiprocessing").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

    def take(self, room: int) -> None:
        """Take up to `room` messages from now on that are not done with."""
        if self.qos is not None:
            self.initial_prefetch_count = room  # also after the connection was lost
            self.qos.value = room  # the event loop tells the broker

    def stand_by(self) -> None:
        """Take no messages any more; what was taken stays. Idempotent."""
        if not self.is_standing_by and self.task_consumer is not None:
            self.is_standing_by = True
            self.task_consumer.cancel()

    def go_on(self) -> None:
        """Take messages again. Idempotent."""
        if self.is_standing_by and self.task_consumer is not None:
            self.is_standing_by = False
            self.task_consumer.consume()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            fault = fault_of(message)
            if self.is_standing_by:  # it was on its way
                message.requeue()
            elif fault:
                self._set_aside(message, *fault)
            else:
                handle(message)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._set_aside(message, "body", f"its body cannot be read ({type(exc).__name__})")

    def _set_aside(self, message: Any, reason: str, detail: str) -> None:
        raw, queue = bytes_of(message), _queue_of(message)
        try:
            self._ledger.set_aside(raw, reason, now_ms(), detail=detail, queue=queue)
        except Exception as exc:  # noqa: BLE001 -- it is the message of somebody else: it must neither be lost nor end us
            self._outage.begins(exc)
            time.sleep(_PAUSES_S[-1])
            message.requeue()
            return
        self._outage.ends()
        log.error("message_set_aside", queue=queue, reason=reason, detail=detail)
        message.reject()

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
        keep_bytes(conn.default_channel)
        return conn

    def on_ready(self) -> None:
        super().on_ready()
        if self.is_standing_by and self.task_consumer is not None:  # Celery has begun to consume, as at its start
            self.task_consumer.cancel()
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


def _queue_of(message: Any) -> str:
    """Return the queue that a message was on; our queues are bound under their own names."""
    delivery = getattr(message, "delivery", None)
    if delivery is not None:
        return str(delivery.queue)
    return str((message.delivery_info or {}).get("routing_key", ""))
