"""Reports: what Sentry is told of a dead letter; in its place a real HTTP server that takes envelopes, or refuses."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sentry_sdk

from orchestrator import reports
from orchestrator.ledger import keys
from orchestrator.reports import Reporter, ReportLoop, drain_unreported, event_of
from tests.conftest import capture_logs, wait_until

LETTER: dict[str, Any] = {
    "id": "00aa", "kind": "step", "reason": "error", "fingerprint": "f00d", "workflow": "shop", "run": "r1",
    "step": "price", "index": 3, "event_id": "e1", "episode": 2, "count": 2, "losses": 1,
    "queue": "orchestrator.cpu.normal", "first_at": "2026-01-02T03:00:00.000Z", "last_at": "2026-01-02T03:04:05.500Z",
    "detail": "shop.errors.NoStock: none at https://me:hunter2@shop.example/a?token=hunter2&b=1",
    "error": {
        "type": "shop.errors.NoStock", "message": "none at https://me:hunter2@shop.example/a?token=hunter2&b=1",
        "traceback": "Traceback: the body",
        "frames": [["tasks.py", 10, "price"], ["shop/stock.py", 20, "take"]],
    },
    "input": {"item": "the body"}, "event": {"data": "the body"}, "output": "the body",
    "attempt_records": [
        {
            "attempt": 1, "worker": "cpu@host:1/2", "code": "c0de", "state": "retrying", "input": {"item": "the body"},
            "started_at": "2026-01-02T03:00:00.000Z", "finished_at": "2026-01-02T03:00:01.000Z",
            "error": {"type": "OSError", "message": "redis://:hunter2@h/0 is away", "traceback": "the body"},
        },
        {
            "attempt": 2, "worker": "cpu@host:1/3", "code": "c0de", "state": "failed",
            "started_at": "2026-01-02T03:04:00.000Z", "finished_at": "2026-01-02T03:04:05.500Z",
            "error": {"type": "shop.errors.NoStock", "message": "none"},
        },
    ],
    "loss_records": [{"at": "2026-01-02T03:02:00.000Z", "reason": "killed by SIGSEGV", "worker": "cpu@host:1/2"}],
}  # fmt: skip


class Sentry:
    """A server that takes envelopes, or answers with `status`, or not at all while `waits` is not set."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.waits = threading.Event()
        self.waits.set()
        self.events: list[dict[str, Any]] = []
        self.requests: list[Any] = []
        sentry = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                header, item, payload = body.rstrip(b"\n").split(b"\n")
                sentry.requests.append((self.path, self.headers, json.loads(header), json.loads(item)))
                sentry.events.append(json.loads(payload))
                sentry.waits.wait(30)
                self.send_response(sentry.status)
                for name, value in sentry.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.dsn = f"http://public@127.0.0.1:{self._server.server_port}/42"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="sentry")
        self._thread.start()

    def stop(self) -> None:
        self.waits.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def sentry() -> Iterator[Sentry]:
    made = Sentry()
    yield made
    made.stop()


@pytest.fixture
def reporter(sentry: Sentry) -> Iterator[Reporter]:
    made = Reporter(sentry.dsn, release="shop@1", environment="test")
    yield made
    made.close()


def test_a_dead_letter_is_one_event(sentry: Sentry, reporter: Reporter) -> None:
    assert reporter.report(LETTER)
    ((path, headers, header, item),) = sentry.requests
    assert (path, item["type"]) == ("/api/42/envelope/", "event")
    assert "sentry_key=public" in headers["X-Sentry-Auth"]
    (event,) = sentry.events
    assert header["event_id"] == event["event_id"]
    assert event.pop("sdk")["name"].startswith("sentry.python")
    assert event.pop("event_id") == event_of(LETTER)["event_id"]
    event.pop("_meta", None)
    assert event == {
        "timestamp": 1767323045.5,
        "platform": "python",
        "level": "error",
        "release": "shop@1",
        "environment": "test",
        "server_name": "cpu@host:1/3",
        "fingerprint": ["f00d"],
        "tags": {
            "workflow": "shop", "run": "r1", "step": "price", "event_id": "e1", "reason": "error", "pool": "cpu",
        },
        "contexts": {
            "dead_letter": {
                "id": "00aa", "run": "r1", "index": 3, "episode": 2, "count": 2, "losses": 1, "attempts": 2,
                "code": "c0de", "first_at": "2026-01-02T03:00:00.000Z", "show": "orchestrator dead-letters show 00aa",
            },
        },
        "exception": {
            "values": [
                {
                    "type": "shop.errors.NoStock", "value": "none at https://***@shop.example/a?token=***&b=1",
                    "stacktrace": {
                        "frames": [
                            {"filename": "tasks.py", "lineno": 10, "function": "price", "in_app": True},
                            {"filename": "shop/stock.py", "lineno": 20, "function": "take", "in_app": True},
                        ],
                    },
                },
            ],
        },
        "breadcrumbs": {
            "values": [
                {
                    "category": "attempt", "level": "error", "timestamp": 1767322801.0,
                    "message": "OSError: redis://***@h/0 is away", "data": {"attempt": 1, "worker": "cpu@host:1/2"},
                },
                {
                    "category": "loss", "level": "error", "timestamp": 1767322920.0, "message": "killed by SIGSEGV",
                    "data": {"worker": "cpu@host:1/2"},
                },
                {
                    "category": "attempt", "level": "error", "timestamp": 1767323045.5,
                    "message": "shop.errors.NoStock: none", "data": {"attempt": 2, "worker": "cpu@host:1/3"},
                },
            ],
        },
    }  # fmt: skip


def test_a_letter_of_which_little_is_known_is_reported(sentry: Sentry) -> None:
    reporter = Reporter(sentry.dsn)
    assert reporter.report({"id": "00aa", "reason": "timeout", "detail": "longer than 5 s", "attempts": 3})
    (event,) = sentry.events
    assert event["exception"]["values"] == [{"type": "timeout", "value": "longer than 5 s"}]
    assert event["tags"] == {"reason": "timeout"}
    assert not event.keys() & {"release", "environment", "server_name", "modules", "user", "request", "extra"}


def test_a_repeat_is_the_same_event_and_another_episode_is_another() -> None:
    assert event_of(LETTER) == event_of(json.loads(json.dumps(LETTER)))
    assert event_of(LETTER)["event_id"] != event_of(LETTER | {"episode": 3})["event_id"]
    assert event_of(LETTER)["fingerprint"] == event_of(LETTER | {"id": "00bb"})["fingerprint"]


def test_nothing_of_this_process_is_sent_or_changed(
    sentry: Sentry, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("SENTRY_RELEASE", "SENTRY_ENVIRONMENT", "SENTRY_DSN"):
        monkeypatch.setenv(name, "http://of-the-user@127.0.0.1:9/1")
    sentry_sdk.set_tag("of", "the user")
    sentry_sdk.add_breadcrumb(message="of the user")
    assert Reporter(sentry.dsn).report(LETTER)
    assert "of the user" not in json.dumps(sentry.events)
    assert "of-the-user" not in json.dumps(sentry.events)
    assert os.uname().nodename not in json.dumps(sentry.events)
    assert not sentry_sdk.get_client().is_active()
    sentry_sdk.get_isolation_scope().clear()


@pytest.mark.parametrize("status", [429, 500, 503, 403, 302])
def test_a_sentry_that_refuses_is_left_alone_for_a_while(
    sentry: Sentry, reporter: Reporter, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentry.status = status
    sentry.headers = {"Location": "/elsewhere"} if status == 302 else {}
    with capture_logs() as logs:
        assert not reporter.report(LETTER)
        assert not reporter.report(LETTER)
        assert len(sentry.events) == 1
        monkeypatch.setattr(reporter, "_again_at", 0.0)
        assert not reporter.report(LETTER)
        sentry.status = 200
        monkeypatch.setattr(reporter, "_again_at", 0.0)
        assert reporter.report(LETTER)
    assert [line["event"] for line in logs] == ["sentry_waits", "sentry_goes_on"]
    assert logs[0]["error"] == f"it answers with HTTP {status}"
    assert len({event["event_id"] for event in sentry.events}) == 1


def test_a_sentry_that_says_how_long_is_left_alone_for_so_long(sentry: Sentry, reporter: Reporter) -> None:
    sentry.status, sentry.headers = 429, {"Retry-After": "60"}
    before = time.monotonic()
    assert not reporter.report(LETTER)
    assert 59 < reporter._again_at - before < 70


def test_what_would_be_refused_again_is_done_with(sentry: Sentry, reporter: Reporter) -> None:
    sentry.status = 413
    with capture_logs() as logs:
        assert reporter.report(LETTER)
    assert [(line["event"], line["letter"], line["status"]) for line in logs] == [("letter_not_reported", "00aa", 413)]


def test_a_letter_of_which_no_event_can_be_made_is_done_with(sentry: Sentry, reporter: Reporter) -> None:
    with capture_logs() as logs:
        assert reporter.report({"id": "00aa", "last_at": "yesterday"})
    assert [line["event"] for line in logs] == ["letter_not_reported"]
    assert not sentry.events


def test_a_slow_sentry_costs_a_bounded_time(
    sentry: Sentry, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "TIMEOUT_S", 0.3)
    sentry.waits.clear()
    before = time.monotonic()
    with capture_logs() as logs:
        assert not reporter.report(LETTER)
    assert time.monotonic() - before < 2
    assert [line["event"] for line in logs] == ["sentry_waits"]
    sentry.waits.set()
    wait_until(lambda: not reporter._sending.is_alive(), "the one that was sent is done with")  # type: ignore[union-attr]
    monkeypatch.setattr(reporter, "_again_at", 0.0)
    assert reporter.report(LETTER)


def test_without_a_sentry_nothing_fails(sentry: Sentry) -> None:
    sentry.stop()
    reporter = Reporter(sentry.dsn)
    with capture_logs() as logs:
        assert not reporter.report(LETTER)
    assert [line["event"] for line in logs] == ["sentry_waits"]
    assert "public" not in str(logs)
    reporter.close()
    reporter.close()


# The list in the ledger


class Counter(Reporter):
    """Notes what it was given; refuses what is in `refused`."""

    def __init__(self, *refused: str) -> None:
        super().__init__("http://public@127.0.0.1:9/1")
        self.refused = refused
        self.got: list[str] = []

    def report(self, letter: Any) -> bool:
        if letter["id"] in self.refused:
            return False
        self.got.append(letter["id"])
        return True


def waiting(client: Any) -> list[str]:
    return list(client.lrange(keys.UNREPORTED, 0, -1))


def test_what_is_reported_leaves_the_list(engine: Any) -> None:
    client, counter = engine.ledger.client, Counter("c")
    client.rpush(keys.UNREPORTED, "a", "b", "c", "d")
    assert drain_unreported(client, lambda one: {"id": one}, counter) == 2
    assert (counter.got, waiting(client)) == (["a", "b"], ["c", "d"])
    counter.refused = ()
    assert drain_unreported(client, lambda one: {"id": one}, counter, limit=1) == 1
    assert waiting(client) == ["d"]


def test_a_letter_that_is_gone_leaves_the_list_and_one_that_is_being_written_stays(engine: Any) -> None:
    client, counter = engine.ledger.client, Counter()
    client.rpush(keys.UNREPORTED, "gone", "coming", "there")
    client.zadd(keys.DEAD_LETTERS, {"coming": 1, "there": 1})
    letters = {"there": {"id": "there"}}
    assert drain_unreported(client, letters.get, counter) == 1
    assert (counter.got, waiting(client)) == (["there"], ["coming"])
    letters["coming"] = {"id": "coming"}
    assert drain_unreported(client, letters.get, counter) == 1
    assert waiting(client) == []


def test_a_kill_before_it_left_the_list_sends_the_same_event_again(
    engine: Any, sentry: Sentry, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = engine.ledger.client
    client.rpush(keys.UNREPORTED, "00aa")

    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(client, "lrem", die)
        with pytest.raises(SystemExit):
            drain_unreported(client, lambda _: LETTER, reporter)
    assert drain_unreported(client, lambda _: LETTER, reporter) == 1
    assert len(sentry.events) == 2
    assert len({event["event_id"] for event in sentry.events}) == 1


def test_of_several_loops_one_reports_and_another_takes_over(
    engine: Any, sentry: Sentry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_PERIOD_S", 0.05)
    client = engine.ledger.client
    monkeypatch.setattr(ReportLoop, "_letter", lambda self, one: LETTER | {"id": one})
    loops = [ReportLoop(engine, Reporter(sentry.dsn)) for _ in range(2)]
    for loop in loops:
        loop.start()
    client.rpush(keys.UNREPORTED, *(f"a{n}" for n in range(10)))
    wait_until(lambda: not waiting(client), "all are reported")
    loops[0].stop()
    client.rpush(keys.UNREPORTED, *(f"b{n}" for n in range(10)))
    wait_until(lambda: not waiting(client), "the other reports")
    loops[1].stop()
    assert len(sentry.events) == 20
