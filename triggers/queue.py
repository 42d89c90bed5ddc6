"""The queue trigger: each message of a queue that somebody else fills becomes one event.

    queue_redis.py, queue_amqp.py, queue_sqs.py --> a message, with its id --> the bus --> the broker may forget it

A message is let go of only after the bus has its event, or the ledger the bytes of one that cannot be read. What comes
again, for we were killed in between, comes under the same id, and so as the same event. While the bus is away, what was
taken is kept, and tried again; nothing further is taken, so that no queue of dead letters of theirs fills meanwhile.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cloud_events import attributes_of, data_of, is_json
from orchestrator.errors import InputError, OrchestratorError, UnavailableError, one_line
from orchestrator.events import QUEUE_MESSAGE, TRIGGER, Event, foreign_fault
from orchestrator.ledger import Ledger
from orchestrator.service import Service
from orchestrator.settings import mask_url, read_secret
from orchestrator.strict_json import NotJsonError, read_json
from orchestrator.subscriptions import OnQueue, queue_source, queue_trigger
from orchestrator.telemetry import Outage, get_logger
from orchestrator.workflows import Workflow
from triggers.queue_source import Message, Source

log = get_logger(__name__)

#: How long to wait for messages before looking whether to stop, and between tries when something is away.
_WAIT_S = 0.5
_PAUSES_S = (0.1, 5.0)
#: What is larger does not become an event.
_LARGEST = 10_000_000
#: CloudEvents over AMQP and elsewhere in binary mode: the prefixes of the headers that have its attributes.
_BINARY = re.compile(r"(?:cloudEvents[:_]|ce[-_])([a-z0-9]+)\Z", re.IGNORECASE)

Emit = Callable[[Sequence[Event]], None]


class QueueTrigger:
    """Emits an event for each message of one queue, in a thread of its own.

    `emit` blocks until all of the events are durable and raises OrchestratorError if they are not.
    """

    def __init__(
        self,
        on: OnQueue,
        *,
        ledger: Ledger,
        emit: Emit,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._on = on
        self._trigger = queue_trigger(on)
        self._ledger = ledger
        self._emit = emit
        self._clock = clock
        self._log = log.bind(queue=on.queue)
        self._outage = Outage(self._log, "queue_trigger")
        self._service = Service(f"queue-trigger:{on.queue}", self._loop)

    def start(self) -> None:
        """Begin to take messages; returns at once. Idempotent. The queue need not be there."""
        self._service.start()

    def stop(self) -> None:
        """Return when what is in work is done, or given back. Idempotent."""
        self._service.stop()

    def _loop(self, stopping: threading.Event) -> None:
        pause_s = _PAUSES_S[0]
        while not stopping.is_set():
            source: Source | None = None
            taken: Sequence[Message] = ()
            where = ""
            try:
                url = self._url()
                where = mask_url(url)
                source = self._source(url)
                while not stopping.is_set():
                    taken = source.take(_WAIT_S)
                    if not taken or self._accept(source, taken, stopping):
                        taken, pause_s = (), _PAUSES_S[0]
                        self._outage.ends()
            except Exception as exc:  # noqa: BLE001 -- this loop owns the thread: it outlives any fault of a broker
                self._outage.begins(one_line(f"{type(exc).__name__}: {exc}"), broker=where)
                stopping.wait(pause_s)
                pause_s = min(2 * pause_s, _PAUSES_S[1])
            finally:
                if source is not None:
                    source.close(taken)

    def _url(self) -> str:
        return read_secret(self._on.url) if self._on.url.startswith(("env:", "file:")) else self._on.url

    def _source(self, url: str) -> Source:
        scheme = urlsplit(url).scheme
        if scheme in ("redis", "rediss"):
            from triggers.queue_redis import RedisSource

            return RedisSource(url, self._on.queue)
        if scheme in ("amqp", "amqps"):
            from triggers.queue_amqp import AmqpSource

            return AmqpSource(url, self._on.queue, trigger=self._trigger, ledger=self._ledger)
        if scheme == "sqs":
            from triggers.queue_sqs import SqsSource

            return SqsSource(url, self._on.queue)
        raise InputError(f"{self._on.url}: its scheme is none of redis, amqp and sqs")

    def _accept(self, source: Source, taken: Sequence[Message], stopping: threading.Event) -> bool:
        """Have the bus take the events, and let go of the messages; False if that did not work until stop."""
        events: list[tuple[Message, Event]] = []
        unreadable: list[tuple[Message, str]] = []
        for message in taken:
            try:
                events.append((message, event_of(self._on, message, self._clock())))
            except InputError as exc:
                unreadable.append((message, str(exc)))
        pause_s = _PAUSES_S[0]
        while True:
            try:
                if events:
                    unreadable += self._emit_all(events)
                    events = []
                while unreadable:
                    self._set_aside(*unreadable[-1])
                    unreadable.pop()
                break
            except UnavailableError as exc:
                self._outage.begins(exc)
                if stopping.wait(pause_s):
                    return False
                pause_s = min(2 * pause_s, _PAUSES_S[1])
                source.keep(taken)
        source.settle(taken)
        return True

    def _emit_all(self, events: Sequence[tuple[Message, Event]]) -> list[tuple[Message, str]]:
        """Emit them, and answer those that nobody can: tried again, they would hold up all others."""
        try:
            self._emit([event for _, event in events])
        except UnavailableError:
            raise
        except Exception as exc:  # noqa: BLE001 -- one of them is what nobody thought of
            if len(events) > 1:
                return [one for pair in events for one in self._emit_all([pair])]
            return [(events[0][0], f"it could not be put on the bus: {type(exc).__name__}")]
        return []

    def _set_aside(self, message: Message, why: str) -> None:
        now_ms = time.time_ns() // 1_000_000
        self._ledger.set_aside(message.body, "queue_message", now_ms, detail=why, queue=self._on.queue)
        self._log.error("queue_message_set_aside", detail=why)


def event_of(on: OnQueue, message: Message, now: datetime) -> Event:
    """Return the event that a message is. Raises InputError, without anything of its body, if it cannot be one."""
    if len(message.body) > _LARGEST:
        raise InputError(f"the message has more than {_LARGEST} bytes")
    trigger = queue_trigger(on)
    if on.format == "cloudevents":
        event = _cloud_event(message)
        fault = foreign_fault(event)
        if fault is not None:
            raise InputError(fault.partition(", as ")[0])
        return replace(event, extensions={**event.extensions, TRIGGER: trigger})
    event = Event(
        id=message.id,
        source=queue_source(on),
        type=QUEUE_MESSAGE,
        subject=on.queue,
        time=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        data={"body": _json(message.body), "headers": dict(message.headers), "queue": on.queue},
        extensions={TRIGGER: trigger},
    )
    return _checked(event.to_json())


def _cloud_event(message: Message) -> Event:
    """Return the CloudEvent in a message: structured, or (its attributes are headers) binary."""
    attributes = {
        match[1].lower(): value for name, value in message.headers.items() if (match := _BINARY.match(name)) is not None
    }
    if "specversion" not in attributes:
        return _checked(attributes_of(_json(message.body)))
    content_type = message.content_type or "application/json"
    if is_json(content_type):
        return _checked(attributes | {"data": _json(message.body)})
    return _checked(attributes | data_of(message.body, content_type))


def _checked(body: object) -> Event:
    try:
        return Event.from_json(body)
    except OrchestratorError as exc:
        # What it found instead is a piece of the body.
        raise InputError(str(exc).partition(", not ")[0]) from exc


def _json(body: bytes) -> Any:
    try:
        return read_json(body)
    except NotJsonError as exc:
        raise InputError("the message is not JSON, or not such as everybody can read") from exc


def queue_triggers(
    workflows: Iterable[Workflow], *, ledger: Ledger, emit: Emit
) -> Mapping[Hashable, Callable[[], QueueTrigger]]:
    """Return what makes a trigger for each queue that is asked for, by what says which."""
    wanted = {
        replace(on, pattern=None) for workflow in workflows for on in workflow.on if isinstance(on, OnQueue)
    }  # of two that differ in their patterns alone one takes the messages, for both
    return {
        ("queue", on.url, on.queue, on.format): partial(QueueTrigger, on, ledger=ledger, emit=emit) for on in wanted
    }
