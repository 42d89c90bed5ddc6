"""Dead letters: what will not be tried again by itself, and why, until somebody redrives or discards it.

- A *step* (or an item of a fan-out) that has finally failed. The run's own record is the letter, with its attempts and
  losses; what is kept here is only what lists need. It is one letter over all episodes: it counts how often it came.
- A *message* or an *event* that cannot be processed, with its bytes. Whoever takes it from a queue sets it aside
  (ledger/keys.py: SET_ASIDE), in one step where the broker lets it, and `drain` makes letters of these.

A letter is one JSON record, which lives a day longer than the retention, and a place in an index by time. What has been
redriven is off the index; its record stays, so that it is known when the same thing comes back.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from typing import Any

import redis
from redis.client import NEVER_DECODE

from orchestrator.celery_app import EVENT_QUEUE, queue_name
from orchestrator.counters import field as counter
from orchestrator.counters import hand_in
from orchestrator.durations import parse_duration
from orchestrator.errors import InputError, NotFoundError, OrchestratorError, one_line
from orchestrator.events import digest
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import connect, unavailable
from orchestrator.payloads import Payloads
from orchestrator.runs import rfc3339
from orchestrator.settings import Settings
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

#: Every reason: of steps, of messages, of events, of what came to a trigger.
REASONS = (
    "error", "timeout", "memory", "worker_lost",
    "unknown_task",
    "envelope", "body", "content_type", "expired", "not_a_step",
    "not_an_event", "dispatch", "loop",
    "notification", "queue_message",
)  # fmt: skip

_DAY_S = 86_400
_PAGE = 500
_SLOTS_AT_ONCE = 1000
_TRIMMED_AT_ONCE = 10_000
#: As many bytes of set-aside entries are read at once, about: one may have 10 MB, or 100.
_DRAINED_BYTES = 4_000_000
_MESSAGE_CHARACTERS = 1000
_ATTEMPTS_SHOWN = 100
#: What of a detail differs from one message to the next of the same fault.
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+")
_ID = re.compile(r"[0-9a-f]{4,40}\Z")

# Takes ids off the index unless they have become dead letters again meanwhile. ARGV: pairs of id and time.
_FORGET = """
local gone = 0
for i = 1, #ARGV, 2 do
  local at = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if at and tonumber(at) <= tonumber(ARGV[i + 1]) then gone = gone + redis.call('ZREM', KEYS[1], ARGV[i]) end
end
return gone
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What is known of a dead letter without its bytes, attempts and tracebacks.

    `kind` is step, message or event; `reason` one of REASONS; `detail` says it in one line. `queue` is where it was.
    `first_at` and `last_at` (ms) are when it became one first and last, `count` how often: for a step once in each
    episode, and `episode` is the last. `attempts` and `losses` count over all episodes. Letters with one fingerprint
    have one cause.
    """

    id: str
    kind: str
    reason: str
    detail: str
    fingerprint: str
    first_at: int
    last_at: int
    count: int = 1
    queue: str = ""
    workflow: str | None = None
    run: str | None = None
    step: str | None = None
    index: int | None = None
    event_id: str | None = None
    error: Mapping[str, Any] | None = None
    episode: int = 0
    attempts: int = 0
    losses: int = 0

    @property
    def slot(self) -> str:
        """The step, or `step/index` for an item; empty for messages and events."""
        return self.step or "" if self.index is None else f"{self.step}/{self.index}"

    @classmethod
    def from_record(cls, text: str) -> DeadLetter:
        """Read a stored record; also one of a later version, which may have more fields."""
        return cls(**{name: value for name, value in json.loads(text).items() if name in _FIELDS})

    def to_record(self) -> str:
        """Return the record as it is stored."""
        return json.dumps({name: getattr(self, name) for name in _FIELDS})

    def to_json(self) -> dict[str, Any]:
        """Return the letter as lists show it; times are RFC 3339."""
        body = {name: getattr(self, name) for name in _FIELDS}
        return body | {"first_at": rfc3339(self.first_at), "last_at": rfc3339(self.last_at)}


_FIELDS = tuple(field.name for field in fields(DeadLetter))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The dead letters of one fingerprint; `detail` and `error` are those of `example`, the youngest.

    One cause may be in several places: `workflow` and `step` are None where they differ.
    """

    fingerprint: str
    count: int
    first_at: int
    last_at: int
    example: DeadLetter
    workflow: str | None = None
    step: str | None = None

    def to_json(self) -> dict[str, Any]:
        one = self.example
        return {
            "fingerprint": self.fingerprint, "count": self.count, "reason": one.reason, "detail": one.detail,
            "error": one.error, "workflow": self.workflow, "step": self.step,
            "first_at": rfc3339(self.first_at), "last_at": rfc3339(self.last_at), "example": one.id,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which dead letters are meant; what is None does not matter. `fingerprint` may be the beginning of one."""

    workflow: str | None = None
    step: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    run: str | None = None
    since_ms: int | None = None

    @property
    def is_empty(self) -> bool:
        return all(getattr(self, field.name) is None for field in fields(self))

    def takes(self, letter: DeadLetter) -> bool:
        """Tell whether a letter is meant."""
        return (
            self.workflow in (None, letter.workflow)
            and self.step in (None, letter.step)
            and self.reason in (None, letter.reason)
            and self.run in (None, letter.run)
            and letter.fingerprint.startswith(self.fingerprint or "")
            and letter.last_at >= (self.since_ms or 0)
        )


def parse_since(text: str, now_ms: int) -> int:
    """Return, in ms, the time that is a duration ago (`2h`), or that is given (RFC 3339). Raises InputError."""
    try:
        return now_ms - int(parse_duration(text).total_seconds() * 1000)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InputError(f"--since must be a duration, as 2h, or a time with zone, as 2026-01-31T08:00Z, not {text!r}")
    return int(moment.timestamp() * 1000)


def letter_id(run: str, slot: str) -> str:
    """Return the id of the dead letter that a step or item of a run is when it fails."""
    return digest("dead-letter", run, slot)[:16]


def fingerprint_of(reason: str, detail: str) -> str:
    """Return the fingerprint of messages with the same fault: numbers, ids and quoted text do not matter."""
    return digest("fingerprint", reason, _VARIABLE.sub("#", detail))[:16]


class DeadLetters:
    """The dead letters of a ledger. Safe to share between threads; connects when asked something.

    Raises UnavailableError if the server is away.
    """

    def __init__(self, ledger: Ledger, payloads: Payloads, settings: Settings) -> None:
        self._ledger = ledger
        self._client = ledger.client
        self._payloads = payloads
        self._settings = settings
        self._retention_s = settings.dead_letters_retention_s
        self._reports = bool(getattr(settings, "sentry_dsn", ""))
        self._forget = self._client.register_script(_FORGET)

    # What comes in

    def bury(self, run: str, slots: Sequence[str]) -> int:
        """Make dead letters of steps and items (`step/index`) of a run that have finally failed; answers how many.

        Idempotent in an episode; in a later one the letter counts one more. What has not failed, or runs again, goes
        off the list.
        """
        return sum(self._bury(run, slots[lo : lo + _SLOTS_AT_ONCE]) for lo in range(0, len(slots), _SLOTS_AT_ONCE))

    def _bury(self, run: str, slots: Sequence[str]) -> int:
        fields_of_run = ("workflow", "event_id", "episode", "priority")
        steps = list(dict.fromkeys(slot.partition("/")[0] for slot in slots))
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hmget(keys.run_key(run, "run"), fields_of_run)
            pipe.hmget(keys.run_key(run, "graph"), steps)
            pipe.hmget(keys.run_key(run, "states"), slots)
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slot}#a" for slot in slots])
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slot}#l" for slot in slots])
            (workflow, event_id, episode, priority), rows, states, retries, losses = self._do(pipe.execute)
        failed = [n for n, state in enumerate(states) if state == "failed"]
        self.forget(self._of(run, [slot for slot, state in zip(slots, states, strict=True) if state != "failed"]))
        if not failed:
            return 0
        attempts = {n: 1 + int(retries[n] or 0) for n in failed}
        ids = {n: letter_id(run, slots[n]) for n in failed}
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slots[n]}@{attempts[n]}" for n in failed])
            pipe.mget([keys.dead_letter_key(ids[n]) for n in failed])
            records, known = self._do(pipe.execute)
        pools = {step: json.loads(row)[0] if row else "" for step, row in zip(steps, rows, strict=True)}
        letters = []
        for n, record, before in zip(failed, records, known, strict=True):
            earlier = DeadLetter.from_record(before) if before else None
            if earlier is not None and earlier.episode >= int(episode or 1):
                continue
            step, _, index = slots[n].partition("/")
            letters.append(
                _step_letter(
                    json.loads(record or "{}"), earlier, id=ids[n], workflow=workflow, run=run, step=step,
                    index=int(index) if index else None, event_id=event_id, episode=int(episode or 1),
                    attempts=attempts[n], losses=int(losses[n] or 0),
                    queue=queue_name(pools[step], priority or "normal") if pools[step] not in ("", "*") else "",
                )
            )  # fmt: skip
        self._write_steps(letters)
        if self._do(lambda: self._client.hget(keys.run_key(run, "run"), "episode")) != episode:
            self.forget(letters)  # the run has gone on meanwhile, and who did that could not know of them
        return len(letters)

    def _of(self, run: str, slots: Sequence[str]) -> Sequence[DeadLetter]:
        """Return the letters that there are, or were, of steps and items of a run."""
        names = [keys.dead_letter_key(letter_id(run, slot)) for slot in slots]
        texts = self._do(lambda: self._client.mget(names)) if names else []
        return [DeadLetter.from_record(text) for text in texts if text]

    def _write_steps(self, letters: Sequence[DeadLetter]) -> None:
        """Write the records last: a kill before that has all of it done again."""
        if not letters:
            return
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(keys.DEAD_LETTERS, {one.id: one.last_at for one in letters})
            for reason in {one.reason for one in letters}:
                hand_in(pipe, counter("dead_letters", reason=reason), sum(one.reason == reason for one in letters))
            if self._reports:
                pipe.rpush(keys.UNREPORTED, *(one.id for one in letters))
            self._do(pipe.execute)
        with self._client.pipeline(transaction=False) as pipe:
            for one in letters:
                pipe.set(keys.dead_letter_key(one.id), one.to_record(), ex=self._ttl_s)
            self._do(pipe.execute)

    def drain(self, limit: int = 1000) -> int:
        """Make dead letters of up to `limit` entries that were set aside; answers how many.

        A letter is written before its entry goes, and has its id from it: a kill, or two that drain at the same time,
        neither lose nor double one.
        """
        return sum(self._drain(client, limit) for client in self._inlets)

    @cached_property
    def _inlets(self) -> tuple[Any, ...]:
        """The servers with a list of what was set aside: the ledger's, and a Redis broker's if that is another."""
        urls = (self._settings.ledger_url, self._settings.broker_url)
        if not self._settings.has_redis_broker or urls[0] == urls[1]:
            return (self._client,)
        return self._client, connect(urls[1])

    def _drain(self, client: Any, limit: int) -> int:
        drained, size = 0, 1
        while drained < limit:
            count = min(size, limit - drained)
            entries: Sequence[bytes] = self._do(
                lambda n=count: client.execute_command("LRANGE", keys.SET_ASIDE, -n, -1, **{NEVER_DECODE: True}), client
            )
            if not entries:
                break
            self._keep(entries)
            with client.pipeline(transaction=False) as pipe:
                for entry in entries:
                    pipe.lrem(keys.SET_ASIDE, -1, entry)
                self._do(pipe.execute, client)
            drained += len(entries)
            size = min(_PAGE, size * 2) if sum(map(len, entries)) < _DRAINED_BYTES // 2 else max(1, size // 4)
        return drained

    def _keep(self, entries: Iterable[bytes]) -> None:
        now_ms = time.time_ns() // 1_000_000
        with self._client.pipeline(transaction=False) as pipe:
            for entry in entries:
                letter, raw = read_entry(entry, now_ms)
                pipe.set(keys.dead_letter_raw_key(letter.id), raw, ex=self._ttl_s)
                pipe.set(keys.dead_letter_key(letter.id), letter.to_record(), ex=self._ttl_s)
                pipe.zadd(keys.DEAD_LETTERS, {letter.id: letter.last_at})
                hand_in(pipe, counter("dead_letters", reason=letter.reason))
            self._do(pipe.execute)

    # What is there

    def get(self, letter: str) -> DeadLetter:
        """Return a letter by its id, or the beginning of it (4 digits at least) if no other has the same.

        Raises NotFoundError.
        """
        if not _ID.match(letter):
            raise NotFoundError(f"dead letter {letter!r} is not known; see `orchestrator dead-letters list`")
        text = self._do(lambda: self._client.get(keys.dead_letter_key(letter)))
        if text is None:
            scan = self._client.zscan_iter(keys.DEAD_LETTERS, f"{letter}*", 1000)
            found = self._do(lambda: {one for one, _ in scan})
            if len(found) > 1:
                raise NotFoundError(f"{len(found)} dead letters begin with {letter}; give more of the id")
            text = self._do(lambda: self._client.get(keys.dead_letter_key(found.pop()))) if found else None
        if text is None:
            raise NotFoundError(f"dead letter {letter!r} is not known; see `orchestrator dead-letters list`")
        return DeadLetter.from_record(text)

    def listed(self, letters: Sequence[str]) -> Sequence[DeadLetter]:
        """Return letters by their ids (see `get`). Raises NotFoundError also for one that was redriven or discarded."""
        found = [self.get(letter) for letter in dict.fromkeys(letters)]
        with self._client.pipeline(transaction=False) as pipe:
            for one in found:
                pipe.zscore(keys.DEAD_LETTERS, one.id)
            for one, score in zip(found, self._do(pipe.execute), strict=True):
                if score is None:
                    raise NotFoundError(f"dead letter {one.id} is not on the list any more: it was redriven")
        return found

    def all(self, which: Filter | None = None, after: str | None = None) -> Iterator[DeadLetter]:
        """Go through the letters that are meant, newest first, in bounded memory.

        What comes, goes or comes back meanwhile may be missed or seen twice. Raises NotFoundError if nothing is known
        of `after`.
        """
        which = which or Filter()
        start = 0 if after is None else self._rank_after(after, self._last_at(after))
        while True:
            rows = self._do(
                lambda lo=start: self._client.zrange(keys.DEAD_LETTERS, lo, lo + _PAGE - 1, desc=True, withscores=True)
            )
            if not rows:
                return
            names = [keys.dead_letter_key(letter) for letter, _ in rows]
            for text in self._do(lambda names=names: self._client.mget(names)):
                if text and which.takes(letter := DeadLetter.from_record(text)):
                    yield letter
            if rows[-1][1] < (which.since_ms or 0):
                return
            start = self._rank_after(*rows[-1])

    def _last_at(self, letter: str) -> float:
        text = self._do(lambda: self._client.get(keys.dead_letter_key(letter)))
        if text is None:
            raise NotFoundError(f"--after {letter}: no such cursor; begin without it")
        return DeadLetter.from_record(text).last_at

    def _rank_after(self, letter: str, at: float) -> int:
        """Return the rank of what comes after a letter of that time, which may have gone or come back since."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zscore(keys.DEAD_LETTERS, letter)
            pipe.zrevrank(keys.DEAD_LETTERS, letter)
            pipe.zcount(keys.DEAD_LETTERS, f"({at:.0f}", "+inf")
            score, rank, newer = self._do(pipe.execute)
        return int(rank) + 1 if score == at else int(newer)

    def list(
        self, which: Filter | None = None, limit: int = 50, after: str | None = None
    ) -> tuple[Sequence[DeadLetter], str | None]:
        """Return the letters that are meant, newest first, and the cursor of the next page."""
        found: Any = []
        for letter in self.all(which, after):
            if len(found) == limit:
                return found, found[-1].id
            found.append(letter)
        return found, None

    def groups(self, which: Filter | None = None) -> Sequence[Group]:
        """Return the letters that are meant by fingerprint, the most frequent first."""
        found: dict[str, Group] = {}
        for one in self.all(which):
            group = found.get(one.fingerprint)
            found[one.fingerprint] = Group(
                fingerprint=one.fingerprint,
                count=1 if group is None else group.count + 1,
                first_at=one.first_at if group is None else min(one.first_at, group.first_at),
                last_at=one.last_at if group is None else group.last_at,
                example=one if group is None else group.example,
                workflow=one.workflow if group is None or group.workflow == one.workflow else None,
                step=one.step if group is None or group.step == one.step else None,
            )
        return sorted(found.values(), key=lambda group: (-group.count, -group.last_at))

    def raw(self, letter: str) -> bytes | None:
        """Return the bytes of a message or event by its whole id, as they came; None for a step."""
        key = keys.dead_letter_raw_key(letter)
        raw: bytes | None = self._do(lambda: self._client.execute_command("GET", key, **{NEVER_DECODE: True}))
        return raw

    def show(self, letter: DeadLetter) -> dict[str, Any]:
        """Return all that is known of a letter: its event, last attempts and losses, or its bytes (as latin-1).

        Of a step whose run is past its retention that is no more than the list shows.
        """
        body = letter.to_json()
        if letter.kind != "step":
            raw = self.raw(letter.id)
            return body | {"raw": None if raw is None else raw.decode("latin-1")}
        run, slot = letter.run or "", letter.slot
        numbers = range(max(1, letter.attempts - _ATTEMPTS_SHOWN + 1), letter.attempts + 1)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.run_key(run, "run"), "event", "state")
            pipe.hget(keys.run_key(run, "states"), slot)
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slot}@{n}" for n in numbers])
            pipe.hget(keys.run_key(run, "attempts"), f"{slot}#x")
            (event, run_state), state, records, losses = self._do(pipe.execute)
        attempts = []
        for n, text in zip(numbers, records, strict=True):
            if text:
                record = json.loads(text)
                times = {name: rfc3339(record.get(name)) for name in ("started_at", "finished_at")}
                attempts.append({"attempt": n} | {k: v for k, v in record.items() if k != "fence"} | times)
        try:
            fact = self._payloads.unpack(event or "")
        except OrchestratorError:  # its blob is gone: the rest is still to be seen
            fact = None
        lost = [one | {"at": rfc3339(one.get("at"))} for one in json.loads(f"[{losses or ''}]")]
        return body | {
            "state": state, "run_state": run_state, "event": fact, "attempt_records": attempts, "loss_records": lost,
            "input": attempts[-1].get("input") if attempts else None,
        }  # fmt: skip

    def states(self, run: str, slots: Sequence[str]) -> Mapping[str, str]:
        """Return the states of steps and items of a run; empty text for what is not known."""
        found = self._do(lambda: self._client.hmget(keys.run_key(run, "states"), slots)) if slots else []
        return {slot: state or "" for slot, state in zip(slots, found, strict=True)}

    def last_fingerprint(self, run: str, slot: str) -> str:
        """Return the fingerprint of the last attempt of a step or item; empty if it did not fail."""
        attempts = keys.run_key(run, "attempts")
        retries = self._do(lambda: self._client.hget(attempts, f"{slot}#a"))
        record = self._do(lambda: self._client.hget(attempts, f"{slot}@{1 + int(retries or 0)}"))
        error = json.loads(record or "{}").get("error")
        return _fingerprint_of_error(error) if error else ""

    def now_ms(self) -> int:
        """Return the server's time, by which steps become dead letters."""
        seconds, micros = self._do(self._client.time)
        return int(seconds) * 1000 + int(micros) // 1000

    def come_since(self, at_ms: int, limit: int = _PAGE) -> Sequence[DeadLetter]:
        """Return letters that have come at this time or later, the oldest first."""
        ids = self._do(lambda: self._client.zrange(keys.DEAD_LETTERS, at_ms, "+inf", byscore=True, offset=0, num=limit))
        texts = self._do(lambda: self._client.mget([keys.dead_letter_key(one) for one in ids])) if ids else []
        return [DeadLetter.from_record(text) for text in texts if text]

    # What goes

    def forget(self, letters: Iterable[DeadLetter]) -> int:
        """Take letters off the list, as they were redriven; answers how many. One that has come back since stays."""
        argv = [part for one in letters for part in (one.id, one.last_at)]
        return sum(
            int(self._do(lambda lo=lo: self._forget(keys=[keys.DEAD_LETTERS], args=argv[lo : lo + 2 * _PAGE])))
            for lo in range(0, len(argv), 2 * _PAGE)
        )

    def discard(self, letters: Sequence[str]) -> int:
        """Drop letters by their whole ids, with their bytes; answers how many there were. The runs stay as they are."""
        return sum(self._drop(letters[lo : lo + _PAGE]) for lo in range(0, len(letters), _PAGE))

    def _drop(self, letters: Sequence[str]) -> int:
        if not letters:
            return 0
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.DEAD_LETTERS, *letters)
            for one in letters:
                pipe.delete(keys.dead_letter_key(one), keys.dead_letter_raw_key(one))
            return int(self._do(pipe.execute)[0])

    def trim(self, now_ms: int) -> int:
        """Drop letters that are past their retention; answers how many, which is bounded: call it again.

        Before that it says, once a day, that letters will go: those in the last tenth of their retention.
        """
        retention_ms = self._retention_s * 1000
        old_ms = now_ms - retention_ms + retention_ms // 10
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zcount(keys.DEAD_LETTERS, "-inf", old_ms)
            pipe.zrange(keys.DEAD_LETTERS, 0, 0, withscores=True)
            count, oldest = self._do(pipe.execute)
        if count and self._do(lambda: self._client.set(keys.EXPIRY_WARNED, "1", nx=True, ex=_DAY_S)):
            first_ms = int(oldest[0][1])
            when = rfc3339(max(first_ms + retention_ms, now_ms))
            log.warning("dead_letters_will_expire", count=count, first_at=rfc3339(first_ms), when=when)
        gone = self._do(
            lambda: self._client.zrange(
                keys.DEAD_LETTERS, "-inf", now_ms - retention_ms, byscore=True, offset=0, num=_TRIMMED_AT_ONCE
            )
        )
        return self.discard(gone)

    @property
    def _ttl_s(self) -> int:
        return self._retention_s + _DAY_S

    def _do(self, command: Any, client: Any = None) -> Any:
        try:
            return command()
        except redis.RedisError as exc:
            raise unavailable(client or self._client, exc) from exc


def _step_letter(record: Mapping[str, Any], earlier: DeadLetter | None, **known: Any) -> DeadLetter:
    error = record.get("error") or {"type": "Unknown", "message": ""}
    kind, message = str(error.get("type")), str(error.get("message"))
    at = int(record.get("finished_at") or time.time_ns() // 1_000_000)
    return DeadLetter(
        kind="step",
        reason=error.get("reason") or "error",
        detail=one_line(f"{kind}: {message}"),
        error={"type": kind, "message": message[:_MESSAGE_CHARACTERS]},
        fingerprint=_fingerprint_of_error(error),
        first_at=earlier.first_at if earlier else at,
        last_at=at,
        count=earlier.count + 1 if earlier else 1,
        **known,
    )


def _fingerprint_of_error(error: Mapping[str, Any]) -> str:
    return error.get("fingerprint") or fingerprint_of(error.get("reason") or "error", str(error.get("type")))


def read_entry(entry: bytes, now_ms: int) -> tuple[DeadLetter, bytes]:
    """Return the letter that an entry of SET_ASIDE becomes, and the bytes that were set aside; never fails.

    An entry that nobody of ours wrote is a letter with the entry itself as its bytes.
    """
    try:
        body = json.loads(entry)
        raw, at = body["raw"].encode("latin-1"), int(body["at"])
        reason, detail, queue = str(body["reason"]), str(body.get("detail", "")), str(body.get("queue", ""))
        queue.encode()  # JSON may have surrogates, which nothing can be made of
    except Exception:  # noqa: BLE001 -- it may be made of anything
        raw, at, queue = entry, now_ms, ""
        reason, detail = "envelope", f"somebody wrote to {keys.SET_ASIDE} what is no entry of it"
    if reason not in REASONS:  # an earlier version's, which had only a text
        reason, detail = "envelope", reason
    detail, at = one_line(detail), at if 0 < at <= now_ms + _DAY_S * 1000 else now_ms
    letter = DeadLetter(
        id=digest("dead-letter", entry.decode("latin-1"))[:16],
        kind="event" if queue == EVENT_QUEUE else "message",
        reason=reason,
        detail=detail,
        fingerprint=fingerprint_of(reason, detail),
        first_at=at,
        last_at=at,
        queue=one_line(queue),
    )
    return letter, raw
