"""RabbitMQ as the broker, where it is at fault: away, frozen, refusing, restarted, or tired of waiting."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import kombu
import kombu.pools
import pytest

from orchestrator import canvas
from orchestrator.brokers import Waiting, broker_of
from orchestrator.bus import EventBus
from orchestrator.celery_app import CONFIRM_TIMEOUT_S, EVENT_QUEUE, STEP_TASK, queue_name
from orchestrator.deadletters import DeadLetters
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.events import Event
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.acceptance.proxy import Proxy
from tests.acceptance.rabbitmq import RabbitMQ
from tests.conftest import WorkerProcess, wait_until

EVENT = Event(id="e", source="s", type="t", subject=None, time=None, data=None)

TASKS = """
import os, time
def hold(gate):
    with open(gate + ".record", "a") as file:
        file.write("began\\n")
    while not os.path.exists(gate):
        time.sleep(0.01)
"""


@pytest.fixture
def on_rabbitmq(settings: Settings, rabbitmq: RabbitMQ) -> Settings:
    """Settings with the ledger on Redis, and a project with a step that holds until its gate opens."""
    (settings.project / "tasks.py").write_text(TASKS)
    return settings.evolve(broker_url=rabbitmq.url)


@pytest.fixture
def start_on_rabbitmq(on_rabbitmq: Settings) -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(pool: str) -> WorkerProcess:
        started.append(WorkerProcess(on_rabbitmq, pool=pool).start())
        return started[-1]

    yield start
    for worker in started:
        assert worker.stop() == 0, worker.log.read_text()


def _plan(engine: Engine, pool: str, gate: Path) -> Plan:
    plan = Plan.of(Workflow(name="w", steps=(Step(id="a", task="tasks:hold", pool=pool, with_={"gate": str(gate)}),)))
    engine.ledger.put_plan(plan)
    return plan


def _delete(settings: Settings, *queues: str) -> None:
    """What is in the queues of one test is not for the next."""
    with kombu.Connection(settings.broker_url) as connection:
        for name in queues:
            kombu.Queue(name, channel=connection.channel()).delete()


def _began(gate: Path) -> int:
    record = gate.with_suffix(".record")
    return len(record.read_text().splitlines()) if record.exists() else 0


@pytest.mark.parametrize("fault", ["away", "password", "queue"])
def test_what_rabbitmq_does_not_take_is_unavailable(
    on_rabbitmq: Settings, rabbitmq: RabbitMQ, tmp_path: Path, fault: str
) -> None:
    """And a unit that was to be published stays in the outbox."""
    url = on_rabbitmq.broker_url
    kombu.pools.reset()  # an older connection remembers what it has declared
    if fault == "away":
        url = url.replace(str(rabbitmq.port), "1")
    elif fault == "password":
        url = url.replace("guest:guest", "guest:hunter2")
    else:
        with kombu.Connection(url) as connection:
            for name in (EVENT_QUEUE, queue_name("odd")):
                kombu.Queue(name, durable=False, channel=connection.channel()).declare()
    engine = Engine(on_rabbitmq.evolve(broker_url=url), patience_s=0.0)
    try:
        with pytest.raises(UnavailableError) as error:
            EventBus(engine.app).publish([EVENT])
        assert "hunter2" not in str(error.value)
        with pytest.raises(UnavailableError) as error:
            engine.start("r", _plan(engine, "odd", tmp_path), event={}, params={})
        assert "hunter2" not in str(error.value)
        assert engine.ledger.sweep("r", outbox_age_ms=0)[1] == ["a"]
    finally:
        engine.close()
        _delete(on_rabbitmq, EVENT_QUEUE, queue_name("odd"))


def test_what_is_not_confirmed_is_not_accepted(on_rabbitmq: Settings, rabbitmq: RabbitMQ) -> None:
    """The network is gone and nobody is told: the publisher does not wait for ever."""
    proxy = Proxy(on_rabbitmq.broker_url)
    engine = Engine(on_rabbitmq.evolve(broker_url=proxy.url), patience_s=0.0)
    try:
        bus = EventBus(engine.app)
        bus.publish([EVENT])
        assert rabbitmq.depth(EVENT_QUEUE) == (1, 0)
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            bus.publish([EVENT])
        assert time.monotonic() - began < 3 * CONFIRM_TIMEOUT_S  # it tries twice
        proxy.mend()
        bus.publish([EVENT])
        # What was on the way may have arrived as well.
        wait_until(lambda: rabbitmq.depth(EVENT_QUEUE)[0] >= 2, "the event is there")
    finally:
        engine.close()
        proxy.stop()
        _delete(on_rabbitmq, EVENT_QUEUE)


def test_a_publisher_whose_idle_connection_was_closed_connects_again(
    on_rabbitmq: Settings, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    """RabbitMQ was restarted, or a firewall forgets what is idle: nobody is to hear of that."""
    proxy = Proxy(on_rabbitmq.broker_url)
    engine = Engine(on_rabbitmq.evolve(broker_url=proxy.url), patience_s=0.0)
    plan = _plan(engine, "idle", tmp_path)
    try:
        for n in (1, 2):
            EventBus(engine.app).publish([EVENT])
            assert engine.start(f"r{n}", plan, event={}, params={})
            assert rabbitmq.depth(EVENT_QUEUE) == rabbitmq.depth(queue_name("idle")) == (n, 0)
            proxy.break_connections()
    finally:
        engine.close()
        proxy.stop()
        _delete(on_rabbitmq, EVENT_QUEUE, queue_name("idle"))


def test_runs_end_although_rabbitmq_is_killed_and_comes_back(
    on_rabbitmq: Settings, rabbitmq: RabbitMQ, start_on_rabbitmq: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    """One is in work, others have been fetched, the last ones wait in the queue."""
    gate = tmp_path / "gate"
    engine = Engine(on_rabbitmq, patience_s=2.0)
    plan = _plan(engine, "killed", gate)
    runs = [f"r{n}" for n in range(8)]
    start_on_rabbitmq("killed")
    for run in runs:
        assert engine.start(run, plan, event={}, params={})
    wait_until(lambda: _began(gate) == 2, "two steps have begun")
    rabbitmq.stop()
    rabbitmq.start()
    gate.touch()
    queries = Queries(engine.ledger, engine.payloads)
    for run in runs:
        wait_until(lambda run=run: queries.run(run, with_steps=False).state.is_end, f"{run} ends")
        assert queries.run(run).steps[0].losses == 0
    assert _began(gate) == len(runs)
    wait_until(lambda: rabbitmq.depth(queue_name("killed")) == (0, 0), "the queue is empty")
    engine.close()


def test_a_step_longer_than_consumer_timeout_runs_once(
    on_rabbitmq: Settings, rabbitmq: RabbitMQ, start_on_rabbitmq: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    """RabbitMQ takes a message away from whoever has not acknowledged it for so long, and its channel with it."""
    gate = tmp_path / "gate"
    engine = Engine(on_rabbitmq, patience_s=2.0)
    plan = _plan(engine, "patient", gate)
    with rabbitmq.consumer_timeout(2000):
        worker = start_on_rabbitmq("patient")
        assert engine.start("r", plan, event={}, params={})
        wait_until(lambda: _began(gate) == 1, "the step has begun")
        wait_until(lambda: "PRECONDITION_FAILED" in worker.log.read_text(), "RabbitMQ has closed the channel")
        wait_until(lambda: rabbitmq.depth(queue_name("patient")) == (0, 0), "what came again was dropped")
    gate.touch()
    queries = Queries(engine.ledger, engine.payloads)
    wait_until(lambda: queries.run("r", with_steps=False).state.is_end, "the run ends")
    assert _began(gate) == 1
    assert queries.run("r").steps[0].losses == 0
    engine.close()


def _put(settings: Settings, queue: str, body: bytes, **options: Any) -> None:
    with kombu.Connection(settings.broker_url) as connection:
        producer = connection.Producer()
        kinds = {"content_type": "application/json", "content_encoding": "utf-8"}
        declare = [kombu.Queue(queue, routing_key=queue)]
        producer.publish(body, exchange="", routing_key=queue, declare=declare, **kinds | options)


def test_bad_messages_become_dead_letters_with_their_bodies(
    on_rabbitmq: Settings, rabbitmq: RabbitMQ, start_on_rabbitmq: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    """And the worker and the dispatcher go on."""
    engine = Engine(on_rabbitmq, patience_s=0.0)
    letters = DeadLetters(engine.ledger, engine.payloads, on_rabbitmq)
    dispatcher, bus = Dispatcher(engine), engine.bus
    dispatcher.apply([])
    worker = start_on_rabbitmq("bad")
    queue = queue_name("bad")
    ours = {"task": STEP_TASK, "id": "1"}
    odd: dict[str, Any] = {"when": datetime.now(UTC), "price": Decimal("1.5"), "deep": json.loads("[" * 60 + "]" * 60)}
    try:
        for headers in (
            {},
            {"task": "x"},
            ours | odd,
            ours | {"id": "\ud800"},
            ours | {"compression": "unheard-of"},
            ours,
        ):
            _put(on_rabbitmq, queue, b"\x00\xff{", headers=headers)
        _put(on_rabbitmq, queue, b"\x00\xff{", headers=ours, content_type="application/x-python-serialize")
        _put(on_rabbitmq, queue, b"\x00\xff{", headers=ours, content_encoding="latin-1")
        _put(on_rabbitmq, EVENT_QUEUE, b"\x00\xff{")
        _put(on_rabbitmq, EVENT_QUEUE, b"\xe9", content_encoding="latin-1")
        _put(on_rabbitmq, EVENT_QUEUE, b'{"specversion": "1.0"}')
        good = Event(id="good", source="s", type="t", time="")
        bus.publish([good])
        dispatcher.start()
        wait_until(lambda: engine.events.seen(good), "the good event was dispatched")
        gate = tmp_path / "gate"
        gate.touch()
        assert engine.start("good", _plan(engine, "bad", gate), event={}, params={})
        wait_until(lambda: engine.ledger.outcome("good")[0] == "succeeded", "the good one ran")
        letters.drain()
        found = list(letters.all())
        bodies = [
            base64.b64decode(json.loads(letters.raw(one.id) or b"")["body"]) for one in found if one.kind == "message"
        ]
        assert bodies == [b"\x00\xff{"] * 8
        assert {one.queue for one in found} == {queue, EVENT_QUEUE}
        events = sorted(letters.raw(one.id) or b"" for one in found if one.kind == "event")
        assert events == [b"\x00\xff{", b'{"specversion": "1.0"}', b"\xe9"]
        assert "Traceback" not in worker.log.read_text()
    finally:
        dispatcher.stop()
        engine.close()
        _delete(on_rabbitmq, EVENT_QUEUE)


def test_what_waits_is_told_also_after_the_connection_was_lost(on_rabbitmq: Settings) -> None:
    proxy = Proxy(on_rabbitmq.broker_url)
    direct = Engine(on_rabbitmq, patience_s=0.0)
    through = Engine(on_rabbitmq.evolve(broker_url=proxy.url), patience_s=0.0)
    broker = broker_of(through.settings, through.app, timeout_s=1.0)
    plan = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f", pool="counted"),)))
    try:
        assert broker.waiting(["counted", "never-made"], 0) == {"counted": Waiting(), "never-made": Waiting()}
        for n in range(3):
            canvas.publish(direct.app, canvas.link(direct.app, plan, f"r{n}", "s"))
        assert broker.waiting(["never-made", "counted"], 0)["counted"] == Waiting(3, None)
        proxy.break_connections()
        assert broker.waiting(["counted"], 0)["counted"].backlog == 3, "by a new connection"
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            broker.depths([queue_name("counted")])
        assert time.monotonic() - began < 10
        proxy.mend()
        assert broker.waiting(["counted"], 0)["counted"].backlog == 3
    finally:
        broker.close()
        proxy.stop()
        for engine in (direct, through):
            engine.close()
