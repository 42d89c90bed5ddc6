"""Subscriptions: the entries of a workflow's `on:`, which say what events start its runs; pure data with its checks.

Every kind comes down to an event pattern (`pattern_of`), so that one matcher decides about all of them and one
sentence explains why an event started nothing. What a trigger has to watch for that is read from the same entries.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote, urlsplit

from orchestrator.errors import one_of
from orchestrator.events import (
    FILE_CREATED,
    RUN_EVENTS,
    S3_EVENTS,
    SCHEDULE_DUE,
    digest,
)
from orchestrator.recurrence import OnSchedule, schedule_faults


@dataclass(frozen=True, slots=True, kw_only=True)
class OnFile:
    """`on: - file:`: start for each file that has arrived in a folder (triggers/files.py)."""

    path: str
    glob: str = "*"
    recursive: bool = False
    settle_s: float | None = None
    min_size: int = 0
    marker: str | None = None
    polling: bool = False
    pattern: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnEvent:
    """`on: - event:`: start for each event that matches an EventPattern (patterns.py)."""

    pattern: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnS3:
    """`on: - s3:`: start for objects of a bucket that are made, or removed (triggers/s3.py).

    `events` are `created` and `removed`. Told by notifications on an SQS `queue` (its URL, or its name), by listing the
    bucket every `poll_s`, or both. `existing` says what becomes of objects that are there when the bucket is looked
    through for the first time: `start` or `skip`.
    """

    bucket: str
    prefix: str = ""
    suffix: str = ""
    events: tuple[str, ...] = ("created",)
    queue: str | None = None
    poll_s: float | None = None
    reconcile_s: float = 3600.0
    existing: str = "start"
    region: str | None = None
    endpoint_url: str | None = None
    pattern: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How a webhook tells its sender from others (triggers/verification.py).

    `scheme` is github, gitlab, stripe, slack, standard or hmac. `secrets` are references (`env:NAME`, `file:PATH`, or a
    name in `[secrets]`), any of which may have signed. `tolerance_s` bounds the age of a delivery whose time is signed.
    The rest is for `hmac`: which header has the signature, its digest, encoding (hex or base64) and prefix, the header
    that has the time, `payload`, what is signed: the text with `{body}` and `{timestamp}` in it, and the header that
    has the delivery's id.
    """

    scheme: str
    secrets: tuple[str, ...]
    tolerance_s: float = 300.0
    header: str = ""
    algorithm: str = "sha256"
    encoding: str = "hex"
    prefix: str = ""
    timestamp_header: str | None = None
    payload: str = "{body}"
    id_header: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnWebhook:
    """`on: - webhook:`: start for each delivery to `/hooks/{path}` (triggers/webhook.py).

    `schema` is a JSON Schema of the body. `respond` is `async` (202 at once) or `sync` (the run's output, if it ends
    within `timeout_s`). `rate` is how many deliveries a second are taken; None: any number. With `raw` the body stays
    the text that it came as, also if it is JSON.
    """

    path: str
    methods: tuple[str, ...] = ("POST",)
    verify: Verification | None = None
    schema: Mapping[str, Any] | None = None
    respond: str = "async"
    timeout_s: float = 30.0
    max_bytes: int = 1_000_000
    rate: float | None = None
    raw: bool = False
    pattern: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnQueue:
    """`on: - queue:`: start for each message of a queue that somebody else fills (triggers/queue.py).

    `url` is that of its broker (redis, amqp or sqs), or a reference to it (`env:NAME`, `file:PATH`); `format` is `json`
    or `cloudevents`.
    """

    url: str
    queue: str
    format: str = "json"
    pattern: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRun:
    """`on: - run:`: start when a run of another workflow has ended, in one of the states."""

    workflow: tuple[str, ...]
    state: tuple[str, ...] = ("succeeded",)
    pattern: Mapping[str, Any] | None = None


#: What the secrets of Standard Webhooks begin with.
SIGNING_PREFIX = "whsec_"

On = OnFile | OnEvent | OnS3 | OnWebhook | OnSchedule | OnQueue | OnRun

#: What stands for an entry that cannot be read, so that the others keep their numbers; it matches nothing.
UNREADABLE: On = OnEvent(pattern={"type": [{"exists": False}]})

_ON_KINDS: Mapping[str, type[Any]] = {
    "file": OnFile, "event": OnEvent, "s3": OnS3, "webhook": OnWebhook, "schedule": OnSchedule, "queue": OnQueue,
    "run": OnRun,
}  # fmt: skip


def kind_of_on(on: On) -> str:
    """Return the name of the kind of an entry of `on:`, as it stands in a definition."""
    return next(name for name, kind in _ON_KINDS.items() if isinstance(on, kind))


def on_to_json(on: On) -> dict[str, Any]:
    """Return one entry of `on:` as plain JSON, without what is at its default."""
    if isinstance(on, OnEvent):
        return {"event": dict(on.pattern)}
    body = {f.name: _plain(value) for f in fields(on) if (value := getattr(on, f.name)) != f.default}
    return {kind_of_on(on): body}


def on_from_json(body: Mapping[str, Any]) -> On:
    """Read what `on_to_json` wrote."""
    ((kind, given),) = body.items()
    if kind == "event":
        return OnEvent(pattern=given)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "verify" in values:
        values["verify"] = Verification(**values["verify"] | {"secrets": tuple(values["verify"]["secrets"])})
    on: On = _ON_KINDS[kind](**values)
    return on


def _plain(value: Any) -> Any:
    if isinstance(value, Verification):
        return {f.name: _plain(one) for f in fields(value) if (one := getattr(value, f.name)) != f.default}
    return list(value) if isinstance(value, tuple) else value


# What events they mean


def file_source(workflow: str, path: str) -> str:
    """Return the source of the events of a workflow's watched folder."""
    return f"file://{quote(path)}?workflow={quote(workflow)}"


def s3_source(bucket: str, endpoint_url: str | None = None) -> str:
    """Return the source of the events of a bucket; one of another store says which."""
    return f"orchestrator:s3/{bucket}" + (
        f"?endpoint={quote(endpoint_url.rstrip('/'), safe='')}" if endpoint_url else ""
    )


def schedule_name(workflow: str, on: OnSchedule) -> str:
    """Return the name of a schedule: its workflow's, and its own where the workflow has several."""
    return f"{workflow}.{on.name}" if on.name else workflow


def schedule_source(name: str) -> str:
    """Return the source of the events of a schedule."""
    return f"orchestrator:schedule/{name}"


def webhook_trigger(path: str) -> str:
    """Return what `trigger` says in the events of a webhook."""
    return f"webhook:{path}"


def queue_source(on: OnQueue) -> str:
    """Return the source of the events of a queue, and of no other: senders number their messages as they like.

    Of the broker it says where it is, and not as whom it is used: that may change while a message is in work.
    """
    parts = urlsplit(on.url)
    where = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    return f"orchestrator:queue/{quote(on.queue, safe='')}?broker={quote(where, safe='')}"


def queue_trigger(on: OnQueue) -> str:
    """Return what `trigger` says in the events of a queue."""
    return f"queue:{on.queue}:{digest(on.url, on.queue, on.format)[:12]}"


def pattern_of(workflow: str, on: On) -> dict[str, Any]:
    """Return the event pattern that an entry comes down to, without the entry's own `pattern`."""
    match on:
        case OnEvent():
            return dict(on.pattern)
        case OnFile():
            return {"type": [FILE_CREATED], "source": [file_source(workflow, on.path)]}
        case OnS3():
            data: dict[str, Any] = {"bucket": [on.bucket]}
            if on.prefix or on.suffix:
                data["key"] = [{"wildcard": f"{_literal(on.prefix)}*{_literal(on.suffix)}"}, *_overlaps(on)]
            source = s3_source(on.bucket, on.endpoint_url)
            return {"type": [S3_EVENTS[event] for event in on.events], "source": [source], "data": data}
        case OnWebhook():
            return {"trigger": [webhook_trigger(on.path)]}
        case OnSchedule():
            return {"type": [SCHEDULE_DUE], "source": [schedule_source(schedule_name(workflow, on))]}
        case OnQueue():
            return {"trigger": [queue_trigger(on)]}
        case OnRun():
            return {"type": [RUN_EVENTS[state] for state in on.state], "data": {"workflow": list(on.workflow)}}


def _overlaps(on: OnS3) -> list[str]:
    """Return the keys that are so short that the end of the prefix is the beginning of the suffix."""
    common = range(1, min(len(on.prefix), len(on.suffix)) + 1)
    return [on.prefix + on.suffix[n:] for n in common if on.prefix.endswith(on.suffix[:n])]


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("*", "\\*")


# What is wrong with them

_Faults = list[tuple[tuple[str, ...], str]]

#: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
#: An SQS queue by name, or by ARN.
_QUEUE = re.compile(r"(arn:[a-z-]+:sqs:[a-z0-9-]+:\d{12}:)?[A-Za-z0-9_-]{1,75}([A-Za-z0-9_-]{0,5}|\.fifo)\Z")
_PATH = re.compile(r"[A-Za-z0-9_.~-]+(/[A-Za-z0-9_.~-]+)*\Z")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_MAX_BODY_BYTES = 100 * 10**6
_METHODS = ("POST", "PUT", "PATCH", "GET", "DELETE")
_QUEUE_SCHEMES = ("redis", "rediss", "amqp", "amqps", "sqs", "env", "file")


def on_faults(on: On) -> _Faults:
    """Return (path of the field within the entry, message) for everything that is wrong with an entry by itself."""
    found: _Faults = []
    match on:
        case OnS3():
            found = _s3_faults(on)
        case OnWebhook():
            found = _webhook_faults(on)
        case OnSchedule():
            found = [((key,) if key else (), message) for key, message in schedule_faults(on)]
        case OnQueue():
            found = _queue_faults(on)
        case OnRun():
            found = [(("workflow",), "must name at least one workflow")] if not on.workflow else []
    return [((kind_of_on(on), *place), message) for place, message in found]


def _s3_faults(on: OnS3) -> _Faults:
    found: _Faults = []
    if not _BUCKET.match(on.bucket) or ".." in on.bucket or re.fullmatch(r"[\d.]+", on.bucket):
        message = f"{on.bucket!r} cannot be a bucket: 3 to 63 of a-z, 0-9, '-' and '.', from a letter or digit to one"
        found.append((("bucket",), message))
    if on.queue is None and on.poll_s is None:
        found.append(((), "needs `queue:` (notifications), or `poll:` (listing), or both"))
    if on.queue is None and "removed" in on.events:
        found.append((("events",), "`removed` is told by notifications alone, and there is no `queue:`"))
    if on.endpoint_url is not None and not _is_http_url(on.endpoint_url):
        found.append(
            (("endpoint_url",), f"{on.endpoint_url!r} is no URL of a server: write http://HOST:PORT, or https")
        )
    if on.queue is not None and not _QUEUE.match(on.queue) and not _is_http_url(on.queue):
        message = f"{on.queue!r} cannot be a queue: its URL, its ARN, or its name (up to 80 of A-Z a-z 0-9 - _)"
        found.append((("queue",), message))
    return found


def _is_http_url(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _webhook_faults(on: OnWebhook) -> _Faults:
    found: _Faults = []
    if not _PATH.match(on.path):
        found.append((("path",), f"{on.path!r} cannot be a path: use letters, digits, and _ . ~ - between slashes"))
    for method in on.methods:
        if method not in _METHODS:
            found.append((("methods",), one_of(_METHODS, method)))
    if on.max_bytes > _MAX_BODY_BYTES or on.max_bytes < 1:
        found.append(
            (("max_bytes",), f"must be from 1 byte to {_MAX_BODY_BYTES // 10**6} MB: a message has to take it")
        )
    if on.verify is not None:
        found += [(("verify", on.verify.scheme, key), message) for key, message in _verification_faults(on.verify)]
    return found


def _verification_faults(how: Verification) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if how.tolerance_s <= 0:
        found.append(("tolerance", "must be more than 0"))
    for key in ("header", "timestamp_header", "id_header"):
        name = getattr(how, key)
        if name and not _HEADER.match(name):
            found.append((key, f"{name!r} cannot be the name of a header"))
    if "{body}" not in how.payload:
        found.append(("payload", "must have {body} in it: else anybody's body would do"))
    if ("{timestamp}" in how.payload) != (how.timestamp_header is not None):
        found.append(
            ("payload", "needs {timestamp} in it and `timestamp_header`, or neither: only a signed time counts")
        )
    return found


def secret_fault(scheme: str, secret: str) -> str | None:
    """Say why a text cannot be the secret of a scheme, without a piece of it; None if it can."""
    if not secret:
        return "is empty"
    if scheme == "standard" or (scheme == "gitlab" and secret.startswith(SIGNING_PREFIX)):
        try:
            is_key = bool(base64.b64decode(secret.removeprefix(SIGNING_PREFIX) + "==", validate=True))
        except ValueError:
            is_key = False
        return None if is_key else f"is no signing secret: {SIGNING_PREFIX} and base64 of the key"
    return None


def _queue_faults(on: OnQueue) -> _Faults:
    scheme = urlsplit(on.url).scheme
    return [] if scheme in _QUEUE_SCHEMES else [(("url",), one_of([f"{s}:" for s in _QUEUE_SCHEMES], f"{scheme}:"))]
