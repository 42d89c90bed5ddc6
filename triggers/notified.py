"""Takes a bucket's notifications off an SQS queue, and emits what they tell.

Each receiver takes up to ten messages, has their events on the bus, and only then deletes them. While they are in its
hands their visibility is renewed, so that an outage of the bus neither gives them to somebody else nor counts as a
receive, of which the queue's owner may allow a few only. One receiver waits for messages; another helps while there are
more than one call brings. What nobody can read is set aside, with its bytes, and deleted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import Ledger
from orchestrator.ledger.objects import How, ObjectRecords, Verdict
from orchestrator.subscriptions import s3_source
from orchestrator.telemetry import Outage, get_logger
from triggers.aws import Queue, describe_error, queue_url, sqs_client, store_errors
from triggers.notifications import Told, UnreadableError, read_notification

_RECEIVERS = 2
_AT_ONCE = 10
#: How long a message stays ours without being renewed: after kill -9 somebody else has it that much later.
_VISIBILITY_S = 15
_WAIT_S = 5
_BACKOFF_S = (0.2, 30.0)
_BUS_BACKOFF_S = (0.1, 5.0)
_STOP_S = 10.0
_FULL_S = 0.2

log = get_logger(__name__)


class QueueTrigger:
    """Emits an event for each object that the messages of a queue tell of.

    `emit` blocks until all of the events are durable and raises OrchestratorError or OSError if they are not; then the
    messages are kept, and it is tried again. Several triggers, in several processes, may share a queue. While `is_full`
    nothing is taken: messages wait on their queue, and not in our server's memory.
    """

    def __init__(
        self,
        queue: Queue,
        *,
        ledger: Ledger,
        emit: Callable[[Sequence[Event]], None],
        is_full: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._make = partial(_Receiving, queue, ledger, emit, is_full, clock)
        self._receiving: _Receiving | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to take messages; returns at once. The queue need not exist. Idempotent."""
        with self._lock:
            if self._receiving is None:
                self._receiving = self._make()
                self._receiving.start()

    def stop(self) -> None:
        """Return when nothing will be emitted any more, or after 10 s if `emit` hangs. Idempotent."""
        with self._lock:
            receiving, self._receiving = self._receiving, None
        if receiving is not None and not receiving.stop(_STOP_S):
            log.warning("s3_queue_stop_timed_out")


class _StoppedError(Exception):
    """Control flow: stop was asked for while something was being tried again."""


class _Receiving:
    """One run of a trigger, from start to stop."""

    def __init__(
        self,
        queue: Queue,
        ledger: Ledger,
        emit: Callable[[Sequence[Event]], None],
        is_full: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._ledger = ledger
        self._emit = emit
        self._is_full = is_full
        self._clock = clock
        self._log = log.bind(queue=queue.name)
        self._outage = Outage(self._log, "s3_queue")
        self._bus_outage = Outage(self._log, "s3_trigger")
        self._connecting = threading.Lock()  # guards the next two
        self._client: Any = None
        self._url = ""
        self._stopping = threading.Event()
        self._lock = threading.Condition()  # guards all that follows
        self._at_work = 0
        self._is_crowded = False  # there are more messages than one call brings
        self._in_hand: set[str] = set()  # receipt handles

    def start(self) -> None:
        loops = [self._receive_always, *[self._receive_when_crowded] * (_RECEIVERS - 1), self._renew_always]
        for loop in loops:
            threading.Thread(target=loop, name=f"s3-queue:{self._queue.name}", daemon=True).start()

    def stop(self, timeout_s: float) -> bool:
        """Tell all to stop; those who wait for messages give back what still comes."""
        self._stopping.set()
        with self._lock:
            self._lock.notify_all()
            return self._lock.wait_for(lambda: not self._at_work, timeout_s)

    # ---- the loops

    def _receive_always(self) -> None:
        wait_s = _BACKOFF_S[0]
        while not self._stopping.is_set():
            try:
                self._receive(_WAIT_S)
                self._outage.ends()
                wait_s = _BACKOFF_S[0]
            except _StoppedError:
                return
            except Exception as exc:  # noqa: BLE001 -- this loop owns its thread
                self._begin_outage(exc)
                self._stopping.wait(wait_s)
                wait_s = min(wait_s * 2, _BACKOFF_S[1])

    def _receive_when_crowded(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._is_crowded or self._stopping.is_set())
            if self._stopping.is_set():
                return
            try:
                self._receive(0)
            except _StoppedError:
                return
            except Exception as exc:  # noqa: BLE001 -- the other loop tells of it, if it lasts
                self._log.info("s3_queue_helper_failed", error=describe_error(exc))
                with self._lock:
                    self._is_crowded = False

    def _renew_always(self) -> None:
        while not self._stopping.wait(_VISIBILITY_S / 3):
            with self._lock:
                handles = list(self._in_hand)
            with suppress(*store_errors()):  # a message that is lost comes again, and is known
                self._make_visible_in(_VISIBILITY_S, handles)

    # ---- one batch

    def _receive(self, wait_s: int) -> None:
        while self._is_full():
            if self._stopping.wait(_FULL_S):
                raise _StoppedError
        client = self._connect()
        answer = client.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=_AT_ONCE,
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=_VISIBILITY_S,
        )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        handles = [message["ReceiptHandle"] for message in messages]
        with self._lock:
            is_stopped = self._stopping.is_set()
            if not is_stopped:
                self._at_work += 1
                self._in_hand.update(handles)
                self._is_crowded = len(messages) == _AT_ONCE
                self._lock.notify_all()
        if is_stopped:
            self._make_visible_in(0, handles)
            raise _StoppedError
        try:
            self._handle_all([message.get("Body", "") for message in messages])
            with self._lock:
                self._in_hand.difference_update(handles)
            self._delete(handles)
        except _StoppedError:
            with suppress(*store_errors()):
                self._make_visible_in(0, handles)
            raise
        finally:
            with self._lock:
                self._in_hand.difference_update(handles)
                self._at_work -= 1
                self._lock.notify_all()

    def _handle_all(self, bodies: list[str]) -> None:
        try:
            self._insist(lambda: self._handle(bodies))
        except (_StoppedError, UnavailableError):
            raise
        except Exception:  # noqa: BLE001 -- one of them is what nobody thought of
            self._log.exception("s3_messages_failed")
            for body in bodies:
                self._handle_alone(body)

    def _handle_alone(self, body: str) -> None:
        try:
            self._insist(lambda: self._handle([body]))
        except _StoppedError:
            raise
        except Exception as exc:  # noqa: BLE001 -- trying again would not help it, and would hold up all others
            detail = f"it could not be handled: {type(exc).__name__}"
            self._insist(lambda: self._set_aside(body, detail))

    def _insist(self, action: Callable[[], None]) -> None:
        """Do it until the bus and the ledger take it."""
        wait_s, longest_s = _BUS_BACKOFF_S
        while True:
            try:
                action()
                self._bus_outage.ends()
                return
            except (OrchestratorError, OSError) as exc:
                self._bus_outage.begins(exc)
                if self._stopping.wait(wait_s):
                    raise _StoppedError from exc
                wait_s = min(wait_s * 2, longest_s)

    def _handle(self, bodies: list[str]) -> None:
        """Have what these messages tell on the bus; may be done again."""
        told: dict[str, list[Told]] = {}
        for body in bodies:
            try:
                for one in read_notification(body, now_ms=round(self._clock() * 1000)):
                    told.setdefault(one.bucket, []).append(one)
            except UnreadableError as exc:
                self._set_aside(body, str(exc))
        for bucket, of_bucket in told.items():
            self._emit_all(bucket, of_bucket)

    def _emit_all(self, bucket: str, told: list[Told]) -> None:
        source = s3_source(bucket, self._queue.endpoint_url)
        # The removal of one version says nothing of the object, and is told by notifications alone.
        events = [
            one.sighting.event(source, bucket, one.sighting.identity) for one in told if one.sighting.is_of_one_version
        ]
        records = ObjectRecords(self._ledger, source)
        claims = records.claim([(one.sighting, How.TOLD) for one in told if not one.sighting.is_of_one_version])
        for claim in claims:
            if claim.verdict is Verdict.LATE:
                self._log.info("s3_notification_is_late", bucket=bucket, key=claim.sighting.key)
        claimed = list({claim.event_id: claim for claim in claims if claim.event_id}.values())
        events += [claim.sighting.event(source, bucket, claim.event_id) for claim in claimed]
        if events:
            self._emit(events)
        records.confirm(claimed)

    def _set_aside(self, body: str, detail: str) -> None:
        raw = body.encode("utf-8", "surrogatepass")
        self._ledger.set_aside(raw, "notification", round(self._clock() * 1000), detail=detail, queue=self._queue.name)
        self._log.error("s3_notification_set_aside", reason=detail)

    # ---- the queue

    def _connect(self) -> Any:
        with self._connecting:
            if self._client is None:
                client = sqs_client(self._queue)
                self._url = queue_url(client, self._queue)
                self._client = client
            return self._client

    def _begin_outage(self, error: Exception) -> None:
        if isinstance(error, store_errors()):
            self._outage.begins(describe_error(error))
        elif isinstance(error, OrchestratorError):
            self._bus_outage.begins(error)
            return
        else:
            self._log.exception("s3_queue_crashed")
        with self._connecting:
            self._client = None  # the next one finds the credentials that there are then

    def _delete(self, handles: list[str]) -> None:
        """Delete messages; one that stays comes again, and is known then."""
        if handles:
            entries = [{"Id": str(n), "ReceiptHandle": handle} for n, handle in enumerate(handles)]
            answer = self._connect().delete_message_batch(QueueUrl=self._url, Entries=entries)
            if answer.get("Failed"):
                self._log.info("s3_messages_not_deleted", count=len(answer["Failed"]))

    def _make_visible_in(self, seconds: int, handles: list[str]) -> None:
        for first in range(0, len(handles), _AT_ONCE):
            entries = [
                {"Id": str(n), "ReceiptHandle": handle, "VisibilityTimeout": seconds}
                for n, handle in enumerate(handles[first : first + _AT_ONCE])
            ]
            self._connect().change_message_visibility_batch(QueueUrl=self._url, Entries=entries)
