"""The beat on a real server: time is passed in, and what is on the bus is read from the broker."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import LEADER_MS
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.recurrence import OnSchedule
from orchestrator.runs import run_id
from orchestrator.schedules import Schedules, ScheduleStore
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnEvent, pattern_of
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, capture_logs, wait_until
from triggers.beat import Beat

DAY = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def to(self, text: str) -> None:
        self.now = datetime.fromisoformat(text).replace(tzinfo=UTC)


def workflow(name: str = "w", **given: Any) -> Workflow:
    on = OnSchedule(**given)
    return Workflow(name=name, on=(on, OnEvent(pattern=pattern_of(name, on))), steps=(Step(id="a", task="tasks:noop"),))


class Place:
    """A server with beats on it, all on one clock; `ids` takes what they have put on the bus."""

    def __init__(self, settings: Settings) -> None:
        self.engine = Engine(settings, patience_s=1.0)
        self.clock = Clock()
        self.bus = EventBus(self.engine.app)
        self.schedules = Schedules(self.engine, clock=self.clock)
        self.store = ScheduleStore(self.engine.ledger.client)
        self._beats: list[Beat] = []

    def beat(self, *workflows: Workflow, bus: Any = None) -> Beat:
        made = Beat(self.engine, bus or self.bus, clock=self.clock)
        made.apply(workflows)
        self.engine.ledger.publish_workflows(Plan.of(one) for one in workflows)
        self._beats.append(made)
        return made

    def kill(self, beat: Beat) -> None:
        """What is left of a beat after kill -9: nothing, and its lead runs out."""
        self.engine.ledger.client.delete(keys.leader_key("beat"))

    def turn(self, beat: Beat, at: str | None = None) -> list[str]:
        """Have a beat go on, as it does by itself, minute by minute, and answer the ids of what it has emitted."""
        if at is not None:
            until = datetime.fromisoformat(at).replace(tzinfo=UTC)
            while until - self.clock.now > timedelta(seconds=20):
                self.clock.now += timedelta(seconds=20)
                beat.turn()
            self.clock.now = until
        beat.turn()
        return self.ids()

    def events(self) -> list[Event]:
        found = []
        while raw := self.engine.ledger.client.rpop(EVENT_QUEUE):
            found.append(Event.from_json(json.loads(base64.b64decode(json.loads(raw)["body"]))))
        return found

    def ids(self) -> list[str]:
        return [event.id for event in self.events()]

    def close(self) -> None:
        for one in self._beats:
            one.stop()
        self.engine.close()


@pytest.fixture
def place(settings: Settings) -> Iterator[Place]:
    made = Place(settings)
    yield made
    made.close()


def test_each_due_time_is_an_event_of_its_own(place: Place) -> None:
    beat = place.beat(workflow(cron="*/10 * * * *"))
    assert place.turn(beat) == []
    place.clock.to("2026-01-01T00:10:00.5")
    assert beat.turn() <= 1.0
    (event,) = place.events()
    assert event.to_json() == {
        "specversion": "1.0", "id": "2026-01-01T00:10:00Z", "source": "orchestrator:schedule/w",
        "type": "orchestrator.schedule.due", "time": "2026-01-01T00:10:00Z", "subject": "w",
        "datacontenttype": "application/json",
        "data": {"schedule": "w", "due_at": "2026-01-01T00:10:00Z", "previous_due_at": "2026-01-01T00:00:00Z"},
    }  # fmt: skip
    assert place.turn(beat) == []
    assert place.turn(beat, "2026-01-01T00:30:01") == ["2026-01-01T00:20:00Z", "2026-01-01T00:30:00Z"]
    assert place.schedules.show("w")["last_due_at"] == "2026-01-01T00:30:00Z"


@pytest.mark.parametrize(
    ("catchup", "expected"),
    [
        ("none", []),
        ("latest", ["2026-03-01T00:00:00Z"]),
        ("all", [f"{DAY + timedelta(days=n):%Y-%m-%dT%H:%M:%SZ}" for n in range(1, 60)]),
    ],
)  # fmt: skip
def test_what_fell_into_a_downtime_is_treated_as_catchup_says(place: Place, catchup: str, expected: list[str]) -> None:
    definition = workflow(cron="@daily", catchup=catchup)
    place.turn(place.beat(definition))
    place.clock.to("2026-03-01T12:00")
    place.kill(place.beat(definition))
    beat = place.beat(definition)
    assert place.turn(beat) == expected
    assert place.turn(beat) == []
    assert place.turn(beat, "2026-03-02T00:00:00")[-1:] == ["2026-03-02T00:00:00Z"]


def test_latest_does_not_come_besides_what_is_due_now(place: Place) -> None:
    definition = workflow(every_s=10, catchup="latest")
    place.turn(place.beat(definition))
    place.kill(place.beat())
    place.clock.to("2026-01-02T00:00:05")
    assert place.turn(place.beat(definition)) == [
        "2026-01-01T23:59:40Z", "2026-01-01T23:59:50Z", "2026-01-02T00:00:00Z"
    ]  # fmt: skip


def test_years_are_caught_up_in_batches_and_from_where_a_kill_left_it(place: Place) -> None:
    """Also with kills between publishing and moving on: none is missing, and what comes twice is the same event."""
    definition = workflow(cron="0 */6 * * *", catchup="all")
    place.turn(place.beat(definition))
    place.clock.to("2028-01-01T00:00:01")
    found: list[str] = []
    rng = random.Random(5)
    beat = None
    for _ in range(200):
        if beat is None:
            place.kill(place.beat())
            beat = place.beat(definition)
        if rng.random() < 0.4:
            beat._store.put_states = _killed  # type: ignore[method-assign]
        try:
            beat.turn()
        except RuntimeError:
            beat = None
        batch = place.ids()
        assert len(batch) <= 250
        found += batch
        if not batch and beat is not None:
            break
        place.clock.now += timedelta(seconds=1)
    expected = [datetime(2026, 1, 1, 6, tzinfo=UTC) + timedelta(hours=6 * n) for n in range(4 * 730)]
    assert sorted(set(found)) == [one.strftime("%Y-%m-%dT%H:%M:%SZ") for one in expected]
    assert len(found) > len(expected)


def _killed(*_: Any) -> Any:
    raise RuntimeError("kill -9")


def test_two_that_think_that_they_lead_emit_the_same_events(place: Place) -> None:
    definition = workflow(every_s=60)
    one, other = place.beat(definition), place.beat(definition)
    place.turn(one)
    found: list[str] = []
    for minute in range(1, 10):
        place.clock.to(f"2026-01-01T00:0{minute}:00")
        for beat in (one, other):
            place.kill(one)
            beat.turn()
        found += place.ids()
    assert sorted(set(found)) == [f"2026-01-01T00:0{minute}:00Z" for minute in range(1, 10)]
    _, state = place.store.state("w")
    assert state is not None
    assert place.turn(one, "2026-01-01T00:09:30") == []


def test_one_leads_and_another_takes_over(place: Place) -> None:
    """Within 15 s after a kill -9: the lead runs out, and what was due meanwhile is not late."""
    definition = workflow(every_s=1)
    one, other = place.beat(definition), place.beat(definition)
    place.turn(one)
    place.clock.to("2026-01-01T00:00:10")
    assert place.turn(other) == []
    wait_until(lambda: place.turn(other), "the other leads", LEADER_MS / 1000 + 2)
    place.clock.to("2026-01-01T00:00:15")
    assert place.turn(other)[-1] == "2026-01-01T00:00:15Z"


def test_definitions_are_followed_live(place: Place) -> None:
    """Edited: from now; renamed: another; removed: none; brought back: from now, and not from when it went."""
    beat = place.beat(workflow(cron="0 * * * *", catchup="all"))
    assert place.turn(beat, "2026-01-01T01:00:30") == ["2026-01-01T01:00:00Z"]
    beat.apply([workflow(cron="*/15 * * * *", catchup="all")])
    assert place.turn(beat, "2026-01-01T01:15:01") == ["2026-01-01T01:15:00Z"]
    beat.apply([workflow(cron="*/15 * * * *", catchup="all", name="quarter")])
    place.turn(beat, "2026-01-01T01:30:01")
    beat.apply([])
    assert place.turn(beat, "2026-01-01T05:00:00") == []
    beat.apply([workflow(cron="*/15 * * * *", catchup="all")])
    assert place.turn(beat, "2026-01-01T05:15:00") == ["2026-01-01T05:15:00Z"]


def test_what_is_no_other_recurrence_keeps_its_place(place: Place) -> None:
    beat = place.beat(workflow(cron="@hourly", catchup="none"))
    place.turn(beat)
    place.clock.to("2026-01-02T00:00:30")
    later = place.beat(workflow(cron="@hourly", catchup="all", jitter_s=1))
    place.kill(beat)
    assert len(place.turn(later)) == 24


def test_a_new_schedule_begins_from_now_or_with_catchup_from_its_start(place: Place) -> None:
    place.clock.to("2026-01-10T12:00")
    start = "2026-01-08T00:00:00Z"
    beat = place.beat(
        workflow("a", cron="@daily", start=start), workflow("b", cron="@daily", start=start, catchup="all"),
        workflow("c", cron="@daily", start=start, catchup="latest"), workflow("d", cron="@daily", catchup="all"),
        workflow("e", at=("2026-01-09T00:00:00Z", "2026-01-10T12:00:05Z")),
    )  # fmt: skip
    beat.turn()
    assert [(event.subject, event.id[:10]) for event in place.events()] == [
        ("b", "2026-01-08"), ("b", "2026-01-09"), ("b", "2026-01-10"), ("c", "2026-01-10")
    ]  # fmt: skip
    assert place.turn(beat, "2026-01-10T12:00:05") == ["2026-01-10T12:00:05Z"]


def test_nothing_after_the_end(place: Place) -> None:
    beat = place.beat(workflow(every_s=60, end="2026-01-01T00:02:00Z"))
    assert place.turn(beat, "2026-01-01T01:00:00") == ["2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"]
    assert place.schedules.show("w")["next_due_at"] == []


def test_jitter_puts_off_and_changes_no_identity(place: Place) -> None:
    """Each comes within the jitter, in turn, and at the same moment whoever emits it."""
    came: list[list[tuple[str, str]]] = []
    for _ in range(2):
        place.clock.to("2026-01-01T00:00")
        place.engine.ledger.client.flushdb()
        beat = place.beat(workflow(every_s=60, jitter_s=50))
        found = []
        for second in range(0, 600, 5):
            place.clock.now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)
            beat.turn()
            found += [(one, str(place.clock.now)) for one in place.ids()]
        came.append(found)
    assert came[0] == came[1]
    assert [one for one, _ in came[0]][:9] == [f"2026-01-01T00:0{minute}:00Z" for minute in range(1, 10)]
    delays = {
        (datetime.fromisoformat(at) - datetime.fromisoformat(due)).total_seconds() for due, at in came[0]
    }  # fmt: skip
    assert len(delays) > 3
    assert max(delays) <= 55


def test_what_waits_for_its_turn_is_not_late(place: Place) -> None:
    """Where the jitter is longer than the period a time may wait for the one before, longer than an outage may last."""
    beat = place.beat(workflow(every_s=600, jitter_s=6 * 3600))
    found = place.turn(beat, "2026-01-02T00:00:00")
    place.clock.to("2026-01-01T00:00")
    wanted = [place.clock.now + timedelta(minutes=10 * n) for n in range(1, 18 * 6 + 1)]
    assert [one for one in found if one <= "2026-01-01T18:00:00Z"] == [f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in wanted]


def test_pause_and_resume(place: Place) -> None:
    """While it is paused nothing comes, also with `catchup: all`, and of that time nothing is made up for."""
    definition = workflow(cron="*/10 * * * *", catchup="all")
    beat = place.beat(definition)
    place.turn(beat)
    assert place.schedules.pause("w")["paused"]
    assert place.schedules.pause("w")["paused"]
    assert place.turn(beat, "2026-01-01T00:35") == []
    assert not place.schedules.resume("w")["paused"]
    assert not place.schedules.resume("w")["paused"]
    assert place.turn(beat, "2026-01-01T00:40") == ["2026-01-01T00:40:00Z"]
    # With nobody there meanwhile.
    place.schedules.pause("w")
    place.kill(beat)
    place.clock.to("2026-01-03T00:05")
    place.schedules.resume("w")
    assert place.turn(place.beat(definition), "2026-01-03T00:10") == ["2026-01-03T00:10:00Z"]
    with pytest.raises(NotFoundError, match="unknown schedule 'x'; known: w"):
        place.schedules.pause("x")


def test_a_paused_schedule_that_was_forgotten_and_restarted_stays_paused(place: Place) -> None:
    definition = workflow(every_s=60, catchup="all")
    place.turn(place.beat(definition))
    place.schedules.pause("w")
    place.kill(place.beat())
    place.clock.to("2026-01-05T00:00")
    assert place.turn(place.beat(definition), "2026-01-05T00:10") == []


def test_a_clock_that_was_ahead_and_is_set_back(place: Place) -> None:
    """The schedule goes on; times that were emitted already are the same events again."""
    beat = place.beat(workflow(every_s=3600, catchup="all"))
    place.turn(beat)
    place.clock.to("2026-01-01T05:00")
    assert len(place.turn(beat)) == 5
    place.clock.to("2026-01-01T01:30")
    with capture_logs() as logs:
        assert place.turn(beat) == []
        assert place.turn(beat, "2026-01-01T02:00") == ["2026-01-01T02:00:00Z"]
    assert [entry["event"] for entry in logs].count("clock_was_ahead") == 1


def test_a_clock_that_steps_back_a_little_repeats_nothing(place: Place) -> None:
    beat = place.beat(workflow(every_s=10))
    assert len(place.turn(beat, "2026-01-01T00:00:40")) == 4
    place.clock.to("2026-01-01T00:00:15")
    assert place.turn(beat, "2026-01-01T00:00:40") == []
    assert place.turn(beat, "2026-01-01T00:00:50") == ["2026-01-01T00:00:50Z"]


def test_a_suspended_process_has_been_a_downtime(place: Place) -> None:
    beat = place.beat(workflow(cron="@hourly", catchup="none"))
    place.turn(beat)
    place.clock.to("2026-01-01T08:30")
    assert place.turn(beat) == []


class _Away:
    """A bus whose broker is away for some publishes."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self.is_away = True

    def publish(self, events: Any) -> None:
        if self.is_away:
            raise UnavailableError("away")
        self._bus.publish(events)


def test_what_was_due_while_the_broker_was_away_comes_when_it_is_back(place: Place) -> None:
    """Also without catchup: the beat was there, so it was no downtime."""
    away = _Away(place.bus)
    beat = place.beat(workflow(every_s=60, catchup="none"), bus=away)
    with capture_logs():
        for _ in range(15):
            place.clock.now += timedelta(seconds=20)
            beat.try_turn()
    away.is_away = False
    assert place.turn(beat) == [f"2026-01-01T00:0{minute}:00Z" for minute in range(1, 6)]


def test_a_ledger_that_was_away_costs_no_tick(own_server: Server, settings: Settings) -> None:
    url = own_server.url
    place = Place(settings.evolve(broker_url=url, ledger_url=url))
    try:
        beat = place.beat(workflow(every_s=60))
        place.turn(beat)
        own_server.stop()
        with capture_logs():
            for _ in range(6):
                place.clock.now += timedelta(seconds=20)
                beat.try_turn()
            own_server.start()
        assert place.turn(beat) == ["2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"]
    finally:
        place.close()


def test_a_thousand_schedules_at_once(place: Place) -> None:
    beat = place.beat(*(workflow(f"w{n}", cron="@hourly") for n in range(1200)))
    place.turn(beat)
    place.clock.to("2026-01-01T01:00")
    beat.turn()
    assert len({event.subject for event in place.events()}) == 1200
    assert place.turn(beat) == []


def test_list_shows_the_next_five(place: Place) -> None:
    place.turn(place.beat(workflow("b", every_s=3600, timezone="Asia/Tokyo"), workflow("a", cron="0 6 * * MON")))
    a, b = place.schedules.list()
    assert a["next_due_at"] == [f"2026-{day}T06:00:00Z" for day in ("01-05", "01-12", "01-19", "01-26", "02-02")]
    assert {name: b[name] for name in ("name", "workflow", "spec", "paused", "last_due_at")} == {
        "name": "b", "workflow": "b", "spec": {"every_s": 3600, "timezone": "Asia/Tokyo"}, "paused": False,
        "last_due_at": None,
    }  # fmt: skip
    assert place.schedules.page(1) == ([a], "a")
    assert place.schedules.page(1, "a") == ([b], None)


# Backfill


class Runs:
    """A dispatcher that is turned by hand, and no worker: runs end when they are told to."""

    def __init__(self, place: Place, *workflows: Workflow) -> None:
        self._place = place
        self._dispatcher = Dispatcher(place.engine)
        self._dispatcher.apply(workflows)
        self.queries = Queries(place.engine.ledger, place.engine.payloads)

    def dispatch(self) -> None:
        for event in self._place.events():
            self._dispatcher.dispatch(event)

    def in_flight(self) -> list[str]:
        return self._place.engine.ledger.active()

    def end(self, run: str) -> None:
        self._place.engine.give_up(run, "the test says so")
        self._place.engine.ledger.close(run)


@pytest.mark.parametrize("kills", [False, True])
def test_backfill_keeps_to_max_parallel_and_runs_none_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch, kills: bool
) -> None:
    definition = workflow(cron="@daily")
    beat, runs = place.beat(definition), Runs(place, definition)
    place.clock.to("2026-01-31T12:00")
    place.turn(beat)
    # One has run already.
    assert place.schedules.backfill("w", "2026-01-10", "2026-01-10")["max_parallel"] == 100
    beat.turn()
    runs.dispatch()
    runs.end(runs.in_flight()[0])
    dry = place.schedules.backfill("w", "2026-01-01", "2026-01-20", dry_run=True)
    assert (dry["due"], dry["known"], dry["to_run"], len(dry["due_at"])) == (20, 1, 19, 19)
    assert dry["due_at"][:2] == ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]
    made = place.schedules.backfill("w", "2026-01-01", "2026-01-20", max_parallel=3)
    rng, most, ended = random.Random(3), 0, set()
    for _ in range(300):
        if kills and rng.random() < 0.3:
            place.kill(beat)
            beat = place.beat(definition)
            if rng.random() < 0.5:
                monkeypatch.setattr(beat._store, "put_backfill", _killed)
        try:
            beat.turn()
        except RuntimeError:
            beat = place.beat(definition)
            place.kill(beat)
        if rng.random() < 0.7:
            runs.dispatch()
        flying = runs.in_flight()
        most = max(most, len(flying))
        if flying and rng.random() < 0.6:
            run = rng.choice(flying)
            assert run not in ended
            ended.add(run)
            runs.end(run)
    assert most == 3
    (shown,) = [one for one in place.schedules.show("w")["backfills"] if one["id"] == made["id"]]
    assert shown["finished_at"]
    assert ended == {
        run_id("w", "orchestrator:schedule/w", f"2026-01-{day:02}T00:00:00Z") for day in range(1, 21) if day != 10
    }
    if not kills:
        assert (shown["released"], shown["known"]) == (19, 1)


def test_backfill_is_of_the_schedule_as_it_was_and_ends_with_it(place: Place) -> None:
    beat = place.beat(workflow(cron="@daily"))
    place.clock.to("2026-01-31T12:00")
    place.schedules.backfill("w", "2026-01-01", "2026-01-05", max_parallel=2)
    beat.turn()
    assert [(event.id, event.extensions) for event in place.events()] == [
        (f"2026-01-0{day}T00:00:00Z", {"priority": "low"}) for day in (1, 2)
    ]
    beat.apply([])
    place.engine.ledger.publish_workflows([])
    with capture_logs() as logs:
        beat.turn()
    assert "backfill_dropped" in [entry["event"] for entry in logs]
    assert place.store.backfills() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("w", "2026-01-05", "2026-01-04"), "to: 2026-01-04 is before from: 2026-01-05"),
        (("w", "x", "2026-01-04"), "from: must be a time with its zone"),
        (("w", "2027-01-01", "2027-01-04"), "from: 2027-01-01 is to come"),
        (("w", "2026-01-01", "2026-01-04", 0), "max_parallel must be from 1 to 10000, not 0"),
    ],
)
def test_backfill_refuses(place: Place, given: Any, message: str) -> None:
    place.beat(workflow(cron="@daily"))
    name, start, end, *most = given
    with pytest.raises(InputError, match=message):
        place.schedules.backfill(name, start, end, max_parallel=most[0] if most else None)
    with pytest.raises(NotFoundError, match="unknown schedule 'v'"):
        place.schedules.backfill("v", "2026-01-01", "2026-01-02")


def test_it_lives_and_stops_as_a_part_of_the_control_process(place: Place) -> None:
    """Celery's own service drives it: started, it emits; stopped, it ends at once and lets another lead."""
    one = Beat(place.engine, place.bus)
    one.apply([workflow(every_s=0.1)])
    one.start()
    one.start()
    found: list[str] = []
    wait_until(lambda: found.extend(place.ids()) or len(found) >= 3, "three have come")
    one.stop()
    one.stop()
    place.ids()
    assert place.engine.ledger.client.get(keys.leader_key("beat")) is None
    assert place.ids() == []
