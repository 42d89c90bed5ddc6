"""Schedules: how far each has come, and what people do with them (list, pause, resume, backfill).

The beat (triggers/beat.py) writes how far a schedule has come, as a JSON text that it replaces only if it is still the
one that it knows: of two beats that think that they lead, one finds out. People write beside it which are paused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import redis

from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, nearest
from orchestrator.events import PRIORITY, SCHEDULE_DUE, Event
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import unavailable
from orchestrator.recurrence import Due, OnSchedule, dues, last_due, parse_moment, recurrence_digest, utc_text
from orchestrator.runs import rfc3339, run_id
from orchestrator.subscriptions import on_from_json, on_to_json, schedule_name, schedule_source
from orchestrator.workflows import Workflow

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)
#: How many due times a list shows, and how many a dry run.
_SHOWN = 5
_SHOWN_OF_BACKFILL = 100
#: Due times whose runs are looked up in one round trip.
_PAGE = 500
#: A backfill without a limit of its own has that many of its runs in flight at most.
DEFAULT_PARALLEL = 100
_MOST_PARALLEL = 10_000

# Replaces a field of a hash if it is still as it was read ("" for: not there).
_REPLACE = """
local now = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if now ~= ARGV[2] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return 1
"""


#: What lists answer.
Rows = list[dict[str, Any]]


def system_clock() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule in force. Its name is unique; `digest` is of what says when it is due."""

    name: str
    workflow: str
    on: OnSchedule
    digest: str


def schedules_of(workflows: Iterable[Workflow]) -> dict[str, Schedule]:
    """Return the schedules of definitions, by name."""
    return {
        schedule_name(workflow.name, on): Schedule(
            name=schedule_name(workflow.name, on), workflow=workflow.name, on=on, digest=recurrence_digest(on)
        )
        for workflow in workflows
        for on in workflow.on
        if isinstance(on, OnSchedule)
    }


def schedule_event(name: str, due: Due, previous: Due | None, *, priority: str | None = None) -> Event:
    """Return the event of one due time; whoever makes it, and whenever, it is the same event."""
    at = utc_text(due.at)
    return Event(
        id=due.id,
        source=schedule_source(name),
        type=SCHEDULE_DUE,
        subject=name,
        time=at,
        data={"schedule": name, "due_at": at, "previous_due_at": utc_text(previous.at) if previous else None},
        extensions={PRIORITY: priority} if priority else {},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a schedule has come: all that was due up to `cursor` is dealt with. Times are us since the epoch.

    `digest` is of when it was due then; `last_due` is the last that was emitted; `removed` since when it is in no
    definition, 0 if it is in one.
    """

    digest: str
    cursor: int
    last_due: int | None = None
    removed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """Due times of the past that are to be made up for. Times are us since the epoch.

    `spec` is the schedule as it was. What is due up to `cursor` has been released or was `known`, which counts those
    that had run before. `in_flight` has the runs that were released and have not ended, and when.
    """

    id: str
    name: str
    workflow: str
    spec: Mapping[str, Any]
    start: int
    end: int
    max_parallel: int
    created: int
    cursor: int
    released: int = 0
    known: int = 0
    in_flight: Mapping[str, int] = field(default_factory=dict)
    finished: int = 0

    @property
    def on(self) -> OnSchedule:
        on = on_from_json({"schedule": self.spec})
        assert isinstance(on, OnSchedule)
        return on

    def to_json(self) -> dict[str, Any]:
        """Return it as it is shown to people."""
        return {
            "id": self.id, "schedule": self.name, "workflow": self.workflow, "from": text_of(self.start),
            "to": text_of(self.end), "max_parallel": self.max_parallel, "created_at": rfc3339(self.created // 1000),
            "released": self.released, "known": self.known, "in_flight": len(self.in_flight),
            "finished_at": rfc3339(self.finished // 1000) if self.finished else None,
        }  # fmt: skip


def micros(moment: datetime) -> int:
    """Return a time as us since the epoch."""
    return (moment - _EPOCH) // _TICK


def moment_of(microseconds: int) -> datetime:
    """Return the time that `micros` was given."""
    return _EPOCH + microseconds * _TICK


def text_of(microseconds: int) -> str:
    """Return a time given in us since the epoch as RFC 3339 in UTC."""
    return utc_text(moment_of(microseconds))


def _record(value: State | Backfill) -> str:
    return json.dumps({one.name: getattr(value, one.name) for one in fields(value)})


def _read(kind: type[Any], text: str) -> Any:
    """Read a record, also one of a later version, which may have more fields."""
    names = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in json.loads(text).items() if name in names})


class ScheduleStore:
    """What the ledger has of schedules. Every call may raise UnavailableError."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._replace = client.register_script(_REPLACE)

    def states(self) -> dict[str, tuple[str, State]]:
        """Return name -> (the text as it stands there, what it says)."""
        rows = self._do(lambda: self._client.hgetall(keys.SCHEDULES))
        return {name: (text, _read(State, text)) for name, text in rows.items()}

    def state(self, name: str) -> tuple[str, State | None]:
        """Return the same for one schedule; an empty text if there is none."""
        text = self._do(lambda: self._client.hget(keys.SCHEDULES, name))
        return text or "", _read(State, text) if text else None

    def put_states(self, rows: Sequence[tuple[str, str, State | None]]) -> list[str | None]:
        """Replace states, given as (name, text as it was known, new one or None), each if it is still as it was known.

        One round trip; answers the new texts, None where somebody else has written.
        """
        return self._put(keys.SCHEDULES, rows)

    def paused(self) -> dict[str, int]:
        """Return the schedules that are paused, and since when (ms)."""
        return {name: int(at) for name, at in self._do(lambda: self._client.hgetall(keys.PAUSED_SCHEDULES)).items()}

    def set_paused(self, name: str, since_ms: int | None) -> None:
        """Pause a schedule, or (None) do not."""
        if since_ms is None:
            self._do(lambda: self._client.hdel(keys.PAUSED_SCHEDULES, name))
        else:
            self._do(lambda: self._client.hsetnx(keys.PAUSED_SCHEDULES, name, since_ms))

    def backfills(self) -> list[tuple[str, Backfill]]:
        """Return the backfills, oldest first, as (text as it stands there, what it says)."""
        rows = self._do(lambda: self._client.hgetall(keys.BACKFILLS))
        return sorted(((text, _read(Backfill, text)) for text in rows.values()), key=lambda row: row[1].created)

    def put_backfill(self, known: str, new: Backfill) -> bool:
        """Replace a backfill if it is still as it was known (empty: not there); False if it is not."""
        return self._put(keys.BACKFILLS, [(new.id, known, new)])[0] is not None

    def drop_backfill(self, backfill: str) -> bool:
        """Forget a backfill; False if there is none."""
        return bool(self._do(lambda: self._client.hdel(keys.BACKFILLS, backfill)))

    def progress(self, workflow: str, events: Sequence[Event]) -> list[tuple[str, bool]]:
        """Return for each event the state of the run that it starts (empty: no run), and whether it was dealt with."""
        runs = [run_id(workflow, event.source, event.id) for event in events]
        return self.progress_of(runs, [event.key for event in events])

    def progress_of(self, runs: Sequence[str], event_keys: Sequence[str]) -> list[tuple[str, bool]]:
        """Return the same, of runs and keys of events."""
        with self._client.pipeline(transaction=False) as pipe:
            for run, key in zip(runs, event_keys, strict=True):
                pipe.hget(keys.run_key(run, "run"), "state")
                pipe.exists(keys.seen_key(key))
            answers = self._do(pipe.execute)
        return [(state or "", bool(seen)) for state, seen in zip(answers[::2], answers[1::2], strict=True)]

    def _put(self, key: str, rows: Sequence[tuple[str, str, State | Backfill | None]]) -> list[str | None]:
        if not rows:
            return []
        texts = [(name, known, "" if new is None else _record(new)) for name, known, new in rows]
        if len(texts) == 1:
            answers = [self._do(lambda: self._replace(keys=[key], args=texts[0]))]
        else:
            with self._client.pipeline(transaction=False) as pipe:
                for one in texts:
                    self._replace(keys=[key], args=one, client=pipe)
                answers = self._do(pipe.execute)
        return [text if answer else None for (_, _, text), answer in zip(texts, answers, strict=True)]

    def _do(self, command: Callable[[], Any]) -> Any:
        try:
            return command()
        except redis.RedisError as exc:
            raise unavailable(self._client, exc) from exc


class Schedules:
    """What people ask about the schedules in force, and have done with them."""

    def __init__(self, engine: Engine, *, clock: Callable[[], datetime] = system_clock) -> None:
        self._engine = engine
        self._store = ScheduleStore(engine.ledger.client)
        self._clock = clock

    def list(self) -> Rows:
        """Return every schedule in force, by name: its spec, whether it is paused, when it was and will be due."""
        states, paused = self._store.states(), self._store.paused()
        known = self._known()
        return [self._shown(known[name], states.get(name), is_paused=name in paused) for name in sorted(known)]

    def page(self, limit: int, after: str | None = None) -> tuple[Rows, str | None]:
        """Return up to `limit` of the list, those after a cursor, and the cursor of the next page or None."""
        rows = [row for row in self.list() if after is None or row["name"] > after]
        return rows[:limit], rows[limit - 1]["name"] if len(rows) > limit else None

    def show(self, name: str) -> dict[str, Any]:
        """Return one schedule, with its backfills. Raises NotFoundError."""
        schedule = self._named(name)
        shown = self._shown(schedule, self._store.states().get(name), is_paused=name in self._store.paused())
        return shown | {"backfills": [one.to_json() for _, one in self._store.backfills() if one.name == name]}

    def pause(self, name: str) -> dict[str, Any]:
        """Have nothing emitted until `resume`; idempotent. Raises NotFoundError."""
        self._named(name)
        self._store.set_paused(name, micros(self._clock()) // 1000)
        return self.show(name)

    def resume(self, name: str) -> dict[str, Any]:
        """Go on from now: what was due meanwhile is not made up for (that is what `backfill` is for); idempotent.

        Raises NotFoundError.
        """
        self._named(name)
        if name in self._store.paused():
            self._move_to_now(name)
            self._store.set_paused(name, None)
        return self.show(name)

    def backfill(
        self, name: str, start: str, end: str, *, dry_run: bool = False, max_parallel: int | None = None
    ) -> dict[str, Any]:
        """Have the workflow run for each time at which a schedule was due from `start` to `end`, both included.

        What has run already, or runs, does not run again. `start` and `end` are RFC 3339, or a date or time on the
        schedule's clocks; a date as `end` is the whole of it, and what is to come is left to the schedule. At most
        `max_parallel` of these runs are in flight at a time. With `dry_run` it only says what would be done: how many
        are `due`, how many of these are `known`, and the first times.
        Returns at once: the beat does it, with low priority. Raises NotFoundError, InputError.
        """
        schedule = self._named(name)
        begin, until = self._range(schedule, start, end)
        if max_parallel is not None and not 1 <= max_parallel <= _MOST_PARALLEL:
            raise InputError(f"max_parallel must be from 1 to {_MOST_PARALLEL}, not {max_parallel}")
        made = Backfill(
            id=uuid.uuid4().hex[:12], name=name, workflow=schedule.workflow,
            spec=on_to_json(schedule.on)["schedule"], start=micros(begin), end=micros(until),
            max_parallel=max_parallel or DEFAULT_PARALLEL, created=micros(self._clock()), cursor=micros(begin) - 1,
        )  # fmt: skip
        if dry_run:
            return self._dry_run(made)
        self._store.put_backfill("", made)
        return made.to_json()

    def cancel_backfill(self, name: str) -> int:
        """Release nothing further of the backfills of a schedule; answers how many were at work. Their runs go on."""
        at_work = [one for _, one in self._store.backfills() if one.name == name and not one.finished]
        return sum(self._store.drop_backfill(one.id) for one in at_work)

    def _dry_run(self, backfill: Backfill) -> dict[str, Any]:
        due = known = 0
        first: list[str] = []
        for page in pages(dues(backfill.on, moment_of(backfill.cursor), moment_of(backfill.end)), _PAGE):
            events = [schedule_event(backfill.name, one, None) for one in page]
            for event, (state, seen) in zip(events, self._store.progress(backfill.workflow, events), strict=True):
                due += 1
                known += bool(state) or seen
                if not (state or seen) and len(first) < _SHOWN_OF_BACKFILL:
                    first.append(event.time)
        body = backfill.to_json()
        named = {name: body[name] for name in ("schedule", "workflow", "from", "to", "max_parallel")}
        return named | {"dry_run": True, "due": due, "known": known, "to_run": due - known, "due_at": first}

    def _range(self, schedule: Schedule, start: str, end: str) -> tuple[datetime, datetime]:
        found = []
        for option, text in (("from", start), ("to", end)):
            try:
                found.append(parse_moment(text, schedule.on.timezone, is_end=option == "to"))
            except ValueError as exc:
                raise InputError(f"{option}: {exc}") from exc
        begin, until = found
        if until < begin:
            raise InputError(f"to: {end} is before from: {start}")
        if begin > self._clock():
            raise InputError(f"from: {start} is to come: a backfill is for what was due")
        return begin, min(until, self._clock())

    def _known(self) -> dict[str, Schedule]:
        rows = self._engine.ledger.workflows().values()
        return schedules_of(Workflow.from_json(row["workflow"]) for row in rows)

    def _named(self, name: str) -> Schedule:
        known = self._known()
        if name not in known:
            raise NotFoundError(f"unknown schedule {name!r}; {nearest(name, sorted(known))}")
        return known[name]

    def _shown(self, schedule: Schedule, row: tuple[str, State] | None, *, is_paused: bool) -> dict[str, Any]:
        last = row[1].last_due if row else None
        return {
            "name": schedule.name,
            "workflow": schedule.workflow,
            "spec": on_to_json(schedule.on)["schedule"],
            "paused": is_paused,
            "last_due_at": None if last is None else text_of(last),
            "next_due_at": [utc_text(due.at) for due in islice(dues(schedule.on, self._clock()), _SHOWN)],
        }

    def _move_to_now(self, name: str) -> None:
        while True:
            text, state = self._store.state(name)
            now = micros(self._clock())
            if state is None or state.cursor >= now:
                return
            if self._store.put_states([(name, text, replace(state, cursor=now))])[0] is not None:
                return


def previous_of(on: OnSchedule, due: Due) -> Due | None:
    """Return when a schedule was due before."""
    return last_due(on, due.at - _TICK)


def pages(found: Iterator[Due], size: int) -> Iterator[list[Due]]:
    """Give what an iterator gives in lists of `size`."""
    while page := list(islice(found, size)):
        yield page
