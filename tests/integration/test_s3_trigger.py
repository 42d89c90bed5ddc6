"""The S3 trigger on moto's S3, SQS, SNS and EventBridge over HTTP, with the real ledger."""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.subscriptions import OnS3, s3_source
from orchestrator.workflows import Step, Workflow
from tests.conftest import capture_logs, wait_until
from tests.moto import CREDENTIALS, Gate, Moto, arn
from triggers import listing, notified, s3
from triggers.bucket_checks import check_buckets, verdict_on
from triggers.s3 import s3_triggers
from triggers.supervisor import TriggerSupervisor


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    made = Moto(tmp_path_factory.mktemp("moto"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def gate(moto: Moto) -> Iterator[Gate]:
    made = Gate(moto.url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(notified, "_WAIT_S", 1)
    monkeypatch.setattr(notified, "_BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(notified, "_BUS_BACKOFF_S", (0.1, 0.2))
    monkeypatch.setattr(listing, "_BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(listing, "_QUIET_S", 0.2)
    monkeypatch.setattr(listing, "_PERIOD_S", 0.05)


class Watch:
    """Triggers for some entries, and what they have emitted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.supervisor = TriggerSupervisor([self._kind])
        self.events: list[Event] = []
        self.away: Callable[[Sequence[Event]], bool] = lambda events: False
        self._on: tuple[OnS3, ...] = ()

    def _kind(self, workflows: Any) -> Any:
        return s3_triggers(workflows, engine=self._engine, emit=self._emit)

    def _emit(self, events: Sequence[Event]) -> None:
        if self.away(events):
            raise UnavailableError("the broker is away; see to it")
        self.events.extend(events)

    def start(self, *on: OnS3) -> None:
        self._on = on
        step = Step(id="s", task="tasks:f")
        self.supervisor.apply([Workflow(name="w", on=on, steps=(step,))])

    def restart(self) -> None:
        self.supervisor.stop()
        self.start(*self._on)

    def stop(self) -> None:
        self.supervisor.stop()

    def has(self, *subjects: str) -> list[Event]:
        """Wait until these were emitted, and nothing else or twice."""

        def known() -> Counter[str | None]:
            return Counter({event.id: event.subject for event in self.events}.values())

        wait_until(lambda: known() >= Counter(subjects), f"{subjects} are emitted, of which {known()} are", 20)
        assert known() == Counter(subjects)
        return self.events


@pytest.fixture
def watch(engine: Engine) -> Iterator[Watch]:
    made = Watch(engine)
    yield made
    made.stop()


class Place:
    """A bucket with a queue, of the test's own."""

    def __init__(self, moto: Moto) -> None:
        self.moto = moto
        self.name = f"b-{uuid.uuid4().hex[:12]}"
        self.queue = f"q-{self.name}"
        self.url = moto.queue(self.queue)
        self.s3 = moto.client("s3")

    def put(self, key: str, body: str = "x", **more: Any) -> None:
        self.s3.put_object(Bucket=self.name, Key=key, Body=body.encode(), **more)

    def remove(self, key: str) -> None:
        self.s3.delete_object(Bucket=self.name, Key=key)

    def upload(self, key: str) -> None:
        """Upload in parts."""
        upload = self.s3.create_multipart_upload(Bucket=self.name, Key=key)["UploadId"]
        part = self.s3.upload_part(Bucket=self.name, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        self.s3.complete_multipart_upload(Bucket=self.name, Key=key, UploadId=upload, MultipartUpload=parts)

    def on(self, **more: Any) -> OnS3:
        return OnS3(**{"bucket": self.name, "queue": self.queue, "endpoint_url": self.moto.url} | more)

    def is_drained(self) -> bool:
        return self.moto.depth(self.url) == 0

    def listed(self, engine: Engine) -> dict[str, Any]:
        """Return how far the bucket was listed."""
        texts = [json.loads(engine.ledger.client.get(key)) for key in engine.ledger.client.keys("*:listing")]
        return dict(texts[0]) if texts else {}


@pytest.fixture
def place(moto: Moto) -> Place:
    return Place(moto)


@pytest.fixture
def notifying(place: Place) -> Place:
    """One that notifies its queue."""
    place.moto.bucket(place.name, queue=arn(place.queue))
    return place


def record(bucket: str, key: str, name: str = "ObjectCreated:Put", *, at: str = "", **entity: Any) -> dict[str, Any]:
    """A record of S3's own form."""
    return {
        "eventSource": "aws:s3",
        "eventTime": at or "2026-01-02T03:04:05.678Z",
        "eventName": name,
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, "size": 1, "eTag": "e"} | entity},
    }


def bridge(bucket: str, key: str, **entity: Any) -> dict[str, Any]:
    """A message of EventBridge's form."""
    return {
        "detail-type": "Object Created",
        "source": "aws.s3",
        "time": "2026-01-02T03:04:05Z",
        "detail": {"bucket": {"name": bucket}, "object": {"key": key, "etag": "e"} | entity, "reason": "PutObject"},
    }


def dead_letters(engine: Engine) -> list[dict[str, Any]]:
    return [json.loads(text) for text in engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1)]


# ---- notifications


def test_an_object_is_one_event_and_its_message_is_deleted(notifying: Place, watch: Watch) -> None:
    notifying.put("in/a b+c ü.csv", "hello")
    watch.start(notifying.on())
    (event,) = watch.has("in/a b+c ü.csv")
    assert event.source == s3_source(notifying.name, notifying.moto.url)
    assert event.type == "orchestrator.s3.object.created"
    assert event.data == {
        "bucket": notifying.name,
        "key": "in/a b+c ü.csv",
        "size": 5,
        "etag": "5d41402abc4b2a76b9719d911017c592",
        "version_id": None,
        "sequencer": None,
        "event_name": "ObjectCreated:Put",
    }
    wait_until(notifying.is_drained, "the message is deleted")


def test_an_upload_in_parts_that_notifies_twice_is_one_event_and_an_overwrite_a_second(
    notifying: Place, watch: Watch
) -> None:
    notifying.upload("parts")
    watch.start(notifying.on(events=("created", "removed")))
    watch.has("parts")
    notifying.put("parts", "other")
    watch.has("parts", "parts")
    notifying.remove("parts")
    watch.has("parts", "parts", "parts")
    notifying.put("parts", "other")
    events = watch.has("parts", "parts", "parts", "parts")
    kinds = [event.type.rpartition(".")[2] for event in {event.id: event for event in events}.values()]
    assert kinds == ["created", "created", "removed", "created"]


@pytest.mark.parametrize("way", ["sns", "raw sns", "eventbridge"])
def test_each_way_from_the_bucket_to_the_queue(way: str, place: Place, watch: Watch, engine: Engine) -> None:
    moto = place.moto
    if way == "eventbridge":
        moto.bucket(place.name, events=True)
        rules = moto.client("events")
        rules.put_rule(Name=place.name, EventPattern=json.dumps({"source": ["aws.s3"]}))
        rules.put_targets(Rule=place.name, Targets=[{"Id": "1", "Arn": arn(place.queue)}])
    else:
        topic = moto.client("sns").create_topic(Name=place.name)["TopicArn"]
        raw = {"RawMessageDelivery": "true"} if way == "raw sns" else {}
        moto.client("sns").subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn(place.queue), Attributes=raw)
        moto.bucket(place.name, topic=topic)
    place.put("a+b ü", "1")
    place.put("a+b ü", "2")
    place.upload("parts")
    watch.start(place.on())
    watch.has("a+b ü", "a+b ü", "parts")
    place.put("a+b ü", "3")
    watch.has("a+b ü", "a+b ü", "parts", "a+b ü")
    assert dead_letters(engine) == []


def test_two_queues_that_tell_of_one_bucket_start_it_once(notifying: Place, watch: Watch, moto: Moto) -> None:
    other = moto.queue(f"{notifying.queue}-2")
    moto.send(other, bridge(notifying.name, "x", sequencer="01", **{"version-id": "v"}))
    moto.send(notifying.url, {"Records": [record(notifying.name, "x", sequencer="01")]})
    watch.start(notifying.on(), notifying.on(queue=other))
    watch.has("x")


def test_a_put_that_comes_after_its_delete_starts_nothing(notifying: Place, watch: Watch, moto: Moto) -> None:
    moto.send(notifying.url, {"Records": [record(notifying.name, "x", "ObjectRemoved:Delete", sequencer="02")]})
    watch.start(notifying.on(events=("created", "removed")))
    watch.has("x")
    moto.send(notifying.url, {"Records": [record(notifying.name, "x", sequencer="01")]})
    moto.send(notifying.url, {"Records": [record(notifying.name, "y", sequencer="01")]})
    watch.has("x", "y")
    wait_until(notifying.is_drained, "both are deleted")


def test_what_cannot_be_read_is_set_aside_with_its_bytes_and_the_rest_goes_on(
    notifying: Place, watch: Watch, moto: Moto, engine: Engine
) -> None:
    for body in ("ü not json", "[]", {"hello": "you"}, {"Records": [record("bad/bucket", "x")]}):
        moto.send(notifying.url, body)
    notifying.put("good")
    watch.start(notifying.on())
    watch.has("good")
    wait_until(notifying.is_drained, "all are deleted")
    letters = dead_letters(engine)
    assert {(one["reason"], one["queue"]) for one in letters} == {("notification", notifying.queue)}
    assert "ü not json".encode() in [one["raw"].encode("latin-1") for one in letters]
    assert len(letters) == 4
    engine.dead_letters.drain()


def test_tests_and_other_kinds_of_events_are_dropped(
    notifying: Place, watch: Watch, moto: Moto, engine: Engine
) -> None:
    moto.send(notifying.url, {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": notifying.name})
    moto.send(notifying.url, {"Records": [record(notifying.name, "x", "ObjectTagging:Put")]})
    watch.start(notifying.on())
    wait_until(notifying.is_drained, "they are deleted")
    assert (watch.events, dead_letters(engine)) == ([], [])


def test_the_removal_of_one_version_says_nothing_of_the_object(notifying: Place, watch: Watch, moto: Moto) -> None:
    watch.start(notifying.on(events=("created", "removed")))
    gone = record(notifying.name, "x", "ObjectRemoved:Delete", sequencer="09", versionId="old")
    moto.send(notifying.url, {"Records": [gone]})
    watch.has("x")
    moto.send(notifying.url, {"Records": [record(notifying.name, "x", sequencer="08", versionId="new")]})
    watch.has("x", "x")


def test_while_the_bus_is_away_messages_are_kept_and_renewed(
    notifying: Place, watch: Watch, monkeypatch: pytest.MonkeyPatch, moto: Moto
) -> None:
    monkeypatch.setattr(notified, "_VISIBILITY_S", 1)
    tried: list[str] = []

    def away(events: Sequence[Event]) -> bool:
        tried.extend(event.id for event in events)
        return len(tried) < 12

    watch.away = away
    with capture_logs() as logs:
        watch.start(notifying.on(reconcile_s=3600.0))
        notifying.put("x")
        watch.has("x")
        wait_until(notifying.is_drained, "the message is deleted")
    assert len(set(tried)) == 1
    told = [line["event"] for line in logs if line["event"].startswith("s3_trigger")]
    assert told == ["s3_trigger_waits", "s3_trigger_goes_on"]
    received = moto.client("sqs").receive_message(QueueUrl=notifying.url).get("Messages", [])
    assert received == []


@pytest.mark.parametrize("way", ["told", "listed"])
def test_what_is_emitted_again_as_nobody_knows_whether_it_was_has_the_same_id(
    way: str, notifying: Place, watch: Watch, engine: Engine, moto: Moto
) -> None:
    """As after a kill -9 between the bus and the confirmation, and then told in another way."""

    def away(events: Sequence[Event]) -> bool:
        watch.events.extend(events)
        return len(watch.events) < 3

    watch.away = away
    if way == "told":
        on, other = notifying.on(reconcile_s=3600.0), notifying.on(queue=None, poll_s=0.2)
    else:
        on, other = notifying.on(queue=None, poll_s=0.2), notifying.on(reconcile_s=3600.0)
    notifying.put("x")
    watch.start(on)
    wait_until(lambda: watch.events, "it is emitted")
    watch.stop()
    watch.start(other)
    watch.has("x")
    wait_until(lambda: len(watch.events) >= 3, "it was emitted until it was confirmed")
    watch.has("x")


def test_stop_gives_messages_back_that_are_not_on_the_bus(notifying: Place, watch: Watch, moto: Moto) -> None:
    tried: list[int] = []
    watch.away = lambda events: not tried.append(len(events))
    watch.start(notifying.on())
    notifying.put("x")
    wait_until(lambda: tried, "it is tried")
    watch.stop()
    found = moto.client("sqs").receive_message(QueueUrl=notifying.url, VisibilityTimeout=0).get("Messages", [])
    assert len(found) == 1
    watch.away = lambda events: False
    watch.restart()
    watch.has("x")


def test_a_message_that_nobody_thought_of_harms_no_other(
    notifying: Place, watch: Watch, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = notified.read_notification

    def read(body: str, *, now_ms: int) -> Any:
        if "bad" in body:
            raise ZeroDivisionError
        return whole(body, now_ms=now_ms)

    monkeypatch.setattr(notified, "read_notification", read)
    for key in ("a", "bad", "b"):
        notifying.put(key)
    watch.start(notifying.on(reconcile_s=3600.0, prefix="only-notified"))
    watch.has("a", "b")
    wait_until(lambda: dead_letters(engine), "it is set aside")
    assert dead_letters(engine)[0]["detail"] == "it could not be handled: ZeroDivisionError"
    wait_until(notifying.is_drained, "all are deleted")


def test_several_consumers_share_a_queue(notifying: Place, engine: Engine) -> None:
    watches = [Watch(engine) for _ in range(3)]
    for n in range(120):
        notifying.put(f"k{n}", str(n))
    for one in watches:
        one.start(notifying.on())
    try:
        wait_until(notifying.is_drained, "the queue is empty", 60)
        events = [event for one in watches for event in one.events]
        assert len({event.id for event in events}) == 120
        assert {event.subject for event in events} == {f"k{n}" for n in range(120)}
    finally:
        for one in watches:
            one.stop()


# ---- what is away


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "ExpiredToken", "renew the credentials"),
        (403, "AccessDenied", "policy"),
        (503, "SlowDown", "SlowDown"),
        (404, "NoSuchBucket", "make the bucket"),
        (400, "AWS.SimpleQueueService.NonExistentQueue", "make the queue"),
    ],
)
def test_a_refusal_is_shown_once_retried_and_survived(
    status: int, code: str, said: str, notifying: Place, watch: Watch, gate: Gate
) -> None:
    notifying.put("before")
    gate.refusal = (status, code)
    with capture_logs() as logs:
        watch.start(notifying.on(endpoint_url=gate.url, poll_s=1.0))
        wait_until(lambda: gate.calls > 30, "it is tried again and again", 60)
        gate.refusal = None
        watch.has("before")
        wait_until(notifying.is_drained, "the message is deleted")
        wait_until(lambda: sum(one["event"] == "s3_bucket_goes_on" for one in logs), "the bucket is listed")
    shown = [line for line in logs if line["event"] in ("s3_queue_waits", "s3_bucket_waits")]
    assert sorted(line["event"] for line in shown) == ["s3_bucket_waits", "s3_queue_waits"]
    assert all(said in line["error"] for line in shown)


def test_without_credentials_it_waits_for_them(
    notifying: Place, watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    notifying.put("x")
    with capture_logs() as logs:
        watch.start(notifying.on())
        wait_until(lambda: any("credentials" in str(line.get("error")) for line in logs), "it is said")
        file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
        watch.has("x")


def test_a_queue_and_a_bucket_that_are_made_later(moto: Moto, watch: Watch, engine: Engine) -> None:
    name = f"b-{uuid.uuid4().hex[:12]}"
    with capture_logs() as logs:
        watch.start(OnS3(bucket=name, queue=f"q-{name}", endpoint_url=moto.url))
        wait_until(lambda: {"s3_queue_waits", "s3_bucket_waits"} <= {line["event"] for line in logs}, "it is said")
    moto.queue(f"q-{name}")
    moto.bucket(name, queue=arn(f"q-{name}"))
    moto.client("s3").put_object(Bucket=name, Key="x", Body=b"x")
    watch.has("x")


def test_when_much_waits_on_the_bus_objects_wait_where_they_are(
    notifying: Place, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "BUS_FULL", 5)
    monkeypatch.setattr(listing, "_PAGE", 1)
    monkeypatch.setattr(notified, "_AT_ONCE", 1)
    supervisor = TriggerSupervisor([partial(s3_triggers, engine=engine, emit=engine.bus.publish)])
    step = Step(id="s", task="tasks:f")
    stop = threading.Event()
    seen: list[Any] = []
    for n in range(12):
        notifying.put(f"k{n:02}")
    try:
        supervisor.apply([Workflow(name="w", on=(notifying.on(reconcile_s=0.2),), steps=(step,))])
        wait_until(lambda: engine.bus.depth() >= 5, "it is full")
        wait_until(lambda: notifying.listed(engine).get("started") or not notifying.is_drained(), "it waits")
        assert engine.bus.depth() <= 10  # as many as may be at work at once
        consumer = threading.Thread(target=engine.bus.consume, args=(lambda body, raw: seen.append(body), stop))
        consumer.start()
        wait_until(lambda: len({body["id"] for body in seen}) == 12, "all went on")
    finally:
        supervisor.stop()
        stop.set()
        consumer.join()


# ---- listings


def test_without_notifications_the_bucket_is_listed(place: Place, watch: Watch) -> None:
    place.moto.bucket(place.name)
    for key in ("in/a.csv", "in/b.txt", "other/c.csv", "in/ü+ .csv"):
        place.put(key)
    watch.start(place.on(queue=None, poll_s=0.2, prefix="in/", suffix=".csv"))
    event = watch.has("in/a.csv", "in/ü+ .csv")[0]
    assert (event.data["bucket"], event.data["size"], event.data["event_name"]) == (place.name, 1, None)
    place.put("in/a.csv", "other")
    watch.has("in/a.csv", "in/ü+ .csv", "in/a.csv")
    place.put("in/d.csv", "")
    watch.has("in/a.csv", "in/ü+ .csv", "in/a.csv", "in/d.csv")
    watch.restart()
    place.put("in/e.csv")
    watch.has("in/a.csv", "in/ü+ .csv", "in/a.csv", "in/d.csv", "in/e.csv")
    objects = place.s3.list_objects_v2(Bucket=place.name)["Contents"]
    assert len(objects) == 6  # none was moved or removed


def test_existing_objects_can_be_skipped(place: Place, watch: Watch, engine: Engine) -> None:
    place.moto.bucket(place.name)
    place.put("old")
    watch.start(place.on(queue=None, poll_s=0.2, existing="skip"))
    wait_until(lambda: place.listed(engine).get("looks", {}).get("*", {}).get("done"), "it was looked through")
    place.put("new")
    watch.has("new")
    place.put("old", "again")
    watch.has("new", "old")


def test_a_listing_goes_on_where_it_was_killed(
    place: Place, watch: Watch, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_PAGE", 10)
    place.moto.bucket(place.name)
    for n in range(45):
        place.put(f"k{n:02}")
    watch.away = lambda events: len(watch.events) >= 20
    watch.start(place.on(queue=None, poll_s=60.0))
    wait_until(lambda: place.listed(engine).get("after") == "k19", "two pages were emitted")
    watch.stop()
    seen = len(watch.events)
    watch.away = lambda events: False
    watch.restart()
    watch.has(*(f"k{n:02}" for n in range(45)))
    assert seen == 20
    assert len(watch.events) == 45  # what was claimed and not emitted was emitted once, and nothing else again


def test_a_pass_finds_what_no_notification_told(notifying: Place, watch: Watch) -> None:
    notifying.s3.put_bucket_notification_configuration(Bucket=notifying.name, NotificationConfiguration={})
    notifying.put("silent")
    watch.start(notifying.on(reconcile_s=0.3))
    watch.has("silent")
    notifying.put("silent too")
    watch.has("silent", "silent too")
    notifying.put("silent", "other")
    watch.has("silent", "silent too", "silent")


def test_what_the_pass_has_found_is_not_started_by_its_notification(
    place: Place, watch: Watch, moto: Moto, engine: Engine
) -> None:
    moto.bucket(place.name)
    place.put("late")
    etag = place.s3.head_object(Bucket=place.name, Key="late")["ETag"].strip('"')
    watch.start(place.on(reconcile_s=0.3))
    (event,) = watch.has("late")
    moto.send(place.url, {"Records": [record(place.name, "late", at=event.time, eTag=etag, sequencer="01")]})
    moto.send(place.url, {"Records": [record(place.name, "next", sequencer="01")]})
    watch.has("late", "next")


def test_all_that_was_told_is_known_to_the_pass(notifying: Place, watch: Watch, engine: Engine) -> None:
    for n in range(30):
        notifying.put(f"k{n}")
    notifying.upload("parts")
    notifying.put("k1", "other")
    notifying.remove("k2")
    watch.start(notifying.on(reconcile_s=0.2))
    told = [f"k{n}" for n in range(30)] + ["parts", "k1", "k2"]
    watch.has(*told)
    first = place_started(notifying, engine)
    wait_until(lambda: place_started(notifying, engine) > first + 1000, "it was listed again, twice or more")
    watch.has(*told)


def place_started(place: Place, engine: Engine) -> int:
    return int(place.listed(engine).get("started") or 0)


def test_a_queue_that_is_gone_does_not_hold_the_pass_up(place: Place, watch: Watch, moto: Moto) -> None:
    moto.bucket(place.name)
    place.put("x")
    watch.start(place.on(queue="no-such-queue"))
    watch.has("x")


def test_one_of_two_lists(place: Place, engine: Engine) -> None:
    place.moto.bucket(place.name)
    for n in range(20):
        place.put(f"k{n}")
    watches = [Watch(engine), Watch(engine)]
    for one in watches:
        one.start(place.on(queue=None, poll_s=0.2))
    try:
        wait_until(lambda: sum(len(one.events) for one in watches) == 20, "all were emitted")
        leader = next(one for one in watches if one.events)
        (other,) = [one for one in watches if one is not leader]
        leader.stop()
        place.put("later")
        assert [event.subject for event in other.has("later")] == ["later"]
    finally:
        for one in watches:
            one.stop()


def test_records_of_objects_that_are_gone_are_swept(
    place: Place, watch: Watch, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.moto.bucket(place.name)
    place.put("gone")
    place.put("kept")
    watch.start(place.on(queue=None, poll_s=0.2))
    watch.has("gone", "kept")
    watch.stop()
    place.remove("gone")
    client = engine.ledger.client
    for key in client.keys("orchestrator:{s3:*"):
        if client.type(key) == "hash":  # as if it was three days ago
            for field, text in client.hgetall(key).items():
                day, _, rest = text.partition("|")
                client.hset(key, field, f"{int(day) - 3}|{rest}")
        else:
            client.set(key, json.dumps(json.loads(client.get(key)) | {"swept": 0}))
    watch.restart()
    wait_until(lambda: place.listed(engine)["swept"], "they were swept")
    assert len([key for key in client.keys("orchestrator:{s3:*") if client.type(key) == "hash"]) == 1
    watch.has("gone", "kept")


# ---- doctor


def test_doctor_says_when_a_bucket_does_not_notify(notifying: Place, moto: Moto) -> None:
    def check(**more: Any) -> tuple[bool, str]:
        (found,) = check_buckets([notifying.on(**more)])
        assert found.name == f"bucket {more.get('bucket', notifying.name)}"
        return found.ok, found.detail

    def configure(**told: Any) -> None:
        notifying.s3.put_bucket_notification_configuration(Bucket=notifying.name, NotificationConfiguration=told)

    def to_queue(prefix: str, *events: str) -> dict[str, Any]:
        filtered = {"Key": {"FilterRules": [{"Name": "prefix", "Value": prefix}]}}
        told = {"QueueArn": arn(notifying.queue), "Events": list(events)}
        return told | ({"Filter": filtered} if prefix else {})

    assert check() == (True, f"notifies {notifying.queue}")
    assert check(queue=notifying.url, events=("removed",)) == (True, f"notifies {notifying.url}")
    assert check(queue=None, poll_s=30.0) == (True, "is listed every 30 s")
    configure(QueueConfigurations=[to_queue("in/", "s3:ObjectCreated:*")])
    assert check(prefix="in/deep/")[0]
    ok, detail = check(prefix="out/", suffix=".csv")
    assert not ok
    assert "does not notify" in detail
    assert "s3:ObjectCreated:* of out/*.csv; add that" in detail
    assert "s3:ObjectRemoved:*" in check(prefix="in/", events=("created", "removed"))[1]
    configure(QueueConfigurations=[to_queue("", "s3:ObjectCreated:Put")])
    assert not check()[0]  # an upload in parts would not be told
    configure()
    assert not check()[0]
    assert "cannot be used" in check(queue="no-such-queue")[1]
    assert "cannot be listed" in check(bucket="no-such-bucket")[1]
    assert "cannot be listed" in check(endpoint_url="http://127.0.0.1:9")[1]


def test_doctor_cannot_see_beyond_eventbridge_and_topics() -> None:
    """By itself, for moto's answers leave EventBridge out."""
    on = OnS3(bucket="bucket", queue="q", prefix="in/")
    ok, detail = verdict_on(on, arn("q"), {"EventBridgeConfiguration": {}})
    assert ok
    assert "tells EventBridge; whether" in detail
    topic = {"TopicArn": "arn:aws:sns:us-east-1:1:t", "Events": ["s3:ObjectCreated:*"]}
    ok, detail = verdict_on(on, arn("q"), {"TopicConfigurations": [topic]})
    assert ok
    assert "tells arn:aws:sns:us-east-1:1:t; whether" in detail
    other = {"Filter": {"Key": {"FilterRules": [{"Name": "Prefix", "Value": "out/"}]}}}
    assert not verdict_on(on, arn("q"), {"TopicConfigurations": [topic | other]})[0]
