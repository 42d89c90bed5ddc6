"""What workers, their watch and the rescuer make of blobs that are lost and of servers that refuse."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator.brokers.claims import UNACKED, Claims
from orchestrator.celery_app import STEP_TASK, queue_name
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import LEADER_MS, RENEW_S, How
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.rescuer import Rescuer
from orchestrator.runs import RunState
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, WorkerProcess, wait_until
from tests.integration.conftest import TASKS, Place
from workers.slots import Slots
from workers.step import Identity, StepRunner
from workers.watch import Watch

HOW = How('{"worker":"w"')


def step(step_id: str, task: str = "echo", *needs: str, with_: Any = None, **options: Any) -> Step:
    given = {name: parse(value) if isinstance(value, str) else value for name, value in (with_ or {}).items()}
    return Step(id=step_id, task=f"tasks:{task}", with_=given, needs=needs, **options)


def test_an_output_that_is_not_json_fails_the_run(place: Place) -> None:
    run = place.run(Workflow(name="w", steps=(step("a"),), output=parse("{{ 1e308 * 10 }}"), has_output=True))
    assert run.state is RunState.FAILED
    assert run.error is not None
    assert "inf" in run.error["message"]


def test_a_blob_that_is_lost_fails_what_reads_it_and_the_run(place: Place, tmp_path: Path) -> None:
    gate, past_a = tmp_path / "gate", tmp_path / "past-a"
    run = place.start(
        Workflow(
            name="w",
            steps=(
                step("a", "big", with_={"characters": 100_000}),
                step("t", "touch", "a", with_={"path": str(past_a)}),
                step("b", "wait_for", "t", with_={"path": str(gate)}),
                step("c", "length", "b", with_={"value": "{{ a }}"}),
                step("d", "echo", "c"),
            ),
        )
    )
    blobs = place.settings.blobs_dir / "runs" / run
    wait_until(past_a.exists, "what comes right after a has read it")
    assert list(blobs.glob("a-*"))
    for blob in blobs.glob("a-*"):
        blob.unlink()
    gate.touch()
    found = place.end(run)
    assert {one.id: str(one.state) for one in found.steps}["c"] == "failed"
    assert found.error is not None
    assert found.error["type"] == "BlobNotFound"


def test_an_outcome_is_not_lost_to_a_blob_store_that_is_full(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    (settings.project / "tasks.py").write_text(
        TASKS + "\ndef large(record):\n    open(record, 'a').write('x')\n    return ['x' * 1000] * 200\n"
    )
    blobs, record = tmp_path / "store", tmp_path / "record"
    blobs.write_text("a file, in which nothing can be stored")
    apart = Engine(settings.evolve(blobs_url=blobs.as_uri()))
    run = _start(
        apart,
        step("a", "large", with_={"record": str(record)}),
        step("b", "length", foreach=parse("{{ a }}"), with_={"value": "{{ item }}"}),
    )
    worker = WorkerProcess(settings, ORCHESTRATOR_BLOBS_URL=blobs.as_uri()).start()
    try:
        wait_until(lambda: "step_waits" in worker.log.read_text(), "the step has ended")
        blobs.unlink()
        assert _end(apart, run, 20).state is RunState.SUCCEEDED
        assert record.read_text() == "x"
    finally:
        assert worker.stop() == 0
        apart.close()


def test_whatever_a_step_raises_is_its_failure(place: Place) -> None:
    (place.settings.project / "odd.py").write_text(
        "import asyncio\ndef cancelled():\n    raise asyncio.CancelledError('gone')\n"
    )
    run = place.run(Workflow(name="w", steps=(Step(id="a", task="odd:cancelled"),)))
    (one,) = run.steps
    assert (str(one.state), one.losses) == ("failed", 0)


# The ledger refuses for a while, the broker does not ---------------------------------------------------------------


@pytest.fixture
def apart(settings: Settings, own_server: Server) -> Iterator[Engine]:
    """An engine whose ledger and broker are two servers, with the tasks in its project."""
    (settings.project / "tasks.py").write_text(TASKS)
    made = Engine(settings.evolve(ledger_url=own_server.url), patience_s=2.0)
    yield made
    made.close()


REFUSALS = ["out of memory", "read-only", "without its replicas"]


def _refuse(server: Server, how: str = REFUSALS[0], *, refuses: bool) -> None:
    client = redis.Redis.from_url(server.url)
    if how == "read-only":
        client.replicaof(*(("127.0.0.1", "1") if refuses else ("no", "one")))
    elif how == "without its replicas":
        client.config_set("min-replicas-to-write", int(refuses))
    else:
        client.config_set("maxmemory", "1" if refuses else "0")
    client.close()


def _end(engine: Engine, run: str, timeout_s: float) -> Any:
    queries = Queries(engine.ledger, engine.payloads)
    wait_until(lambda: queries.run(run, with_steps=False).state.is_end, f"run {run} ends", timeout_s)
    return queries.run(run)


def _start(engine: Engine, *steps: Step) -> str:
    plan = Plan.of(Workflow(name="w", steps=steps))
    engine.ledger.put_plan(plan)
    assert engine.start("r", plan, event={}, params={})
    return "r"


def test_a_message_is_not_lost_to_a_ledger_that_refuses(apart: Engine, own_server: Server) -> None:
    run = _start(apart, step("a", with_={"value": 1}))
    broker = redis.Redis.from_url(apart.settings.broker_url)
    message = broker.rpop(queue_name("default"))
    worker = WorkerProcess(apart.settings).start()
    try:
        wait_until(apart.pools.reports, "the worker has been heard of")
        _refuse(own_server, refuses=True)
        broker.lpush(queue_name("default"), message)
        wait_until(lambda: "step_waits" in worker.log.read_text(), "the message was taken")
        time.sleep(3)  # it is tried again
        _refuse(own_server, refuses=False)
        assert _end(apart, run, 15).output == 1
        assert "Traceback" not in worker.log.read_text()
    finally:
        assert worker.stop() == 0


@pytest.mark.parametrize("how", REFUSALS)
def test_an_outcome_is_not_lost_to_a_ledger_that_refuses(
    apart: Engine, own_server: Server, tmp_path: Path, how: str
) -> None:
    gate, record = tmp_path / "gate", tmp_path / "record"
    run = _start(
        apart,
        step("a", "stamp", with_={"record": str(record), "name": "a", "seconds": 1.0}),
        step("b", "wait_for", "a", with_={"path": str(gate)}),
    )
    worker = WorkerProcess(apart.settings).start()
    try:
        wait_until(lambda: apart.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
        _refuse(own_server, how, refuses=True)
        wait_until(lambda: "step_waits" in worker.log.read_text(), "the step has ended")
        _refuse(own_server, how, refuses=False)
        gate.touch()
        assert _end(apart, run, 15).state is RunState.SUCCEEDED
        assert len(record.read_text().splitlines()) == 1
        assert "Traceback" not in worker.log.read_text()
    finally:
        assert worker.stop() == 0


def test_a_worker_that_stops_keeps_the_leases_of_the_steps_that_it_finishes(
    engine: Engine, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    (engine.settings.project / "tasks.py").write_text(TASKS)
    gate = tmp_path / "gate"
    run = _start(engine, step("a", "wait_for", with_={"path": str(gate)}))
    worker = start_worker()

    def runs_out() -> float:
        return float(engine.ledger.client.zscore("orchestrator:{r}:leases", "a") or 0)

    wait_until(runs_out, "the step has begun")
    assert worker.process is not None
    worker.process.terminate()
    wait_until(lambda: "Warm shutdown" in worker.log.read_text(), "the worker stops")
    at_stop = runs_out()
    wait_until(lambda: runs_out() > at_stop + 2 * RENEW_S * 1000 - 500, "its lease was renewed twice more", 10)
    gate.touch()
    assert worker.process.wait(timeout=10) == 0
    assert Queries(engine.ledger, engine.payloads).run(run).steps[0].state == "succeeded"


# Messages that are no steps' -------------------------------------------------------------------------------------


def _spoilt() -> list[dict[str, Any]]:
    """Return envelopes as Celery makes them, each with one thing wrong."""

    def encoded(value: Any) -> str:
        return base64.b64encode(json.dumps(value).encode()).decode()

    def envelope(*, headers: Any = None, properties: Any = None, **changes: Any) -> dict[str, Any]:
        good = {"task": "orchestrator.step", "id": "i", "eta": None, "expires": None, "timelimit": [None, None]}
        delivery = {"exchange": "", "routing_key": "orchestrator.default.normal"}
        return {
            "body": encoded([["r", "a"], {}, {}]), "content-encoding": "utf-8", "content-type": "application/json",
            "headers": good | (headers or {}),
            "properties": {"body_encoding": "base64", "delivery_info": delivery} | (properties or {}),
        } | changes  # fmt: skip

    headers: list[dict[str, Any]] = [
        {"task": "another.task"}, {"task": ["a"]}, {"id": None}, {"id": ["a"]}, {"timelimit": 7}, {"timelimit": "ab"},
        {"timelimit": [5, 3]}, {"stamped_headers": 5}, {"compression": "unheard-of"}, {"eta": "9999-01-01T00:00:00"},
        {"expires": "2001-01-01T00:00:00"},
    ]  # fmt: skip
    bodies = [[1], [1, 2, 3], {"task": "orchestrator.step"}, [["r"], {}, {}], [["r", "a"], {"x": 1}, {}]]
    return [
        *(envelope(headers=change) for change in headers),
        *(envelope(body=encoded(body)) for body in bodies),
        envelope(properties={"delivery_info": "x"}),
        envelope(body=None),
        *(envelope(**{"content-type": kind}) for kind in (None, ["a"], "application/x-python-serialize")),
        envelope(**{"content-encoding": 7}),
        envelope() | {"headers": {}},
    ]


def test_a_worker_sets_aside_what_is_no_step_and_lives(
    engine: Engine, start_worker: Callable[..., WorkerProcess]
) -> None:
    (engine.settings.project / "tasks.py").write_text(TASKS)
    spoilt, client = _spoilt(), engine.ledger.client
    for envelope in spoilt:
        client.lpush("orchestrator.default.normal", json.dumps(envelope))
    worker = start_worker()
    run = _start(engine, step("a", with_={"value": 1}))
    assert _end(engine, run, 20).output == 1
    records = [json.loads(record) for record in client.lrange(keys.SET_ASIDE, 0, -1)]
    assert len(records) == len(spoilt), worker.log.read_text()
    assert all(record["reason"] and json.loads(record["raw"])["headers"] is not None for record in records)
    assert worker.stop() == 0
    assert "Traceback" not in worker.log.read_text()


# The watch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the child of a worker."""
    made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield made
    made.kill()
    made.wait()


def test_a_child_between_two_items_is_not_taken_for_one_that_was_taken_over(
    engine: Engine, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("f", foreach=[0, 1, 2]),))))
    assert engine.start("r", plan, event={}, params={})
    first = engine.ledger.begin("r", ["f"], HOW).taken
    assert first is not None
    answer = engine.ledger.expand("r", first, 3, size=3, max_parallel=0, per=3, chunks=["[0,1,2]"], how=HOW, inline="")
    taken = engine.ledger.begin("r", answer.publish, HOW).taken
    assert taken is not None
    slots = Slots(1)
    monkeypatch.setattr("workers.slots.os.getpid", lambda: child.pid)

    def note(fence: int, index: int) -> None:
        now = time.monotonic()
        slots.write(0, fence=fence, attempt=1, tries=1, index=index, run="r", unit=taken.unit, unit_since=now)

    watch = Watch(engine, slots, Identity("w", ""))
    note(taken.fence, 0)
    following = engine.ledger.complete("r", taken, "succeeded", payload="1", how=HOW, inline="default").taken
    assert following is not None
    now = time.monotonic()
    watch.round(now)  # it has completed the item, and not yet noted what it took next
    assert child.poll() is None
    note(following.fence, 1)
    watch.round(now + 10)
    watch.round(now + 20)
    assert child.poll() is None
    # Somebody really takes over: now it is ended.
    assert engine.ledger.abandon("r", HOW.record, "killed")[0] == [taken.unit]
    assert engine.ledger.begin("r", [taken.unit], HOW).taken is not None
    watch.round(now + 30)
    watch.round(now + 40)
    assert child.wait(timeout=5) == -9
    slots.close()


def test_a_bad_run_does_not_cost_the_others_their_leases(engine: Engine) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a"),))))
    slots = Slots(2)
    for slot, run in enumerate(("bad", "good")):
        assert engine.start(run, plan, event={}, params={})
        taken = engine.ledger.begin(run, ["a"], How('{"worker":"w"', lease_ms=1)).taken
        assert taken is not None
        slots.write(slot, fence=taken.fence, attempt=1, tries=1, index=-1, run=run, unit="a", unit_since=0.0)
    engine.ledger.client.set("orchestrator:{bad}:leases", "no sorted set")
    Watch(engine, slots, Identity("w", "")).round(time.monotonic())
    seconds, _ = engine.ledger.client.time()
    assert engine.ledger.client.zscore("orchestrator:{good}:leases", "a") > (seconds + 5) * 1000
    slots.close()


def test_what_was_taken_is_watched_while_the_rest_is_published(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing a large fan-out may take longer than a lease."""
    (settings.project / "tasks.py").write_text(TASKS)
    plan = Plan.of(Workflow(name="w", steps=(step("a"), step("b", "echo", "a"), step("c", "echo", "a"))))
    engine.ledger.put_plan(plan)
    assert engine.start("r", plan, event={}, params={})
    slots = Slots(1)
    runner = StepRunner(engine, Identity("w", ""), pool="default", slots=slots, slot=0)
    seen = []

    def publish(run: str, rows: Sequence[str], *, plan: Plan | None = None, priority: str = "normal") -> None:
        work = slots.read(0)
        seen.append((list(rows), work and work.unit))

    monkeypatch.setattr(engine, "publish", publish)
    runner.carry("r", ["a"])
    assert seen[0] == (["c"], "b")
    assert slots.read(0) is None
    slots.close()


# The rescuer ---------------------------------------------------------------------------------------------------------


def test_a_bad_run_does_not_end_the_care_for_the_others(engine: Engine, settings: Settings) -> None:
    plans = [Plan.of(Workflow(name=name, steps=(step("a"),))) for name in ("bad", "good")]
    for plan in plans:
        engine.ledger.put_plan(plan)
        assert engine.ledger.start(
            plan.workflow.name, plan, event="{}", event_id="e", run_input="{}", created_ms=len(plan.workflow.name)
        )
    engine.ledger.client.set(f"orchestrator:plan:{plans[0].hash}", "{}")
    time.sleep(5.1)  # the rows in the outbox are old enough
    rescuer = Rescuer(engine)
    assert rescuer.round() == 1
    rescuer.stop()


# A server that refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", REFUSALS)
def test_a_worker_outlives_a_server_that_refuses_writes(
    own_server: Server, settings: Settings, tmp_path: Path, how: str
) -> None:
    """Broker and ledger refuse, also while the worker starts; then both take up again what was there."""
    (settings.project / "tasks.py").write_text(TASKS)
    engine = Engine(settings.evolve(ledger_url=own_server.url, broker_url=own_server.url), patience_s=2.0)
    run = _start(engine, step("a", with_={"value": 1}))
    client = redis.Redis.from_url(own_server.url)

    def refuse(*, refuses: bool) -> None:
        _refuse(own_server, how, refuses=refuses)

    refuse(refuses=True)
    worker = WorkerProcess(engine.settings).start()
    try:
        wait_until(lambda: "_waits" in worker.log.read_text(), "it was refused")
        refuse(refuses=False)
        assert _end(engine, run, 20).output == 1
        refuse(refuses=True)
        with pytest.raises(UnavailableError):
            engine.ledger.start("r2", engine.plan(engine.ledger.plan_of("r")), event="{}", event_id="e", run_input="{}",
                                created_ms=1)  # fmt: skip
        refuse(refuses=False)
        assert engine.start("r2", engine.plan(engine.ledger.plan_of("r")), event={}, params={})
        assert _end(engine, "r2", 20).output == 1
        text = worker.log.read_text()
        assert text.count("consumer_waits") <= 3, text
        assert "Traceback" not in text, text
    finally:
        refuse(refuses=False)
        assert worker.stop() == 0
        client.close()
        engine.close()


@pytest.mark.parametrize(
    "message",
    [
        {"properties": {}},
        {"properties": {"body_encoding": "base64"}, "body": "!", "headers": {}},
        {"task": "theirs.task"},
        {"task": STEP_TASK, "content-type": "application/x-python-serialize"},
        {"task": STEP_TASK, "body": "not JSON"},
        {"task": STEP_TASK, "body": '"no call"'},
        {"task": STEP_TASK, "eta": "tomorrow"},
    ],
)
def test_a_worker_sets_aside_what_is_no_call_of_a_step(
    engine: Engine, settings: Settings, message: dict[str, Any]
) -> None:
    """Celery drops some of these unseen; of others its worker dies, and the next one, because they come back."""
    (settings.project / "tasks.py").write_text(TASKS)
    envelope = message
    if "task" in message:
        headers = {"lang": "py", "id": "1", "task": message["task"], "eta": message.get("eta")}
        envelope = {
            "headers": headers,
            "properties": {"delivery_info": {}},
            "body": message.get("body", "[[], {}, {}]"),
            "content-type": message.get("content-type", "application/json"),
            "content-encoding": "utf-8",
        }
    raw = json.dumps(envelope)
    client = redis.Redis.from_url(settings.broker_url)
    client.lpush(queue_name("default"), raw)
    worker = WorkerProcess(settings).start()
    try:
        wait_until(lambda: client.llen(keys.SET_ASIDE), "it is set aside", 20)
        run = _start(engine, step("a", with_={"value": 1}))
        assert _end(engine, run, 20).output == 1
        assert json.loads(client.lindex(keys.SET_ASIDE, 0))["raw"] == raw
        wait_until(lambda: client.hlen(UNACKED) == 0, "nothing is in work")
        assert worker.log.read_text().count("message_set_aside") == 1
        assert "Traceback" not in worker.log.read_text()
    finally:
        assert worker.stop() == 0
        client.close()


def test_a_run_whose_message_is_lost_goes_on_and_one_that_only_waits_is_left_alone(engine: Engine) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a"), step("b")))))
    queue = queue_name("default")
    for run in ("lost", "waiting"):
        assert engine.start(run, plan, event={}, params={})
    client = redis.Redis.from_url(engine.settings.broker_url)
    messages = client.lrange(queue, 0, -1)
    rescuer = Rescuer(engine)
    for _ in range(4):
        assert rescuer.round() == 0  # their queue is not empty
    client.delete(queue)
    assert rescuer.round() == 4  # two rounds have seen them idle, and now nothing is in any queue
    assert client.llen(queue) == 4
    assert rescuer.round() == rescuer.round() == 0
    client.delete(queue)
    with app_messages(engine) as take_all:  # in work is not lost
        for message in messages:
            client.lpush(queue, message)
        assert len(take_all()) == 4
        for _ in range(4):
            assert rescuer.round() == 0
    rescuer.stop()
    client.close()


@contextmanager
def app_messages(engine: Engine) -> Iterator[Callable[[], list[str]]]:
    """Take messages as a worker does, and keep them unacknowledged until the end."""
    client = redis.Redis.from_url(engine.settings.broker_url)
    claims = Claims(client)
    yield lambda: [one.tag for one in claims.fetch([queue_name("default")], 100)]
    client.close()


def test_a_run_whose_plan_is_gone_ends_and_tells_why(engine: Engine) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a"),))))
    assert engine.ledger.start("r", plan, event="{}", event_id="e", run_input="{}", created_ms=1)
    engine.ledger.client.delete(f"orchestrator:plan:{plan.hash}")
    rescuer = Rescuer(engine)
    wait_until(lambda: rescuer.round() == 0 and not engine.ledger.active(), "it was given up", 15)
    found = Queries(engine.ledger, engine.payloads).run("r", with_steps=False)
    assert found.state is RunState.FAILED
    assert found.error is not None
    assert plan.hash in found.error["message"]
    rescuer.stop()


def test_one_rescuer_leads_and_another_takes_over(engine: Engine) -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a"),))))
    first, second = Rescuer(engine), Rescuer(engine)
    first.round()
    second.round()
    assert engine.ledger.start("r", plan, event="{}", event_id="e", run_input="{}", created_ms=1)
    key = "orchestrator:leader:rescuer"
    leader = engine.ledger.client.get(key)
    assert 0 < engine.ledger.client.pttl(key) <= LEADER_MS
    wait_until(lambda: second.round() or first.round(), "what waited in the outbox is published", 10)
    assert engine.ledger.client.get(key) == leader
    first.stop()  # it is gone: the other leads at once
    second.round()
    assert engine.ledger.client.get(key) not in (None, leader)
    engine.ledger.client.delete(key)
    second.stop()


def test_leases_that_ran_out_while_nobody_looked_are_left_to_the_living_for_a_while(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.rescuer._GRACE_MS", 1500)
    rescuer = Rescuer(engine)
    rescuer.round()
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a"),))))
    assert engine.start("r", plan, event={}, params={})
    taken = engine.ledger.begin("r", ["a"], How('{"worker":"w"', lease_ms=1)).taken
    assert taken is not None
    began = time.monotonic()
    rescuer._seen_ms -= 60_000  # as if nobody had seen the server for a minute
    assert rescuer.round() == 0  # the lease has run out, but its holder may have been kept from renewing it
    assert engine.ledger.renew([("r", "a", taken.fence)], lease_ms=1)[0] == set()
    wait_until(rescuer.round, "nobody has renewed it", 10)
    assert time.monotonic() - began >= 1.5
    rescuer.stop()


def test_who_only_waits_for_its_time_is_not_looked_at_and_found_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.of(Workflow(name="w", steps=(step("a"), step("b", "echo", "a"))))
    engine.ledger.put_plan(plan)
    for run in ("sleeps", "wakes", "is_cancelled"):
        assert engine.start(run, plan, event={}, params={})
        taken = engine.ledger.begin(run, ["a"], HOW).taken
        assert taken is not None
        engine.ledger.complete(run, taken, "retrying", delay_ms=60_000, how=HOW, inline="")
    rescuer = Rescuer(engine)
    looked: list[str] = []
    look = rescuer._engine.ledger.look

    def note(runs: Sequence[str], *rest: int) -> tuple[list[str], dict[str, str]]:
        looked.extend(runs)
        return look(runs, *rest)

    monkeypatch.setattr(rescuer._engine.ledger, "look", note)
    for _ in range(3):
        rescuer.round()
    looked.clear()
    rescuer.round()
    assert looked == []
    engine.ledger.client.zadd(keys.run_key("wakes", "timers"), {"a": 1})
    engine.ledger.client.zadd(keys.TIMERS, {"wakes": 1})
    engine.ledger.due(engine.ledger.now_ms(), 10)
    engine.ledger.cancel("is_cancelled")
    rescuer.round()
    assert sorted(looked) == ["is_cancelled", "wakes"]
    assert engine.ledger.client.hget(keys.run_key("wakes", "states"), "a") == "queued"
