"""Task events: what steps do, told to Celery's tools (Flower), as long as somebody watches.

Celery's own events are of messages, and one message carries many steps; so they stay off, and a child tells of each
link and item that it runs: received, started, and how it ended. It writes a line of JSON into a pipe that all children
of a worker share; a thread of the parent, which also says that the worker is alive, publishes what has come in one
message, compressed, some times a second.

    child: StepRunner -> StepEvents -> pipe -> parent: Monitoring -> broker -> Flower

A full pipe, and a broker that is away, cost events and never a step.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.events.event import get_exchange
from celery.utils.sysinfo import load_average
from celery.utils.time import utcoffset
from celery.worker.state import SOFTWARE_INFO
from kombu import Producer

from orchestrator.celery_app import broker_errors, impatient_connection
from orchestrator.ledger import Taken
from orchestrator.runs import StepError, task_id
from orchestrator.service import Service
from orchestrator.telemetry import Outage, get_logger
from workers.slots import Slots

log = get_logger(__name__)

#: How long events are gathered for one message.
GATHER_S = 0.3
#: How often a worker says that it is alive; tools take it for gone after twice this.
HEARTBEAT_S = 5.0
#: How often to look whether somebody watches.
_LOOK_S = 0.5
#: Room for events that wait to be gathered, and how many go into one message.
_PIPE_BYTES = 1024 * 1024
_MOST_EVENTS = 4000
#: What a pipe takes in one piece (PIPE_BUF), so that the lines of children are not mixed.
_LINE_BYTES = 4096
_ERROR_CHARACTERS = 300
#: How long a broker that is away is left alone, and how long it may take to answer.
_PAUSE_S = 5.0
_TIMEOUT_S = 1.0

#: State of an attempt in the ledger -> what Celery's tools call its event. Those of Celery's that fit; where none does,
#: tools show the name itself (SKIPPED, SLEEPING, WAITING).
_TYPES = {
    "succeeded": "task-succeeded",
    "failed": "task-failed",
    "retrying": "task-retried",
    "postponed": "task-retried",
    "cancelled": "task-revoked",
    "skipped": "task-skipped",
    "sleeping": "task-sleeping",
    "waiting": "task-waiting",
}


class Pipe:
    """What children write lines into and their parent reads; made before the children are."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # more than this machine allows: a burst loses some
                fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._rest = b""

    def close(self) -> None:
        """Close it; the parent's last act."""
        os.close(self.reader)
        os.close(self._writer)

    def write(self, line: bytes) -> None:
        """Write a line, or lose it when nobody has read for long. Never blocks."""
        with suppress(OSError):
            os.write(self._writer, line)

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to read; False if nothing came."""
        return bool(select.select([self.reader], [], [], timeout_s)[0])

    def read(self) -> list[str]:
        """Return the lines that have come."""
        pieces = [self._rest]
        while True:
            try:
                piece = os.read(self.reader, _PIPE_BYTES)
            except BlockingIOError:
                break
            if not piece:
                break
            pieces.append(piece)
        *lines, self._rest = b"".join(pieces).split(b"\n")
        return [line.decode() for line in lines]


def shown_error(error: StepError) -> str:
    """Return an error in one short line."""
    text = " ".join(f"{error.type}: {error.message}".split())
    return text if len(text) <= _ERROR_CHARACTERS else text[: _ERROR_CHARACTERS - 3] + "..."


@dataclass(slots=True, kw_only=True)
class Told:
    """One attempt that is at work, and whether its beginning was told. `since` is in seconds since the epoch."""

    run: str
    workflow: str
    slot: str
    attempt: int
    since: float
    is_begun: bool = False

    @property
    def id(self) -> str:
        return task_id(self.run, self.slot, self.attempt)

    @property
    def name(self) -> str:
        return f"{self.workflow}.{self.slot.partition('/')[0]}"

    @property
    def kwargs(self) -> str:
        index = self.slot.partition("/")[2]
        return f"{{'item': {index}}}" if index else "{}"


class StepEvents:
    """Tells of what one process runs. Costs the reading of a byte while nobody watches."""

    def __init__(self, pipe: Pipe, slots: Slots) -> None:
        self._pipe = pipe
        self._slots = slots

    def begin(self, run: str, workflow: str, taken: Taken) -> Told:
        """Tell that an attempt begins."""
        told = Told(run=run, workflow=workflow, slot=taken.slot, attempt=taken.attempt, since=time.time())
        if self._slots.is_monitored:
            self._write(self._beginning(told, os.getpid()))
        return told

    def end(
        self, told: Told, state: str, *, error: StepError | None = None, result: str = "", pid: int | None = None
    ) -> None:
        """Tell how it has ended, in this process or in `pid`; of what began when nobody watched, the beginning too."""
        if not self._slots.is_monitored:
            return
        now, pid = time.time(), pid or os.getpid()
        event: dict[str, Any] = {"type": _TYPES[state], "uuid": told.id, "timestamp": round(now, 4)}
        event["pid"] = pid
        if state == "succeeded":
            event["runtime"] = round(now - told.since, 4)
        if result:
            event["result"] = result
        if error is not None:
            event["exception"] = shown_error(error)
        if state == "cancelled":
            event |= {"terminated": True, "signum": None, "expired": False}
        self._write(([] if told.is_begun else self._beginning(told, pid)) + [event])

    @staticmethod
    def _beginning(told: Told, pid: int) -> list[dict[str, Any]]:
        told.is_begun, since = True, round(told.since, 4)
        received: dict[str, Any] = {"type": "task-received", "uuid": told.id, "timestamp": since, "pid": pid}
        received |= {"name": told.name, "args": told.run, "kwargs": told.kwargs}
        if told.attempt > 1:
            received["retries"] = told.attempt - 1
        started = {"type": "task-started", "uuid": told.id, "timestamp": since, "pid": pid}
        return [received, started]

    def _write(self, events: list[dict[str, Any]]) -> None:
        line = "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events).encode()
        if len(line) <= _LINE_BYTES:
            self._pipe.write(line)


class Monitoring:
    """The thread of a parent that publishes events while somebody watches.

    `publishing` is held while it uses the broker.
    """

    def __init__(
        self,
        app: Celery,
        slots: Slots,
        pipe: Pipe,
        hostname: str,
        *,
        publishing: AbstractContextManager[Any],
    ) -> None:
        self._app = app
        self._slots = slots
        self._pipe = pipe
        self._hostname = hostname
        self._publishing = publishing
        self._service = Service("monitoring", self._loop)
        self._outage = Outage(log, "monitoring")
        self._connection: Any = None
        self._producer: Any = None
        self._exchange: Any = None
        self._beat_at = 0.0
        self._is_online = False
        self._paused_until = 0.0

    def start(self) -> None:
        """Begin; returns at once."""
        self._service.start()

    def stop(self) -> None:
        """End; returns when the last events are published."""
        self._service.stop()

    def beat(self) -> None:
        """Say soon that the worker lives."""
        self._beat_at = 0.0

    def _loop(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self._turn(stopping)
            except Exception:  # this loop owns the thread
                log.exception("monitoring_failed")
                stopping.wait(_PAUSE_S)
        if self._slots.is_monitored:
            self._publish(self._pipe.read())
            self._send_worker_event("worker-offline")
        self._disconnect()

    def _turn(self, stopping: threading.Event) -> None:
        if not self._slots.is_monitored:
            self._is_online = False
            self._disconnect()
            self._pipe.read()
            stopping.wait(_LOOK_S)
            return
        if time.monotonic() >= self._beat_at or not self._is_online:
            self._beat_at = time.monotonic() + HEARTBEAT_S
            self._send_worker_event("worker-heartbeat" if self._is_online else "worker-online")
            self._is_online = True
        if self._pipe.wait(_LOOK_S):
            stopping.wait(GATHER_S)
            self._publish(self._pipe.read())

    def _publish(self, lines: list[str]) -> None:
        tail = f',"hostname":{json.dumps(self._hostname)},"utcoffset":{utcoffset():g},"clock":'
        clock = self._app.clock
        for lo in range(0, len(lines), _MOST_EVENTS):
            events = ",".join(f"{line[:-1]}{tail}{clock.forward()}}}" for line in lines[lo : lo + _MOST_EVENTS])
            self._send(f"[{events}]", "task.multi")

    def _send_worker_event(self, kind: str) -> None:
        event = {"type": kind, "hostname": self._hostname, "pid": os.getpid(), "timestamp": time.time()}
        event |= {"utcoffset": utcoffset(), "clock": self._app.clock.forward(), "freq": HEARTBEAT_S}
        active = sum(self._slots.read(slot) is not None for slot in range(self._slots.count))
        event |= {"active": active, "loadavg": load_average()} | SOFTWARE_INFO
        self._send(json.dumps(event), kind.replace("-", "."))

    def _send(self, body: str, routing_key: str) -> None:
        if time.monotonic() < self._paused_until:
            return
        try:
            with self._publishing:
                if self._producer is None:
                    self._connect()
                self._producer.publish(
                    body, content_type="application/json", content_encoding="utf-8", compression="zlib",
                    exchange=self._exchange.name, routing_key=routing_key, declare=[self._exchange],
                    delivery_mode=1, retry=False,
                )  # fmt: skip
            self._outage.ends()
        except broker_errors(self._app) as exc:
            self._outage.begins(exc)
            self._disconnect()
            self._paused_until = time.monotonic() + _PAUSE_S

    def _connect(self) -> None:
        self._connection = impatient_connection(self._app, _TIMEOUT_S)
        self._producer = Producer(self._connection.channel(), auto_declare=False)
        self._exchange = get_exchange(self._connection, name=self._app.conf.event_exchange)

    def _disconnect(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            with self._publishing:
                # Not `release`: kombu would say goodbye to an AMQP server, and wait for its answer.
                connection.collect()
