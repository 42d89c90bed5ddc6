"""EventLog: every event that was dealt with, what came of it, and why the other workflows did not start.

An event's record has the verdicts of the workflows that it started, and says which definitions were in force. Why the
others said no is not kept but found again when somebody asks: matching depends on nothing but the event and the
definitions, and both are there. So an event costs the same for one workflow and for 1,000.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.counters import field, hand_in
from orchestrator.errors import InputError, NotFoundError
from orchestrator.events import Event, digest
from orchestrator.ledger import Ledger, keys
from orchestrator.matching import Matcher
from orchestrator.payloads import Payloads
from orchestrator.runs import rfc3339
from orchestrator.settings import Settings

#: What may come of an event: the best of its verdicts, or that it was one of a loop.
VERDICTS = ("started", "refused", "no_match", "loop")
_PAGE = 200
#: Records outlive their retention by that much: `trim` has to see which of them have blobs.
_GRACE_S = 86400
_TRIMMED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of an event for one workflow: `started` a run, `refused` (a run that failed at once), `no_match`."""

    verdict: str
    run: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "run": self.run, "reason": self.reason}


class EventLog:
    """The record of events in a ledger. Safe to share between threads.

    Raises UnavailableError if the server is away.
    """

    def __init__(self, ledger: Ledger, payloads: Payloads, settings: Settings) -> None:
        self._ledger = ledger
        self._payloads = payloads
        self._settings = settings
        self._matcher = lru_cache(maxsize=8)(self._read_matcher)

    # What the dispatcher writes

    def seen(self, event: Event) -> bool:
        """Tell whether this event was dealt with inside the dedupe window."""
        return bool(self._do(lambda: self._ledger.client.exists(keys.seen_key(event.key))))

    def note_again(self, event: Event, now_ms: int) -> None:
        """Note that an event that was dealt with has come again."""
        key = keys.event_key(event.key)
        with self._ledger.client.pipeline(transaction=False) as pipe:
            pipe.hincrby(key, "duplicates", 1)
            pipe.hset(key, "duplicate_at", now_ms)
            # Its record may be gone, and this all there is.
            pipe.expire(key, self._settings.events_retention_s + _GRACE_S)
            hand_in(pipe, field("events", verdict="duplicate"))
            self._do(pipe.execute)

    def note(self, event: Event, verdicts: Mapping[str, Verdict], *, definitions: str, now_ms: int, loop: bool) -> None:
        """Note that an event was dealt with under these definitions, and the verdicts that are not `no_match` only."""
        found = {one.verdict for one in verdicts.values()}
        verdict = "loop" if loop else next((known for known in VERDICTS if known in found), "no_match")
        retention_s = self._settings.events_retention_s + _GRACE_S
        record = {
            "event": self._payloads.pack(event.to_json(), _blob(event.key)),
            "accepted_at": now_ms,
            "verdict": verdict,
            "definitions": definitions,
            "verdicts": json.dumps({name: one.to_json() for name, one in verdicts.items()}),
        }
        key, by_id = keys.event_key(event.key), keys.event_id_key(digest(event.id))
        with self._ledger.client.pipeline(transaction=False) as pipe:
            pipe.hset(key, mapping=record)
            pipe.expire(key, retention_s)
            pipe.sadd(by_id, event.key)
            pipe.expire(by_id, retention_s)
            pipe.zadd(keys.EVENTS, {event.key: now_ms})
            pipe.set(keys.seen_key(event.key), "1", ex=self._settings.dedupe_s)
            hand_in(pipe, field("events", verdict=verdict))
            self._do(pipe.execute)

    # What is there

    def get(self, event: str) -> dict[str, Any]:
        """Return the record of an event by its id or key.

        {"key", "event", "accepted_at", "verdict", "duplicates", "duplicate_at", "verdicts"}; `verdicts` has the
        workflows that it started. Raises NotFoundError, and InputError where several events have that id.
        """
        return self._record(*self._find(event))

    def page(
        self,
        *,
        limit: int = 50,
        after: str | None = None,
        verdict: str | None = None,
        type_: str | None = None,
        most: int | None = None,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return records, newest first, and the cursor of the next page.

        No more than `most` are looked at: then there may be fewer on the page than there are.
        """
        found: list[dict[str, Any]] = []
        last = None
        for number, (key, fields) in enumerate(self._newest(after)):
            if number == most:
                return found, last
            last = key
            if verdict not in (None, fields["verdict"]):
                continue
            record = self._record(key, fields)
            if type_ not in (None, (record["event"] or {}).get("type")):
                continue
            if len(found) == limit:
                return found, found[-1]["key"]
            found.append(record)
        return found, None

    def explain(self, event: str) -> dict[str, Any]:
        """Return the record of an event with the verdict of every workflow that was in force then, and why."""
        key, fields = self._find(event)
        record = self._record(key, fields)
        matcher, names = self._matcher(fields["definitions"])
        verdicts = {
            name: Verdict(verdict="no_match", reason=self._why_not(matcher, name, record)).to_json() for name in names
        }
        return record | {"verdicts": verdicts | record["verdicts"]}

    def explain_workflow(self, workflow: str, *, since_ms: int, limit: int = 50) -> list[dict[str, Any]]:
        """Return what each event since then, newest first, was to a workflow, and why.

        [{"key", "event_id", "type", "source", "subject", "accepted_at", "duplicates", "verdict", "run", "reason"}]
        """
        found: list[dict[str, Any]] = []
        for key, fields in self._newest(None):
            if int(fields["accepted_at"]) < since_ms or len(found) == limit:
                break
            record = self._record(key, fields)
            event = record["event"] or {}
            found.append(
                {name: event.get(name) for name in ("type", "source", "subject")}
                | {"key": key, "event_id": event.get("id")}
                | {name: record[name] for name in ("accepted_at", "duplicates")}
                | (record["verdicts"].get(workflow) or self._no_match(workflow, record, fields))
            )
        return found

    def _no_match(self, workflow: str, record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
        matcher, names = self._matcher(fields["definitions"])
        reason = self._why_not(matcher, workflow, record) if workflow in names else "it was not in force then"
        return Verdict(verdict="no_match", reason=reason).to_json()

    @staticmethod
    def _why_not(matcher: Matcher, workflow: str, record: Mapping[str, Any]) -> str:
        if record["verdict"] == "loop":
            return "the event is one of a loop, and was set aside"
        if record["event"] is None:
            return "the event's data is gone"
        return matcher.why_not(workflow, record["event"]) or "it asked for the event, but was not started"

    def _read_matcher(self, definitions: str) -> tuple[Matcher, tuple[str, ...]]:
        workflows = self._ledger.definitions(definitions)
        return Matcher(workflows), tuple(workflow.name for workflow in workflows)

    def _find(self, event: str) -> tuple[str, dict[str, str]]:
        known = self._do(lambda: self._ledger.client.smembers(keys.event_id_key(digest(event))))
        rows = [(key, fields) for key, fields in self._rows(sorted({*known, event})) if fields]
        rows = [row for row in rows if row[0] == event] or rows  # or whoever chooses an id could hide another's event
        if len(rows) > 1:
            listed = ", ".join(key for key, _ in rows)
            raise InputError(
                f"events of several sources or triggers have the id {event!r}; say which by its key: {listed}"
            )
        if not rows:
            raise NotFoundError(
                f"event {event!r} is not known: it has not come over the bus, or is past events_retention_s; "
                "see `orchestrator events list` and `orchestrator dead-letters list`"
            )
        return rows[0]

    def _newest(self, after: str | None) -> Iterator[tuple[str, dict[str, str]]]:
        client = self._ledger.client
        start = 0
        if after is not None:
            rank = self._do(lambda: client.zrevrank(keys.EVENTS, after))
            if rank is None:
                raise NotFoundError(f"--after {after}: no such cursor; begin without it")
            start = int(rank) + 1
        while True:
            page = self._do(lambda lo=start: client.zrange(keys.EVENTS, lo, lo + _PAGE - 1, desc=True))
            if not page:
                return
            yield from ((key, fields) for key, fields in self._rows(page) if fields)
            start += len(page)

    def _rows(self, found: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
        """Read records by key; empty where there is none, or no more of it than that it came again."""
        with self._ledger.client.pipeline(transaction=False) as pipe:
            for key in found:
                pipe.hgetall(keys.event_key(key))
            rows = self._do(pipe.execute)
        return [(key, fields if "event" in fields else {}) for key, fields in zip(found, rows, strict=True)]

    def _record(self, key: str, fields: Mapping[str, str]) -> dict[str, Any]:
        again = fields.get("duplicate_at")
        return {
            "key": key,
            "event": self._payloads.unpack_or_none(fields["event"]),
            "accepted_at": rfc3339(int(fields["accepted_at"])),
            "verdict": fields["verdict"],
            "duplicates": int(fields.get("duplicates", 0)),
            "duplicate_at": rfc3339(int(again)) if again else None,
            "verdicts": json.loads(fields["verdicts"]),
        }

    def trim(self, now_ms: int) -> int:
        """Drop the events that are past their retention, and the oldest of those above the maximum; answers how many.

        Idempotent. What is dropped is still recognised when it comes again, within the dedupe window.
        """
        before, dropped = now_ms - self._settings.events_retention_s * 1000, 0
        while old := self._oldest(before):
            for key, fields in self._rows(old):
                if not fields or fields["event"].startswith("@"):
                    self._payloads.delete(f"events/{key}")
            with self._ledger.client.pipeline(transaction=False) as pipe:
                pipe.delete(*(keys.event_key(key) for key in old))
                pipe.zrem(keys.EVENTS, *old)
                self._do(pipe.execute)
            dropped += len(old)
        return dropped

    def _oldest(self, before_ms: int) -> list[str]:
        """Return some of the events that are to be dropped."""
        with self._ledger.client.pipeline(transaction=False) as pipe:
            pipe.zrange(keys.EVENTS, "-inf", before_ms, byscore=True, offset=0, num=_TRIMMED_AT_ONCE)
            pipe.zcard(keys.EVENTS)
            old, count = self._do(pipe.execute)
        over = min(count - self._settings.events_maximum, _TRIMMED_AT_ONCE)
        if not old and over > 0:
            old = self._do(lambda: self._ledger.client.zrange(keys.EVENTS, 0, over - 1))
        return list(old)

    def _do(self, command: Any) -> Any:
        return self._ledger.guard(command)


def _blob(key: str) -> str:
    return f"events/{key}/event"
