"""EventBus: the durable queue between the triggers and the dispatcher, over kombu.

An event is accepted once `publish` has returned: then the broker has it. It leaves the bus when the handler that
`consume` gave it to has returned; a handler that raises, or a process that dies, gets it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from kombu import Consumer, Queue

from orchestrator.celery_app import CONFIRM_TIMEOUT_S, EVENT_QUEUE, HEARTBEAT_S, broker_errors, publishing
from orchestrator.errors import UnavailableError
from orchestrator.events import Event
from orchestrator.messages import body_of, keep_bytes
from orchestrator.settings import mask_url
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

_QUEUE = Queue(EVENT_QUEUE, routing_key=EVENT_QUEUE, durable=True)
#: A connection that was idle may have been closed long ago, which is seen only when it is used.
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
_PREFETCH = 64
_WAIT_S = (0.1, 5.0)


class EventBus:
    """The bus on the broker of an application."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def publish(self, events: Sequence[Event]) -> None:
        """Put events on the bus; returns when the broker has all of them.

        Raises UnavailableError, and then some of them may be on the bus: a repeat is recognised by source + id.
        """
        try:
            with publishing(self._app) as producer:
                with producer.batch():
                    for event in events:
                        producer.publish(
                            event.to_json(), serializer="json", exchange="", routing_key=EVENT_QUEUE, delivery_mode=2,
                            declare=[_QUEUE], retry=True, retry_policy=_RETRY, confirm_timeout=CONFIRM_TIMEOUT_S,
                        )  # fmt: skip
        except broker_errors(self._app) as exc:
            reason = exc.__cause__ or exc  # of a batch kombu says no more than that it failed
            raise UnavailableError(f"the broker at {self._where()} cannot take events: {reason}; see to it") from exc

    def depth(self) -> int:
        """Return how many events wait on the bus. Raises UnavailableError."""
        try:
            return self._depth()
        except broker_errors(self._app):  # the connection may have been idle for too long: see _RETRY
            pass
        try:
            return self._depth()
        except broker_errors(self._app) as exc:
            raise UnavailableError(f"the broker at {self._where()} does not answer: {exc}; see to it") from exc

    def _depth(self) -> int:
        with publishing(self._app) as producer:
            return int(producer.channel.queue_declare(EVENT_QUEUE, durable=True, auto_delete=False).message_count)

    def consume(self, handle: Callable[[object, bytes], None], stop: threading.Event) -> None:
        """Give each message, as (decoded body, raw bytes), to `handle` until `stop` is set; blocks.

        The body is None where it is not JSON. A broker that is away is waited for, with one log line per change.
        """
        wait_s, outage = _WAIT_S[0], Outage(log, "bus")

        def receive(message: Any) -> None:
            try:
                body = message.decode() if message.content_type == "application/json" else None
            except Exception:  # noqa: BLE001 -- whatever a decoder raises, the bytes are what is handed on
                body = None
            handle(body, body_of(message))
            message.ack()

        while not stop.is_set():
            try:
                with self._app.connection_for_read(heartbeat=HEARTBEAT_S) as connection:
                    connection.ensure_connection(max_retries=1, timeout=2)
                    channel = keep_bytes(connection.channel())
                    consumer = Consumer(
                        channel, [_QUEUE], on_message=receive, prefetch_count=_PREFETCH, accept=["json"]
                    )
                    # Else kombu raises, and the message that it cannot unpack is the first one for ever.
                    consumer.on_decode_error = lambda message, _: receive(message)
                    with consumer:
                        while not stop.is_set():
                            try:
                                connection.drain_events(timeout=0.5)
                            except TimeoutError:
                                connection.heartbeat_check()
                            outage.ends()
                            wait_s = _WAIT_S[0]
            except Exception as exc:  # noqa: BLE001 -- this loop owns the thread: it outlives any fault of the broker
                outage.begins(f"{type(exc).__name__}: {exc}", broker=self._where())
                stop.wait(wait_s)
                wait_s = min(wait_s * 2, _WAIT_S[1])

    def _where(self) -> str:
        return mask_url(self._app.conf.broker_url)
