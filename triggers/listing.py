"""Lists a bucket: where nothing notifies, and to find what no notification told.

One of several processes does it, a page of up to 1,000 keys in a turn. How far it came is in the ledger after each, so
that whoever is next goes on there; no more than a page is ever in memory. Objects are not moved, marked or removed.

Where the bucket notifies a queue, a pass begins when the queue is empty, or was not for too long: it finds little then
but what was lost. That nothing starts twice does not rest on this, but on the records (orchestrator/ledger/objects.py).

    due --> [queue is empty] --> page --> ... --> page --> [once a day: sweep records of keys that are gone] --> due
              claim, emit, confirm, keep how far   ^
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from orchestrator.engine import Engine
from orchestrator.events import Event, digest
from orchestrator.leading import LeadingService
from orchestrator.ledger.objects import SHARDS, Claim, How, ObjectRecords, Verdict
from orchestrator.sightings import Sighting
from orchestrator.subscriptions import s3_source
from orchestrator.telemetry import Outage, get_logger
from triggers.aws import Queue, describe_error, error_code, queue_url, s3_client, sqs_client, store_errors

_PERIOD_S = 0.5
#: A queue counts as empty when it was for so long.
_QUIET_S = 2.0
#: A pass is put off by a queue that is not empty for no longer than this.
_PUT_OFF_S = 600.0
_PAGE = 1000
_EMIT_AT_ONCE = 500
_BACKOFF_S = (1.0, 60.0)
_DAY_MS = 86_400_000
_SWEPT_AT_ONCE = 512

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """Which keys somebody asks for, and whether those that are there at the first look count."""

    prefix: str
    suffix: str
    skips_existing: bool

    @property
    def name(self) -> str:
        return f"{quote(self.prefix)}*{quote(self.suffix)}"

    def has(self, key: str) -> bool:
        fits = key.startswith(self.prefix) and key.endswith(self.suffix)
        return fits and len(key) >= len(self.prefix) + len(self.suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A bucket to be listed, every `period_s`, after its queues are empty."""

    name: str
    region: str | None
    endpoint_url: str | None
    period_s: float
    scopes: tuple[Scope, ...]
    queues: tuple[Queue, ...]

    @property
    def source(self) -> str:
        return s3_source(self.name, self.endpoint_url)

    @property
    def roots(self) -> list[str]:
        """The prefixes to list: those that are not within another."""
        roots: list[str] = []
        for prefix in sorted({scope.prefix for scope in self.scopes}):
            if not roots or not prefix.startswith(roots[-1]):
                roots.append(prefix)
        return roots


class _StoppedError(Exception):
    """Control flow: stop was asked for in the middle of a page, which is listed again."""


class ListingTrigger(LeadingService):
    """Emits an event for each object of a bucket that nobody told of.

    `emit` blocks until all of the events are durable and raises OrchestratorError or OSError if they are not; then the
    page is listed again. While `is_full` no further page is. What is kept in the ledger: `scopes`, for which the pass
    is; `started` (ms, by the ledger), `root` and `after`, how far it came; `finished`; `looks`, for each scope since
    when it is looked at (ms, by the store) and whether a first pass has ended; `swept`, on which day.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        engine: Engine,
        emit: Callable[[Sequence[Event]], None],
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        self.role = f"s3-{digest('listing', bucket.source)[:12]}"
        super().__init__(engine)
        self._bucket = bucket
        self._emit = emit
        self._is_full = is_full
        self._log = log.bind(bucket=bucket.name)
        self._store_outage = Outage(self._log, "s3_bucket")
        self._queue_outage = Outage(self._log, "s3_reconcile")
        self._records = ObjectRecords(self._engine.ledger, bucket.source)
        self._scopes = [[scope.prefix, scope.suffix] for scope in bucket.scopes]
        self._state: dict[str, Any] | None = None  # None: somebody else may have changed it
        self._leads_since_ms: int | None = None
        self._waits_since: float | None = None
        self._quiet_since: float | None = None
        self._emitted = 0  # in this pass
        self._client: Any = None
        self._queue_clients: dict[Queue, tuple[Any, str]] = {}
        self._retry_at, self._backoff_s = 0.0, _BACKOFF_S[0]

    def turn(self) -> float:
        leads, now_ms = self.lead()
        if not leads:
            self._state, self._leads_since_ms, self._waits_since = None, None, None
            return _PERIOD_S
        if self._leads_since_ms is None:
            self._leads_since_ms = now_ms
        if time.monotonic() < self._retry_at:
            return _PERIOD_S
        try:
            return self._go_on(now_ms)
        except _StoppedError:
            return 0.0
        except store_errors() as exc:
            self._store_outage.begins(describe_error(exc))
            self._client = None  # the next one finds the credentials that there are then
            self._retry_at = time.monotonic() + self._backoff_s
            self._backoff_s = min(self._backoff_s * 2, _BACKOFF_S[1])
            return _PERIOD_S

    def _go_on(self, now_ms: int) -> float:
        if self._state is None:
            self._state = self._records.listing()
        state = self._state
        if "started" not in state or state.get("scopes") != self._scopes:
            self._state = state = {"looks": state.get("looks", {}), "swept": state.get("swept", 0)}
        if not _is_going_on(state):
            due_ms = self._due_ms(state)
            if now_ms < due_ms:
                return min(_PERIOD_S, (due_ms - now_ms) / 1000)
        if self._waits_since is None:
            self._waits_since, self._quiet_since = time.monotonic(), None
        if not _is_going_on(state):
            if not self._is_queue_empty():
                return _PERIOD_S
            self._begin(state, now_ms)
        if self._is_full():
            return _PERIOD_S
        self._list_page(state)
        if not _is_going_on(state):
            self._end(state)
        return 0.0

    def _due_ms(self, state: dict[str, Any]) -> int:
        """When the next pass is due: at once, if none was since we lead."""
        started: int | None = state.get("started")
        if started is None or self._leads_since_ms is None or started < self._leads_since_ms:
            return 0
        return started + round(self._bucket.period_s * 1000)

    def _begin(self, state: dict[str, Any], now_ms: int) -> None:
        looks = {scope.name: state["looks"].get(scope.name, {}) for scope in self._bucket.scopes}
        state.update(scopes=self._scopes, started=now_ms, finished=None, root=0, after="", looks=looks)
        self._records.keep_listing(state)

    def _end(self, state: dict[str, Any]) -> None:
        day = state["started"] // _DAY_MS
        if state["swept"] < day:
            # A pass refreshes the day of every record of an object that is there. One day is for what comes late.
            for first in range(0, SHARDS, _SWEPT_AT_ONCE):
                if not self.lead()[0]:
                    return
                self._records.sweep(first, first + _SWEPT_AT_ONCE, day - 1)
            state["swept"] = day
        for look in state["looks"].values():
            look["done"] = True
        self._records.keep_listing(state)
        self._waits_since = None
        if self._emitted:
            self._log.info("s3_objects_found", count=self._emitted)
        self._emitted = 0

    # ---- a page

    def _list_page(self, state: dict[str, Any]) -> None:
        roots = self._bucket.roots
        if self._client is None:
            self._client = s3_client(region=self._bucket.region, endpoint_url=self._bucket.endpoint_url)
        answer = self._client.list_objects_v2(
            Bucket=self._bucket.name,
            Prefix=roots[state["root"]],
            MaxKeys=_PAGE,
            **({"StartAfter": state["after"]} if state["after"] else {}),
        )
        self._store_outage.ends()
        self._backoff_s = _BACKOFF_S[0]
        listed_ms = _date_ms(answer)
        for look in state["looks"].values():
            look.setdefault("since", listed_ms)
        entries = answer.get("Contents", [])
        self._take([sighting for entry in entries if (sighting := _sighting(entry, listed_ms))], state["looks"])
        if entries and answer.get("IsTruncated"):
            state["after"] = entries[-1]["Key"]
        else:
            state["root"], state["after"] = state["root"] + 1, ""
        if state["root"] == len(roots):
            state["finished"] = True
        self._records.keep_listing(state)

    def _take(self, sightings: Iterable[Sighting], looks: dict[str, dict[str, Any]]) -> None:
        asked = [(one, how) for one in sightings if (how := self._how(one, looks)) is not None]
        claims = self._records.claim(asked)
        changed = [claim.sighting for claim in claims if claim.verdict is Verdict.CHANGED]
        claims += self._records.claim([(one, How.CERTAIN) for one in changed if self._is_so(one)])
        claimed = [claim for claim in claims if claim.event_id]
        for first in range(0, len(claimed), _EMIT_AT_ONCE):
            self._emit_all(claimed[first : first + _EMIT_AT_ONCE])

    def _emit_all(self, claims: Sequence[Claim]) -> None:
        source, name = self._bucket.source, self._bucket.name
        if self._service.stopping.is_set():  # who waits for the end may have waited for S3 for too long
            raise _StoppedError
        self._emit([claim.sighting.event(source, name, claim.event_id) for claim in claims])
        self._records.confirm(claims)
        self._emitted += len(claims)

    def _how(self, sighting: Sighting, looks: dict[str, dict[str, Any]]) -> How | None:
        """Say what is to become of what a listing shows; None if nobody asks for it."""
        scopes = [scope for scope in self._bucket.scopes if scope.has(sighting.key)]
        if not scopes:
            return None
        modified_ms = sighting.modified_ms or 0
        skips = all(
            scope.skips_existing and not looks[scope.name].get("done") and modified_ms <= looks[scope.name]["since"]
            for scope in scopes
        )
        if skips:
            return How.SKIPPED
        return How.LISTED if self._bucket.queues else How.CERTAIN

    def _is_so(self, sighting: Sighting) -> bool:
        """Tell whether an object is now as a listing has shown it."""
        try:
            found = self._client.head_object(Bucket=self._bucket.name, Key=sighting.key)
        except store_errors() as exc:
            if error_code(exc) in ("404", "NoSuchKey", "NotFound"):
                return False
            raise
        return _etag(found) == sighting.etag and _modified_ms(found) // 1000 == (sighting.modified_ms or 0) // 1000

    # ---- the queues

    def _is_queue_empty(self) -> bool:
        """Tell whether a pass need not wait for the bucket's queues (any more)."""
        now = time.monotonic()
        if not self._bucket.queues:
            return True
        if self._waits_since is not None and now - self._waits_since > min(self._bucket.period_s, _PUT_OFF_S):
            return True
        try:
            is_quiet = all(self._depth(queue) == 0 for queue in self._bucket.queues)
            self._queue_outage.ends()
        except store_errors() as exc:
            # Of a queue that is gone nothing is to be expected.
            self._queue_outage.begins(describe_error(exc))
            self._queue_clients.clear()
            is_quiet = True
        if not is_quiet:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        return self._quiet_since is not None and now - self._quiet_since >= _QUIET_S

    def _depth(self, queue: Queue) -> int:
        if queue not in self._queue_clients:
            client = sqs_client(queue)
            self._queue_clients[queue] = (client, queue_url(client, queue))
        client, url = self._queue_clients[queue]
        names = [f"ApproximateNumberOfMessages{state}" for state in ("", "NotVisible", "Delayed")]
        found = client.get_queue_attributes(QueueUrl=url, AttributeNames=names).get("Attributes", {})
        return sum(int(found.get(name, 0)) for name in names)


def _is_going_on(state: dict[str, Any]) -> bool:
    return "started" in state and not state.get("finished")


def _sighting(entry: dict[str, Any], listed_ms: int) -> Sighting | None:
    """Return what an entry of a listing shows; None for what no event can name."""
    try:
        entry["Key"].encode()
    except UnicodeEncodeError:
        return None
    return Sighting(
        key=entry["Key"], etag=_etag(entry), size=entry.get("Size"), at_ms=listed_ms, modified_ms=_modified_ms(entry)
    )


def _etag(entry: dict[str, Any]) -> str | None:
    return str(entry.get("ETag") or "").strip('"') or None


def _modified_ms(entry: dict[str, Any]) -> int:
    modified = entry.get("LastModified")
    return round(modified.timestamp() * 1000) if modified is not None else 0


def _date_ms(answer: dict[str, Any]) -> int:
    """When the store gave this answer, by its clock; by ours if it does not say."""
    try:
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return round(parsedate_to_datetime(headers["date"]).timestamp() * 1000)
    except (KeyError, TypeError, ValueError):
        return round(time.time() * 1000)
