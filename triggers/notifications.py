"""What a bucket's notifications say; pure. All forms that AWS has, and those of stores that speak S3.

| form | where it is used |
|---|---|
| S3's own (`Records`) | a bucket that notifies a queue; MinIO and Ceph have it too |
| EventBridge's (`detail-type`, `detail`) | a rule that sends to a queue |
| either of them in SNS's (`Type: Notification`, `Message`) | a topic between, without raw delivery |

Keys are URL-encoded in the first (a space is a plus), and as they are in the second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

from orchestrator.sightings import Sighting

#: By EventBridge's `reason`; other reasons are shown as they are.
_REASONS = {
    "PutObject": "Put",
    "POST Object": "Post",
    "CopyObject": "Copy",
    "CompleteMultipartUpload": "CompleteMultipartUpload",
}
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}\Z")
_MADE, _GONE = "Object Created", "Object Deleted"


class UnreadableError(Exception):
    """A message is no notification of a bucket; says in one line why, without a piece of it."""


@dataclass(frozen=True, slots=True)
class Told:
    """One thing that a message tells: an object of a bucket."""

    bucket: str
    sighting: Sighting


def read_notification(body: str, *, now_ms: int) -> list[Told]:
    """Return what a message tells, in its order: nothing, if it is a test or about what is no event of ours.

    `now_ms` is for what has no time. Raises UnreadableError.
    """
    try:
        return _read(_object(body, "the message"), now_ms)
    except RecursionError as exc:
        raise UnreadableError("it is nested too deeply") from exc


def _read(message: Mapping[str, Any], now_ms: int, *, is_wrapped: bool = False) -> list[Told]:
    if message.get("Type") == "Notification" and "Message" in message and not is_wrapped:
        return _read(_object(message["Message"], "SNS's Message"), now_ms, is_wrapped=True)
    if message.get("Event") == "s3:TestEvent":
        return []
    if "Records" in message:
        records = message["Records"]
        if not isinstance(records, list) or not records:
            raise UnreadableError("its Records are no list, or an empty one")
        told = [_record(record, n, now_ms) for n, record in enumerate(records)]
        return [one for one in told if one is not None]
    if "detail-type" in message:
        one = _event(message, now_ms)
        return [] if one is None else [one]
    raise UnreadableError("it is neither S3's form, nor EventBridge's, nor one of these in SNS's")


def _record(record: object, n: int, now_ms: int) -> Told | None:
    where = f"Records[{n}]"
    if not isinstance(record, dict):
        raise UnreadableError(f"{where} is no object")
    if not str(record.get("eventSource", "aws:s3")).endswith(":s3"):
        raise UnreadableError(f"{where}.eventSource is not S3")
    name = _text(record, "eventName", where).removeprefix("s3:")
    kind = name.partition(":")[0]
    if kind not in ("ObjectCreated", "ObjectRemoved", "LifecycleExpiration"):
        return None
    s3 = _part(record, "s3", where)
    entity = _part(s3, "object", f"{where}.s3")
    try:
        key = unquote_plus(_text(entity, "key", f"{where}.s3.object"), errors="strict")
    except UnicodeDecodeError as exc:
        raise UnreadableError(f"{where}.s3.object.key is not URL-encoded UTF-8") from exc
    return _told(
        _text(_part(s3, "bucket", f"{where}.s3"), "name", f"{where}.s3.bucket"),
        key,
        entity,
        removed=kind != "ObjectCreated",
        event_name=name,
        at_ms=_time_ms(record.get("eventTime"), now_ms),
    )


def _event(message: Mapping[str, Any], now_ms: int) -> Told | None:
    if message.get("source") != "aws.s3":
        raise UnreadableError("its source is not aws.s3")
    kind = message["detail-type"]
    if not isinstance(kind, str) or not kind.startswith("Object "):
        raise UnreadableError("its detail-type is none of S3's")
    if kind not in (_MADE, _GONE):
        return None
    detail = _part(message, "detail", "it")
    entity = _part(detail, "object", "detail")
    reason = str(detail.get("reason") or "")
    if kind == _MADE:
        name = f"ObjectCreated:{_REASONS.get(reason, reason)}"
    else:
        prefix = "LifecycleExpiration" if reason == "Lifecycle Expiration" else "ObjectRemoved"
        is_marker = detail.get("deletion-type") == "Delete Marker Created"
        name = f"{prefix}:{'DeleteMarkerCreated' if is_marker else 'Delete'}"
    return _told(
        _text(_part(detail, "bucket", "detail"), "name", "detail.bucket"),
        _text(entity, "key", "detail.object"),
        entity,
        removed=kind == _GONE,
        event_name=name,
        at_ms=_time_ms(message.get("time"), now_ms),
    )


def _told(bucket: str, key: str, entity: Mapping[str, Any], *, removed: bool, event_name: str, at_ms: int) -> Told:
    if not _BUCKET.match(bucket):
        raise UnreadableError("what it names cannot be a bucket")
    size = entity.get("size")
    sighting = Sighting(
        key=key,
        removed=removed,
        etag=(_word(entity, "eTag", "etag") or "").strip('"') or None,
        version_id=_word(entity, "versionId", "version-id"),
        sequencer=_word(entity, "sequencer"),
        size=size if isinstance(size, int) and not isinstance(size, bool) else None,
        event_name=event_name,
        at_ms=at_ms,
    )
    try:
        "".join((key, event_name, sighting.etag or "", sighting.version_id or "")).encode()
    except UnicodeEncodeError as exc:
        raise UnreadableError("a text in it is not Unicode") from exc
    return Told(bucket, sighting)


def _object(text: object, what: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError as exc:
        raise UnreadableError(f"{what} is not JSON") from exc
    if not isinstance(value, dict):
        raise UnreadableError(f"{what} is no JSON object")
    return value


def _part(parent: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise UnreadableError(f"{where} has no object {name!r}")
    return value


def _text(parent: Mapping[str, Any], name: str, where: str) -> str:
    value = parent.get(name)
    if not isinstance(value, str) or not value:
        raise UnreadableError(f"{where} has no text {name!r}")
    return value


def _word(parent: Mapping[str, Any], *names: str) -> str | None:
    found = (parent.get(name) for name in names)
    return next((value for value in found if isinstance(value, str) and value), None)


def _time_ms(value: object, now_ms: int) -> int:
    """A time that nobody can read is no reason to lose what happened then."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1000)
        if isinstance(value, int | float) and 0 < value < 1e11:
            return round(value * 1000)
    except (ValueError, OverflowError):
        pass
    return now_ms
