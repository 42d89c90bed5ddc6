"""The transport under kombu's own consumers and producers, on the real server."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Connection, Consumer, Queue

from orchestrator.brokers import claims
from orchestrator.brokers.redis import Transport
from orchestrator.celery_app import make_app
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from tests.conftest import wait_until

NAME = "orchestrator.test"
QUEUE = Queue(NAME, routing_key=NAME)


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    made = make_app(settings)
    yield made
    made.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[Any]:
    made = redis.Redis.from_url(settings.broker_url)
    yield made
    made.close()


def publish(app: Celery, *bodies: Any, batch: bool = False) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        if batch:
            with producer.batch():
                for body in bodies:
                    producer.publish(body, exchange="", routing_key=NAME, serializer="json")
        else:
            for body in bodies:
                producer.publish(body, exchange="", routing_key=NAME, serializer="json")


@contextmanager
def consuming(app: Celery, prefetch: int = 4, *, ack: bool = True) -> Iterator[tuple[list[Any], Callable[[], None]]]:
    """Give the messages as they come, and what drives the consumer for up to 0.2 s."""
    got: list[Any] = []

    def receive(message: Any) -> None:
        got.append(message)
        if ack:
            message.ack()

    with app.connection_for_read() as connection:

        def drive() -> None:
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                return

        with Consumer(connection.channel(), [QUEUE], on_message=receive, prefetch_count=prefetch, accept=["json"]):
            yield got, drive


def until(drive: Callable[[], None], condition: Callable[[], Any], description: str, timeout_s: float = 10) -> None:
    def look() -> Any:
        drive()
        return condition()

    wait_until(look, description, timeout_s)


@pytest.mark.parametrize("batch", [False, True])
def test_messages_come_in_order_and_are_gone_when_acknowledged(app: Celery, client: Any, batch: bool) -> None:
    publish(app, *range(10), batch=batch)
    with consuming(app) as (got, drive):
        until(drive, lambda: len(got) == 10, "all are there")
        assert [message.payload for message in got] == list(range(10))
    assert (client.llen(NAME), client.hlen(claims.UNACKED), client.zcard(claims.UNACKED_INDEX)) == (0, 0, 0)
    assert client.llen(claims.bell(NAME)) <= 1


def test_no_more_than_the_prefetch_is_taken(app: Celery, client: Any) -> None:
    publish(app, *range(10), batch=True)
    with consuming(app, prefetch=3, ack=False) as (got, drive):
        until(drive, lambda: len(got) >= 3, "three are there")
        for _ in range(3):
            drive()
        assert (len(got), client.llen(NAME), client.hlen(claims.UNACKED)) == (3, 7, 3)
        got[0].ack()
        until(drive, lambda: len(got) == 4, "the next one came")
    assert client.llen(NAME) == 9  # what was not acknowledged went back when the channel was closed
    assert client.hlen(claims.UNACKED) == 0


def test_a_channel_that_is_closed_leaves_no_connection(app: Celery, client: Any) -> None:
    gc.disable()
    try:
        publish(app, "a")
        before = len(client.client_list())
        with consuming(app, ack=False) as (got, drive):
            until(drive, lambda: got, "it came")
        wait_until(lambda: len(client.client_list()) <= before, "its connections are closed")
    finally:
        gc.enable()
    assert client.llen(NAME) == 1


def test_two_consumers_share_what_one_ring_brought(app: Celery) -> None:
    with consuming(app, prefetch=2, ack=False) as (first, drive_first):
        with consuming(app, prefetch=2, ack=False) as (second, drive_second):
            drive_first()
            drive_second()
            publish(app, *range(4), batch=True)
            until(drive_first, lambda: len(first) == 2, "the first has its two")
            until(drive_second, lambda: len(second) == 2, "the second has its two")


def test_a_publisher_that_does_not_ring_is_heard(app: Celery, settings: Settings) -> None:
    with consuming(app) as (got, drive):
        drive()
        with Connection(settings.broker_url) as stock:  # kombu's own transport
            stock.Producer().publish({"from": "elsewhere"}, exchange="", routing_key=NAME, serializer="json")
        until(drive, lambda: got, "it came", 5)
        assert got[0].payload == {"from": "elsewhere"}


def test_a_message_that_is_given_back_comes_first(app: Celery) -> None:
    publish(app, "a", "b")
    with consuming(app, prefetch=1, ack=False) as (got, drive):
        until(drive, lambda: len(got) == 1, "a came")
        got[0].reject(requeue=True)
        until(drive, lambda: len(got) == 2, "it came again")
        assert got[1].payload == "a"
        assert got[0].delivery_tag != got[1].delivery_tag


def test_a_rejected_message_is_gone(app: Celery, client: Any) -> None:
    publish(app, "a")
    with consuming(app, ack=False) as (got, drive):
        until(drive, lambda: len(got) == 1, "a came")
        got[0].reject()
    assert (client.llen(NAME), client.hlen(claims.UNACKED)) == (0, 0)


def test_a_live_consumer_keeps_its_message_and_a_dead_one_does_not(
    app: Celery, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CLAIM_MS", 1500)
    publish(app, "dead", "alive")
    dead = claims.Claims(client)
    dead.fetch([NAME], 1)
    with consuming(app, prefetch=2, ack=False) as (got, drive):
        until(drive, lambda: len(got) == 2, "what the dead one held came to the living")
        assert [message.payload for message in got] == ["alive", "dead"]
        for _ in range(12):  # longer than a claim
            drive()
        assert len(got) == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"not JSON",
        b"{}",
        b'{"properties": {}}',
        b'{"properties": {"body_encoding": "base64", "delivery_info": {}}, "body": "?"}',
        b'{"properties": {"body_encoding": "unheard-of"}, "body": "x"}',
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_read_is_set_aside_and_the_next_one_comes(app: Celery, client: Any, raw: bytes) -> None:
    client.lpush(NAME, raw)
    publish(app, "good")
    with consuming(app) as (got, drive):
        until(drive, lambda: got or client.llen(keys.SET_ASIDE), "something came")
        until(drive, lambda: [message for message in got if message.delivery_tag and message.body], "the good one came")
    kept = [json.loads(record) for record in client.lrange(keys.SET_ASIDE, 0, -1)]
    assert [record["raw"].encode("latin-1") for record in kept] in ([raw], [])
    assert "good" in [message.payload for message in got if message.content_type == "application/json"]
    assert client.hlen(claims.UNACKED) == 0


def test_a_server_that_refuses_writes_is_waited_for(app: Celery, client: Any) -> None:
    publish(app, "a")
    client.replicaof("127.0.0.1", "1")  # read-only until told otherwise
    try:
        with consuming(app) as (got, drive):
            for _ in range(5):
                drive()
            assert got == []
            client.replicaof("no", "one")
            until(drive, lambda: got, "it came")
    finally:
        client.replicaof("no", "one")


def test_get_takes_one(app: Celery, client: Any) -> None:
    publish(app, "a", "b")
    with app.connection_for_read() as connection:
        bound = QUEUE(connection.channel())
        first = bound.get()
        assert first.payload == "a"
        assert client.hlen(claims.UNACKED) == 1
        first.ack()
        assert bound.get(no_ack=True).payload == "b"
        assert client.hlen(claims.UNACKED) == 0
        assert bound.get() is None


def test_the_transport_is_ours(app: Celery) -> None:
    with app.connection_for_write() as connection:
        assert isinstance(connection.transport, Transport)
