"""The beat: emits an event for each time at which a schedule is due.

It is celery's beat with a Scheduler of ours. Of several processes one leads; another takes over within seconds.

**None is lost, none runs twice.** An event's identity is schedule and due time. It is published first, and then the
ledger's record of how far the schedule has come moves on; a kill in between, or two that think that they lead, publish
it again under the same identity, and nothing further comes of it.

**What is late**, and so treated as `catchup` says, is what fell into a downtime: what was due GRACE (time for a
failover) before the process that leads was there. What was due while it was there is not, although a server was away
(up to OUTAGE). Catching up goes in batches, with the record moved on after each.

**What begins from now**: a schedule that is new, is due at other times than before, was removed and is back, or was
paused. With `catchup` and a `start` in the past, a new one begins from there. A clock that was ahead and has been set
back would leave a schedule waiting until it is there again: then, too, it goes on from now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

from celery import beat

from orchestrator.bus import EventBus
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.leading import LeadingService
from orchestrator.recurrence import Due, dues, jitter, last_due, parse_moment
from orchestrator.runs import RunState, run_id
from orchestrator.schedules import (
    Backfill,
    Schedule,
    ScheduleStore,
    State,
    micros,
    moment_of,
    previous_of,
    schedule_event,
    schedules_of,
    system_clock,
)
from orchestrator.telemetry import get_logger
from orchestrator.workflows import Workflow

log = get_logger(__name__)

#: How late, at most, a schedule that another process has changed is noticed; and who follows looks that often.
PERIOD_S = 1.0
#: While a backfill is at work.
_BACKFILL_PERIOD_S = 0.2
#: What was due that long before the leader's process was there is late, and so is what nobody could emit for OUTAGE.
GRACE = timedelta(seconds=30)
OUTAGE = timedelta(minutes=10)
#: A record that is further ahead of the clock than that was written by a clock that was wrong.
_AHEAD = timedelta(seconds=60)
#: A schedule at which something has failed that another try does not help is left alone for so long.
_FAILED = timedelta(seconds=60)
#: Events of one schedule in a turn, and published at once.
_BATCH = 250
_PUBLISHED_AT_ONCE = 500
#: Due times of a backfill of which it is looked up at once whether they have run, at least.
_LOOKED_AT = 50
#: Released events that became no run in that time hold up their backfill no longer.
_LOST = timedelta(hours=1)
#: How long removed schedules and finished backfills are remembered.
_KEPT = timedelta(days=30)
_TICK = timedelta(microseconds=1)
_NOW = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class _Entry:
    """A schedule in work: its record as the ledger has it, and when to look at it again (None: never).

    Nothing up to `begin` is emitted: it was paused then. What comes next comes in turn, not before `turn_at`, when what
    was due before it came: where the jitter is longer than the period.
    """

    schedule: Schedule
    text: str
    state: State
    begin: datetime
    next_at: datetime | None = _NOW
    turn_at: datetime = _NOW

    @property
    def after(self) -> datetime:
        return max(self.begin, moment_of(self.state.cursor))


class Beat(LeadingService):
    """Follows the definitions and emits what their schedules ask for; of several processes one does."""

    role = "beat"

    def __init__(self, engine: Engine, bus: EventBus, *, clock: Callable[[], datetime] = system_clock) -> None:
        super().__init__(engine)
        self._bus = bus
        self._clock = clock
        self._store = ScheduleStore(self._engine.ledger.client)
        self._lock = threading.Lock()  # guards the next two: what is in force, and since when
        self._wanted: dict[str, Schedule] = {}
        self._since: dict[str, datetime] = {}
        #: Of the leader: what is in work, by the schedules and pauses that it was made of; stale: to be read anew.
        self._entries: dict[str, _Entry] = {}
        self._made_of: tuple[dict[str, Schedule], set[str]] = ({}, set())
        self._is_stale = True
        #: Since when this process is there, and when its last turn ended: it may have been suspended meanwhile.
        self._here_since = self._turned_at = clock()

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force; their schedules are followed from the next turn on."""
        wanted, now = schedules_of(workflows), self._clock()
        with self._lock:
            same = {
                name for name, before in self._wanted.items() if name in wanted and before.digest == wanted[name].digest
            }
            self._since = {name: self._since[name] if name in same else now for name in wanted}
            self._wanted = wanted

    def _loop(self, stopping: threading.Event) -> None:
        make = partial(_Scheduler, self, stopping)
        beat.Service(self._engine.app, max_interval=PERIOD_S, scheduler_cls=make, remote_control=False).start()

    def turn(self) -> float:
        """Emit what is due, if we lead; answers in how many seconds the next is."""
        now = self._clock()
        if abs(now - self._turned_at) > GRACE:
            self._here_since = now
        try:
            if self.lead()[0]:
                return self._lead_on(now)
            self._is_stale = True
            return PERIOD_S
        finally:
            self._turned_at = self._clock()

    def _lead_on(self, now: datetime) -> float:
        with self._lock:
            wanted, since = self._wanted, self._since
        paused = set(self._store.paused())
        if self._is_stale or self._made_of != (wanted, paused):
            self._entries = self._take_up(wanted, since, now)
            self._made_of, self._is_stale = (wanted, paused), False
        entries = self._entries
        if any(moment_of(one.state.cursor) > now + _AHEAD for one in entries.values()):
            log.warning("clock_was_ahead")
            self._is_stale = True
            return 0.0
        ready = [one for one in entries.values() if one.next_at is not None and one.next_at <= now]
        for one in ready:
            if one.schedule.name in paused:
                one.begin, one.next_at = now, _next_at(one.schedule, now)
        self._emit([one for one in ready if one.schedule.name not in paused], now)
        longest = _BACKFILL_PERIOD_S if self._backfill(wanted, now) else PERIOD_S
        if self._is_stale:
            return 0.0
        coming = [one.next_at for one in entries.values() if one.next_at is not None]
        return max(0.0, min([longest, *((at - now).total_seconds() for at in coming)]))

    # How far schedules have come

    def _take_up(
        self, wanted: Mapping[str, Schedule], since: Mapping[str, datetime], now: datetime
    ) -> dict[str, _Entry]:
        """Read the records; write those of what is new, has changed or is gone."""
        known = self._store.states()
        rows: list[tuple[str, str, State | None]] = []
        for name, schedule in wanted.items():
            text, state = known.get(name, ("", None))
            rows.append((name, text, _brought_up(schedule, state, min(since[name], now), now)))
        for name in known.keys() - wanted.keys():
            text, state = known[name]
            if not state.removed:
                rows.append((name, text, replace(state, removed=micros(now))))
            elif moment_of(state.removed) < now - _KEPT:
                rows.append((name, text, None))
        changed = [row for row in rows if not row[1] or row[2] != known[row[0]][1]]
        # Where somebody else has written meanwhile, what follows will not be taken, and the records are read again.
        texts = {row[0]: text for row, text in zip(changed, self._store.put_states(changed), strict=True)}
        return {
            name: _Entry(
                schedule=wanted[name], text=texts.get(name) or text, state=state, begin=moment_of(state.cursor)
            )
            for name, text, state in rows
            if name in wanted and state is not None
        }

    def _due(self, entry: _Entry, now: datetime) -> list[Due]:
        """Return what an entry has to emit, in turn, and note when to look at it again."""
        on, name = entry.schedule.on, entry.schedule.name
        begin, late_before = entry.after, max(self._here_since - GRACE, now - OUTAGE)
        if on.catchup != "all":
            begin = max(begin, late_before - timedelta(seconds=on.jitter_s) - _TICK)
        found: list[Due] = []
        late: Due | None = None
        entry.next_at, emit_at = None, entry.turn_at
        for due in dues(on, begin):
            emit_at = max(emit_at, due.at + jitter(name, on, due))
            if emit_at > now:
                entry.next_at = emit_at
                break
            if on.catchup != "all" and emit_at < late_before:
                late = due
                continue
            found.append(due)
            entry.turn_at = emit_at
            if len(found) == _BATCH:
                entry.next_at = now + timedelta(seconds=PERIOD_S)
                break
        if on.catchup == "latest" and not found:
            late = late or last_due(on, begin, entry.after)
            found = [late] if late is not None else []
        return found

    # Emitting

    def _emit(self, entries: list[_Entry], now: datetime) -> None:
        batch: list[tuple[_Entry, list[Due]]] = []
        for entry in entries:
            try:
                found = self._due(entry, now)
            except Exception:  # one schedule must not hold up the others
                log.exception("schedule_failed", schedule=entry.schedule.name)
                entry.next_at = now + _FAILED
                continue
            if found:
                batch.append((entry, found))
            if sum(len(found) for _, found in batch) >= _PUBLISHED_AT_ONCE:
                self._publish(batch)
                batch = []
                if not self.lead()[0]:
                    self._is_stale = True
                    return
        if batch:
            self._publish(batch)

    def _publish(self, batch: list[tuple[_Entry, list[Due]]]) -> None:
        """Publish, then move on. Whatever fails, what is in the ledger is where to begin again."""
        events = [event for entry, found in batch for event in _events(entry.schedule, found)]
        states = []
        for entry, found in batch:
            at = micros(found[-1].at)
            states.append(replace(entry.state, cursor=at, last_due=at))
        try:
            self._bus.publish(events)
            rows = [(entry.schedule.name, entry.text, state) for (entry, _), state in zip(batch, states, strict=True)]
            texts = self._store.put_states(rows)
        except Exception:
            for entry, _ in batch:
                entry.next_at = _NOW
            raise
        for (entry, found), state, text in zip(batch, states, texts, strict=True):
            log.debug("schedule_emitted", schedule=entry.schedule.name, count=len(found), last=found[-1].id)
            if text is None:  # somebody else has written: another leader, or `resume`
                self._is_stale = True
            else:
                entry.text, entry.state = text, state

    # Backfills

    def _backfill(self, wanted: Mapping[str, Schedule], now: datetime) -> bool:
        """Go on with the backfills; answers whether some are at work."""
        at_work = False
        for text, one in self._store.backfills():
            if one.finished:
                if moment_of(one.finished) < now - _KEPT:
                    self._store.drop_backfill(one.id)
            elif one.name not in wanted:
                log.warning("backfill_dropped", backfill=one.id, schedule=one.name, reason="the schedule is gone")
                self._store.drop_backfill(one.id)
            else:
                at_work = True
                self._fill(text, one, now)
        return at_work

    def _fill(self, text: str, one: Backfill, now: datetime) -> None:
        """Release as many as there is room for: publish, then move on.

        What was published before a kill is found again: it counts as in flight as long as its run has not ended.
        """
        flying = self._flying(one, now)
        room = min(one.max_parallel - len(flying), _BATCH)
        coming = dues(one.on, moment_of(one.cursor), moment_of(one.end))
        page = list(islice(coming, max(room, _LOOKED_AT))) if room > 0 else []
        schedule = Schedule(name=one.name, workflow=one.workflow, on=one.on, digest="")
        made = _events(schedule, page, priority="low")
        cursor, known, events = one.cursor, one.known, []
        for due, event, (state, seen) in zip(page, made, self._store.progress(one.workflow, made), strict=True):
            if len(flying) >= one.max_parallel:
                break
            cursor = micros(due.at)
            if (state and RunState(state).is_end) or (seen and not state):
                known += 1
                continue
            flying[f"{run_id(one.workflow, event.source, event.id)}:{event.key}"] = micros(now)
            events += [] if state else [event]
        is_over = room > 0 and not page and not flying
        if events:
            self._bus.publish(events)
        new = replace(
            one, cursor=cursor, known=known, released=one.released + len(events), in_flight=flying,
            finished=micros(now) if is_over else 0,
        )  # fmt: skip
        if new != one:
            self._store.put_backfill(text, new)
        if is_over:
            log.info("backfill_finished", backfill=one.id, schedule=one.name, released=one.released, known=one.known)

    def _flying(self, one: Backfill, now: datetime) -> dict[str, int]:
        """Return those of a backfill's runs in flight that still are."""
        pairs = [name.split(":") for name in one.in_flight]
        progress = self._store.progress_of([run for run, _ in pairs], [key for _, key in pairs])
        flying = {}
        for (name, since), (state, seen) in zip(one.in_flight.items(), progress, strict=True):
            is_lost = not state and (seen or moment_of(since) < now - _LOST)
            if not is_lost and not (state and RunState(state).is_end):
                flying[name] = since
        return flying


def _events(schedule: Schedule, found: Sequence[Due], *, priority: str | None = None) -> list[Event]:
    """Return the events of times that follow each other."""
    before = [previous_of(schedule.on, found[0]), *found[:-1]] if found else []
    pairs = zip(found, before, strict=True)
    return [schedule_event(schedule.name, due, last, priority=priority) for due, last in pairs]


def _next_at(schedule: Schedule, after: datetime) -> datetime | None:
    due = next(dues(schedule.on, after), None)
    return None if due is None else due.at + jitter(schedule.name, schedule.on, due)


def _brought_up(schedule: Schedule, state: State | None, since: datetime, now: datetime) -> State:
    """Return the record of a schedule that is in force since then, made from the one that there was."""
    if state is None:
        begin, start = since, schedule.on.start
        if start is not None and schedule.on.catchup != "none":
            begin = min(begin, parse_moment(start, schedule.on.timezone) - _TICK)
        return State(digest=schedule.digest, cursor=micros(begin))
    if moment_of(state.cursor) > now + _AHEAD:
        state = replace(state, cursor=micros(now))
    if state.removed or state.digest != schedule.digest:
        state = replace(state, cursor=max(state.cursor, micros(since)), digest=schedule.digest, removed=0)
    return state


class _Scheduler(beat.Scheduler):  # type: ignore[misc]  # celery has no types
    """What celery's beat asks at each of its turns; the schedules are the definitions', and not celery's own."""

    def __init__(self, ours: Beat, stopping: threading.Event, app: Any, **options: Any) -> None:
        super().__init__(app, **options)
        self._ours = ours
        self._stopping = stopping
        self._wait_s = 0.0

    def tick(self, *_: Any, **__: Any) -> float:
        """Wait for what is next and do a turn; ends celery's service when it shall stop."""
        if self._stopping.wait(self._wait_s):
            raise SystemExit
        self._wait_s = self._ours.try_turn()
        return 0.0
