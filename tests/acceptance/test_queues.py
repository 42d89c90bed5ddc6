"""The queue trigger in a process that is killed again and again, on Redis and RabbitMQ; what RabbitMQ has besides."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnQueue
from tests.acceptance.rabbitmq import RabbitMQ
from tests.conftest import Server, capture_logs, command, on_servers, wait_until, write_project
from triggers import queue_amqp
from triggers.queue import QueueTrigger
from triggers.queue_amqp import AmqpSource


def on_bus(engine: Engine) -> list[Event]:
    found = []
    while raw := engine.ledger.client.rpop(EVENT_QUEUE):
        found.append(Event.from_json(json.loads(base64.b64decode(json.loads(raw)["body"]))))
    return found


class Killed:
    """`orchestrator trigger` for one queue, which is killed and started again."""

    def __init__(self, settings: Settings, on: OnQueue) -> None:
        entry = f"{{queue: {{url: '{on.url}', queue: {on.queue}}}}}"
        definition = f"workflow: w\non: [{entry}]\nsteps: {{a: {{task: 'tasks:a'}}}}\n"
        write_project(settings.project, {"workflows/w.yaml": definition, "tasks.py": "def a():\n    pass\n"})
        self._settings = settings
        self._log = settings.project.parent / "trigger.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command("trigger", "--project", str(self._settings.project)), stdout=log, stderr=log,
                env=on_servers(self._settings),
            )  # fmt: skip

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def survive(killed: Killed, engine: Engine, put: Callable[[Sequence[str]], None], count: int) -> None:
    """Each message is one event, with kills while messages come; equal ones too."""
    rng, found = random.Random(7), []
    bodies = [json.dumps({"n": n // 2}) for n in range(count)]
    for lo in range(0, count, count // 6):
        put(bodies[lo : lo + count // 6])
        killed.start()
        before = len(found)
        most = rng.randint(1, count // 10)

        def enough(before: int = before, most: int = most) -> bool:
            found.extend(on_bus(engine))
            return len(found) - before >= most

        wait_until(enough, f"{most} more are on the bus", 60)
        killed.kill()
    killed.start()

    def all_there() -> bool:
        found.extend(on_bus(engine))
        return len({event.id for event in found}) >= count

    try:
        wait_until(all_there, f"all {count} are on the bus", 60)
    finally:
        killed.kill()
    found.extend(on_bus(engine))
    by_id = {event.id: event.data["body"]["n"] for event in found}
    assert sorted(by_id.values()) == [n // 2 for n in range(count)]
    print(f"{len(found) - count} of {count} came twice, under the same id")


@pytest.fixture
def source(server: Server) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server.url.removesuffix("/0") + "/6")
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


def test_redis_with_kills(settings: Settings, engine: Engine, server: Server, source: redis.Redis) -> None:
    on = OnQueue(url=server.url.removesuffix("/0") + "/6", queue="jobs")
    survive(Killed(settings, on), engine, lambda bodies: source.lpush("jobs", *bodies), 4000)


# RabbitMQ


@pytest.fixture
def jobs(rabbitmq: RabbitMQ) -> Iterator[OnQueue]:
    """Somebody else's queue, with arguments that we do not know of."""
    queue = Queue("jobs", durable=True, queue_arguments={"x-max-length": 100_000})
    with Connection(rabbitmq.url) as connection:
        queue(connection.default_channel).declare()
    yield OnQueue(url=rabbitmq.url, queue="jobs")
    with Connection(rabbitmq.url) as connection:
        queue(connection.default_channel).delete()


def put(url: str, bodies: Sequence[Any], **options: Any) -> None:
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        producer = connection.Producer(exchange=Exchange(""))
        for body in bodies:
            given = {"content_type": "application/json", "content_encoding": "utf-8"} | options
            producer.publish(body, routing_key="jobs", delivery_mode=2, **given)


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[[OnQueue], QueueTrigger]]:
    started: list[QueueTrigger] = []

    def start_(on: OnQueue) -> QueueTrigger:
        started.append(QueueTrigger(on, ledger=engine.ledger, emit=EventBus(engine.app).publish))
        started[-1].start()
        return started[-1]

    yield start_
    for one in started:
        one.stop()


def wait_for(engine: Engine, count: int) -> list[Event]:
    found: list[Event] = []
    wait_until(lambda: found.extend(on_bus(engine)) or len(found) >= count, f"{count} events are on the bus")
    return found


def test_rabbitmq_with_kills(settings: Settings, engine: Engine, jobs: OnQueue) -> None:
    """The messages have no ids, and each comes in two equal copies."""
    survive(Killed(settings, jobs), engine, lambda bodies: put(jobs.url, bodies), 4000)


def test_messages_of_rabbitmq(start: Any, engine: Engine, jobs: OnQueue, rabbitmq: RabbitMQ) -> None:
    put(jobs.url, ['{"n": 1}'], headers={"tenant": "a", "raw": b"x"}, message_id="m1")
    put(jobs.url, ['{"n": 2}', '{"n": 2}'])
    put(jobs.url, [b"\xff\x00"], content_type="application/octet-stream", content_encoding="binary")
    put(jobs.url, [b"[3]"], content_type="text/plain", content_encoding="no-such-encoding")
    with capture_logs() as logs:
        start(jobs)
        events = wait_for(engine, 4)
        assert [event.data["body"] for event in events] == [{"n": 1}, {"n": 2}, {"n": 2}, [3]]
        assert events[0].id == "m1"
        assert events[0].data["headers"]["tenant"] == "a"
        assert len({event.id for event in events}) == 4
        wait_until(lambda: rabbitmq.depth("jobs") == (0, 0), "all are acknowledged")
    assert [entry["event"] for entry in logs] == ["queue_message_set_aside"]
    (letter,) = engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1)
    assert json.loads(letter)["raw"] == "\xff\x00"
    wait_until(lambda: not engine.ledger.client.keys(f"{keys.PREFIX}:taken:*:ids"), "no ids are held any more")


def test_cloudevents_over_amqp(start: Any, engine: Engine, jobs: OnQueue) -> None:
    """Structured, and binary: the attributes are headers."""
    cloud = {"specversion": "1.0", "id": "e1", "source": "https://shop", "type": "shop.order", "data": {"n": 1}}
    put(jobs.url, [json.dumps(cloud)], content_type="application/cloudevents+json")
    headers = {f"cloudEvents:{name}": value for name, value in (cloud | {"id": "e2"}).items() if name != "data"}
    put(jobs.url, ['{"n": 2}'], headers=headers)
    start(OnQueue(url=jobs.url, queue="jobs", format="cloudevents"))
    assert [(event.id, event.type, event.data) for event in wait_for(engine, 2)] == [
        ("e1", "shop.order", {"n": 1}), ("e2", "shop.order", {"n": 2}),
    ]  # fmt: skip


def test_a_queue_of_rabbitmq_that_goes_and_comes(start: Any, engine: Engine, jobs: OnQueue, rabbitmq: RabbitMQ) -> None:
    """It is waited for, is not made by us, and its consumer outlives its deletion."""
    with capture_logs() as logs, Connection(rabbitmq.url) as connection:
        start(OnQueue(url=jobs.url, queue="later"))
        wait_until(lambda: logs, "it says that it waits")
        assert "later" in logs[0]["error"]
        queue = Queue("later")(connection.default_channel)
        for n in (1, 2):
            queue.declare()
            connection.Producer().publish({"n": n}, routing_key="later")
            assert wait_for(engine, 1)[0].data["body"] == {"n": n}
            wait_until(lambda: rabbitmq.depth("later") == (0, 0), "it is acknowledged")
            queue.delete()
    assert logs[0]["event"] == "queue_trigger_waits"


def test_connections_that_break(start: Any, engine: Engine, jobs: OnQueue, rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    """All connections of the server are closed while messages come: each is one event, though none has an id."""
    start(jobs)
    found: list[Event] = []
    with capture_logs():
        for lo in range(0, 1000, 100):
            put(jobs.url, [json.dumps(n) for n in range(lo, lo + 100)])
            rabbitmq._ctl("close_all_connections", "the test says so")

        def all_there() -> bool:
            found.extend(on_bus(engine))
            return len({event.data["body"] for event in found}) >= 1000

        wait_until(all_there, "all are there")
        wait_until(lambda: rabbitmq.depth("jobs") == (0, 0), "all are acknowledged")
    found += on_bus(engine)
    assert len({event.id for event in found}) == 1000


def test_what_a_killed_owner_had_comes_again_under_its_ids(
    engine: Engine, jobs: OnQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal messages keep ids of their own, over two kills, and only when the owner is known to live no more."""
    monkeypatch.setattr(queue_amqp, "OWNER_MS", 800)
    put(jobs.url, ["1", "1", "2"])

    def source() -> AmqpSource:
        return AmqpSource(jobs.url, "jobs", trigger="t", ledger=engine.ledger)

    def take(one: AmqpSource, count: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        wait_until(lambda: found.update({m.id: m.body for m in one.take(0.1)}) or len(found) >= count, "all are taken")
        return found

    first = source()
    ids = take(first, 3)
    assert sorted(ids.values()) == [b"1", b"1", b"2"]
    for _ in range(2):
        first._connection.collect()
        put(jobs.url, ["3"])
        second = source()
        again = take(second, len(ids) + 1)
        assert ids.items() <= again.items()
        ids, first = again, second
    first.close()
    last = source()
    assert set(take(last, len(ids))) == set(ids)
    last.close()
