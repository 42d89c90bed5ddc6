"""What answers over ASGI are made of, and the answer that says what is wrong (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]


def answer(
    status: int, body: bytes, *headers: Header, content_type: bytes = b"application/json"
) -> tuple[Message, Message]:
    """Return the messages of an answer with a body of a known length."""
    about = ((b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers)
    return (
        {"type": "http.response.start", "status": status, "headers": list(about)},
        {"type": "http.response.body", "body": body},
    )


def problem(status: int, detail: str, *headers: Header) -> tuple[Message, Message]:
    """Return the messages of an answer that says what is wrong."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return answer(status, json.dumps(body).encode(), *headers, content_type=b"application/problem+json")


async def reply(send: Send, messages: Iterable[Message]) -> None:
    """Send the messages of an answer."""
    for message in messages:
        await send(message)
