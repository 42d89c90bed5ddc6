"""Webhooks over real HTTP, from the gateway to the bus of a real server."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.cli.addresses import STATE, addresses, listen
from orchestrator.cli.gateway import Gateway
from orchestrator.engine import Engine
from orchestrator.errors import AlreadyRunningError, SettingsError, UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.project import load_in_subprocess
from orchestrator.runs import run_id
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnWebhook, Verification
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, capture_logs, command, on_servers, wait_until, write_project
from triggers import group_commit, webhook
from triggers.group_commit import GroupCommit

GITHUB = Verification(scheme="github", secrets=("env:HOOK_SECRET",))
SECRET = "It's a Secret to Everybody"


def _workflow(*on: OnWebhook, name: str = "w") -> Workflow:
    return Workflow(name=name, on=on, steps=(Step(id="s", task="tasks:f"),))


class Hooked:
    """A gateway, and what came onto the bus by it."""

    def __init__(self, engine: Engine) -> None:
        self.gateway = Gateway(engine)
        self.gateway.start()
        self.http = httpx.Client(base_url=self.gateway.url, timeout=20)
        self.events: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._reader = threading.Thread(target=engine.bus.consume, args=(self._take, self._stop))
        self._reader.start()

    def _take(self, body: Any, raw: bytes) -> None:
        self.events.append(body)

    def apply(self, *on: OnWebhook) -> None:
        self.gateway.apply([_workflow(*on)])

    def event(self) -> dict[str, Any]:
        """Wait for the only event."""
        wait_until(lambda: self.events, "the event is on the bus")
        (event,) = self.events
        return event

    def close(self) -> None:
        self.http.close()
        self.gateway.stop()
        self._stop.set()
        self._reader.join(timeout=20)


@pytest.fixture
def hooked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooked]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    made = Hooked(engine)
    yield made
    made.close()


def _signed(body: bytes, secret: str = SECRET) -> dict[str, str]:
    return {"X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


def test_a_delivery_is_an_event_on_the_bus(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a/b"))
    response = hooked.http.post("/hooks/a/b?x=1", json={"n": 1}, headers={"Idempotency-Key": "k1", "Cookie": "c"})
    assert response.status_code == 202
    assert response.json() == {"id": "k1", "source": "orchestrator:webhook/a/b"}
    event = hooked.event()
    assert (event["id"], event["source"]) == ("k1", "orchestrator:webhook/a/b")
    assert event["type"] == "orchestrator.webhook.received"
    assert event["trigger"] == "webhook:a/b"
    assert event["data"]["body"] == {"n": 1}
    assert event["data"]["query"] == {"x": "1"}
    assert event["data"]["headers"]["idempotency-key"] == "k1"
    assert "cookie" not in event["data"]["headers"]


def test_without_an_id_each_delivery_is_an_event_of_its_own(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a"))
    ids = {hooked.http.post("/hooks/a", json={}).json()["id"] for _ in range(3)}
    assert len(ids) == 3


def test_an_id_seen_before_is_answered_with_the_first_event(hooked: Hooked, engine: Engine) -> None:
    hooked.apply(OnWebhook(path="a", verify=GITHUB))
    headers = _signed(b"{}") | {"X-GitHub-Delivery": "d1"}
    first = hooked.http.post("/hooks/a", content=b"{}", headers=headers).json()
    again = hooked.http.post("/hooks/a", content=b"{}", headers=headers).json()
    assert first == again == {"id": "d1", "source": "orchestrator:webhook/a"}
    wait_until(lambda: hooked.events, "the event is on the bus")
    engine.ledger.client.set(keys.seen_key(Event.from_json(hooked.events[0]).key), "1", ex=60)
    later = hooked.http.post("/hooks/a", content=b"{}", headers=headers).json()
    assert later == first | {"duplicate": True}


@pytest.mark.parametrize(
    ("method", "path", "options", "expected", "header"),
    [
        ("POST", "/hooks/none", {}, 404, None),
        ("POST", "/hooks/", {}, 404, None),
        ("POST", "/hooks/a/b", {}, 404, None),
        ("POST", "/hooks/../hooks/A", {}, 404, None),
        ("GET", "/hooks/a", {}, 405, ("allow", "POST, PUT, OPTIONS")),
        ("DELETE", "/hooks/a", {}, 405, ("allow", "POST, PUT, OPTIONS")),
        ("POST", "/hooks/a", {"content": b"x" * 101}, 413, None),
        ("POST", "/hooks/a", {"content": (b"x" * 50 for _ in range(3))}, 413, None),
        ("POST", "/hooks/a", {"content": b"x" * 50_000_000}, 413, None),
        ("POST", "/hooks/a", {"content": (b"x" * 500_000 for _ in range(100))}, 413, None),
        ("POST", "/hooks/a", {"content": gzip.compress(b"0" * 50_000), "headers": {"Content-Encoding": "gzip"}}, 415, None),  # noqa: E501
        ("POST", "/hooks/a", {"json": {}, "headers": {"Idempotency-Key": "x" * 600}}, 400, None),
        ("POST", "/hooks/a?" + "a=1&" * 300, {"json": {}}, 400, None),
        ("POST", "/hooks/a", {"content": b"{", "headers": {"Content-Type": "application/cloudevents+json"}}, 400, None),
        ("POST", "/hooks/a", {"content": b"{}", "headers": {"ce-specversion": "1.0"}}, 400, None),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_why(
    hooked: Hooked, method: str, path: str, options: dict[str, Any], expected: int, header: tuple[str, str] | None
) -> None:
    hooked.apply(OnWebhook(path="a", max_bytes=100, methods=("POST", "PUT")))
    response = hooked.http.request(method, path, **options)
    assert response.status_code == expected, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == expected
    if header is not None:
        assert response.headers[header[0]] == header[1]
    assert hooked.http.put("/hooks/a/", content=b"x").status_code == 202  # the process goes on


def test_whoever_is_not_verified_gets_one_answer_whatever_the_reason(hooked: Hooked) -> None:
    slack = Verification(scheme="slack", secrets=("env:HOOK_SECRET",))
    hooked.apply(OnWebhook(path="g", verify=GITHUB), OnWebhook(path="s", verify=slack))
    now = str(int(time.time()))

    def slack_headers(moment: str, secret: str = SECRET) -> dict[str, str]:
        signature = hmac.new(secret.encode(), f"v0:{moment}:b".encode(), "sha256").hexdigest()
        return {"X-Slack-Request-Timestamp": moment, "X-Slack-Signature": f"v0={signature}"}

    tries: list[tuple[str, dict[str, str]]] = [
        ("g", {}),
        ("g", _signed(b"other")),
        ("g", _signed(b"b", "wrong")),
        ("g", {"X-Hub-Signature-256": "x" * 5000}),
        ("s", slack_headers(now, "wrong")),
        ("s", slack_headers(str(int(now) - 1000))),
        ("s", slack_headers(str(int(now) + 1000))),
        ("s", {}),
    ]
    with capture_logs() as logs:
        answers = [hooked.http.post(f"/hooks/{path}", content=b"b", headers=headers) for path, headers in tries]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert len({str(sorted(h for h in answer.headers.items() if h[0] != "date")) for answer in answers}) == 1
    told = [entry for entry in logs if entry["event"] == "webhook_refused"]
    assert {entry["path"] for entry in told} == {"g", "s"}
    assert len(told) == 2  # not a line for each, for strangers would fill the log
    assert SECRET not in str(logs)
    assert hooked.http.post("/hooks/g", content=b"b", headers=_signed(b"b")).status_code == 202
    assert hooked.http.post("/hooks/s", content=b"b", headers=slack_headers(now)).status_code == 202


def test_secrets_in_files_are_replaced_without_a_restart(hooked: Hooked, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("one\n")
    new.write_text("two")
    verify = Verification(scheme="github", secrets=(f"file:{old}", f"file:{new}"))
    hooked.apply(OnWebhook(path="a", verify=verify))

    def deliver(secret: str) -> int:
        return hooked.http.post("/hooks/a", content=b"b", headers=_signed(b"b", secret)).status_code

    assert (deliver("one"), deliver("two"), deliver("three")) == (202, 202, 401)
    replaced = tmp_path / "draft"
    replaced.write_text("three")
    replaced.replace(old)
    assert (deliver("one"), deliver("two"), deliver("three")) == (401, 202, 202)
    old.unlink()
    assert (deliver("three"), deliver("two")) == (401, 202)
    new.unlink()
    response = hooked.http.post("/hooks/a", content=b"b", headers=_signed(b"b", "two"))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    new.write_text("")
    assert deliver("") == 503
    new.write_bytes(b"\xff\xfe")
    assert deliver("") == 503
    new.write_text("four")
    assert deliver("four") == 202


def test_named_secrets_are_those_of_the_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    engine = Engine(settings.evolve(secrets={"github": "env:HOOK_SECRET"}))
    made = Hooked(engine)
    try:
        made.apply(OnWebhook(path="a", verify=Verification(scheme="github", secrets=("github",))))
        assert made.http.post("/hooks/a", content=b"b", headers=_signed(b"b")).status_code == 202
    finally:
        made.close()
        engine.close()


def test_a_body_must_fit_the_schema(hooked: Hooked) -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}, "t": {"$ref": "#"}}}
    hooked.apply(OnWebhook(path="a", schema=schema))
    assert hooked.http.post("/hooks/a", json={"n": 1, "t": {"n": 2}}).status_code == 202
    assert hooked.http.post("/hooks/a", content=b'{"n": 1}').status_code == 202  # whatever type it says
    wrong = hooked.http.post("/hooks/a", json={"n": 1, "t": {"n": "x"}})
    assert (wrong.status_code, wrong.json()["detail"]) == (
        422,
        "the body does not fit the schema: $.t.n: 'x' is not of type 'integer'",
    )
    for body in (b"", b"n=1", b"{", b"\xff", b'{"n": NaN}', b"[" * 10_000):
        assert hooked.http.post("/hooks/a", content=body).status_code == 400
    deep = b'{"n": 1, "t":' * 50 + b"{}" + b"}" * 50
    assert hooked.http.post("/hooks/a", content=deep).status_code == 422
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t"}
    assert hooked.http.post("/hooks/a", json={"n": 1}, headers=headers).status_code == 202
    assert hooked.http.post("/hooks/a", json={"n": "1"}, headers=headers).status_code == 422


def test_a_schema_that_takes_long_holds_up_nobody_else(hooked: Hooked) -> None:
    """Of some a small body is enough: to see that no two objects are equal each is compared with each."""
    hooked.apply(OnWebhook(path="slow", schema={"uniqueItems": True}), OnWebhook(path="quick"))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(hooked.http.post, "/hooks/slow", json=[{"n": n} for n in range(2000)])
        wait_until(lambda: hooked.http.post("/hooks/quick").status_code == 202 and hooked.events, "others are answered")
        assert not slow.done()
        assert slow.result().status_code == 202


def test_a_schema_is_not_shown_to_who_is_not_verified(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a", verify=GITHUB, schema={"type": "object"}))
    assert hooked.http.post("/hooks/a", content=b"[]").status_code == 401
    assert hooked.http.post("/hooks/a", content=b"[]", headers=_signed(b"[]")).status_code == 422


def test_cloud_events_keep_what_they_are(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a"))
    body = {"specversion": "1.0", "id": "e1", "source": "/s", "type": "com.example", "data": {"a": 1}}
    structured = hooked.http.post("/hooks/a", json=body, headers={"Content-Type": "application/cloudevents+json"})
    assert (structured.status_code, structured.json()) == (202, {"id": "e1", "source": "/s"})
    event = hooked.event()
    assert (event["id"], event["source"], event["type"], event["data"]) == ("e1", "/s", "com.example", {"a": 1})
    assert event["trigger"] == "webhook:a"
    batch = {"Content-Type": "application/cloudevents-batch+json"}
    many = hooked.http.post("/hooks/a", json=[body | {"id": "e2"}, body | {"id": "e3"}], headers=batch)
    assert many.json() == {"items": [{"id": "e2", "source": "/s"}, {"id": "e3", "source": "/s"}]}
    assert hooked.http.post("/hooks/a", json=[], headers=batch).json() == {"items": []}
    bad = hooked.http.post("/hooks/a", json=[body | {"id": "e4"}, body | {"hops": 3}], headers=batch)
    assert bad.status_code == 400
    wait_until(lambda: len(hooked.events) == 3, "the batch is on the bus")
    assert "e4" not in str(hooked.events)  # all or nothing


def test_a_known_sender_sends_no_cloud_events(hooked: Hooked) -> None:
    """Headers are not signed: who has overheard a delivery could make another event of it."""
    hooked.apply(OnWebhook(path="a", verify=GITHUB))
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t", "X-GitHub-Delivery": "d"}
    response = hooked.http.post("/hooks/a", content=b"{}", headers=_signed(b"{}") | headers)
    assert response.json() == {"id": "d", "source": "orchestrator:webhook/a"}


@pytest.mark.parametrize("scheme", ["stripe", "slack"])
def test_what_is_not_signed_makes_no_other_delivery_of_an_overheard_one(hooked: Hooked, scheme: str) -> None:
    hooked.apply(OnWebhook(path="a", verify=Verification(scheme=scheme, secrets=("env:HOOK_SECRET",))))
    moment = str(int(time.time()))
    for body in (b'{"id": "evt_1", "event_id": "evt_1"}', b"no=json"):
        signed = (f"{moment}." if scheme == "stripe" else f"v0:{moment}:").encode() + body
        signature = hmac.new(SECRET.encode(), signed, "sha256").hexdigest()
        headers = {
            "stripe": {"Stripe-Signature": f"t={moment},v1={signature}"},
            "slack": {"X-Slack-Request-Timestamp": moment, "X-Slack-Signature": f"v0={signature}"},
        }[scheme]
        tries: list[dict[str, str]] = [
            {"Content-Type": "application/json"},
            {"Content-Type": "text/plain"},
            {"Idempotency-Key": "other"},
            {"Content-Type": "application/octet-stream", "Idempotency-Key": "another"},
        ]
        answers = [hooked.http.post("/hooks/a", content=body, headers=headers | more) for more in tries]
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1


def test_attributes_in_headers_do_not_pass_for_signed(hooked: Hooked) -> None:
    """Who has overheard a delivery could make any event of it, as often as they like."""
    how = {"header": "X-Signature", "timestamp_header": "X-Time", "payload": "{timestamp}.{body}"}
    hooked.apply(OnWebhook(path="a", verify=Verification(scheme="hmac", secrets=("env:HOOK_SECRET",), **how)))
    attributes = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}
    moment = str(int(time.time()))

    def deliver(body: bytes, more: dict[str, str]) -> httpx.Response:
        signature = hmac.new(SECRET.encode(), f"{moment}.".encode() + body, "sha256").hexdigest()
        headers = {"X-Signature": signature, "X-Time": moment} | more
        return hooked.http.post("/hooks/a", content=body, headers=headers)

    binary = deliver(b"{}", {f"ce-{name}": value for name, value in attributes.items()})
    assert (binary.status_code, "structured mode" in binary.json()["detail"]) == (400, True)
    structured = deliver(json.dumps(attributes).encode(), {"Content-Type": "application/cloudevents+json"})
    assert structured.json() == {"id": "1", "source": "/s"}


def test_challenges_are_answered(hooked: Hooked) -> None:
    slack = Verification(scheme="slack", secrets=("env:HOOK_SECRET",))
    hooked.apply(OnWebhook(path="s", verify=slack), OnWebhook(path="c", rate=2.0))
    body = json.dumps({"type": "url_verification", "challenge": "3eZbrw1aB", "token": "t"}).encode()
    moment = str(int(time.time()))
    signature = hmac.new(SECRET.encode(), f"v0:{moment}:".encode() + body, "sha256").hexdigest()
    headers = {"Content-Type": "application/json", "X-Slack-Request-Timestamp": moment}
    assert hooked.http.post("/hooks/s", content=body, headers=headers).status_code == 401
    answer = hooked.http.post("/hooks/s", content=body, headers=headers | {"X-Slack-Signature": f"v0={signature}"})
    assert (answer.status_code, answer.text) == (200, "3eZbrw1aB")
    asked = hooked.http.options("/hooks/c", headers={"WebHook-Request-Origin": "events.example"})
    assert asked.headers["webhook-allowed-origin"] == "events.example"
    assert asked.headers["webhook-allowed-rate"] == "120"
    assert asked.headers["allow"] == "POST, OPTIONS"
    assert hooked.http.options("/hooks/none").status_code == 404
    assert hooked.events == []


def test_more_than_the_rate_is_told_to_wait(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a", rate=0.5, verify=GITHUB), OnWebhook(path="b"))
    for _ in range(5):  # forged ones do not use up what the sender may send
        assert hooked.http.post("/hooks/a", content=b"b").status_code == 401
    assert hooked.http.post("/hooks/a", content=b"b", headers=_signed(b"b")).status_code == 202
    more = hooked.http.post("/hooks/a", content=b"b", headers=_signed(b"b"))
    assert (more.status_code, more.headers["retry-after"]) == (429, "2")
    assert hooked.http.post("/hooks/b", content=b"b").status_code == 202


def test_the_rate_refills_with_time() -> None:
    now = [0.0]
    rate = webhook._Rate(2.0, lambda: now[0])

    def taken() -> int:
        count = 0
        try:
            while True:
                rate.check(take=True)
                count += 1
        except webhook._AnswerError:
            return count

    assert taken() == 2
    now[0] = 0.5
    assert taken() == 1
    now[0] = 100.0
    assert taken() == 2


def test_all_bodies_together_are_bounded(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_BODY_BYTES", 150_000)
    hooked.apply(OnWebhook(path="a"))
    assert hooked.http.post("/hooks/a", content=b"x" * 200_000).status_code == 503
    for _ in range(5):  # what was held is given back
        assert hooked.http.post("/hooks/a", content=b"x" * 100_000).status_code == 202


def test_many_clients_at_once_each_get_their_own(hooked: Hooked) -> None:
    hooked.apply(OnWebhook(path="a"))

    def deliver(n: int) -> bool:
        with httpx.Client(base_url=hooked.gateway.url, timeout=20) as client:
            return all(
                client.post("/hooks/a", json={"n": n}, headers={"Idempotency-Key": f"{n}-{m}"}).json()["id"]
                == f"{n}-{m}"
                for m in range(10)
            )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(deliver, range(16)))
    wait_until(lambda: len(hooked.events) == 160, "all are on the bus")
    assert len({event["id"] for event in hooked.events}) == 160


def test_definitions_change_under_load(hooked: Hooked) -> None:
    """Each delivery is answered by one state of the definitions, and what was accepted is on the bus."""
    stop = threading.Event()

    def change() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            hooked.apply(OnWebhook(path="a", max_bytes=1000 + n), *([OnWebhook(path="b")] if n % 2 else []))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        answers = [hooked.http.post(f"/hooks/{path}", json={}).status_code for _ in range(100) for path in "ab"]
    finally:
        stop.set()
        changer.join()
    assert set(answers[::2]) == {202}
    assert set(answers[1::2]) <= {202, 404}
    wait_until(lambda: len(hooked.events) == answers.count(202), "what was accepted is on the bus")


# Servers that are away


def test_a_delivery_that_cannot_be_stored_is_to_come_again(own_server: Server, settings: Settings) -> None:
    engine = Engine(settings.evolve(broker_url=own_server.url, ledger_url=own_server.url), patience_s=1.0)
    gateway = Gateway(engine)
    gateway.apply([_workflow(OnWebhook(path="a"), OnWebhook(path="s", respond="sync", timeout_s=0.1))])
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, timeout=30) as client:
            assert client.post("/hooks/a", json={}).status_code == 202
            own_server.stop()
            with capture_logs() as logs:
                for path in ("a", "a", "s"):
                    away = client.post(f"/hooks/{path}", json={}, headers={"Idempotency-Key": "k"})
                    assert (away.status_code, away.headers["retry-after"]) == (503, "5")
                    assert "redis" not in away.text  # strangers need not know where what is
            assert len([entry for entry in logs if entry["event"] == "webhooks_waits"]) == 1
            own_server.start()
            assert client.post("/hooks/a", json={}, headers={"Idempotency-Key": "k"}).json()["id"] == "k"
    finally:
        gateway.stop()
        engine.close()


def test_a_ledger_that_is_away_stops_no_delivery(own_server: Server, settings: Settings) -> None:
    engine = Engine(settings.evolve(ledger_url=own_server.url), patience_s=1.0)
    gateway = Gateway(engine)
    gateway.apply([_workflow(OnWebhook(path="a"), OnWebhook(path="s", respond="sync", timeout_s=0.5))])
    gateway.start()
    own_server.stop()
    try:
        with httpx.Client(base_url=gateway.url, timeout=30) as client:
            for _ in range(3):
                assert client.post("/hooks/a", json={}, headers={"Idempotency-Key": "k"}).status_code == 202
            answer = client.post("/hooks/s", json={}, headers={"Idempotency-Key": "k"})
            run = run_id("w", "orchestrator:webhook/s", "k")
            assert (answer.status_code, answer.headers["location"]) == (202, f"/api/v1/runs/{run}")
    finally:
        gateway.stop()
        engine.close()


def test_a_broker_that_hangs_is_waited_for_so_long_and_by_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who was told to come again is not published later, unless that was under way."""
    monkeypatch.setattr(group_commit, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(group_commit, "_WAITING", 3)
    released, entered, published = threading.Event(), list[str](), list[str]()

    def publish(events: Sequence[Event]) -> None:
        entered.extend(event.id for event in events)
        released.wait(20)
        published.extend(event.id for event in events)

    commits = GroupCommit(publish, lambda events: [False] * len(events))

    async def commit(event_id: str) -> list[bool]:
        return await commits.commit([Event(id=event_id, source="s", type="t", time="")], 1)

    async def deliver() -> list[Any]:
        under_way = []
        for n in range(2):
            under_way.append(asyncio.ensure_future(commit(f"first-{n}")))
            while len(entered) <= n:
                await asyncio.sleep(0.001)
        return await asyncio.gather(*under_way, *(commit(str(n)) for n in range(5)), return_exceptions=True)

    commits.start()
    try:
        outcomes = asyncio.run(deliver())
    finally:
        released.set()
        commits.stop()
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert sum("too many" in str(outcome) for outcome in outcomes) == 2
    assert sorted(published) == ["first-0", "first-1"]


def test_what_is_no_fault_of_the_broker_harms_only_that_batch() -> None:
    published: list[str] = []

    def publish(events: Sequence[Event]) -> None:
        if any(event.id == "bad" for event in events):
            raise ValueError("of this event")
        published.extend(event.id for event in events)

    commits = GroupCommit(publish, lambda events: [False] * len(events))

    async def deliver(event_id: str) -> list[bool]:
        return await commits.commit([Event(id=event_id, source="s", type="t", time="")], 1)

    commits.start()
    with capture_logs() as logs, pytest.raises(UnavailableError, match="ValueError"):
        asyncio.run(deliver("bad"))
    assert asyncio.run(deliver("good")) == [False]
    commits.stop()
    assert published == ["good"]
    assert [entry["event"] for entry in logs] == ["webhooks_not_published"]


# Who waits for the run

TASKS = """
import time

def double(n):
    return n * 2

def fail(n):
    raise ValueError(f"no {n}")

def slow(n):
    time.sleep(600)
"""


def _sync(name: str, *, timeout: str = "20s", pattern: str = "") -> str:
    return (
        f"workflow: {name}\non:\n  - webhook: {{path: {name}, respond: sync, timeout: {timeout}{pattern}}}\n"
        f"params: {{n: {{default: '{{{{ event.data.body.n }}}}'}}}}\n"
        f"steps:\n  s: {{task: 'tasks:{name}', with: {{n: '{{{{ params.n }}}}'}}}}\n"
    )


@pytest.fixture
def sync(settings: Settings, engine: Engine, start_worker: Callable[..., Any]) -> Iterator[httpx.Client]:
    """A gateway, in front of a dispatcher and a worker that are processes."""
    files = {
        "tasks.py": TASKS,
        "workflows/double.yaml": _sync("double", pattern=', pattern: {data: {body: {n: [{numeric: [">", 0]}]}}}'),
        "workflows/fail.yaml": _sync("fail"),
        "workflows/slow.yaml": _sync("slow", timeout="300ms"),
    }
    write_project(settings.project, files)
    start_worker()
    with (settings.project.parent / "dispatcher.log").open("ab") as log:
        dispatcher = subprocess.Popen(
            command("dispatcher", "--project", str(settings.project)), env=on_servers(settings), stdout=log, stderr=log
        )
    gateway = Gateway(engine)
    gateway.apply(load_in_subprocess(settings.project).workflows.values())
    gateway.start()
    wait_until(lambda: engine.ledger.workflows(), "the definitions are in force")
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client
    gateway.stop()
    dispatcher.kill()
    dispatcher.wait()


def test_sync_answers_with_what_the_run_came_to(sync: httpx.Client, engine: Engine) -> None:
    answer = sync.post("/hooks/double", json={"n": 21}, headers={"Idempotency-Key": "k"})
    run = run_id("double", "orchestrator:webhook/double", "k")
    assert (answer.status_code, answer.json()) == (200, {"run": run, "state": "succeeded", "output": 42})
    again = sync.post("/hooks/double", json={"n": 21}, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()) == (200, answer.json())
    failed = sync.post("/hooks/fail", json={"n": 1})
    assert failed.status_code == 502
    assert failed.json()["error"] == {"type": "ValueError", "message": "no 1"}
    assert failed.json()["state"] == "failed"
    began = time.monotonic()
    slow = sync.post("/hooks/slow", json={"n": 1})
    assert slow.status_code == 202
    assert slow.headers["location"] == f"/api/v1/runs/{slow.json()['run']}"
    none = sync.post("/hooks/double", json={"n": -1})
    assert (none.status_code, none.json().get("run")) == (202, None)
    assert time.monotonic() - began < 15  # and not the limit of 20 s: it is known that no run will come
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: sync.post("/hooks/double", json={"n": n}).json()["output"], range(1, 17)))
    assert answers == [2 * n for n in range(1, 17)]


def test_who_waits_for_a_run_is_answered_when_the_gateway_stops(engine: Engine) -> None:
    """The delivery was accepted, and is not to come again."""
    gateway = Gateway(engine)
    gateway.apply([_workflow(OnWebhook(path="s", respond="sync", timeout_s=60))])
    gateway.start()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{gateway.url}/hooks/s", json={}, timeout=30)
        wait_until(lambda: engine.ledger.client.llen(EVENT_QUEUE), "the delivery is on the bus")
        began = time.monotonic()
        gateway.stop()
        assert answer.result().status_code == 202
        assert answer.result().headers["location"].startswith("/api/v1/runs/")
        assert time.monotonic() - began < 5


# The addresses


def test_ports_are_kept_over_restarts(settings: Settings) -> None:
    first = listen(settings)
    kept = addresses(settings.data_dir)
    assert (kept["url"], kept["health_url"]) == (first.url, first.health_url)
    second = listen(settings)  # as long as another has them, others are taken
    assert {second.url, second.health_url}.isdisjoint({first.url, first.health_url})
    second.close()
    elsewhere = listen(settings.evolve(port=int(second.url.rpartition(":")[2])))
    assert addresses(settings.data_dir)["url"] == elsewhere.url == second.url
    elsewhere.close()
    first.close()
    third = listen(settings)  # neither has taken the first one's away
    assert (third.url, third.health_url) == (first.url, first.health_url)
    third.close()


def test_a_port_in_use_is_told(settings: Settings) -> None:
    first = listen(settings)
    port = first.gateway.getsockname()[1]
    with pytest.raises(AlreadyRunningError, match=f"port {port} on 127.0.0.1 is in use; .* set port to another"):
        listen(settings.evolve(port=port))
    with pytest.raises(AlreadyRunningError, match="set health_port to another"):
        listen(settings.evolve(health_port=port))
    first.close()


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "::zz"])
def test_an_address_of_elsewhere_is_told(settings: Settings, host: str) -> None:
    with pytest.raises(SettingsError, match="set host and port to others"):
        listen(settings.evolve(host=host))


def test_state_that_is_broken_is_not_minded(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    for text in ("{", "[]", '{"url": "http://x:99999999"}', '{"url": 5}'):
        (settings.data_dir / STATE).write_text(text)
        listen(settings).close()


# The definitions


def _faults(root: Path, webhook_text: str, **options: Any) -> list[str]:
    write_project(root, {"tasks.py": "def f(): pass\n"})
    text = f"workflow: w\non:\n  - webhook: {webhook_text}\nsteps:\n  s: {{task: 'tasks:f'}}\n"
    write_project(root, {"workflows/w.yaml": text})
    return [str(fault) for fault in load_in_subprocess(root, **options).faults]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{path: a, verify: {github: env:NO_SUCH}}", "verify.github: secret env:NO_SUCH: the environment has no"),
        ("{path: a, verify: {github: file:/no/such}}", "verify.github: secret file:/no/such: No such file"),
        ("{path: a, verify: {github: env:EMPTY}}", "verify.github: secret env:EMPTY: is empty"),
        ("{path: a, verify: {github: hunter2}}", "verify.github: a secret is env:NAME, file:PATH or a name"),
        ("{path: a, verify: {standard: named}}", "verify.standard: secret env:HOOK_SECRET: is no signing secret"),
        ("{path: a, schema: {type: objekt}}", "schema.type: is no JSON Schema: 'objekt' is not valid"),
        ("{path: a, schema: {$ref: 'https://x.invalid/y'}}", "others are not fetched"),
        ("{path: a, schema: {$ref: '#/$defs/none'}}", "leads to nothing in this schema"),
        ("{path: 'a b'}", "path: 'a b' cannot be a path"),
        ("{path: a, methods: FETCH}", "methods: must be one of"),
        ("{path: a, max_bytes: 0}", "max_bytes: must be from 1 byte"),
        ("{path: a, rate: 0}", "rate"),
        ("{path: a, verify: {}}", "verify: must have one scheme: github, gitlab"),
        ("{path: a, verify: {github: named, slack: named}}", "verify: must have one scheme: github, gitlab"),
        ("{path: a, verify: {hmac: {secrets: named, header: X, payload: 'x'}}}", "payload: must have {body}"),
        ("{path: a, verify: {hmac: {secrets: named, header: X, timestamp_header: T}}}", "only a signed time counts"),
        ("{path: a, verify: {hmac: {secrets: named, header: 'X:'}}}", "cannot be the name of a header"),
        ("{path: a, verify: {slack: {secrets: named, tolerance: 0}}}", "tolerance: must be more than 0"),
    ],
)  # fmt: skip
def test_faults_are_told_at_load(tmp_path: Path, text: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    monkeypatch.setenv("EMPTY", "")
    faults = _faults(tmp_path, text, secrets={"named": "env:HOOK_SECRET"})
    assert faults
    assert all(line.startswith("workflows/w.yaml:3: on.0.webhook") for line in faults)
    assert fault in faults[0]
    assert "hunter2" not in str(faults)


def test_a_path_used_twice_is_told(tmp_path: Path) -> None:
    other = "workflow: v\non:\n  - webhook: {path: /hooks/a/}\nsteps:\n  s: {task: 'tasks:f'}\n"
    write_project(tmp_path, {"workflows/v.yaml": other})
    (fault,) = _faults(tmp_path, "{path: a}")
    assert (
        fault == "workflows/w.yaml:3: on.0.webhook.path: the path 'a' is used twice; the other is in workflows/v.yaml:3"
    )


def test_workers_do_not_need_the_secrets_of_webhooks(tmp_path: Path) -> None:
    assert _faults(tmp_path, "{path: a, verify: {github: env:NO_SUCH}}") == []
