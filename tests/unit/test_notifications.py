"""What a bucket's notifications say, in each of their forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.sightings import Sighting
from triggers.notifications import Told, UnreadableError, read_notification

NOW_MS = 1_700_000_000_000
ETAG = "b1946ac92492d2347c6235b4d2611184"


def record(key: str = "happy%20face.jpg", name: str = "ObjectCreated:Put", **entity: Any) -> dict[str, Any]:
    """After https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html."""
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-west-2",
        "eventTime": "1970-01-01T00:00:00.500Z",
        "eventName": name,
        "s3": {
            "s3SchemaVersion": "1.0",
            "bucket": {"name": "bucket1", "arn": "arn:aws:s3:::bucket1"},
            "object": {"key": key, "size": 1024, "eTag": ETAG, "sequencer": "0055AED6DCD90281E5"} | entity,
        },
    }


def bridge(kind: str = "Object Created", reason: str = "PutObject", **detail: Any) -> dict[str, Any]:
    """After https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html."""
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": kind,
        "source": "aws.s3",
        "time": "2021-11-12T00:00:00Z",
        "detail": {
            "version": "0",
            "bucket": {"name": "bucket1"},
            "object": {
                "key": "a+b%20c",
                "size": 5,
                "etag": ETAG,
                "version-id": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
                "sequencer": "617f08299329d189",
            },
            "reason": reason,
        }
        | detail,
    }


def sns(message: object) -> dict[str, Any]:
    return {"Type": "Notification", "TopicArn": "arn:aws:sns:us-east-1:1:t", "Message": json.dumps(message)}


def read(message: object) -> list[Told]:
    return read_notification(message if isinstance(message, str) else json.dumps(message), now_ms=NOW_MS)


def one(message: object) -> Sighting:
    (told,) = read(message)
    assert told.bucket == "bucket1"
    return told.sighting


def test_the_form_of_s3() -> None:
    assert one({"Records": [record(versionId="096fKKXTRTtl3on89fVO.nfljtsv6qko")]}) == Sighting(
        key="happy face.jpg",
        etag=ETAG,
        version_id="096fKKXTRTtl3on89fVO.nfljtsv6qko",
        sequencer="0055AED6DCD90281E5",
        size=1024,
        event_name="ObjectCreated:Put",
        at_ms=500,
    )


@pytest.mark.parametrize(
    ("encoded", "key"),
    [
        ("a+b", "a b"),
        ("a%2Bb", "a+b"),
        ("%E4%BD%A0%E5%A5%BD/%F0%9F%8E%89.csv", "你好/🎉.csv"),
        ("a%2520b", "a%20b"),
        ("100%", "100%"),
        ("a//b/", "a//b/"),
    ],
)
def test_its_keys_are_url_encoded(encoded: str, key: str) -> None:
    assert one({"Records": [record(encoded)]}).key == key


def test_the_form_of_eventbridge_whose_keys_are_as_they_are() -> None:
    assert one(bridge()) == Sighting(
        key="a+b%20c",
        etag=ETAG,
        version_id="IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
        sequencer="617f08299329d189",
        size=5,
        event_name="ObjectCreated:Put",
        at_ms=1_636_675_200_000,
    )


@pytest.mark.parametrize(
    ("reason", "deletion", "name"),
    [
        ("DeleteObject", "Permanently Deleted", "ObjectRemoved:Delete"),
        ("DeleteObject", "Delete Marker Created", "ObjectRemoved:DeleteMarkerCreated"),
        ("Lifecycle Expiration", "Permanently Deleted", "LifecycleExpiration:Delete"),
        ("Lifecycle Expiration", "Delete Marker Created", "LifecycleExpiration:DeleteMarkerCreated"),
    ],
)
def test_removals_of_eventbridge(reason: str, deletion: str, name: str) -> None:
    found = one(bridge("Object Deleted", reason, **{"deletion-type": deletion}))
    assert found.removed
    assert found.event_name == name


@pytest.mark.parametrize("message", [{"Records": [record()]}, bridge()])
def test_both_come_in_the_form_of_sns_as_well(message: dict[str, Any]) -> None:
    assert read(sns(message)) == read(message)


def test_other_stores_say_more_or_less() -> None:
    minio = {"EventName": "s3:ObjectCreated:Put", "Key": "bucket1/x", "Records": [record(name="s3:ObjectCreated:Put")]}
    minio["Records"][0]["eventSource"] = "minio:s3"
    assert one(minio).event_name == "ObjectCreated:Put"
    bare = record("x")
    bare["s3"]["object"] = {"key": "x", "eTag": f'"{ETAG}"'}
    del bare["eventTime"]
    assert one({"Records": [bare]}) == Sighting(key="x", etag=ETAG, event_name="ObjectCreated:Put", at_ms=NOW_MS)
    seconds = bridge() | {"time": 1636675200}
    assert one(seconds).at_ms == 1_636_675_200_000


def test_several_records_are_told_in_their_order() -> None:
    told = read({"Records": [record("b"), record("a"), record("b", "ObjectRemoved:Delete")]})
    assert [(one.sighting.key, one.sighting.removed) for one in told] == [("b", False), ("a", False), ("b", True)]


@pytest.mark.parametrize(
    "message",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2014-10-13T15:57:02.089Z", "Bucket": "bucket1"},
        sns({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "bucket1"}),
        {"Records": [record(name="ObjectTagging:Put")]},
        {"Records": [record(name="ObjectRestore:Completed")]},
        {"Records": [record(name="s3:Replication:OperationFailedReplication")]},
        bridge("Object Restore Completed"),
        bridge("Object Tags Added"),
    ],
)
def test_what_is_no_event_of_ours_is_nothing(message: dict[str, Any]) -> None:
    assert read(message) == []


def without(path: str) -> dict[str, Any]:
    message: dict[str, Any] = {"Records": [record()]}
    *parents, last = path.split(".")
    place = message["Records"][0]
    for name in parents:
        place = place[name]
    del place[last]
    return message


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("", "the message is not JSON"),
        ("not json", "the message is not JSON"),
        ("[]", "the message is no JSON object"),
        ("{}", "neither S3's form, nor EventBridge's"),
        ('{"Records": 1}', "its Records are no list"),
        ('{"Records": []}', "its Records are no list, or an empty one"),
        ('{"Records": [1]}', "Records[0] is no object"),
        ({"Records": [record(), {"eventSource": "aws:sqs"}]}, "Records[1].eventSource is not S3"),
        ({"Records": [record(key="")]}, "Records[0].s3.object has no text 'key'"),
        ({"Records": [record(key="%ff%fe")]}, "is not URL-encoded UTF-8"),
        ({"Records": [record(key="\ud800")]}, "a text in it is not Unicode"),
        (without("eventName"), "Records[0] has no text 'eventName'"),
        (without("s3"), "Records[0] has no object 's3'"),
        (without("s3.bucket"), "Records[0].s3 has no object 'bucket'"),
        (without("s3.bucket.name"), "Records[0].s3.bucket has no text 'name'"),
        (without("s3.object"), "Records[0].s3 has no object 'object'"),
        (bridge() | {"source": "aws.ec2"}, "its source is not aws.s3"),
        (bridge() | {"detail-type": "AWS API Call via CloudTrail"}, "its detail-type is none of S3's"),
        (bridge() | {"detail": []}, "it has no object 'detail'"),
        (bridge(bucket={"name": "b?endpoint=x"}), "cannot be a bucket"),
        ({"Type": "Notification", "Message": 5}, "SNS's Message is no JSON object"),
        ({"Type": "Notification", "Message": "hello"}, "SNS's Message is not JSON"),
        (sns(sns({"Records": [record()]})), "neither S3's form"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_notification_says_why(message: object, why: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read(message)
    assert why in str(caught.value)


def test_the_identity_is_all_that_tells_versions_apart() -> None:
    def identity(**given: Any) -> str:
        return Sighting(**{"key": "k", "etag": "e", "at_ms": 1} | given).identity

    told = {
        identity(), identity(key="l"), identity(etag="f"), identity(version_id="v"), identity(sequencer="1"),
        identity(removed=True), identity(at_ms=2), identity(modified_ms=1), identity(modified_ms=2),
    }  # fmt: skip
    assert len(told) == 9
    assert identity(sequencer="1", at_ms=1) == identity(sequencer="1", at_ms=2)
    assert identity(modified_ms=1, at_ms=1) == identity(modified_ms=1, at_ms=2)
    assert identity(event_name="ObjectCreated:Put") == identity(event_name="ObjectCreated:CompleteMultipartUpload")


@pytest.mark.parametrize(
    ("at_ms", "time"), [(1500, "1970-01-01T00:00:01.500000Z"), (10**18, "1970-01-01T00:00:00.000000Z")]
)
def test_the_event_has_the_time_of_the_object(at_ms: int, time: str) -> None:
    event = Sighting(key="k", at_ms=at_ms).event("orchestrator:s3/b", "b", "1")
    assert (event.time, event.subject, event.type) == (time, "k", "orchestrator.s3.object.created")
    assert set(event.data) == {"bucket", "key", "size", "etag", "version_id", "sequencer", "event_name"}
