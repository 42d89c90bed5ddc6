"""What is kept of events and told about them; events of runs that have ended; loops."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.dispatcher import Dispatcher, manual_event
from orchestrator.engine import Engine, now_ms
from orchestrator.errors import InputError, NotFoundError
from orchestrator.events import CAUSATION, HOPS, TRIGGER, Event, digest, foreign_fault, replay_of
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.resume import resume
from orchestrator.runs import RunState, run_id
from orchestrator.subscriptions import OnEvent, OnRun, OnWebhook
from orchestrator.workflows import Param, Step, Workflow
from tests.conftest import command, on_servers, wait_until
from tests.integration.conftest import Place


def event(type_: str = "t", data: Any = None, **options: Any) -> Event:
    given = {"id": uuid.uuid4().hex, "source": "test", "time": "2026-01-01T00:00:00Z"} | options
    return Event(type=type_, data=data, **given)


def echo(name: str, *on: Any, value: str = "{{ event.data }}", **options: Any) -> Workflow:
    return Workflow(
        name=name, steps=(Step(id="a", task="tasks:echo", with_={"value": parse(value)}),), on=on, **options
    )


T = OnEvent(pattern={"type": ["t"]})


@pytest.fixture
def dispatcher(engine: Engine) -> Dispatcher:
    """One on a server that holds nothing else; its runs are not run."""
    return Dispatcher(engine)


@pytest.fixture
def at_work(place: Place) -> Iterator[Dispatcher]:
    """One that takes events off the bus, beside a worker."""
    made = Dispatcher(place.engine)
    made.start()
    yield made
    made.stop()
    made.apply([])


# What is kept


def test_an_event_that_comes_again_is_counted_and_starts_nothing(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", T)])
    same = event()
    dispatcher.dispatch(same)
    assert engine.events.get(same.id)["duplicates"] == 0
    assert dispatcher.dispatch(same) == {}
    found = engine.events.get(same.id)
    assert found["duplicates"] == 1
    assert found["duplicate_at"] >= found["accepted_at"]
    assert len(engine.ledger.active()) == 1
    assert engine.ledger.client.hgetall(keys.COUNTERS) == {
        "events|verdict=started": "1", "events|verdict=duplicate": "1",
    }  # fmt: skip


def test_an_event_that_comes_by_two_triggers_is_for_the_workflows_of_both(
    engine: Engine, dispatcher: Dispatcher
) -> None:
    """A broker delivers one CloudEvent to each of its subscribers; and a stranger may claim another's id."""
    dispatcher.apply([echo("wa", OnWebhook(path="a")), echo("wb", OnWebhook(path="b")), echo("both", T)])
    a, b = (event(id="1", extensions={TRIGGER: f"webhook:{path}"}) for path in "ab")
    assert set(dispatcher.dispatch(a)) == {"wa", "both"}
    assert set(dispatcher.dispatch(b)) == {"wb", "both"}
    assert dispatcher.dispatch(a) == dispatcher.dispatch(b) == {}
    runs = {run_id(name, "test", "1") for name in ("wa", "wb", "both")}
    assert set(engine.ledger.active()) == runs  # once each
    with pytest.raises(InputError, match="say which by its key"):
        engine.events.get("1")


def test_an_id_that_is_the_key_of_another_event_does_not_hide_it(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([])
    mine = event()
    dispatcher.dispatch(mine)
    dispatcher.dispatch(event(id=mine.key, source="b"))
    assert engine.events.get(mine.key)["event"]["id"] == mine.id


def test_a_page_ends_where_too_many_would_have_to_be_looked_at(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([])
    old = event("rare")
    for n, each in enumerate((old, *(event() for _ in range(5)))):
        dispatcher.dispatch(each)
        engine.ledger.client.zadd(keys.EVENTS, {each.key: n})
    found, cursor = engine.events.page(type_="rare", most=3)
    assert (found, cursor is not None) == ([], True)
    found, cursor = engine.events.page(type_="rare", after=cursor, most=3)
    assert ([one["key"] for one in found], cursor) == ([old.key], None)


def test_why_is_told_by_the_definitions_that_were_in_force_then(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", OnEvent(pattern={"type": ["x"]})), echo("by-hand")])
    old = event()
    assert dispatcher.dispatch(old) == {}
    dispatcher.apply([echo("w", T), echo("new", T)])
    found = engine.events.explain(old.id)
    assert found["verdict"] == "no_match"
    assert found["verdicts"] == {
        "w": {"verdict": "no_match", "run": None, "reason": 'event: type: wanted ["x"], saw "t"'},
        "by-hand": {
            "verdict": "no_match", "run": None, "reason": "it has no `on:`; only `orchestrator run` starts it"
        },
    }  # fmt: skip
    young = event(subject="s")
    dispatcher.dispatch(young)
    new, before = engine.events.explain_workflow("new", since_ms=0)
    assert (new["event_id"], new["subject"], new["verdict"], new["reason"]) == (young.id, "s", "started", None)
    assert new["run"] == run_id("new", "test", young.id)
    assert (before["event_id"], before["verdict"], before["reason"]) == (old.id, "no_match", "it was not in force then")
    assert [one["verdict"] for one in engine.events.explain_workflow("w", since_ms=0)] == ["started", "no_match"]
    assert engine.events.explain_workflow("w", since_ms=now_ms() + 1000) == []


def test_a_refused_input_is_told_with_its_run(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", T, params={"n": Param(type="integer", default=parse("{{ event.data.n }}"))})])
    bad = event(data={"n": "x"})
    dispatcher.dispatch(bad)
    found = engine.events.get(bad.id)
    assert found["verdict"] == "refused"
    assert found["verdicts"]["w"]["run"] == run_id("w", "test", bad.id)
    assert "valid integer" in found["verdicts"]["w"]["reason"]


def test_an_id_may_be_that_of_events_of_several_sources(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([])
    one, two = event(id="1", source="a"), event(id="1", source="b")
    for each in (one, two):
        dispatcher.dispatch(each)
    with pytest.raises(InputError, match="events of several sources or triggers have the id '1'"):
        engine.events.get("1")
    assert engine.events.get(two.key)["event"]["source"] == "b"
    with pytest.raises(NotFoundError, match="event 'x' is not known"):
        engine.events.get("x")


def test_events_are_listed_in_pages_and_by_what_they_are(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", T)])
    sent = [event("t" if n % 2 else "u", n) for n in range(6)]
    for n, one in enumerate(sent):
        dispatcher.dispatch(one)
        engine.ledger.client.zadd(keys.EVENTS, {one.key: n})  # no two at the same time
    first, cursor = engine.events.page(limit=4)
    rest, end = engine.events.page(limit=4, after=cursor)
    assert [one["event"]["data"] for one in (*first, *rest)] == [5, 4, 3, 2, 1, 0]
    assert end is None
    assert [one["event"]["data"] for one in engine.events.page(verdict="no_match")[0]] == [4, 2, 0]
    assert [one["event"]["data"] for one in engine.events.page(type_="t", limit=2)[0]] == [5, 3]
    with pytest.raises(NotFoundError, match="no such cursor"):
        engine.events.page(after="x")


def test_events_are_kept_for_their_time_and_up_to_their_number(engine: Engine, dispatcher: Dispatcher) -> None:
    """Also their large data; and what is dropped is known when it comes again."""
    dispatcher.apply([echo("w")])
    large = "x" * (engine.settings.payload_bytes + 1)
    sent = [event(data=large if n == 0 else n) for n in range(5)]
    for n, one in enumerate(sent):
        dispatcher.dispatch(one)
        engine.ledger.client.zadd(keys.EVENTS, {one.key: now_ms() - 1000 + n})
    assert engine.events.get(sent[0].id)["event"]["data"] == large
    assert list((engine.settings.blobs_dir / "events").iterdir())
    few = Engine(engine.settings.evolve(events_maximum=3))
    assert few.events.trim(now_ms()) == 2
    few.close()
    by_id = [engine.ledger.client.exists(keys.event_id_key(digest(one.id))) for one in sent]
    assert by_id == [0, 0, 1, 1, 1]
    assert not list((engine.settings.blobs_dir / "events").iterdir())
    assert [one["event"]["data"] for one in engine.events.page()[0]] == [4, 3, 2]
    assert dispatcher.dispatch(sent[0]) == {}
    assert engine.events.trim(now_ms() + engine.settings.events_retention_s * 1000 + 2000) == 3
    assert engine.events.page() == ([], None)


def test_a_large_event_leaves_nothing_behind_whenever_it_is_dropped(engine: Engine) -> None:
    """Its record is still there at the end of the retention, and is not needed after a long downtime."""
    short = Engine(engine.settings.evolve(events_retention_s=1))
    dispatcher = Dispatcher(short)
    dispatcher.apply([])
    blobs = engine.settings.blobs_dir / "events"
    for lose_record in (False, True):
        large = event(data="x" * (engine.settings.payload_bytes + 1))
        dispatcher.dispatch(large)
        assert list(blobs.iterdir())
        record = keys.event_key(large.key)
        assert short.ledger.client.ttl(record) > 3600
        if lose_record:
            short.ledger.client.delete(record)
        assert short.events.trim(now_ms() + 2000) == 1
        assert not list(blobs.iterdir())
    short.close()


def test_a_replay_is_a_new_event_that_says_which_one_it_repeats(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", T)])
    old = event(data=1)
    dispatcher.dispatch(old)
    new = replay_of(old, "r1")
    assert (new.id, new.extensions[CAUSATION], new.data) == (f"{old.id}~r1", old.id, 1)
    dispatcher.dispatch(new)
    assert dispatcher.dispatch(replay_of(old, "r1")) == {}
    assert len(engine.ledger.active()) == 2


# Runs that follow runs


def test_a_run_that_has_ended_starts_those_that_follow_it(place: Place, at_work: Dispatcher) -> None:
    """With its output or error; and a further episode is a further event."""
    gate = OnRun(workflow=("work",), state=("succeeded", "failed"))
    work = Workflow(
        name="work",
        steps=(Step(id="a", task="tasks:fail_on", with_={"item": parse("{{ params.n }}"), "bad": [13]}),),
        params={"n": Param(type="integer")},
    )
    at_work.apply([work, echo("after", gate), echo("other", OnRun(workflow=("else",)))])

    def followed(run: str, episode: int = 1) -> Any:
        after = run_id("after", "orchestrator:runs", f"{run}.{episode}")
        wait_until(lambda: place.engine.ledger.outcome(after)[0], "the run is followed")
        return place.end(after).output

    place.engine.bus.publish([good := manual_event("work", {"n": 1}, event_id=uuid.uuid4().hex)])
    run = run_id("work", good.source, good.id)
    assert followed(run) == {
        "run": run, "workflow": "work", "state": "succeeded", "episode": 1, "output": 1, "error": None
    }  # fmt: skip
    place.engine.bus.publish([bad := manual_event("work", {"n": 13}, event_id=uuid.uuid4().hex)])
    run = run_id("work", bad.source, bad.id)
    first = followed(run)
    assert (first["state"], first["output"], first["error"]["message"]) == ("failed", None, "bad item 13")
    resume(place.engine, run)
    assert followed(run, 2)["episode"] == 2
    ended = Event(id=f"{run}.2", source="orchestrator:runs", type="-", time="")
    wait_until(lambda: place.engine.events.seen(ended), "it is written down")
    told = place.engine.events.get(ended.id)
    assert told["event"][CAUSATION] == bad.id
    assert told["event"][HOPS] == 1
    assert list(told["verdicts"]) == ["after"]


def test_a_run_that_was_refused_or_cancelled_is_followed_too(place: Place, at_work: Dispatcher) -> None:
    follow = OnRun(workflow=("strict", "slow"), state=("failed", "cancelled"))
    strict = echo("strict", params={"n": Param(type="integer")})
    slow = Workflow(name="slow", steps=(Step(id="a", sleep="1h"),))
    at_work.apply([strict, slow, echo("after", follow, value="{{ event.data.state }}")])

    def followed(start: Event) -> Any:
        after = run_id("after", "orchestrator:runs", f"{run_id(str(start.subject), start.source, start.id)}.1")
        wait_until(lambda: place.engine.ledger.outcome(after)[0], "the run is followed")
        return place.end(after).output

    refused, waiting = (manual_event(name, {}, event_id=uuid.uuid4().hex) for name in ("strict", "slow"))
    place.engine.bus.publish([refused, waiting])
    assert followed(refused) == "failed"
    run = run_id("slow", waiting.source, waiting.id)
    wait_until(lambda: place.engine.ledger.outcome(run)[0] == "running", "it sleeps")
    place.engine.cancel(run)
    assert followed(waiting) == "cancelled"


def test_nobody_is_told_of_runs_that_nobody_follows(place: Place, at_work: Dispatcher) -> None:
    at_work.apply([echo("work"), echo("after", OnRun(workflow=("work",), state=("failed",)))])
    place.engine.bus.publish([start := manual_event("work", {}, event_id=uuid.uuid4().hex)])
    run = run_id("work", start.source, start.id)
    wait_until(lambda: place.engine.ledger.outcome(run)[0] == "succeeded", "it has ended")
    wait_until(lambda: run not in place.engine.ledger.active(), "all is done for it")
    with pytest.raises(NotFoundError):
        place.engine.events.get(f"{run}.1")


def test_the_event_of_a_run_is_told_again_by_the_rescuer_if_the_bus_was_away(place: Place, at_work: Dispatcher) -> None:
    """The run stays on the list of those in flight until its event is on the bus."""
    at_work.apply([echo("work"), echo("after", OnRun(workflow=("work",)))])
    engine = Engine(place.settings)
    plan = place.engine.ledger.workflow_plan("work")
    run = uuid.uuid4().hex
    ledger = engine.ledger
    ledger.start(run, engine.plan(plan), event="{}", event_id="e", run_input="{}", created_ms=now_ms())
    ledger.give_up(run, {"type": "RunLost", "message": "x"})  # and whoever did that has died here
    assert run in ledger.active()
    at_work.apply([echo("work"), echo("after", OnRun(workflow=("work",), state=("failed",)))])
    engine.repair(run)
    assert run not in ledger.active()
    after = run_id("after", "orchestrator:runs", f"{run}.1")
    wait_until(lambda: ledger.outcome(after)[0], "the run is followed")
    place.end(after)
    engine.close()


def test_the_end_of_an_episode_is_told_though_the_run_goes_on_before_anybody_could(
    place: Place, at_work: Dispatcher
) -> None:
    follow = OnRun(workflow=("work",), state=("failed", "succeeded"))
    at_work.apply([echo("work"), echo("after", follow, value="{{ event.data.state }}")])
    ledger = place.engine.ledger
    run, plan = uuid.uuid4().hex, place.engine.plan(ledger.workflow_plan("work"))
    text = json.dumps(event().to_json())
    ledger.start(run, plan, event=text, event_id="e", run_input="{}", created_ms=now_ms())
    ledger.give_up(run, {"type": "RunLost", "message": "x"})  # and whoever did that has died here
    assert resume(place.engine, run) == 2
    for episode, state in ((1, "failed"), (2, "succeeded")):
        after = run_id("after", "orchestrator:runs", f"{run}.{episode}")
        wait_until(lambda after=after: ledger.outcome(after)[0], "the episode is followed")
        assert place.end(after).output == state
        assert place.engine.events.get(f"{run}.{episode}")["duplicates"] == 0


def test_a_large_output_does_not_travel(place: Place, at_work: Dispatcher) -> None:
    big = Workflow(name="big", steps=(Step(id="a", task="tasks:big", with_={"characters": 100_000}),))
    at_work.apply([big, echo("after", OnRun(workflow=("big",)))])
    place.engine.bus.publish([start := manual_event("big", {}, event_id=uuid.uuid4().hex)])
    after = run_id("after", "orchestrator:runs", f"{run_id('big', start.source, start.id)}.1")
    wait_until(lambda: place.engine.ledger.outcome(after)[0], "the run is followed")
    output = place.end(after).output
    assert (output["output"], output["output_omitted"], output["state"]) == (None, True, "succeeded")


def test_runs_that_follow_each_other_in_a_circle_end_as_a_dead_letter(place: Place, at_work: Dispatcher) -> None:
    """After as many as `maximum_hops` says, each of which knows what caused it."""
    at_work.apply([echo("ping", T, OnRun(workflow=("pong",))), echo("pong", OnRun(workflow=("ping",)))])
    place.engine.bus.publish([first := event()])
    hops = place.settings.maximum_hops

    def looped() -> list[dict[str, Any]]:
        return [
            one for one in place.engine.events.page(verdict="loop")[0] if one["event"]["data"]["workflow"] == "ping"
        ]

    (found,) = wait_until(looped, "the loop is cut", 60.0)
    assert found["event"][HOPS] == hops + 1
    assert "was set aside" in place.engine.events.explain(found["key"])["verdicts"]["pong"]["reason"]
    chain = found["event"]
    for _ in range(hops):
        chain = place.engine.events.get(chain[CAUSATION])["event"]
    assert chain[CAUSATION] == first.id
    aside = "".join(place.engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1))
    assert "runs have caused each other" in aside
    wait_until(lambda: not place.engine.ledger.active(), "all runs have ended")
    ended = place.queries.runs(limit=100, workflow="ping")[0] + place.queries.runs(limit=100, workflow="pong")[0]
    assert all(run.state is RunState.SUCCEEDED for run in ended)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "orchestrator.manual"}, "types that begin with `orchestrator.` are not for others"),
        ({"source": "orchestrator:run"}, "sources that begin with `orchestrator:`"),
        ({"source": "file:///in?workflow=w"}, "or `file://` are not for others"),
        ({"extensions": {"trigger": "webhook:x"}}, "the attribute 'trigger' is not for others"),
        ({"extensions": {"hops": 0}}, "the attribute 'hops' is not for others"),
        ({"extensions": {"causationid": "x"}}, "the attribute 'causationid' is not for others"),
    ],
)
def test_what_comes_from_outside_cannot_be_one_of_ours(given: dict[str, Any], words: str) -> None:
    one = {"id": "1", "source": "s", "type": "t", "time": ""}
    assert foreign_fault(Event(**one)) is None
    assert words in (foreign_fault(Event(**(one | given))) or "")


# Commands


def test_the_commands(engine: Engine, dispatcher: Dispatcher) -> None:
    dispatcher.apply([echo("w", T), echo("v", OnEvent(pattern={"type": ["x"]}))])
    sent = event(subject="s")
    dispatcher.dispatch(sent)
    dispatcher.dispatch(sent)

    def cli(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            command("events", *arguments, "--project", str(engine.settings.project)),
            env=on_servers(engine.settings), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    run = run_id("w", "test", sent.id)
    (listed,) = json.loads(cli("list", "--json", "--verdict", "started", "--type", "t"))["items"]
    assert (listed["verdicts"]["w"]["run"], listed["duplicates"]) == (run, 1)
    assert f"w: {run}" in cli("list")
    assert json.loads(cli("show", sent.id, "--json"))["event"] == sent.to_json()
    assert "it came 1 x again" in cli("show", sent.id)
    explained = cli("explain", sent.id)
    assert 'event: type: wanted ["x"], saw "t"' in explained
    assert f"run {run}" in explained
    assert json.loads(cli("explain", sent.id, "--json"))["verdicts"]["v"]["verdict"] == "no_match"
    (told,) = json.loads(cli("explain", "--workflow", "v", "--since", "1h", "--json"))["items"]
    assert (told["event_id"], told["verdict"]) == (sent.id, "no_match")
    assert "no event has come since 0s" in cli("explain", "--workflow", "v", "--since", "0s")
    replayed = json.loads(cli("replay", sent.id, "--json"))
    assert replayed["id"].startswith(f"{sent.id}~")
    assert engine.ledger.client.llen(EVENT_QUEUE) == 1
    assert "must be one of started, refused" in cli("list", "--verdict", "begun", code=1)
    assert "give the id of an event, or --workflow NAME" in cli("explain", code=1)
    assert "'nope' is not known" in cli("explain", "nope", code=1)
    assert "--since must be a duration" in cli("explain", "--workflow", "w", "--since", "soon", code=1)
