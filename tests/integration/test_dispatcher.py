"""From an event on the bus to runs: matching, identity, verdicts, and what is refused."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.dispatcher import Dispatcher, manual_event
from orchestrator.engine import Engine
from orchestrator.eventlog import Verdict
from orchestrator.events import FILE_CREATED, Event
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.ledger.queries import Queries
from orchestrator.rescuer import Rescuer
from orchestrator.runs import RunState
from orchestrator.subscriptions import OnEvent, OnFile, file_source
from orchestrator.workflows import Param, Step, Workflow
from tests.conftest import wait_until
from tests.integration.conftest import Place


def event(type_: str = "t", data: Any = None, **options: Any) -> Event:
    given = {"id": uuid.uuid4().hex, "source": "test", "time": "2026-01-01T00:00:00Z"} | options
    return Event(type=type_, data=data, **given)


def workflow(name: str, *steps: Step, **options: Any) -> Workflow:
    only = (Step(id="a", task="tasks:echo", with_={"value": parse("{{ event.data }}")}),)
    return Workflow(name=name, steps=steps or only, **options)


@pytest.fixture
def dispatcher(place: Place) -> Iterator[Dispatcher]:
    made = Dispatcher(place.engine)
    yield made
    made.stop()
    made.apply([])


def started(verdict: Verdict | dict[str, Any]) -> str:
    one = Verdict(**verdict) if isinstance(verdict, dict) else verdict
    assert one.verdict in ("started", "refused"), one
    assert one.run is not None
    return one.run


def test_an_event_starts_every_workflow_that_asks_for_it_and_no_other(place: Place, dispatcher: Dispatcher) -> None:
    dispatcher.apply(
        [
            workflow("big", on=(OnEvent(pattern={"type": ["order"], "data": {"n": [{"numeric": [">", 10]}]}}),)),
            workflow("all", on=(OnEvent(pattern={"type": ["order"]}),)),
            workflow("other", on=(OnEvent(pattern={"type": ["invoice"]}),)),
            workflow("files", on=(OnFile(path="/x"),)),
        ]
    )
    order = event("order", {"n": 5})
    verdicts = dispatcher.dispatch(order)
    assert list(verdicts) == ["all"]
    run = place.end(started(verdicts["all"]))
    assert run.output == {"n": 5}
    told = place.engine.events.explain(order.id)
    assert told["verdict"] == "started"
    assert told["verdicts"]["all"] == {"verdict": "started", "run": run.id, "reason": None}
    assert {name: one["reason"] for name, one in told["verdicts"].items() if one["verdict"] == "no_match"} == {
        "big": 'event: data.n: wanted [{"numeric":[">",10]}], saw 5',
        "other": 'event: type: wanted ["invoice"], saw "order"',
        "files": 'file: type: wanted ["orchestrator.file.created"], saw "order"',
    }
    assert started(dispatcher.dispatch(event("order", {"n": 11}))["big"])


def test_the_same_event_starts_a_workflow_once_however_often_it_comes(place: Place, dispatcher: Dispatcher) -> None:
    dispatcher.apply([workflow("w", on=(OnEvent(pattern={"type": ["t"]}),))])
    same = event()
    first = started(dispatcher.dispatch(same)["w"])
    assert dispatcher.dispatch(same) == {}
    # Also when the mark of the event was never written, as after a kill in between.
    place.engine.ledger.client.delete(keys.seen_key(same.key))
    assert started(dispatcher.dispatch(same)["w"]) == first
    place.end(first)
    # And the same id from another source is another event.
    assert started(dispatcher.dispatch(event(id=same.id, source="elsewhere"))["w"]) != first


def test_file_events_are_for_the_workflow_that_watches(place: Place, dispatcher: Dispatcher) -> None:
    dispatcher.apply([workflow(name, on=(OnFile(path="/in"),)) for name in ("one", "two")])
    verdicts = dispatcher.dispatch(event(FILE_CREATED, {"path": "/in/a"}, source=file_source("one", "/in")))
    assert started(verdicts["one"])
    assert list(verdicts) == ["one"]


def test_params_are_read_from_the_event_and_a_misfit_is_a_failed_run(place: Place, dispatcher: Dispatcher) -> None:
    params = {"n": Param(type="integer", default=parse("{{ event.data.n }}"))}
    step = Step(id="a", task="tasks:echo", with_={"value": parse("{{ params.n }}")})
    dispatcher.apply([workflow("w", step, on=(OnEvent(pattern={"type": ["t"]}),), params=params)])
    assert place.end(started(dispatcher.dispatch(event(data={"n": 5}))["w"])).output == 5
    verdict = dispatcher.dispatch(event(data={"n": "5"}))["w"]
    run = place.queries.run(started(verdict))
    assert run.state is RunState.FAILED
    assert (run.error or {})["type"] == "InputError"
    assert "n: Input should be a valid integer (got '5')" in (run.error or {})["message"]
    assert run.id not in place.engine.ledger.active()
    assert place.engine.ledger.client.ttl(keys.run_key(run.id, "run")) > 0


def test_a_run_by_hand_is_for_its_workflow_alone(place: Place, dispatcher: Dispatcher) -> None:
    params = {"n": Param(type="integer")}
    step = Step(id="a", task="tasks:echo", with_={"value": parse("{{ params.n }}")})
    dispatcher.apply([workflow("w", step, params=params), workflow("v", on=(OnEvent(pattern={"type": ["t"]}),))])
    verdicts = dispatcher.dispatch(manual_event("w", {"n": 1}, event_id=uuid.uuid4().hex))
    assert place.end(started(verdicts["w"])).output == 1
    assert list(verdicts) == ["w"]
    unknown = dispatcher.dispatch(manual_event("x", {}, event_id="e"))["x"]
    assert (unknown.verdict, unknown.reason) == ("no_match", "no such workflow is in force")


def test_events_travel_over_the_bus_and_keep_their_verdicts(place: Place, dispatcher: Dispatcher) -> None:
    dispatcher.apply([workflow("w", on=(OnEvent(pattern={"type": ["t"]}),))])
    sent = [event(data=n) for n in range(50)]
    place.engine.bus.publish(sent)
    dispatcher.start()
    wait_until(lambda: place.engine.events.seen(sent[-1]), "the last event was dealt with")
    for one in sent:
        record = place.engine.events.get(one.id)
        assert record["event"] == one.to_json()
        assert place.end(started(record["verdicts"]["w"])).output == one.data
    listed, _ = place.engine.events.page(limit=50)
    assert {record["event"]["id"] for record in listed} == {one.id for one in sent}


def test_what_is_no_event_is_set_aside_with_its_bytes_and_the_next_one_goes_on(
    place: Place, dispatcher: Dispatcher
) -> None:
    dispatcher.apply([workflow("w", on=(OnEvent(pattern={"type": ["t"]}),))])
    app, good = place.engine.app, event()
    with app.producer_pool.acquire(block=True) as producer:
        for body, kind in ((b"\x80\x04pickle", "application/x-python-serialize"), (b"{broken", "application/json")):
            producer.publish(body, content_type=kind, content_encoding="binary", exchange="", routing_key=EVENT_QUEUE)
        producer.publish({"specversion": "1.0"}, serializer="json", exchange="", routing_key=EVENT_QUEUE)
        producer.publish(
            b"squeezed", content_type="application/json", content_encoding="binary", exchange="",
            routing_key=EVENT_QUEUE, headers={"compression": "unheard-of"},
        )  # fmt: skip
    place.engine.bus.publish([good])
    dispatcher.start()
    wait_until(lambda: place.engine.events.seen(good), "the good event was dealt with")
    aside = "".join(place.engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1))
    assert "pickle" in aside
    assert "{broken" in aside
    assert "squeezed" in aside
    assert "id must be a string" in aside


def test_nested_workflows_are_runs_of_their_own(place: Place, dispatcher: Dispatcher) -> None:
    child = workflow(
        "child",
        Step(id="double", task="tasks:add", with_={"numbers": [parse("{{ params.n }}"), parse("{{ params.n }}")]}),
        Step(id="check", task="tasks:fail_on", with_={"item": parse("{{ double }}"), "bad": [8]}),
        params={"n": Param(type="integer")},
    )
    parent = workflow(
        "parent",
        Step(id="one", workflow="child", with_={"n": 5}),
        Step(id="many", workflow="child", foreach=[1, 2, 3], with_={"n": parse("{{ item }}")}),
        Step(id="sum", task="tasks:add", with_={"numbers": parse("{{ many + [one] }}")}),
    )
    broken = workflow("broken", Step(id="a", workflow="child", with_={"n": 4}))
    misfit = workflow("misfit", Step(id="a", workflow="child", with_={"n": "x"}))
    dispatcher.apply([child, parent, broken, misfit])

    def go(name: str) -> Any:
        return place.end(started(dispatcher.dispatch(manual_event(name, {}, event_id=uuid.uuid4().hex))[name]))

    run = go("parent")
    assert run.output == 2 + 4 + 6 + 10
    nested = place.queries.run({one.id: one for one in run.steps}["one"].run)
    assert (nested.workflow, nested.output) == ("child", 10)
    assert nested.parent == {"run": run.id, "step": "one", "index": None}
    failed = go("broken")
    assert failed.state is RunState.FAILED
    assert (failed.error or {})["message"] == "bad item 8"
    assert "n: Input should be a valid integer" in (go("misfit").error or {})["message"]
    # A repeated start puts a run on the list once more; the rescuer, whose list it is, takes it off.
    rescuer = Rescuer(place.engine)
    wait_until(lambda: rescuer.round() == 0 and not place.engine.ledger.active(), "nothing is in flight")


def test_the_rescuer_publishes_what_a_dead_process_left_in_the_outbox(place: Place, engine: Engine) -> None:
    """Dies after writing the run and before publishing: the row in the outbox is all there is."""
    from orchestrator.plan import Plan

    plan = Plan.of(Workflow(name="w", steps=(Step(id="a", task="tasks:echo", with_={"value": 1}),)))
    ledger = place.engine.ledger
    ledger.put_plan(plan)
    run = uuid.uuid4().hex
    ledger.start(run, plan, event="{}", event_id="e", run_input="{}", created_ms=1)
    rescuer = Rescuer(place.engine)
    assert rescuer.round() == 0  # not yet: it may be about to be published
    ledger.client.zadd(keys.run_key(run, "outbox"), {"a": 1})
    assert rescuer.round() == 1
    assert place.end(run).output == 1
    wait_until(lambda: rescuer.round() == 0 and run not in ledger.active(), "the run is off the list")


def test_the_threads_of_dispatcher_and_rescuer_end(place: Place) -> None:
    for _ in range(3):
        dispatcher, rescuer = Dispatcher(place.engine), Rescuer(place.engine)
        for part in (dispatcher, rescuer):
            part.stop()
            part.start()
            part.start()
        for part in (dispatcher, rescuer):
            part.stop()
            part.stop()
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"dispatcher", "rescuer"}
    assert Queries(place.engine.ledger, place.engine.payloads).runs(limit=1)


def test_an_event_that_cannot_be_dispatched_is_set_aside_and_holds_nothing_up(
    place: Place, dispatcher: Dispatcher
) -> None:
    """Numbers that JSON does not have, and ids that are no text: Python's own json writes and reads both."""
    dispatcher.apply([workflow("w", on=(OnEvent(pattern={"type": ["t"]}),))])
    dispatcher.start()
    client = place.engine.ledger.client
    before = client.llen(keys.SET_ASIDE)
    good = event()
    place.engine.bus.publish([event(data=float("nan")), event(id="\ud800"), good])
    wait_until(lambda: client.exists(keys.seen_key(good.key)), "the good event was dispatched")
    assert client.llen(keys.SET_ASIDE) == before + 2
    assert client.llen(EVENT_QUEUE) == 0
