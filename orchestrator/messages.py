"""Messages: their bytes, and why one is not that of a step; nothing here fails, whatever somebody put on a queue."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from kombu.message import Message

from orchestrator.brokers.claims import parse
from orchestrator.celery_app import STEP_TASK
from orchestrator.errors import one_line

#: How deep what is beside a body may be nested; a process passes it on to its children.
_DEPTH = 8
#: Ids of ours have up to 100; what a child runs is noted by them in a place of its own size (workers/slots.py).
_ID_BYTES = 200
#: More items than any fan-out has.
_ITEMS = 2**31
#: What a message of ours never says: Celery would do it, or fail at it, and forget the message.
_NOT_FOR_STEPS = ("callbacks", "errbacks", "chord")


def keep_bytes(channel: Any) -> Any:
    """Have a channel give bodies as they came; AMQP's client decodes them otherwise, which cannot always be undone."""
    channel.auto_decode = False
    return channel


def bytes_of(message: Any) -> bytes:
    """Return a message as it was published; where the broker's client does not keep that, an envelope of its parts."""
    delivery = getattr(message, "delivery", None)
    if delivery is not None:
        raw: bytes = delivery.raw
        return raw
    envelope = {
        "body": base64.b64encode(_body(message)).decode(),
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
    }
    properties = {name: value for name, value in message.properties.items() if name != "application_headers"}
    properties |= {"body_encoding": "base64", "delivery_info": message.delivery_info}
    try:
        return json.dumps(_plain(envelope | {"headers": message.headers, "properties": properties})).encode()
    except (ValueError, RecursionError):
        envelope |= {"content-type": None, "content-encoding": None, "headers": {}}
        return json.dumps(envelope | {"properties": {"body_encoding": "base64"}}).encode()


def body_of(message: Any) -> bytes:
    """Return the body of a message as it was published; the whole message where there is none that can be told."""
    is_told = isinstance(message.body, bytes) or (isinstance(message.body, str) and not message.errors)
    return _body(message) if is_told else bytes_of(message)


def _body(message: Any) -> bytes:
    body = message.body
    if isinstance(body, str):  # the client has decoded it
        try:
            return body.encode(message.content_encoding or "utf-8")
        except (LookupError, UnicodeError, TypeError):
            return body.encode("utf-8", "surrogatepass")
    return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b""


def _plain(value: Any) -> Any:
    """Return what JSON can say of a value: bytes as latin-1, what else it does not know as text."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("latin-1")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def message_of(raw: bytes) -> Message:
    """Read what `bytes_of` gave, as a worker would that got it now. Raises ValueError, which says what is wrong."""
    envelope = parse(raw)
    properties = envelope["properties"]
    body = envelope.get("body")
    try:
        if body and properties.get("body_encoding") == "base64":
            body = base64.b64decode(body)
        message = Message(
            body, content_type=envelope.get("content-type"), content_encoding=envelope.get("content-encoding"),
            delivery_info=properties.get("delivery_info"), properties=properties, headers=envelope.get("headers"),
            postencode="utf-8", accept={"application/json"},
        )  # fmt: skip
    except Exception as exc:  # whatever it is made of
        raise ValueError(f"its envelope cannot be read ({type(exc).__name__})") from exc
    if message.errors:
        raise ValueError(f"its body cannot be read ({message.errors[0][0].__name__})")
    return message


def fault_of(message: Any) -> tuple[str, str] | None:
    """Say why a message cannot be that of a step: (reason of its dead letter, why in one line); None if it can.

    Never raises, and quotes nothing of the body. Everything is looked at that Celery, which takes its form for granted,
    would die of, here or in a child that has it.
    """
    try:
        return _fault_of(message)
    except Exception as exc:  # noqa: BLE001 -- it may be made of anything
        return "envelope", f"its envelope cannot be read ({type(exc).__name__})"


def _fault_of(message: Any) -> tuple[str, str] | None:
    headers = message.headers if isinstance(message.headers, dict) else {}
    task = headers.get("task")
    if task != STEP_TASK:
        if isinstance(task, str):
            return "unknown_task", f"it is for the task {one_line(task, 100)}; here is only {STEP_TASK}"
        return "not_a_step", "it names no task"
    if message.content_type != "application/json" or not isinstance(message.content_encoding, str):
        return "content_type", "its content is not application/json in a text encoding"
    if headers.get("expires") is not None:
        return "expired", "it has `expires`, which steps do not have"
    if not _is_id(headers.get("id")):
        return "not_a_step", "it has no id that can be printed"
    beside = (headers, message.properties, message.delivery_info)
    if not all(isinstance(one, dict) and _is_shallow(one, _DEPTH) for one in beside):
        return "envelope", "its headers, properties or delivery_info are no mappings of plain values"
    if headers.get("eta") is not None:
        return "not_a_step", "it has an `eta`, which steps do not have"
    if headers.get("timelimit") not in (None, [None, None]):
        return "not_a_step", "it has a `timelimit`, which messages of steps do not have"
    if headers.get("stamped_headers") or any(headers.get(name) for name in (*_NOT_FOR_STEPS, "chain")):
        return "not_a_step", "its headers ask for more than a step"
    try:
        payload = message.payload
    except Exception as exc:  # noqa: BLE001 -- whatever a decoder raises
        return "body", f"its body cannot be read ({type(exc).__name__})"
    if not _is_call(payload):
        return "not_a_step", "its body is not [[run, step], {}, {...}] or [[run, step, lo, hi], {}, {...}]"
    return None


def _is_call(payload: Any) -> bool:
    if not isinstance(payload, list) or len(payload) != 3:
        return False
    args, kwargs, embed = payload
    if kwargs != {} or not isinstance(embed, dict) or not embed.keys() <= {*_NOT_FOR_STEPS, "chain"}:
        return False
    chain = embed.get("chain") or []
    if any(embed.get(name) for name in _NOT_FOR_STEPS) or not isinstance(chain, list):
        return False
    links = [link.get("args") if isinstance(link, dict) else None for link in chain]
    return (_is_link(args) or _is_part(args)) and all(map(_is_link, links))


def _is_link(args: Any) -> bool:
    return isinstance(args, list) and len(args) == 2 and all(map(_is_id, args))


def _is_part(args: Any) -> bool:
    if not isinstance(args, list) or len(args) != 4 or not _is_link(args[:2]):
        return False
    lo, hi = args[2:]
    return type(lo) is int and type(hi) is int and 0 <= lo < hi <= _ITEMS


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and text.isprintable() and 0 < len(text.encode()) <= _ID_BYTES


def _is_shallow(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(k, str) and _is_shallow(v, depth - 1) for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return depth > 0 and isinstance(value, list | tuple) and all(_is_shallow(v, depth - 1) for v in value)
    return value is None or isinstance(value, str | bytes | int | float | datetime | Decimal)
