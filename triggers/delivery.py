"""What a delivery to a webhook is made into: one event, or those that a CloudEvents sender has put into it; pure.

CloudEvents over HTTP come in three forms (https://github.com/cloudevents/spec, HTTP protocol binding): binary, with the
attributes in `ce-` headers, structured, and batched. Everything else is `orchestrator.webhook.received`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote

from orchestrator.errors import InputError, one_line
from orchestrator.events import TRIGGER, WEBHOOK_RECEIVED, Event, foreign_fault
from orchestrator.subscriptions import webhook_trigger

#: What is nested deeper is no JSON that anybody has made for others to read, and trouble for whoever does.
LEVELS = 100
_ID_CHARACTERS = 512
_QUERY_FIELDS = 200
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,50}\Z")
_JSON_TYPE = re.compile(r"application/json\Z|[^/]+/[^/]+\+json\Z")
#: A text that has no end reaches to the end: else it would be looked for again from each quote in it.
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CORE = ("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One request as it came; the names of `headers` are lower-case, values of the same name are joined."""

    method: str
    query: bytes
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def is_cloud_event(self) -> bool:
        return self.is_batch or self.is_structured or "ce-specversion" in self.headers

    @property
    def is_structured(self) -> bool:
        return self.content_type == "application/cloudevents+json"

    @property
    def is_binary(self) -> bool:
        return self.is_cloud_event and not self.is_batch and not self.is_structured

    @property
    def is_batch(self) -> bool:
        return self.content_type == "application/cloudevents-batch+json"


class NotJsonError(ValueError):
    """A text is not JSON, or such as not everybody can read: NaN, half a surrogate pair, more than LEVELS deep."""


def joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers of a request by name."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1").strip()
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def read_json(body: bytes) -> Any:
    """Return the value of a text in JSON. Raises NotJsonError."""
    if body.count(b"[") + body.count(b"{") > LEVELS and _is_deep(body):
        raise NotJsonError(f"it is nested more than {LEVELS} levels deep")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        raise NotJsonError("it is not UTF-8") from exc
    except UnicodeEncodeError as exc:
        raise NotJsonError("a text in it is not Unicode") from exc
    except (ValueError, RecursionError) as exc:
        raise NotJsonError(one_line(str(exc), 200)) from exc
    return value


def _is_deep(body: bytes) -> bool:
    """Tell whether lists and objects are nested deeper than LEVELS, if they are balanced; texts do not count."""
    left = _TEXT.sub(b"", body).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(LEVELS):
        inner = left.replace(b"[]", b"")  # takes the innermost level away
        if len(inner) == len(left):
            return False
        left = inner
    return bool(left)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return number


# An event of ours


def parsed(delivery: Delivery) -> object:
    """Return the JSON of a body that says it is; None if it is none."""
    if not _JSON_TYPE.match(delivery.content_type):
        return None
    try:
        return read_json(delivery.body)
    except NotJsonError:
        return None


def received(
    path: str,
    delivery: Delivery,
    value: object,
    *,
    delivery_id: str,
    time: str,
    raw: bool = False,
    hidden: frozenset[str] = frozenset(),
) -> Event:
    """Return the event of a delivery whose body is the JSON `value`, or, if that is None, something else.

    Headers that are `hidden` are left out. Raises InputError.
    """
    _check_id(delivery_id)
    data: dict[str, Any] = {"path": path, "method": delivery.method, "content_type": delivery.content_type or None}
    data["query"] = _query(delivery.query)
    data["headers"] = {name: text for name, text in delivery.headers.items() if name not in hidden}
    if value is not None and not raw:
        data["body"] = value
    else:
        text = _text(delivery.body)
        data["body"] = text if text is not None else base64.b64encode(delivery.body).decode()
        if text is None:
            data["encoding"] = "base64"
    return Event(
        id=delivery_id,
        source=f"orchestrator:webhook/{path}",
        type=WEBHOOK_RECEIVED,
        time=time,
        subject=path,
        data=data,
        extensions={TRIGGER: webhook_trigger(path)},
    )


def _check_id(text: str) -> None:
    if len(text) > _ID_CHARACTERS:
        raise InputError(f"the delivery's id is longer than {_ID_CHARACTERS} characters")


def _text(body: bytes) -> str | None:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def _query(query: bytes) -> dict[str, str | list[str]]:
    found: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_QUERY_FIELDS)
    except ValueError as exc:
        raise InputError(f"the query has more than {_QUERY_FIELDS} fields") from exc
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


# Those of others


def cloud_events(path: str, delivery: Delivery, *, time: str) -> list[Event]:
    """Return the CloudEvents of a delivery, with the trigger that they came by. Raises InputError."""
    if delivery.is_batch:
        bodies = _json(delivery.body)
        if not isinstance(bodies, list):
            raise InputError("a batch of CloudEvents must be a JSON array")
        return [_foreign(path, _structured(body), time) for body in bodies]
    if delivery.is_structured:
        return [_foreign(path, _structured(_json(delivery.body)), time)]
    return [_foreign(path, _binary(delivery), time)]


def _json(body: bytes) -> object:
    try:
        return read_json(body)
    except NotJsonError as exc:
        raise InputError(f"the body is not JSON: {exc}") from exc


def _structured(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InputError(f"a CloudEvent must be a JSON object, not {type(body).__name__}")
    attributes = {name: value for name, value in body.items() if value is not None or name == "data"}
    encoded = attributes.pop("data_base64", None)
    if encoded is not None:
        try:
            content = base64.b64decode(encoded, validate=True)
        except (ValueError, TypeError) as exc:
            raise InputError("data_base64 of a CloudEvent must be base64") from exc
        attributes |= _data(content, str(attributes.get("datacontenttype", "")))
    return attributes


def _binary(delivery: Delivery) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        name.removeprefix("ce-"): unquote(value) for name, value in delivery.headers.items() if name.startswith("ce-")
    }
    attributes.pop("data", None)  # which is the body
    return attributes | (_data(delivery.body, delivery.content_type or "application/json") if delivery.body else {})


def _data(content: bytes, content_type: str) -> dict[str, Any]:
    """Return `data` for content of some type: what its JSON says, its text, or base64, which is then said beside it."""
    if _JSON_TYPE.match(content_type.partition(";")[0].strip().lower()):
        return {"data": _json(content)}
    text = _text(content)
    return (
        {"data": text} if text is not None else {"data": base64.b64encode(content).decode(), "dataencoding": "base64"}
    )


def _foreign(path: str, attributes: Mapping[str, Any], time: str) -> Event:
    for name, value in attributes.items():
        if name != "data" and not _ATTRIBUTE.match(name):
            raise InputError(f"CloudEvent: an attribute's name is of a-z and 0-9, not {name[:60]!r}")
        if name not in _CORE and not isinstance(value, str | int):
            raise InputError(f"CloudEvent: the attribute {name!r} must be a text, a whole number or a boolean")
    event = Event.from_json(attributes)
    if event.time:
        _check_time(event.time)
    _check_id(event.id)
    fault = foreign_fault(event)
    if fault is not None:
        raise InputError(fault)
    return replace(event, time=event.time or time, extensions={**event.extensions, TRIGGER: webhook_trigger(path)})


def _check_time(text: str) -> None:
    try:
        is_moment = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        is_moment = False
    if not is_moment:
        raise InputError("CloudEvent: time must be RFC 3339, such as 2026-01-31T12:00:00Z")
