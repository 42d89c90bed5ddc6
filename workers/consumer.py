"""Celery's consumer, with two things that a worker must outlive: a broker that is away or refuses, and bad messages."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.state import maybe_shutdown

from orchestrator.celery_app import STEP_TASK
from orchestrator.engine import now_ms
from orchestrator.errors import UnavailableError
from orchestrator.ledger import Ledger
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

#: Pause before a broker that is away is tried again: the first, what is added each time, the longest.
_PAUSES_S = (0.2, 0.3, 2.0)
#: How often to look for children that have died. Celery waits 5 s, or for a pipe that a sibling may hold open.
_REPLACE_S = 0.5
#: Celery would wait for an eta with the message in hand, and forget what has expired.
_NOT_FOR_STEPS = ("eta", "expires", "stamped_headers")


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """Comes back within two seconds of the broker (Celery: up to 30) and logs one line when it goes and one after.

    A message that is no step's is set aside in the ledger: Celery would forget most of them, and die of some.
    """

    def __init__(self, ledger: Ledger, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = ledger
        self._outage = Outage(log, "consumer")
        # Celery's own lines about it: one for each try, and one for each message in work, which then comes again.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
        logging.getLogger("celery.worker.request").addFilter(lambda record: "ack" not in str(record.msg)[:14])
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_REPLACE_S, self.pool.maintain_pool)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            fault = fault_of(message)
            if fault:
                self._set_aside(message, fault)
            else:
                handle(message)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._set_aside(message, f"it cannot be read: {type(exc).__name__}: {exc}")

    def _set_aside(self, message: Any, fault: str) -> None:
        try:
            self._ledger.set_aside(_bytes_of(message), fault, now_ms())
        except UnavailableError as exc:
            self._outage.begins(exc)
            time.sleep(_PAUSES_S[-1])
            message.requeue()
            return
        log.error("message_set_aside", reason=fault)
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


def _bytes_of(message: Any) -> bytes:
    """Return a message as it was published; where the broker's client does not keep that, its parts as JSON."""
    if hasattr(message, "delivery"):
        raw: bytes = message.delivery.raw
        return raw
    parts = {name: getattr(message, name) for name in ("headers", "content_type", "content_encoding", "properties")}
    body = message.body
    parts["body"] = body.decode("latin-1") if isinstance(body, bytes) else body
    return json.dumps(parts, default=str).encode()


def fault_of(message: Any) -> str:
    """Say why a message cannot be that of a step; empty if it can.

    Everything is looked at that Celery, which takes its form for granted, would die of.
    """
    headers = message.headers if isinstance(message.headers, dict) else {}
    if headers.get("task") != STEP_TASK:
        return f"it is not for the task {STEP_TASK}"
    if message.content_type != "application/json" or not isinstance(message.content_encoding, str):
        return "its content is not JSON"
    if not isinstance(headers.get("id"), str) or not isinstance(message.delivery_info, dict):
        return "it has no id, or no delivery_info"
    if headers.get("timelimit") not in (None, [None, None]) or any(headers.get(name) for name in _NOT_FOR_STEPS):
        return f"it has a timelimit, or one of {', '.join(_NOT_FOR_STEPS)}, which steps do not have"
    try:
        args, kwargs, embed = message.payload
    except Exception as exc:  # noqa: BLE001 -- whatever a decoder raises
        return f"its body cannot be read ({type(exc).__name__})"
    kinds = [type(argument) for argument in args] if isinstance(args, list) else []
    if kinds not in ([str, str], [str, str, int, int]) or kwargs or not isinstance(embed, dict):
        return "its body is not [[run, step], {}, {...}] or [[run, step, lo, hi], {}, {...}]"
    return ""
