"""Celery's consumer, with two things otherwise:

- It waits for a broker that is away, or that refuses, without giving up and without much ado.
- A message that is no call of a task of ours is set aside, with one log line. Celery drops most of these, and dies of
  some, again and again, because they come back.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import structlog
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.state import maybe_shutdown

from orchestrator.telemetry import Outage

log = structlog.get_logger(__name__)

#: Pause before a broker that is away is tried again: the first, what is added each time, the longest.
_PAUSES_S = (0.2, 0.3, 2.0)
#: Of a message that a server drops, kept in the log.
_BODY_CHARACTERS = 4000


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """Comes back within two seconds of the broker (Celery: up to 30) and logs one line when it goes and one after."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outage = Outage(log, "consumer")
        # Celery's own lines about it: one for each try, and one for each message in work, which then comes again.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
        logging.getLogger("celery.worker.request").addFilter(lambda record: "ack" not in str(record.msg)[:14])
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

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

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        receive = super().create_task_handler(*args, **kwargs)

        def receive_or_set_aside(message: Any) -> None:
            try:
                receive(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as exc:  # noqa: BLE001 -- whatever a message is made of, it must not end the worker
                self._set_aside(message, exc)

        return receive_or_set_aside

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._set_aside(message, "it names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._set_aside(message, f"no task is named {exc}")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._set_aside(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._set_aside(message, exc)

    def _set_aside(self, message: Any, reason: str | Exception) -> None:
        why = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        if hasattr(message.channel, "set_aside"):
            message.channel.set_aside(message, why)
        else:  # RabbitMQ: the server drops it, unless the queue has a dead-letter exchange
            queue = (message.delivery_info or {}).get("routing_key")
            log.error("message_rejected", queue=queue, reason=why, body=repr(message.body)[:_BODY_CHARACTERS])
            message.reject_log_error(log, self.connection_errors)

    def _pause(self, exc: Exception) -> None:
        """A server that can be reached and lets nobody work would be tried again without end, and at once."""
        if self._outage.is_on:
            time.sleep(_PAUSES_S[-1])
        self._outage.begins(exc)
