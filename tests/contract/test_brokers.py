"""What a broker tells of its queues, on the real server; RabbitMQ's part is in the acceptance tests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from orchestrator import canvas
from orchestrator.brokers import Broker, Waiting, broker_of
from orchestrator.brokers.claims import Claims
from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.plan import Plan
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server

PLAN = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f", pool="p"),)))


@pytest.fixture
def broker(engine: Engine) -> Iterator[Broker]:
    made = broker_of(engine.settings, engine.app)
    yield made
    made.close()


def publish(engine: Engine, run: str, priority: str = "normal") -> None:
    canvas.publish(engine.app, canvas.link(engine.app, PLAN, run, "s", priority))


def test_what_waits_is_counted_by_queue_and_of_a_pool_over_its_priorities(engine: Engine, broker: Broker) -> None:
    now_ms = time.time_ns() // 1_000_000
    assert broker.waiting(["p", "other"], now_ms) == {"p": Waiting(0, None), "other": Waiting(0, None)}
    for n in range(3):
        publish(engine, f"r{n}")
    publish(engine, "urgent", "high")
    assert broker.depths([queue_name("p"), queue_name("p", "high"), queue_name("p", "low")]) == [3, 1, 0]
    assert broker.waiting(["p"], now_ms)["p"].backlog == 4


def test_the_age_is_that_of_the_message_that_has_waited_longest(engine: Engine, broker: Broker) -> None:
    for run, priority in (("first", "low"), ("second", "high"), ("third", "low")):
        publish(engine, run, priority)
        time.sleep(0.05)  # their ages differ
    found = broker.queued_at([queue_name("p", priority) for priority in ("high", "normal", "low")])
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[2] < found[0]
    assert broker.waiting(["p"], found[2] + 60_000)["p"].oldest_age_s == 60.0
    assert broker.waiting(["p"], found[2] - 1)["p"].oldest_age_s == 0.0, "its publisher's clock is ahead"


def test_a_message_that_was_given_back_is_as_old_as_it_is(engine: Engine, broker: Broker) -> None:
    publish(engine, "r1")
    [since] = broker.queued_at([queue_name("p")])
    client = redis.Redis.from_url(engine.settings.broker_url)
    claims = Claims(client)
    [delivery] = claims.fetch([queue_name("p")], 1)
    publish(engine, "r2")
    claims.give_back(delivery.tag)
    assert broker.queued_at([queue_name("p")]) == [since]
    client.close()


@pytest.mark.parametrize(
    "raw", [b"{", b"null", b'{"properties": {}}', b'{"properties": {}, "headers": {"queued_at": "then"}}',
            b'{"properties": {}, "headers": [1]}', b'{"properties": {}, "headers": {"queued_at": true}}'],
)  # fmt: skip
def test_what_somebody_else_put_into_a_queue_has_no_age(engine: Engine, broker: Broker, raw: bytes) -> None:
    engine.ledger.client.lpush(queue_name("p"), raw)
    assert broker.waiting(["p"], 0)["p"] == Waiting(1, None)


def test_a_broker_that_is_away_is_said_to_be(engine: Engine, own_server: Server) -> None:
    broker = broker_of(engine.settings.evolve(broker_url=own_server.url), engine.app, timeout_s=1.0)
    assert broker.depths(["q"]) == [0]
    own_server.stop()
    for ask in (broker.depths, broker.queued_at):
        with pytest.raises(UnavailableError):
            ask(["q"])
    own_server.start()
    assert broker.depths(["q"]) == [0]
    broker.close()
