"""kombu's envelope, in which it and Celery put a message where a broker has only text: on Redis and SQS."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from triggers.queue_source import Message


def opened(envelope: object, *, id_: str, handle: Any) -> Message:
    """Return the message in an envelope, with the id that it has there, else `id_`.

    Raises ValueError for what only looks like an envelope: a message of somebody's own that has `properties`.
    """
    if not isinstance(envelope, dict):
        raise ValueError("it is not kombu's")
    properties, body = envelope.get("properties"), envelope.get("body")
    if not isinstance(properties, dict) or not isinstance(body, str) or "content-type" not in envelope:
        raise ValueError("it is not kombu's")
    raw = base64.b64decode(body, validate=True) if properties.get("body_encoding") == "base64" else body.encode()
    headers = envelope.get("headers")
    own = properties.get("message_id") or properties.get("delivery_tag")
    return Message(
        id=own if isinstance(own, str) else id_,
        body=raw,
        headers=headers if isinstance(headers, dict) else {},
        content_type=str(envelope["content-type"] or ""),
        handle=handle,
    )


def plain(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return headers as JSON: what it has no word for (times, bytes, decimals) as text."""
    found: dict[str, Any] = json.loads(json.dumps(headers or {}, default=str))
    return found
