"""The queue trigger on a real Redis and on moto's SQS: what comes to the bus, and what is let go of when."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.subscriptions import OnQueue, queue_source, queue_trigger
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, capture_logs, wait_until
from tests.moto import Moto
from triggers import queue_redis
from triggers.queue import QueueTrigger, queue_triggers
from triggers.queue_redis import RedisSource
from triggers.queue_sqs import SqsSource

CLOUD = {"specversion": "1.0", "id": "e1", "source": "https://shop", "type": "shop.order", "data": {"n": 1}}


def on_bus(engine: Engine) -> list[Event]:
    """Return the events on the bus, which they leave."""
    found = []
    while raw := engine.ledger.client.rpop(EVENT_QUEUE):
        found.append(Event.from_json(json.loads(base64.b64decode(json.loads(raw)["body"]))))
    return found


class Bus:
    """The real bus, which may be told to be away; and what came to it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bus = EventBus(engine.app)
        self.is_away = False
        self.tries = 0
        self.found: list[Event] = []

    def publish(self, events: Sequence[Event]) -> None:
        self.tries += 1
        if self.is_away:
            raise UnavailableError("the bus is away")
        self._bus.publish(events)

    def wait(self, count: int) -> list[Event]:
        def enough() -> bool:
            self.found += on_bus(self._engine)
            return len(self.found) >= count

        wait_until(enough, f"{count} events are on the bus")
        found, self.found = self.found, []
        return found

    def set_aside(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in self._engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1)]


@pytest.fixture
def bus(engine: Engine) -> Bus:
    return Bus(engine)


@pytest.fixture
def start(engine: Engine, bus: Bus) -> Iterator[Callable[..., QueueTrigger]]:
    started: list[QueueTrigger] = []

    def start_(on: OnQueue) -> QueueTrigger:
        started.append(QueueTrigger(on, ledger=engine.ledger, emit=bus.publish))
        started[-1].start()
        return started[-1]

    yield start_
    for one in started:
        one.stop()


@pytest.fixture
def source(server: Server) -> Iterator[redis.Redis]:
    """Somebody else's Redis: another database of the server."""
    client = redis.Redis.from_url(server.url.removesuffix("/0") + "/5")
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


@pytest.fixture
def jobs(server: Server) -> OnQueue:
    return OnQueue(url=server.url.removesuffix("/0") + "/5", queue="jobs")


def is_empty(source: redis.Redis) -> bool:
    return not source.keys("*")


# Redis


def test_each_message_of_a_list_is_an_event(start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue) -> None:
    """Equal ones too; in the order of LPUSH; and nothing is left on the server when they are on the bus."""
    source.lpush("jobs", '{"n": 1}', '{"n": 1}', '"text"', "[3]", "null")
    start(jobs)
    events = bus.wait(5)
    assert [event.data["body"] for event in events] == [{"n": 1}, {"n": 1}, "text", [3], None]
    assert len({event.id for event in events}) == 5
    first = events[0].to_json()
    assert {name: first[name] for name in ("source", "type", "subject", "trigger")} == {
        "source": queue_source(jobs), "type": "orchestrator.queue.message", "subject": "jobs",
        "trigger": queue_trigger(jobs),
    }  # fmt: skip
    assert first["data"] == {"body": {"n": 1}, "headers": {}, "queue": "jobs"}
    wait_until(lambda: is_empty(source), "nothing of ours is left there")
    # One that comes while it waits.
    source.lpush("jobs", "6")
    assert bus.wait(1)[0].data["body"] == 6


def test_what_kombu_put_in_is_taken_out_of_its_envelope(start: Any, bus: Bus, source: Any, jobs: OnQueue) -> None:
    with Connection(jobs.url) as connection:
        producer = connection.Producer()
        for body in ({"n": 1}, {"n": 2}):
            producer.publish(body, routing_key="jobs", headers={"tenant": "a"}, serializer="json")
    tags = [json.loads(raw)["properties"]["delivery_tag"] for raw in source.lrange("jobs", 0, -1)]
    start(jobs)
    events = bus.wait(2)
    assert [event.data["body"] for event in events] == [{"n": 1}, {"n": 2}]
    assert events[0].data["headers"]["tenant"] == "a"
    assert {event.id for event in events} == set(tags)


def test_senders_of_two_brokers_may_number_their_messages_alike(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue
) -> None:
    """Two queues of one name are two sources, and one whose password has changed is the same."""
    other = OnQueue(url=jobs.url.removesuffix("/5") + "/7", queue="jobs")
    for on in (jobs, other):
        with Connection(on.url) as connection:
            connection.Producer().publish({"n": 1}, routing_key="jobs", serializer="json", message_id="1")
        start(on)
    first, second = bus.wait(2)
    assert first.id == second.id == "1"
    assert {first.source, second.source} == {queue_source(jobs), queue_source(other)}
    assert first.key != second.key
    (before, after) = (
        queue_source(OnQueue(url=f"amqp://{who}@rabbit/shop", queue="a/b")) for who in ("me:old", "me:new")
    )
    assert before == after == "orchestrator:queue/a%2Fb?broker=amqp%3A%2F%2Frabbit%2Fshop"


def test_what_only_looks_like_an_envelope_is_a_message(start: Any, bus: Bus, source: Any, jobs: OnQueue) -> None:
    own = [
        {"properties": {"a": 1}, "body": "x"}, {"properties": {}, "body": 1, "content-type": "x"}, {"body": {"a": 1}},
        {"properties": {"body_encoding": "base64"}, "body": "?", "content-type": "application/json"},
    ]  # fmt: skip
    for body in own:
        source.lpush("jobs", json.dumps(body))
    start(jobs)
    assert [event.data["body"] for event in bus.wait(4)] == own


def test_what_cannot_be_read_is_set_aside_with_its_bytes_and_holds_up_nobody(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue
) -> None:
    bad = [b"{", b"\xff\xfe", b"", b"NaN", b"[" * 100_000, b'{"a": 1e999}', b'"\\ud800"', b"x" * 11_000_000]
    source.lpush("jobs", *bad, b"1")
    with capture_logs() as logs:
        start(jobs)
        assert [event.data["body"] for event in bus.wait(1)] == [1]
        wait_until(lambda: is_empty(source), "all are let go of")
    letters = bus.set_aside()
    assert sorted(one["raw"].encode("latin-1") for one in letters) == sorted(bad)
    assert {(one["reason"], one["queue"]) for one in letters} == {("queue_message", "jobs")}
    assert {entry["event"] for entry in logs} == {"queue_message_set_aside"}


def test_what_is_nested_as_deeply_as_can_be_read_holds_up_nobody(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue
) -> None:
    """Whether it can be written depends on how many calls are on the stack: it must not be the first for ever."""
    bad = [b"[" * depth + b"]" * depth for depth in range(940, 1000)]
    source.lpush("jobs", *bad, b"1")
    start(jobs)
    assert [event.data["body"] for event in bus.wait(1)] == [1]
    wait_until(lambda: is_empty(source), "all are let go of")
    assert sorted(one["raw"].encode("latin-1") for one in bus.set_aside()) == sorted(bad)


def test_an_event_that_nobody_can_publish_is_set_aside_and_the_others_are_not(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = bus.publish

    def refuse(events: Sequence[Event]) -> None:
        if any(event.data["body"] == 2 for event in events):
            raise RuntimeError("nobody thought of it")
        publish(events)

    monkeypatch.setattr(bus, "publish", refuse)
    source.lpush("jobs", "1", "2", "3")
    start(jobs)
    assert [event.data["body"] for event in bus.wait(2)] == [1, 3]
    wait_until(lambda: is_empty(source), "all are let go of")
    (letter,) = bus.set_aside()
    assert (letter["raw"], letter["detail"]) == ("2", "it could not be put on the bus: RuntimeError")


def test_cloudevents_keep_their_identity(start: Any, bus: Bus, source: Any, jobs: OnQueue) -> None:
    on = OnQueue(url=jobs.url, queue="jobs", format="cloudevents")
    source.lpush("jobs", json.dumps(CLOUD | {"tenant": "a"}))
    for fault in (
        {"type": "orchestrator.file.created"}, {"source": "orchestrator:schedule/x"}, {"trigger": "webhook:x"},
        {"hops": 1}, {"specversion": "0.3"}, {"id": ""},
    ):  # fmt: skip
        source.lpush("jobs", json.dumps(CLOUD | fault))
    source.lpush("jobs", '{"n": 1}')
    start(on)
    (event,) = bus.wait(1)
    assert (event.id, event.source, event.type, event.data) == ("e1", "https://shop", "shop.order", {"n": 1})
    assert event.extensions == {"tenant": "a", "trigger": queue_trigger(on)}
    wait_until(lambda: len(bus.set_aside()) == 7, "the others are set aside")
    encoded = {name: value for name, value in CLOUD.items() if name != "data"} | {
        "id": "e2",
        "data_base64": "eyJuIjogMn0=",
    }
    source.lpush("jobs", json.dumps(encoded | {"datacontenttype": "application/json"}))
    assert bus.wait(1)[0].data == {"n": 2}


def test_while_the_bus_is_away_what_was_taken_is_kept(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken once, kept past the time it was taken for, and nothing further is taken."""
    monkeypatch.setattr(queue_redis, "TAKEN_MS", 300)
    source.lpush("jobs", "1")
    bus.is_away = True
    with capture_logs() as logs:
        start(jobs)
        wait_until(lambda: bus.tries > 3, "it has tried")
        source.lpush("jobs", "2")
        wait_until(lambda: bus.tries > 5, "it has tried further")
        assert source.llen("jobs") == 1
        bus.is_away = False
        events = bus.wait(2)
    assert [event.data["body"] for event in events] == [1, 2]
    assert [entry["event"] for entry in logs] == ["queue_trigger_waits", "queue_trigger_goes_on"]


def test_what_somebody_took_who_was_killed_comes_again_under_its_id(
    start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after it took them, after it waited for one, and after the bus had them."""
    monkeypatch.setattr(queue_redis, "TAKEN_MS", 50)
    source.lpush("jobs", "1", "2")
    source.lpush(keys.queue_keys("jobs")[0], "0")
    taken = {message.body: message.id for message in RedisSource(jobs.url, "jobs").take(0.1)}
    assert set(taken) == {b"0", b"1", b"2"}
    start(jobs)
    events = bus.wait(3)
    assert {json.dumps(event.data["body"]).encode(): event.id for event in events} == taken
    wait_until(lambda: is_empty(source), "all are let go of")


def test_stop_gives_back_what_is_not_on_the_bus(start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue) -> None:
    source.lpush("jobs", "1")
    bus.is_away = True
    with capture_logs():
        trigger = start(jobs)
        wait_until(lambda: bus.tries > 1, "it has tried")
        trigger.stop()
        trigger.stop()
    assert [message.body for message in RedisSource(jobs.url, "jobs").take(0.1)] == [b"1"]


def test_a_server_that_is_away_and_a_key_that_is_no_list_are_waited_for(
    start: Any, bus: Bus, own_server: Server
) -> None:
    url = own_server.url
    client = redis.Redis.from_url(url)
    client.set("jobs", "no list")
    with capture_logs() as logs:
        start(OnQueue(url=url, queue="jobs"))
        wait_until(lambda: logs, "it says so")
        assert "WRONGTYPE" in logs[0]["error"]
        client.delete("jobs")
        client.lpush("jobs", "1")
        assert bus.wait(1)[0].data["body"] == 1
        wait_until(lambda: logs[-1]["event"] == "queue_trigger_goes_on", "it has let go of it")
        own_server.stop()
        wait_until(lambda: [entry["event"] for entry in logs].count("queue_trigger_waits") == 2, "it says so")
        own_server.start()
        redis.Redis.from_url(url).lpush("jobs", "2")
        assert bus.wait(1)[0].data["body"] == 2


def test_two_share_a_list(start: Any, bus: Bus, source: redis.Redis, jobs: OnQueue) -> None:
    start(jobs)
    start(jobs)
    for lo in range(0, 1000, 50):
        source.lpush("jobs", *range(lo, lo + 50))
    events = bus.wait(1000)
    assert sorted(event.data["body"] for event in events) == list(range(1000))
    assert len({event.id for event in events}) == 1000


def test_the_url_is_read_from_where_it_is_kept_and_its_password_is_not_logged(
    start: Any, bus: Bus, source: Any, jobs: OnQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Anew with each connection, so that another password holds without a restart."""
    secret = tmp_path / "url"
    secret.write_text("redis://:hun2ter@127.0.0.1:1/0\n")
    source.lpush("jobs", "1")
    with capture_logs() as logs, caplog.at_level(logging.DEBUG):
        start(OnQueue(url=f"file:{secret}", queue="jobs"))
        wait_until(lambda: logs, "it says that it waits")
        secret.write_text(jobs.url)
        assert bus.wait(1)[0].data["body"] == 1
    assert logs[0]["broker"] == "redis://:***@127.0.0.1:1/0"
    assert "hun2ter" not in json.dumps([str(entry) for entry in logs]) + caplog.text


def test_a_secret_that_is_not_there_is_said(start: Any, bus: Bus) -> None:
    with capture_logs() as logs:
        start(OnQueue(url="env:NO_SUCH_QUEUE_URL", queue="jobs"))
        wait_until(lambda: logs, "it says so")
    assert "the environment has no variable NO_SUCH_QUEUE_URL" in logs[0]["error"]


def test_workflows_that_ask_for_the_same_queue_share_one_trigger(engine: Engine, bus: Bus, jobs: OnQueue) -> None:
    def workflow(name: str, *on: OnQueue) -> Workflow:
        return Workflow(name=name, on=on, steps=(Step(id="a", task="tasks:noop"),))

    other = OnQueue(url=jobs.url, queue="jobs", pattern={"data": {"body": {"n": [1]}}})
    third = OnQueue(url=jobs.url, queue="more")
    made = queue_triggers(
        [workflow("a", jobs, third), workflow("b", other)], ledger=engine.ledger, emit=bus.publish
    )  # fmt: skip
    assert set(made) == {("queue", jobs.url, "jobs", "json"), ("queue", jobs.url, "more", "json")}
    assert queue_trigger(jobs) == queue_trigger(other)


# SQS


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    made = Moto(tmp_path_factory.mktemp("moto"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def sqs(moto: Moto) -> OnQueue:
    moto.reset()
    moto.queue("jobs")
    return OnQueue(url=f"sqs://test:test@127.0.0.1:{moto.port}?region=us-east-1", queue="jobs")


def left(moto: Moto) -> int:
    client = moto.client("sqs")
    url = client.get_queue_url(QueueName="jobs")["QueueUrl"]
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    told = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return sum(int(told[name]) for name in names)


def test_each_message_of_sqs_is_an_event_and_is_deleted(start: Any, bus: Bus, moto: Moto, sqs: OnQueue) -> None:
    client = moto.client("sqs")
    url = client.get_queue_url(QueueName="jobs")["QueueUrl"]
    attributes = {"tenant": {"DataType": "String", "StringValue": "a"}}
    ids = {}
    for n in range(25):
        sent = client.send_message(QueueUrl=url, MessageBody=json.dumps({"n": n}), MessageAttributes=attributes)
        ids[sent["MessageId"]] = n
    client.send_message(QueueUrl=url, MessageBody="not json")
    with capture_logs():
        start(sqs)
        events = bus.wait(25)
        assert {event.id: event.data["body"]["n"] for event in events} == ids
        assert events[0].data["headers"] == {"tenant": "a"}
        wait_until(lambda: left(moto) == 0, "all are deleted")
    assert [one["raw"] for one in bus.set_aside()] == ["not json"]


def test_sqs_by_url_and_with_kombus_envelope(start: Any, bus: Bus, moto: Moto, sqs: OnQueue) -> None:
    """Celery's way: the envelope in base64, or not."""
    client = moto.client("sqs")
    url = client.get_queue_url(QueueName="jobs")["QueueUrl"]
    envelope = {
        "body": base64.b64encode(b'{"n": 1}').decode(), "content-type": "application/json", "headers": {"a": 1},
        "properties": {"body_encoding": "base64", "delivery_tag": "x"},
    }  # fmt: skip
    texts = [json.dumps(envelope), base64.b64encode(json.dumps(envelope).encode()).decode()]
    ids = {client.send_message(QueueUrl=url, MessageBody=text)["MessageId"] for text in texts}
    start(OnQueue(url=sqs.url, queue=url))
    events = bus.wait(2)
    assert {event.id for event in events} == ids
    assert [(event.data["body"], event.data["headers"]) for event in events] == [({"n": 1}, {"a": 1})] * 2


def test_sqs_what_was_taken_and_not_settled_comes_again_under_its_id(
    start: Any, bus: Bus, moto: Moto, sqs: OnQueue
) -> None:
    client = moto.client("sqs")
    url = client.get_queue_url(QueueName="jobs")["QueueUrl"]
    sent = client.send_message(QueueUrl=url, MessageBody="1")["MessageId"]
    dead = SqsSource(sqs.url, "jobs")
    (taken,) = dead.take(0.1)
    dead.keep([taken])
    assert SqsSource(sqs.url, "jobs")._client.receive_message(QueueUrl=url).get("Messages") is None
    dead.close([taken])
    start(sqs)
    assert [event.id for event in bus.wait(1)] == [taken.id] == [sent]


def test_a_queue_of_sqs_that_is_not_there_yet_and_a_server_that_goes(
    start: Any, bus: Bus, moto: Moto, sqs: OnQueue
) -> None:
    client = moto.client("sqs")
    with capture_logs() as logs:
        start(OnQueue(url=sqs.url, queue="later"))
        wait_until(lambda: logs, "it says so")
        assert "NonExistentQueue" in logs[0]["error"] or "does not exist" in logs[0]["error"]
        url = client.create_queue(QueueName="later")["QueueUrl"]
        client.send_message(QueueUrl=url, MessageBody="1")
        assert bus.wait(1)[0].data["body"] == 1
        wait_until(lambda: logs[-1]["event"] == "queue_trigger_goes_on", "it has let go of it")
        moto.stop()
        wait_until(lambda: [entry["event"] for entry in logs].count("queue_trigger_waits") == 2, "it says so")
        moto.start()
        url = client.create_queue(QueueName="later")["QueueUrl"]
        client.send_message(QueueUrl=url, MessageBody="2")
        assert bus.wait(1)[0].data["body"] == 2
