"""CloudEvents in the JSON format as others write them (https://github.com/cloudevents/spec, JSON format); pure."""

from __future__ import annotations

import base64
import re
from typing import Any

from orchestrator.errors import InputError
from orchestrator.strict_json import NotJsonError, read_json

_JSON_TYPE = re.compile(r"application/json\Z|[^/]+/[^/]+\+json\Z")


def attributes_of(body: object) -> dict[str, Any]:
    """Return the attributes and `data` of a CloudEvent in the JSON format, without what is null. Raises InputError."""
    if not isinstance(body, dict):
        raise InputError(f"an event must be a JSON object, not {type(body).__name__}")
    attributes = {name: value for name, value in body.items() if value is not None or name == "data"}
    encoded = attributes.pop("data_base64", None)
    if encoded is not None:
        try:
            content = base64.b64decode(encoded, validate=True)
        except (ValueError, TypeError) as exc:
            raise InputError("data_base64 of a CloudEvent must be base64") from exc
        attributes |= data_of(content, str(attributes.get("datacontenttype", "")))
    return attributes


def data_of(content: bytes, content_type: str) -> dict[str, Any]:
    """Return `data` for content of some type: what its JSON says, its text, or base64, which is then said beside it.

    Raises InputError.
    """
    if is_json(content_type):
        return {"data": json_of(content)}
    text = text_of(content)
    return (
        {"data": text} if text is not None else {"data": base64.b64encode(content).decode(), "dataencoding": "base64"}
    )


def json_of(body: bytes) -> object:
    """Return the value of a body that has to be JSON. Raises InputError."""
    try:
        return read_json(body)
    except NotJsonError as exc:
        raise InputError(f"the body is not JSON: {exc}") from exc


def is_json(content_type: str) -> bool:
    """Tell whether a content type is JSON, or one that is written in it."""
    return _JSON_TYPE.match(content_type.partition(";")[0].strip().lower()) is not None


def text_of(body: bytes) -> str | None:
    """Return a body as text; None if it is none."""
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None
