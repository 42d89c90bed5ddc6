"""Bad messages on real queues become dead letters with their bytes; letters are sent back; and the commands for it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE, STEP_TASK, queue_name
from orchestrator.deadletters import DeadLetters, Filter, letter_id
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.errors import InFlightError, InputError, NotFoundError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import How
from orchestrator.messages import fault_of, message_of
from orchestrator.plan import Plan
from orchestrator.redrive import Options, Redrive, Summary
from orchestrator.subscriptions import OnEvent
from orchestrator.workflows import Step, Workflow
from tests.conftest import WorkerProcess, command, on_servers, wait_until

QUEUE = queue_name("default")


@pytest.fixture
def letters(engine: Engine) -> DeadLetters:
    return DeadLetters(engine.ledger, engine.payloads, engine.settings)


# What comes in -------------------------------------------------------------------------------------------------------


def envelope(body: bytes, **headers: Any) -> bytes:
    whole = {
        "body": base64.b64encode(body).decode(), "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"task": STEP_TASK, "id": "1"} | headers,
        "properties": {"body_encoding": "base64", "delivery_info": {}},
    }  # fmt: skip
    return json.dumps(whole).encode()


def _deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


CALL = b'[["r", "a"], {}, {}]'
BAD = [
    b"", b"\x80\x04\x95pickle", b"\xff\xfe\x00", b"[" * 200_000, b"9" * 10_000, b"null", b"{}", b'{"properties": 5}',
    b'{"properties": {}, "headers": [1]}', b'{"properties": {}, "body": "\\ud800"}', b'{"properties": {"x": 1e999}}',
    envelope(b"9" * 5000), envelope(b"{" * 100_000), envelope(b"\xff"), envelope(b"x" * 10_000_000),
    envelope(CALL, task="another.task"), envelope(CALL, expires="2001-01-01T00:00:00"), envelope(CALL, eta="9999"),
    envelope(CALL, compression="unheard-of"), envelope(CALL, deep=_deep(700)), envelope(CALL, id=_deep(700)),
    envelope(b'[["r", "a", 0, 1' + b"0" * 400 + b"], {}, {}]"), envelope(b'[["r\\u0000", "a"], {}, {}]'),
    envelope(b'[["\\ud800", "a"], {}, {}]'), envelope(b'[["r", "a"], {}, {"chain": 5}]'),
    envelope(b'[["r", "a"], {}, {"callbacks": [{"task": "x"}]}]'), envelope(b'[["r", "a"], {}, {"id": 5}]'),
    envelope(CALL, timelimit=[1, 1]), envelope(CALL, stamped_headers=["x"]), envelope(CALL, chord={"task": "x"}),
]  # fmt: skip


def _bytes(letters: DeadLetters) -> list[bytes]:
    while letters.drain():
        pass
    return sorted(letters.raw(one.id) or b"" for one in letters.all())


def test_a_worker_leaves_a_letter_of_each_bad_message_and_goes_on(
    engine: Engine, letters: DeadLetters, start_worker: Callable[..., WorkerProcess]
) -> None:
    (engine.settings.project / "tasks.py").write_text("def echo(value):\n    return value\n")
    client = engine.ledger.client
    client.rpush(QUEUE, *BAD)
    worker = start_worker()
    plan = Plan.of(Workflow(name="w", steps=(Step(id="a", task="tasks:echo", with_={"value": 1}),)))
    engine.ledger.put_plan(plan)
    assert engine.start("good", plan, event={}, params={})
    wait_until(lambda: engine.ledger.outcome("good")[0] == "succeeded", "the good one ran")
    wait_until(lambda: not client.llen(QUEUE) and not client.hlen("orchestrator.unacked"), "all were taken")
    assert _bytes(letters) == sorted(BAD)
    found = list(letters.all())
    assert {one.queue for one in found} == {QUEUE}
    assert {one.reason for one in found} == {"envelope", "body", "unknown_task", "expired", "not_a_step"}
    assert all(one.detail and "x" * 100 not in one.detail for one in found)
    assert worker.stop() == 0
    assert "Traceback" not in worker.log.read_text()


BAD_EVENTS = [
    b"null", b"5", b"{}", b"[" * 200_000, b"9" * 5000, b"\xff", b'{"specversion": "1.0"}', b"",
    b'{"specversion": "1.0", "id": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"specversion": "1.0", "id": "\\ud800", "source": "s", "type": "t"}',
    b'{"specversion": "1.0", "id": "i", "source": "s", "type": "t", "data": NaN}',
    b'{"specversion": "1.0", "id": "secret' + b"x" * 1_000_000 + b'", "source": 5, "type": "t"}',
    b'{"specversion": "1.0", "id": {"password": "hunter2"}, "source": "s", "type": "t"}',
]  # fmt: skip


def test_the_dispatcher_leaves_a_letter_of_each_bad_event_and_goes_on(engine: Engine, letters: DeadLetters) -> None:
    bus = EventBus(engine.app)
    dispatcher = Dispatcher(engine)
    dispatcher.apply([Workflow(name="w", steps=(Step(id="a", task="t:f"),), on=(OnEvent(pattern={"type": ["t"]}),))])
    with engine.app.producer_pool.acquire(block=True) as producer:
        for body in BAD_EVENTS:
            producer.publish(
                body, content_type="application/json", content_encoding="utf-8", exchange="", routing_key=EVENT_QUEUE
            )
    odd = b'{"properties": {}, "body": "\\ud800", "content-type": "application/json"}'
    engine.ledger.client.lpush(EVENT_QUEUE, b"not JSON", odd)
    good = Event(id="g", source="s", type="t", time="")
    bus.publish([good])
    dispatcher.start()
    try:
        wait_until(lambda: engine.events.seen(good), "the good one was dispatched")
    finally:
        dispatcher.stop()
    assert _bytes(letters) == sorted([*BAD_EVENTS, b"not JSON", odd])
    found = list(letters.all())
    assert {(one.kind, one.queue) for one in found} == {("event", EVENT_QUEUE)}
    assert not any("hunter2" in one.detail or "secret" in one.detail for one in found)


def test_what_the_canvas_publishes_is_taken_for_a_step(engine: Engine) -> None:
    """Links, chains of them and header parts; else nothing would ever run."""
    steps = (Step(id="a", task="t:f"), Step(id="b", task="t:f", needs=("a",)), Step(id="f", task="t:f", foreach=[1, 2]))
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=steps)))
    engine.start("r", plan, event={}, params={})
    engine.publish("r", ["b", "f/0-1", "f/1-2"], plan=plan)
    sent = [raw.encode() for raw in engine.ledger.client.lrange(QUEUE, 0, -1)]
    assert len(sent) == 5
    assert [fault_of(message_of(raw)) for raw in sent] == [None] * 5


# Sending back --------------------------------------------------------------------------------------------------------

HOW = How('{"worker":"w"')


@dataclass
class Answer:
    episode: int
    slots: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


class Runs:
    """Runs whose only steps have failed; opening their next episode has each step end as `outcome` says."""

    def __init__(self, engine: Engine, letters: DeadLetters) -> None:
        self._engine, self._letters = engine, letters
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.outcome: Callable[[str, str], str] = lambda run, slot: "succeeded"
        self.busy: dict[str, int] = {}

    def fail(self, run: str, *steps: str) -> None:
        plan = Plan.of(Workflow(name="w", steps=tuple(Step(id=one, task="t:f") for one in steps)))
        self._engine.ledger.put_plan(plan)
        self._engine.ledger.start(run, plan, event="{}", event_id="e", run_input="{}", created_ms=1)
        for one in steps:
            taken = self._engine.ledger.begin(run, [one], HOW).taken
            assert taken is not None
            tail = ',"error":{"type":"E","message":"m","fingerprint":"f1"}'
            self._engine.ledger.complete(run, taken, "failed", tail=tail, how=HOW, inline="")
        self._letters.bury(run, steps)

    def redrive(self, engine: Engine, run: str, slots: Mapping[str, Any]) -> Answer:
        if self.busy.get(run, 0):
            self.busy[run] -= 1
            raise InFlightError(f"run {run} is going on")
        self.calls.append((run, dict(slots)))
        client = engine.ledger.client
        episode = client.hincrby(keys.run_key(run, "run"), "episode", 1)
        if episode == 1:
            raise NotFoundError(f"run {run} is not known")
        states = client.hmget(keys.run_key(run, "states"), list(slots))
        sent = [slot for slot, state in zip(slots, states, strict=True) if state == "failed"]
        for slot in sent:
            outcome = self.outcome(run, slot)
            client.hset(keys.run_key(run, "states"), slot, outcome.partition(" ")[0])
            if outcome.startswith("failed"):
                client.hset(keys.run_key(run, "attempts"), f"{slot}#a", episode - 1)
                error = {"type": "E", "message": "m", "fingerprint": outcome.partition(" ")[2]}
                record = {"finished_at": time.time_ns() // 1_000_000, "error": error}
                client.hset(keys.run_key(run, "attempts"), f"{slot}@{episode}", json.dumps(record))
        self._letters.bury(run, list(slots))  # as fast as a worker may be
        return Answer(episode, tuple(sent), {slot: "it has not failed" for slot in slots if slot not in sent})


@pytest.fixture
def runs(engine: Engine, letters: DeadLetters) -> Runs:
    return Runs(engine, letters)


@pytest.fixture
def redrive(
    engine: Engine, letters: DeadLetters, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Summary]:
    monkeypatch.setattr("orchestrator.redrive.redrive_run", runs.redrive)

    def do(which: Filter | None = None, **options: Any) -> Summary:
        return Redrive(engine, letters, Options(**options)).run(letters.all(which))

    return do


def test_letters_of_a_run_go_in_one_call_and_leave_the_list(
    runs: Runs, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    runs.fail("r", "a", "b")
    runs.fail("s", "a")
    summary = redrive(mended={"x": 1})
    assert sorted(summary.sent) == sorted(letter_id(*one) for one in (("r", "a"), ("r", "b"), ("s", "a")))
    assert summary.worked
    assert sorted(runs.calls) == [("r", {"a": {"x": 1}, "b": {"x": 1}}), ("s", {"a": {"x": 1}})]
    assert letters.list()[0] == []


def test_what_fails_again_at_once_is_on_the_list_again(
    runs: Runs, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    runs.fail("r", "a")
    runs.outcome = lambda run, slot: "failed f2"
    redrive()
    (again,), _ = letters.list()
    assert (again.count, again.fingerprint) == (2, "f2")


def test_the_rest_follows_canaries_that_succeed(runs: Runs, redrive: Callable[..., Summary]) -> None:
    runs.fail("r", "a", "b", "c")
    runs.fail("s", "a")
    summary = redrive(canary=2)
    assert letter_id("s", "a") in summary.succeeded
    assert (len(summary.succeeded), len(summary.sent), summary.left, summary.stopped) == (2, 4, [], "")
    assert [len(slots) for _, slots in runs.calls] == [1, 1, 2]
    assert {run for run, _ in runs.calls[:2]} == {"r", "s"}


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("failed f1", "failed as before: fingerprint f1 came back"),
        ("failed f2", "failed in another way than before; see `runs show r`"),
        ("cancelled", "of run r\\) is cancelled"),
    ],
)
def test_nothing_follows_a_canary_that_does_not(
    runs: Runs, redrive: Callable[..., Summary], outcome: str, message: str
) -> None:
    runs.fail("r", "a", "b", "c")
    runs.outcome = lambda run, slot: outcome
    summary = redrive(canary=1)
    assert re.search(message, summary.stopped)
    assert (len(summary.sent), len(summary.left), summary.worked) == (1, 2, False)


def test_it_stops_when_the_fingerprint_comes_back(runs: Runs, redrive: Callable[..., Summary]) -> None:
    for n in range(10):
        runs.fail(f"r{n}", "a")
    runs.outcome = lambda run, slot: "failed f1" if run == "r6" else "failed f2" if run == "r8" else "succeeded"
    summary = redrive(rate=200)
    assert summary.stopped == "a of run r6 failed as before: fingerprint f1 came back"
    assert runs.calls[-1][0] == "r6"
    assert len(summary.sent) == len(runs.calls) == 10 - len(summary.left)


def test_a_rate_is_held(runs: Runs, redrive: Callable[..., Summary]) -> None:
    for n in range(5):
        runs.fail(f"r{n}", "a", "b")
    began = time.monotonic()
    assert redrive(rate=20).worked
    assert 0.4 <= time.monotonic() - began < 5


def test_a_run_that_is_going_on_is_waited_for_and_in_the_end_skipped(
    runs: Runs, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    for run in ("r", "s", "t"):
        runs.fail(run, "a")
    runs.busy = {"r": 2, "s": 10**9}
    summary = redrive(timeout_s=1.0)
    assert [run for run, _ in runs.calls] == ["t", "r"]
    (skipped,) = summary.skipped.items()
    assert skipped[0] == letter_id("s", "a")
    assert "run s is going on" in skipped[1]
    assert [one.run for one in letters.list()[0]] == ["s"]
    assert not summary.worked


def test_what_was_sent_already_is_skipped_and_off_the_list(
    engine: Engine, runs: Runs, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    """Whoever sent it was killed before it was off the list."""
    runs.fail("r", "a", "b")
    engine.ledger.client.hset(keys.run_key("r", "states"), "a", "running")
    summary = redrive()
    assert summary.skipped == {letter_id("r", "a"): "it has not failed"}
    assert letters.list()[0] == []
    runs.fail("gone", "a")
    engine.ledger.client.delete(*keys.run_keys("gone"))
    assert "past its retention" in redrive().skipped[letter_id("gone", "a")]


def _aside(engine: Engine, letters: DeadLetters, raw: bytes, reason: str, queue: str) -> None:
    engine.ledger.set_aside(raw, reason, time.time_ns() // 1_000_000, detail="d", queue=queue)
    letters.drain()


def test_a_mended_event_is_dispatched(engine: Engine, redrive: Callable[..., Summary], letters: DeadLetters) -> None:
    _aside(engine, letters, b'{"specversion": "1.0", "id": "e", "source": "s"}', "not_an_event", EVENT_QUEUE)
    (why,) = redrive().skipped.values()
    assert why.startswith("event: type must be a string that is not empty; it would come back at once; give the mended")
    mended = {"specversion": "1.0", "id": "e", "source": "s", "type": "t"}
    with pytest.raises(InputError, match="type must be"):
        redrive(mended={"specversion": "1.0", "id": "e", "source": "s"})
    assert len(redrive(mended=mended).sent) == 1
    assert letters.list()[0] == []
    (raw,) = engine.ledger.client.lrange(EVENT_QUEUE, 0, -1)
    assert json.loads(base64.b64decode(json.loads(raw)["body"]))["type"] == "t"


def test_an_event_goes_as_it_was_if_it_is_one(
    engine: Engine, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    _aside(engine, letters, b'{"specversion": "1.0", "id": "e", "source": "s", "type": "t"}', "dispatch", EVENT_QUEUE)
    assert redrive().worked
    assert engine.ledger.client.llen(EVENT_QUEUE) == 1


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"not JSON", "its envelope is not JSON (JSONDecodeError)"),
        (envelope(b"{broken"), "its body cannot be read (DecodeError)"),
        (envelope(CALL, task="a.b"), "it is for the task a.b; here is only orchestrator.step"),
        (b"", "its envelope is not JSON (JSONDecodeError)"),
    ],
)
def test_a_message_that_would_come_back_is_not_sent(
    engine: Engine, redrive: Callable[..., Summary], letters: DeadLetters, raw: bytes, why: str
) -> None:
    _aside(engine, letters, raw, "envelope", QUEUE)
    ((letter, said),) = redrive().skipped.items()
    assert said == (
        f"{why}; it would come back at once; discard it, or see its bytes with `dead-letters show {letter} --raw`"
    )
    assert len(letters.list()[0]) == 1


def test_a_message_that_a_worker_would_take_now_is_on_its_queue_again(
    engine: Engine, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(Step(id="a", task="t:f"),))))
    engine.start("r", plan, event={}, params={})
    client = engine.ledger.client
    raw = client.rpop(QUEUE).encode()
    _aside(engine, letters, raw, "unknown_task", QUEUE)
    assert redrive().worked
    again = message_of(client.rpop(QUEUE).encode())
    first = message_of(raw)
    assert fault_of(again) is None
    assert (again.payload, again.headers) == (first.payload, first.headers)
    assert letters.list()[0] == []


def test_what_was_asked_for_must_fit_the_letters(
    engine: Engine, runs: Runs, redrive: Callable[..., Summary], letters: DeadLetters
) -> None:
    runs.fail("r", "a")
    with pytest.raises(InputError, match="must be a JSON object"):
        redrive(mended=[1])
    _aside(engine, letters, b"x", "envelope", QUEUE)
    with pytest.raises(InputError, match="not several kinds at once"):
        redrive(mended={})
    with pytest.raises(InputError, match="--canary waits for steps"):
        redrive(canary=1)
    letters.discard([one.id for one in letters.all()])
    for _ in range(2):
        _aside(engine, letters, b"x", "not_an_event", EVENT_QUEUE)
    with pytest.raises(InputError, match="there are 2; redrive them one by one"):
        redrive(mended={})


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(engine: Engine) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command("dead-letters", *arguments, "--project", str(engine.settings.project)),
            env=on_servers(engine.settings), capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip

    return run


def test_the_commands(engine: Engine, runs: Runs, letters: DeadLetters, cli: Callable[..., Any]) -> None:
    runs.fail("r", "a", "b")
    _aside(engine, letters, b"\x00\xffbytes", "envelope", QUEUE)
    done = cli("list", "--json")
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout)["items"]
    assert sorted(one["kind"] for one in items) == ["message", "step", "step"]
    items.sort(key=lambda one: one["kind"])
    assert b"message on orchestrator.default.normal" in cli("list").stdout
    (group,) = json.loads(cli("list", "--group", "--step", "a", "--json").stdout)["items"]
    assert (group["fingerprint"], group["count"], group["workflow"]) == ("f1", 1, "w")
    assert b"more: --after" in cli("list", "--limit", "1").stdout
    message, step = items[0]["id"], items[1]["id"]
    assert cli("show", message[:8], "--raw").stdout == b"\x00\xffbytes"
    assert json.loads(cli("show", message, "--json").stdout)["raw"].encode("latin-1") == b"\x00\xffbytes"
    shown = cli("show", step).stdout.decode()
    assert "fingerprint f1" in shown
    assert "E: m" in shown
    assert b"7 bytes" in cli("show", message).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["redrive"], "which dead letters? give ids, a filter such as --fingerprint, or --all"),
        (["discard"], "which dead letters?"),
        (["redrive", "abcd", "--all"], "give ids or a filter, not both"),
        (["show", "abcd"], "dead letter 'abcd' is not known"),
        (["discard", "--all"], "this discards 1 dead letter(s), and nobody is there to be asked; add --yes"),
    ],
)
def test_a_command_that_is_refused_says_why_in_one_line(
    engine: Engine, letters: DeadLetters, cli: Callable[..., Any], arguments: list[str], message: str
) -> None:
    _aside(engine, letters, b"x", "envelope", QUEUE)
    done = cli(*arguments)
    assert done.returncode == 1
    assert message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert len(letters.list()[0]) == 1


def test_redrive_and_discard(engine: Engine, letters: DeadLetters, cli: Callable[..., Any]) -> None:
    _aside(engine, letters, b'{"specversion": "1.0", "id": "e", "source": "s", "type": "t"}', "dispatch", EVENT_QUEUE)
    _aside(engine, letters, b"x", "envelope", QUEUE)
    done = cli("redrive", "--all")
    assert done.returncode == 1
    assert b"sent 1, skipped 1, left 0" in done.stdout
    assert b"it would come back at once" in done.stdout
    assert engine.ledger.client.llen(EVENT_QUEUE) == 1
    summary = json.loads(cli("redrive", "--all", "--json").stdout)
    assert (summary["sent"], len(summary["skipped"]), summary["stopped"]) == ([], 1, None)
    done = cli("discard", "--reason", "envelope", "--yes")
    assert (done.returncode, done.stdout) == (0, b"discarded 1\n")
    done = cli("redrive", "--all")
    assert (done.returncode, done.stdout) == (0, b"sent 0, skipped 0, left 0\n")
