"""The API over real HTTP: what it answers, whom it lets in, and what it makes of bad requests."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from orchestrator import operations
from orchestrator.api import check_exposure, make_app, make_health
from orchestrator.audit import Audit
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.cli.http_server import HttpServer
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, SettingsError
from orchestrator.events import Event
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.recurrence import OnSchedule
from orchestrator.runs import run_id
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnEvent, OnQueue
from orchestrator.tokens import Scope, Tokens
from orchestrator.workflows import Param, Step, Workflow
from tests.conftest import Server, capture_logs, wait_until
from tests.integration.conftest import Place

NOW_MS = 1_700_000_000_000


class Served:
    """An ASGI application on a real port, served as the gateway does it."""

    def __init__(self, app: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = HttpServer("served", app, listener)

    def __enter__(self) -> Served:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()


@pytest.fixture
def api(engine: Engine) -> Iterator[httpx.Client]:
    """A client of the API on the test's own, empty ledger."""
    with Served(make_app(engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as client:
        yield client


def workflow(name: str = "w", **options: Any) -> Workflow:
    only = (Step(id="a", task="tasks:echo", with_={"value": parse("{{ params.n }}")}),)
    options = {"params": {"n": Param(type="integer", default=1)}} | options
    return Workflow(name=name, steps=only, **options)


def put_in_force(engine: Engine, *workflows: Workflow) -> Dispatcher:
    dispatcher = Dispatcher(engine)
    dispatcher.apply(workflows or [workflow()])
    return dispatcher


def is_problem(answer: httpx.Response, status: int) -> str:
    """Check that an answer is a problem, and return what it says."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert "\n" not in body["detail"]
    return str(body["detail"])


@pytest.fixture
def admin(engine: Engine) -> str:
    """A token that may do everything; with it, tokens are asked for."""
    return Tokens(engine.ledger).create("admin", Scope.ADMIN, now_ms=NOW_MS)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def start(engine: Engine, n: int = 0) -> str:
    """Start a run that nobody takes up."""
    event = Event(id=f"e{n}", source="test", type="t", time="2026-01-01T00:00:00Z", data={"n": n})
    run = run_id("w", "test", event.id)
    plan = engine.plan(engine.ledger.workflow_plan("w"))
    assert engine.start(run, plan, event=event.to_json(), params={"n": n})
    return run


# What it answers


def test_lists_are_paged_by_a_cursor_and_show_the_objects_of_the_command_line(
    api: httpx.Client, engine: Engine
) -> None:
    put_in_force(engine)
    runs = [start(engine, n) for n in range(5)]
    engine.cancel(runs[0])
    seen: list[str] = []
    page: dict[str, Any] = {"next": None}
    while not seen or page["next"]:
        page = api.get("/runs", params={"limit": 2} | ({"after": page["next"]} if seen else {})).json()
        seen += [one["id"] for one in page["items"]]
    assert sorted(seen) == sorted(runs)
    assert [one["id"] for one in api.get("/runs?state=cancelled").json()["items"]] == [runs[0]]
    assert api.get("/runs?workflow=nothing").json() == {"items": [], "next": None}
    shown = api.get(f"/runs/{runs[1]}").json()
    assert shown == Queries(engine.ledger, engine.payloads).run(runs[1]).to_json()
    assert api.get(f"/runs/{runs[1]}", params={"step": "a"}).json() == shown["steps"][0]


def test_one_step_is_cancelled_and_the_audit_log_says_who_asked(api: httpx.Client, engine: Engine) -> None:
    put_in_force(engine)
    run = start(engine)
    told = api.post(f"/runs/{run}/steps/a/cancel").json()
    assert told == {"id": run, "step": "a", "index": None, "cancelled": True, "state": "cancelled"}
    assert api.post(f"/runs/{run}/steps/a/cancel").json()["cancelled"] is False
    entry = api.get("/audit").json()["items"][0]
    assert (entry["action"], entry["target"], entry["status"]) == ("cancel_step", f"{run}/a", 200)
    is_problem(api.post(f"/runs/{run}/steps/b/cancel"), 404)
    is_problem(api.post(f"/runs/{run}/steps/a/cancel?index=3"), 404)
    is_problem(api.post(f"/runs/{run}/steps/a/cancel?index=-3"), 422)
    is_problem(api.post("/runs/nobody/steps/a/cancel"), 404)


def test_a_workflow_is_started_shown_and_its_end_waited_for(place: Place) -> None:
    dispatcher = put_in_force(place.engine)
    dispatcher.start()
    try:
        with Served(make_app(place.engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as api:
            answer = api.post("/workflows/w/runs", json={"input": {"n": 3}, "key": "k1"}, params={"wait": "20s"})
            assert answer.status_code == 200, answer.text
            assert (answer.json()["state"], answer.json()["output"]) == ("succeeded", 3)
            again = api.post("/workflows/w/runs", json={"input": {"n": 3}, "key": "k1"})
            assert again.status_code == 202
            assert again.json()["id"] == answer.json()["id"]
            assert again.headers["location"] == f"/api/v1/runs/{again.json()['id']}"
            event = api.post("/events", json={"type": "order", "data": {"x": 1}}).json()
            wait_until(lambda: api.get(f"/events/{event['id']}").status_code == 200, "the event was dispatched")
            assert api.get(f"/events/{event['id']}").json()["event"] == event
            rerun = api.post(f"/runs/{again.json()['id']}/rerun")
            assert rerun.status_code == 201
            ended = api.get(f"/runs/{rerun.json()['id']}", params={"wait": "20s"}).json()
            assert ended["output"] == 3
            is_problem(api.post(f"/runs/{ended['id']}/resume"), 422)
            assert api.post(f"/runs/{ended['id']}/cancel").json()["cancelled"] is False
            assert api.get(f"/runs/{ended['id']}/logs").json() == {"items": [], "next": None}
    finally:
        dispatcher.stop()
        dispatcher.apply([])


def test_failed_runs_are_resumed_and_their_logs_paged(place: Place) -> None:
    failing = Workflow(
        name="bad",
        steps=(
            Step(id="f", task="tasks:fail"),
            Step(id="t", task="tasks:talk", with_={}),
        ),
    )
    place.engine.ledger.publish_workflows([Plan.of(failing)])
    run = place.start(failing)
    place.end(run)
    with Served(make_app(place.engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as api:
        first = api.get(f"/runs/{run}/logs", params={"limit": 1}).json()
        second = api.get(f"/runs/{run}/logs", params={"limit": 1, "after": first["next"]}).json()
        assert (first["items"][0]["step"], second["items"][0]["step"]) == ("f", "t")
        assert second["next"] is None
        assert first["items"][0]["error"]["type"] == "ValueError"
        is_problem(api.get(f"/runs/{run}/logs", params={"after": "nothing"}), 422)
        is_problem(api.get(f"/runs/{run}/logs", params={"step": "nothing"}), 404)
        asked = api.post(f"/runs/{run}/resume", json={"dry_run": True}).json()
        assert (asked["again"], asked["keeps"]) == ({"f": "failed"}, ["t"])
        assert api.post(f"/runs/{run}/resume").json()["episode"] == 2
        place.end(run)
        changed = Workflow(
            name="bad", steps=(Step(id="f", task="tasks:noop"), Step(id="t", task="tasks:talk", with_={}))
        )
        place.engine.ledger.publish_workflows([Plan.of(changed)])
        assert "take_definition" in is_problem(api.post(f"/runs/{run}/resume"), 409)
        assert api.post(f"/runs/{run}/resume", json={"take_definition": True}).json()["definition_changed"]
        assert place.end(run).state == "succeeded"
    place.engine.ledger.publish_workflows([])


def test_dead_letters_are_listed_grouped_shown_and_discarded(api: httpx.Client, engine: Engine) -> None:
    for n in range(3):
        engine.ledger.set_aside(b"\xff\x00{", "envelope", NOW_MS, detail=f"fault {n}", queue="q")
    engine.dead_letters.drain()
    found = api.get("/dead-letters").json()["items"]
    assert len(found) == 3
    (group,) = api.get("/dead-letters/groups").json()["items"]
    assert group["count"] == 3
    assert api.get(f"/dead-letters/{found[0]['id']}").json()["raw"] == "\xff\x00{"
    raw = api.get(f"/dead-letters/{found[0]['id']}/raw")
    assert (raw.content, raw.headers["content-type"]) == (b"\xff\x00{", "application/octet-stream")
    sent = api.post("/dead-letters/redrive", json={"ids": [found[0]["id"]]}).json()
    assert list(sent["skipped"]) == [found[0]["id"]]
    assert "which dead letters" in is_problem(api.post("/dead-letters/discard", json={}), 422)
    is_problem(api.post("/dead-letters/discard", json={"ids": ["0123456789abcdef"]}), 404)
    assert api.post("/dead-letters/discard", json={"ids": [found[0]["id"]]}).json() == {"discarded": 1}
    assert api.post("/dead-letters/discard", json={"all": True}).json() == {"discarded": 2}
    assert api.get("/dead-letters").json()["items"] == []
    entry = api.get("/audit").json()["items"][0]
    assert (entry["action"], entry["about"]) == ("discard_dead_letters", {"all": True, "discarded": 2})


def test_steps_that_have_failed_are_sent_back_with_a_canary_first(place: Place) -> None:
    failing = Workflow(name="lettered", steps=(Step(id="f", task="tasks:fail"),))
    runs = [place.start(failing) for _ in range(2)]
    for run in runs:
        place.end(run)
    with Served(make_app(place.engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as api:
        asked = {"workflow": "lettered", "canary": 1, "rate": "100/s"}
        done = api.post("/dead-letters/redrive", json=asked).json()
        assert len(done["sent"]) == len(done["left"]) == 1
        assert "came back" in done["stopped"]
        for odd in ("0.0000001/s", "fast", "-1", "1e9", "0"):
            is_problem(api.post("/dead-letters/redrive", json=asked | {"rate": odd}), 422)
        is_problem(api.post("/dead-letters/redrive", json=asked | {"timeout": "9h"}), 422)
        is_problem(api.post("/dead-letters/redrive", json=asked | {"reason": "odd"}), 422)
        is_problem(api.post("/dead-letters/redrive", json=asked | {"sinse": "2h"}), 422)


def test_a_page_of_runs_ends_early_when_their_values_are_large(api: httpx.Client, engine: Engine) -> None:
    put_in_force(engine)
    plan = engine.plan(engine.ledger.workflow_plan("w"))
    large = {"n": "x" * 9_000_000}
    for n in range(5):
        engine.start(f"r{n}", plan, event={"id": f"e{n}"}, params=large)
    seen: list[str] = []
    page = api.get("/runs").json()
    while True:
        assert 0 < len(page["items"]) <= 3
        seen += [one["id"] for one in page["items"]]
        if page["next"] is None:
            break
        page = api.get("/runs", params={"after": page["next"]}).json()
    assert sorted(seen) == [f"r{n}" for n in range(5)]


def test_schedules_are_listed_paused_and_backfilled(api: httpx.Client, engine: Engine) -> None:
    put_in_force(
        engine,
        workflow("daily", on=(OnSchedule(cron="0 6 * * *"),)),
        workflow("hourly", on=(OnSchedule(cron="@hourly"),)),
    )
    page = api.get("/schedules", params={"limit": 1}).json()
    assert ([one["name"] for one in page["items"]], len(page["items"][0]["next_due_at"])) == (["daily"], 5)
    assert [one["name"] for one in api.get("/schedules", params={"after": page["next"]}).json()["items"]] == ["hourly"]
    assert api.post("/schedules/daily/pause").json()["paused"] is True
    assert api.get("/schedules/daily").json()["paused"] is True
    assert api.post("/schedules/daily/resume").json()["paused"] is False
    asked = {"from": "2026-01-01", "to": "2026-01-03"}
    assert api.post("/schedules/daily/backfill", json=asked | {"dry_run": True}).json()["to_run"] == 3
    assert api.post("/schedules/daily/backfill", json=asked | {"max_parallel": 2}).json()["max_parallel"] == 2
    assert api.delete("/schedules/daily/backfill").json() == {"schedule": "daily", "cancelled": 1}
    for body in (
        {},
        asked | {"from": "odd"},
        asked | {"to": "2025-01-01"},
        asked | {"max_parallel": 0},
        {"start": "x", "end": "y"},
    ):
        is_problem(api.post("/schedules/daily/backfill", json=body), 422)
    for path in ("/schedules/none", "/schedules/a%2Fb"):
        is_problem(api.get(path), 404)
    is_problem(api.post("/schedules/none/pause"), 404)


def test_passwords_of_queues_are_not_shown(api: httpx.Client, engine: Engine) -> None:
    queue = OnQueue(url="amqp://user:hunter2@mq:5672/v", queue="orders")
    put_in_force(engine, workflow(on=[queue]))
    for path in ("/workflows", "/workflows/w"):
        text = api.get(path).text
        assert "hunter2" not in text
        assert "amqp://user:***@mq:5672/v" in text
    assert operations.workflow_in_force(engine, "w").on == (queue,)


def test_workflows_in_force_are_listed_shown_drawn_and_built(api: httpx.Client, engine: Engine) -> None:
    put_in_force(engine, workflow(), workflow("other"))
    assert [one["name"] for one in api.get("/workflows").json()["items"]] == ["other", "w"]
    assert api.get("/workflows/w").json()["name"] == "w"
    for form in ("tree", "mermaid", "dot"):
        drawn = api.get("/workflows/w/graph", params={"format": form})
        assert "a" in drawn.text
        assert drawn.headers["content-type"].startswith("text/plain")
    assert api.get("/workflows/w/build").json()["items"][0]["when"] == "at the start"
    assert "did you mean 'w'" in is_problem(api.get("/workflows/ww"), 404)


def test_events_come_alone_whole_or_in_a_batch_and_claim_nothing_of_ours(api: httpx.Client, engine: Engine) -> None:
    own = {"specversion": "1.0", "id": "1", "source": "shop", "type": "order", "data": {"a": 1}, "traceid": "x"}
    answer = api.post("/events", json=own)
    assert answer.status_code == 202
    assert answer.json()["traceid"] == "x"
    assert answer.headers["location"] == f"/api/v1/events/{Event.from_json(own).key}"
    kind = {"content-type": "application/cloudevents-batch+json"}
    batch = api.post("/events", content=json.dumps([own, {"type": "t"}]), headers=kind)
    assert [one["type"] for one in batch.json()["items"]] == ["order", "t"]
    encoded = {"data_base64": "eyJhIjogMX0=", "datacontenttype": "application/json"}
    assert api.post("/events", json={"type": "t"} | encoded).json()["data"] == {"a": 1}
    is_problem(api.post("/events", json={"type": "t", "data_base64": "?"}), 422)
    nothing = dict.fromkeys(("id", "source", "subject", "time", "data"))
    assert api.post("/events", json={"type": "t"} | nothing).json()["source"] == "orchestrator:emit"
    before = engine.ledger.client.llen(EVENT_QUEUE)
    assert before == 5
    for body in (
        {"type": "orchestrator.manual"}, {"type": "t", "source": "orchestrator:run"}, {"type": "t", "hops": 1},
        {"type": "t", "source": "file:///x"}, {"type": "t", "trigger": "x"}, {"type": "t", "causationid": "x"},
        {"type": ""}, {"type": 1}, {"source": "s"}, {"type": "t", "id": 7}, [], "text", None, {"type": "t", "time": 5},
    ):  # fmt: skip
        is_problem(api.post("/events", content=json.dumps(body), headers={"content-type": "application/json"}), 422)
    for content in ([own, {"type": 3}], [], own):
        is_problem(api.post("/events", content=json.dumps(content), headers=kind), 422)
    is_problem(api.post("/events", content=json.dumps([own] * 1001), headers=kind), 413)
    assert engine.ledger.client.llen(EVENT_QUEUE) == before


# Bad requests


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"type": "\\ud800"}', "application/json", 400),
        (b'{"type": "t", "data": NaN}', "application/json", 400),
        (b'{"type": "t", "data": 1e999}', "application/json", 400),
        (b'{"type": "t", "data": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"type": "t"}', "text/plain", 415),
        (b'{"type": "t"}', "application/x-www-form-urlencoded", 415),
        (b"", "application/json", 400),
    ],
)
def test_a_body_that_is_not_json_is_refused(
    api: httpx.Client, engine: Engine, body: bytes, kind: str, status: int
) -> None:
    is_problem(api.post("/events", content=body, headers={"content-type": kind}), status)
    assert engine.ledger.client.llen(EVENT_QUEUE) == 0


def test_a_body_that_is_too_large_or_compressed_is_refused_before_it_is_read(api: httpx.Client) -> None:
    json_type = {"content-type": "application/json"}
    is_problem(api.post("/events", content=b"x", headers=json_type | {"content-encoding": "gzip"}), 415)

    def chunks() -> Iterator[bytes]:
        for _ in range(11 * 16):
            yield b" " * 65536

    is_problem(api.post("/events", content=chunks(), headers=json_type), 413)
    host, port = api.base_url.host, api.base_url.port
    with socket.create_connection((host, port), timeout=10) as peer:
        head = f"POST /api/v1/events HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        peer.sendall(f"{head}Content-Length: 50000000000\r\n\r\n".encode())
        assert b" 413 " in peer.recv(1000)


@pytest.mark.parametrize(
    "odd", ["%00", "%ff%fe", "a%2Fb", "..%2f..", "*", "{x}", "%F0%9F%92%A9", "x" * 5000, "%25", "a:b"]
)
def test_ids_and_cursors_of_any_text_are_unknown_and_harm_nothing(api: httpx.Client, engine: Engine, odd: str) -> None:
    put_in_force(engine)
    run = start(engine)
    for path in (
        f"/runs/{odd}", f"/runs/{odd}/logs", f"/events/{odd}", f"/dead-letters/{odd}", f"/workflows/{odd}",
        f"/workflows/{odd}/graph", f"/runs/{run}?step={odd}",
    ):  # fmt: skip
        is_problem(api.get(path), 404)
    for path in (f"/runs?after={odd}", f"/events?after={odd}", f"/dead-letters?after={odd}", f"/audit?after={odd}"):
        is_problem(api.get(path), 422)
    for verb in ("cancel", "resume", "rerun"):
        is_problem(api.post(f"/runs/{odd}/{verb}"), 404)
    is_problem(api.post(f"/runs/{odd}/steps/a/cancel"), 404)
    is_problem(api.post(f"/runs/{run}/steps/{odd}/cancel"), 404)
    is_problem(api.post(f"/workflows/{odd}/runs", json={}), 404)


def test_an_event_is_found_by_any_id(api: httpx.Client, engine: Engine) -> None:
    dispatcher = put_in_force(engine)
    for number, name in enumerate(("orders/1", "a b", "ü", "\ud800 half", "x?y#z", "100%")):
        event = Event(id=name, source="s", type="t", time="2026-01-01T00:00:00Z", data={"half": "\ud800"})
        if "\ud800" in name:
            event = Event(id=str(number), source="s", type="t", time="2026-01-01T00:00:00Z", data={"half": "\ud800"})
        dispatcher.dispatch(event)
        shown = api.get(f"/events/{quote(event.id, safe='')}")
        assert shown.status_code == 200, shown.text
        assert shown.json()["event"]["id"] == event.id
        assert shown.json()["event"]["data"] == {"half": "\ud800"}
    assert len(api.get("/events").json()["items"]) == 6


def test_it_says_why_an_event_started_what_it_did_and_deals_with_it_anew(api: httpx.Client, engine: Engine) -> None:
    dispatcher = put_in_force(engine, workflow("asks", on=(OnEvent(pattern={"type": ["t"]}),)), workflow("other"))
    event = Event(id="a/b", source="s", type="t", time="2026-01-01T00:00:00Z", data={})
    dispatcher.dispatch(event)
    explained = api.get("/events/a%2Fb/explain").json()
    assert explained["verdicts"]["asks"]["verdict"] == "started"
    assert (explained["verdicts"]["other"]["verdict"], explained["key"]) == ("no_match", event.key)
    (one,) = api.get("/workflows/other/events", params={"since": "1h"}).json()["items"]
    assert (one["event_id"], one["verdict"]) == ("a/b", "no_match")
    is_problem(api.get("/workflows/other/events", params={"since": "yesterday"}), 422)
    is_problem(api.get("/events/nothing/explain"), 404)
    is_problem(api.post("/events/nothing/replay"), 404)
    again = api.post("/events/a/b/replay")
    assert again.status_code == 202
    assert again.json()["causationid"] == "a/b"
    assert engine.ledger.client.llen(EVENT_QUEUE) == 1
    for verdict, count in (("started", 1), ("no_match", 0)):
        assert len(api.get("/events", params={"verdict": verdict}).json()["items"]) == count
    is_problem(api.get("/events", params={"verdict": "odd"}), 422)


def test_items_of_a_fan_out_have_number_cursors_alone(place: Place) -> None:
    fan = Workflow(name="fan", steps=(Step(id="a", task="tasks:echo", foreach=[1, 2, 3], with_={"value": 1}),))
    run = place.start(fan)
    place.end(run)
    with Served(make_app(place.engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as api:
        page = api.get(f"/runs/{run}", params={"step": "a", "limit": 2}).json()
        assert [one["index"] for one in page["items"]] == [0, 1]
        page = api.get(f"/runs/{run}", params={"step": "a", "limit": 2, "after": page["next"]}).json()
        assert [one["index"] for one in page["items"]] == [2]
        for odd in ("²", "x", "-1", "9" * 5000, "1.5", ""):
            is_problem(api.get(f"/runs/{run}", params={"step": "a", "after": odd}), 422)


def test_a_ledger_that_is_away_is_said_at_once_and_it_goes_on_when_it_is_back(
    own_server: Server, tmp_path: Any
) -> None:
    settings = Settings.load(
        tmp_path, environ={}, data_dir=tmp_path / "data", broker_url=own_server.url, ledger_url=own_server.url
    )
    engine = Engine(settings)
    put_in_force(engine)
    with (
        Served(make_app(engine)) as served,
        Served(make_health(engine)) as health,
        httpx.Client(base_url=f"{served.url}/api/v1", timeout=10) as api,
        httpx.Client(base_url=health.url, timeout=10) as probes,
    ):
        assert api.get("/runs").status_code == 200
        assert probes.get("/readyz").status_code == 200
        own_server.stop()
        for path in (
            "/runs",
            "/runs/x",
            "/runs/x/logs",
            "/events",
            "/events/x",
            "/dead-letters",
            "/workflows",
            "/audit",
        ):
            answer = api.get(path)
            is_problem(answer, 503)
            assert answer.headers["retry-after"]
        for path in ("/events", "/workflows/w/runs", "/runs/x/cancel", "/runs/x/resume", "/runs/x/rerun"):
            is_problem(api.post(path, json={"type": "t"}), 503)
        is_problem(probes.get("/readyz"), 503)
        assert probes.get("/healthz").status_code == 200
        assert "orchestrator_ledger_up 0.0" in probes.get("/metrics").text
        own_server.start()
        assert api.get("/runs").status_code == 200
        assert probes.get("/readyz").status_code == 200
        assert "orchestrator_ledger_up 1.0" in probes.get("/metrics").text
    engine.close()


def test_a_ledger_that_hangs_does_not_hang_the_answers(own_server: Server, tmp_path: Any) -> None:
    settings = Settings.load(
        tmp_path, environ={}, data_dir=tmp_path / "data", broker_url=own_server.url, ledger_url=own_server.url
    )
    engine = Engine(settings)
    with (
        Served(make_app(engine)) as served,
        Served(make_health(engine)) as health,
    ):
        assert httpx.get(f"{health.url}/readyz").status_code == 200
        assert own_server.process is not None
        own_server.process.send_signal(signal.SIGSTOP)
        try:
            is_problem(httpx.get(f"{health.url}/readyz", timeout=5), 503)
            assert "orchestrator_ledger_up 0.0" in httpx.get(f"{health.url}/metrics", timeout=8).text
            is_problem(httpx.get(f"{served.url}/api/v1/runs", timeout=10), 503)
        finally:
            own_server.process.send_signal(signal.SIGCONT)
    engine.close()


def test_a_broken_answer_of_ours_is_a_problem_too(api: httpx.Client, engine: Engine) -> None:
    put_in_force(engine)
    engine.ledger.client.hset(keys.WORKFLOWS, "broken", "{not json")
    with capture_logs() as logs:
        is_problem(api.get("/workflows"), 500)
    assert [one["event"] for one in logs] == ["api_failed"]


# Who may


def test_without_tokens_this_machine_may_do_all_and_pages_in_its_browsers_nothing(api: httpx.Client) -> None:
    assert api.get("/runs").status_code == 200
    port = api.base_url.port
    for host in (f"localhost:{port}", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert api.get("/runs", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "localhost@evil.example", "10.0.0.1",
                 "", "127.0.0.1.nip.io", "localhost:x", "localhost.", "0.0.0.0"):  # fmt: skip
        is_problem(api.get("/runs", headers={"host": host}), 403)
    same = f"http://127.0.0.1:{port}"
    assert api.post("/events", json={"type": "t"}, headers={"origin": same}).status_code == 202
    for origin in ("https://evil.example", "null", f"http://localhost:{port + 1}", f"http://127.0.0.1:{port}.evil"):
        is_problem(api.post("/events", json={"type": "t"}, headers={"origin": origin}), 403)
        is_problem(api.get("/runs", headers={"origin": origin}), 403)
    is_problem(api.get("/runs", headers={"sec-fetch-site": "cross-site"}), 403)
    is_problem(api.get("/runs", headers={"x-forwarded-for": "10.1.1.1"}), 403)
    is_problem(api.get("/runs", headers=bearer("orc.x.y")), 401)
    assert "access-control-allow-origin" not in api.options("/runs", headers={"origin": same}).headers


def test_from_the_first_token_on_every_request_needs_one(api: httpx.Client, engine: Engine, admin: str) -> None:
    assert api.get("/runs", headers=bearer(admin)).status_code == 200
    assert api.get("/runs", headers={"authorization": f"bEARER  {admin}"}).status_code == 200
    name, _, secret = admin.removeprefix("orc.").partition(".")
    for wrong in (
        "",
        "x",
        admin[:-1],
        admin + "x",
        f"orc.other.{secret}",
        f"orc.{name}.",
        secret,
        "orc..",
        "é",
        "x" * 9000,
    ):
        answer = api.get("/runs", headers={"authorization": f"Bearer {wrong}".strip().encode()})
        assert is_problem(answer, 401) == is_problem(api.get("/nothing/here"), 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")
    is_problem(api.get("/runs", headers={"authorization": f"Basic {admin}"}), 401)
    is_problem(api.get("/runs", params={"access_token": admin}), 401)
    is_problem(api.get("/openapi.json"), 401)
    assert api.get("/runs", headers=bearer(admin) | {"host": "any.example", "origin": "https://a.b"}).status_code == 200
    Tokens(engine.ledger).revoke("admin")
    is_problem(api.get("/runs", headers=bearer(admin)), 401)


def test_a_token_does_what_its_scope_says_until_it_expires(api: httpx.Client, engine: Engine, admin: str) -> None:
    put_in_force(engine)
    tokens = Tokens(engine.ledger)
    read = bearer(tokens.create("reader", Scope.READ, now_ms=NOW_MS))
    run = bearer(tokens.create("runner", Scope.RUN, now_ms=NOW_MS))
    gone = bearer(tokens.create("gone", Scope.ADMIN, now_ms=NOW_MS, expires_at=NOW_MS + 1))
    is_problem(api.get("/runs", headers=gone), 401)
    assert api.get("/runs", headers=read).status_code == 200
    refused = api.post("/events", json={"type": "t"}, headers=read)
    assert "read" in is_problem(refused, 403)
    assert 'scope="run"' in refused.headers["www-authenticate"]
    assert api.post("/events", json={"type": "t"}, headers=run).status_code == 202
    is_problem(api.post("/dead-letters/discard", json={"all": True}, headers=run), 403)
    is_problem(api.get("/audit", headers=run), 403)
    assert api.post("/dead-letters/discard", json={"all": True}, headers=bearer(admin)).status_code == 200
    entries = api.get("/audit", headers=bearer(admin)).json()["items"]
    assert [(one["who"], one["action"], one["status"]) for one in entries] == [
        ("admin", "discard_dead_letters", 200), ("runner", "emit_events", 202)
    ]  # fmt: skip


def test_every_address_that_changes_something_asks_for_more_than_read_and_is_audited(
    api: httpx.Client, engine: Engine, admin: str
) -> None:
    read = bearer(Tokens(engine.ledger).create("reader", Scope.READ, now_ms=NOW_MS))
    paths = api.get("/openapi.json", headers=read).json()["paths"]
    changes = [(method, path) for path, methods in paths.items() for method in methods if method != "get"]
    assert len(changes) >= 8
    for method, path in changes:
        address = str(api.base_url).removesuffix("/api/v1/") + path.format(
            run="r", step="t", workflow="w", event="e", schedule="s", pool="p"
        )
        is_problem(api.request(method, address, json={}, headers=read), 403)
        before = len(api.get("/audit?limit=1000", headers=bearer(admin)).json()["items"])
        answer = api.request(method, address, json={}, headers=bearer(admin))
        entries = api.get("/audit?limit=1000", headers=bearer(admin)).json()["items"]
        assert len(entries) == before + 1
        assert entries[0]["status"] == answer.status_code


def test_an_address_for_others_needs_a_token_before_anything_listens_there(engine: Engine) -> None:
    tokens = Tokens(engine.ledger)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_exposure(engine.settings.evolve(host=host), tokens)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com"):
        with pytest.raises(SettingsError, match="tokens create"):
            check_exposure(engine.settings.evolve(host=host), tokens)
    tokens.create("t", Scope.READ, now_ms=NOW_MS)
    check_exposure(engine.settings.evolve(host="0.0.0.0"), tokens)


def test_on_an_address_for_others_no_request_goes_without_a_token_though_all_were_revoked(settings: Settings) -> None:
    engine = Engine(settings.evolve(host="0.0.0.0"))
    with Served(make_app(engine)) as served:
        is_problem(httpx.get(f"{served.url}/api/v1/runs"), 401)
    engine.close()


def test_a_change_that_cannot_be_written_down_is_not_made(api: httpx.Client, engine: Engine) -> None:
    client = engine.ledger.client
    client.set(keys.AUDIT_ENTRIES, "not a hash")
    assert api.post("/events", json={"type": "t"}).status_code >= 500
    assert client.llen(EVENT_QUEUE) == 0


def test_the_audit_log_is_bounded_and_paged(engine: Engine) -> None:
    audit = Audit(engine.ledger, maximum=5)
    made = [audit.begin({"who": "x", "n": n}, NOW_MS + n) for n in range(8)]
    found, cursor = audit.list(limit=3)
    assert [one["n"] for one in found] == [7, 6, 5]
    rest, end = audit.list(limit=3, after=cursor)
    assert [one["n"] for one in rest] == [4, 3]
    assert end is None
    assert engine.ledger.client.hlen(keys.AUDIT_ENTRIES) == 5
    audit.complete(made[7], {"who": "x", "n": 7, "status": 200})
    assert audit.list(limit=1)[0][0]["status"] == 200


def test_tokens_are_kept_as_digests_and_have_names_of_their_own(engine: Engine) -> None:
    tokens = Tokens(engine.ledger)
    token = tokens.create("ci", Scope.RUN, now_ms=NOW_MS)
    assert token.rpartition(".")[2] not in json.dumps(engine.ledger.client.hgetall(keys.TOKENS))
    assert [one.to_json() for one in tokens.list()] == [
        {"name": "ci", "scope": "run", "created_at": "2023-11-14T22:13:20.000Z", "expires_at": None}
    ]
    for name in ("ci", "", "a.b", "x" * 51, "a b", "é"):
        with pytest.raises(InputError):
            tokens.create(name, Scope.READ, now_ms=NOW_MS)
    with pytest.raises(NotFoundError):
        tokens.revoke("other")
