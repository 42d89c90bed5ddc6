"""What `orchestrator doctor` says of buckets and queues: can they be reached, and does the one notify the other?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.subscriptions import OnS3
from triggers.aws import describe_error, queue_url, s3_client, sqs_client, store_errors
from triggers.s3 import queue_of

_READ_S = 5.0
_KINDS = {"created": "s3:ObjectCreated:*", "removed": "s3:ObjectRemoved:*"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def check_buckets(entries: Iterable[OnS3]) -> list[Finding]:
    """Look at the bucket and the queue of each entry; blocks for up to some seconds for each that does not answer."""
    found: dict[Finding, None] = {}
    for on in entries:
        found[_check(on)] = None
    return list(found)


def _check(on: OnS3) -> Finding:
    name = f"bucket {on.bucket}"
    try:
        client = s3_client(region=on.region, endpoint_url=on.endpoint_url, patience=1, read_s=_READ_S)
        client.list_objects_v2(Bucket=on.bucket, Prefix=on.prefix, MaxKeys=1)
    except store_errors() as exc:
        return Finding(name, False, f"cannot be listed: {describe_error(exc)}")
    if on.queue is None:
        return Finding(name, True, f"is listed every {on.poll_s:g} s")
    try:
        queue = queue_of(on)
        sqs = sqs_client(queue, patience=1, read_s=_READ_S)
        answer = sqs.get_queue_attributes(QueueUrl=queue_url(sqs, queue), AttributeNames=["QueueArn"])
        arn = answer["Attributes"]["QueueArn"]
    except store_errors() as exc:
        return Finding(name, False, f"queue {on.queue} cannot be used: {describe_error(exc)}")
    try:
        told = client.get_bucket_notification_configuration(Bucket=on.bucket)
    except store_errors() as exc:
        return Finding(name, False, f"does not say whether it notifies: {describe_error(exc)}")
    return Finding(name, *verdict_on(on, arn, told))


def verdict_on(on: OnS3, arn: str, told: Mapping[str, Any]) -> tuple[bool, str]:
    """Say whether a bucket with this notification configuration tells an entry's queue (ARN) what the entry needs."""
    missing = [_KINDS[event] for event in on.events]
    for configuration in told.get("QueueConfigurations", []):
        if configuration.get("QueueArn") == arn and _covers(configuration, on):
            missing = [kind for kind in missing if kind not in configuration.get("Events", [])]
    if not missing:
        return True, f"notifies {on.queue}"
    if "EventBridgeConfiguration" in told:
        return True, f"tells EventBridge; whether a rule sends that to {on.queue} cannot be seen from here"
    topics = [one for one in told.get("TopicConfigurations", []) if _covers(one, on)]
    if all(any(kind in topic.get("Events", []) for topic in topics) for kind in missing):
        where = ", ".join(sorted({topic["TopicArn"] for topic in topics}))
        return True, f"tells {where}; whether that is sent on to {on.queue} cannot be seen from here"
    keys = f" of {on.prefix}*{on.suffix}" if on.prefix or on.suffix else ""
    return False, (
        f"does not notify {on.queue} of {' and '.join(missing)}{keys}; add that to the bucket's notifications: until "
        f"then its objects are found every {min(on.poll_s or on.reconcile_s, on.reconcile_s):g} s"
    )


def _covers(configuration: Mapping[str, Any], on: OnS3) -> bool:
    """Tell whether a configuration's filter lets all keys of an entry through."""
    rules = configuration.get("Filter", {}).get("Key", {}).get("FilterRules", [])
    wanted = {rule["Name"].lower(): rule["Value"] for rule in rules}
    return on.prefix.startswith(wanted.get("prefix", "")) and on.suffix.endswith(wanted.get("suffix", ""))
