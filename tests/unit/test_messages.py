"""What is no message of a step is told from what is, and nothing that is put on a queue makes that fail."""

from __future__ import annotations

import base64
import datetime
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.celery_app import STEP_TASK
from orchestrator.errors import one_line
from orchestrator.messages import bytes_of, fault_of, message_of

HEADERS = {"task": STEP_TASK, "id": "1", "timelimit": [None, None], "eta": None, "expires": None, "stamps": {}}
EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def envelope(content: Any = None, *, add: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """Return the bytes of a message of a step, but for what is given."""
    content = [["r", "a"], {}, EMBED] if content is None else content
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    whole = {
        "body": base64.b64encode(text).decode(), "content-type": "application/json", "content-encoding": "utf-8",
        "headers": HEADERS | (add or {}), "properties": {"body_encoding": "base64", "delivery_info": {}},
    }  # fmt: skip
    return json.dumps(whole | changes).encode()


def fault(raw: bytes) -> str:
    """Return the reason that a worker would set these bytes aside for; empty if it would take them."""
    try:
        found = fault_of(message_of(raw))
    except ValueError as exc:
        return f"unreadable: {exc}"
    return found[0] if found else ""


LINK = {"task": STEP_TASK, "args": ["r", "b"], "kwargs": {}, "options": {}, "immutable": True}


@pytest.mark.parametrize(
    "raw",
    [
        envelope(),
        envelope([["r", "a/b", 0, 1], {}, EMBED]),
        envelope([["r", "a"], {}, {}]),
        envelope([["r", "a"], {}, EMBED | {"chain": [LINK, LINK]}]),
        envelope(add={"timelimit": None, "stamped_headers": []}),
    ],
)
def test_what_is_a_step_is_taken(raw: bytes) -> None:
    assert fault(raw) == ""


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (envelope(add={"task": "theirs.task"}), "unknown_task"),
        (envelope(add={"task": ["a"]}), "not_a_step"),
        (envelope(add={"task": None}), "not_a_step"),
        (envelope(headers={}), "not_a_step"),
        (envelope(add={"id": None}), "not_a_step"),
        (envelope(add={"id": "\ud800"}), "not_a_step"),
        (envelope(add={"eta": ""}), "not_a_step"),
        (envelope(add={"expires": "2001-01-01T00:00:00"}), "expired"),
        (envelope(add={"expires": 0}), "expired"),
        (envelope(add={"timelimit": [5, 3]}), "not_a_step"),
        (envelope(add={"stamped_headers": ["a"]}), "not_a_step"),
        (envelope(add={"callbacks": [LINK]}), "not_a_step"),
        (envelope(add={"chain": [LINK]}), "not_a_step"),
        (envelope(add={"deep": json.loads("[" * 50 + "]" * 50)}), "envelope"),
        (envelope(**{"content-type": "application/x-python-serialize"}), "content_type"),
        (envelope(**{"content-type": ["a"]}), "content_type"),
        (envelope(**{"content-encoding": 7}), "content_type"),
        (envelope(b"{broken"), "body"),
        (envelope(b"\x80\x04pickle"), "body"),
        (envelope(b"[" * 100_000), "body"),
        (envelope(b"9" * 5000), "body"),
        (envelope([["r", "a"], {}]), "not_a_step"),
        (envelope({"args": 1, "kwargs": 2, "embed": 3}), "not_a_step"),
        (envelope("abc"), "not_a_step"),
        (envelope([["r", "a"], [], {}]), "not_a_step"),
        (envelope([["r", ""], {}, {}]), "not_a_step"),
        (envelope([["r", "a\x00"], {}, {}]), "not_a_step"),
        (envelope([["\ud800", "a"], {}, {}]), "not_a_step"),
        (envelope([["r" * 201, "a"], {}, {}]), "not_a_step"),
        (envelope([["r", "é" * 101], {}, {}]), "not_a_step"),
        (envelope([["r", "a", 0, 10**30], {}, {}]), "not_a_step"),
        (envelope([["r", "a", -1, 1], {}, {}]), "not_a_step"),
        (envelope([["r", "a", 2, 1], {}, {}]), "not_a_step"),
        (envelope([["r", "a", True, 2], {}, {}]), "not_a_step"),
        (envelope([["r", "a"], {}, {"chain": 5}]), "not_a_step"),
        (envelope([["r", "a"], {}, {"chain": [5]}]), "not_a_step"),
        (envelope([["r", "a"], {}, {"chain": [LINK | {"args": ["r"]}]}]), "not_a_step"),
        (envelope([["r", "a"], {}, {"callbacks": [LINK]}]), "not_a_step"),
        (envelope([["r", "a"], {}, {"is_eager": True}]), "not_a_step"),
        (envelope(properties={"delivery_info": "x"}), "envelope"),
        (envelope(body="x", properties={"body_encoding": "base64"}), "unreadable: its envelope cannot be read (Error)"),
        (envelope(add={"compression": "unheard-of"}), "unreadable: its body cannot be read (KeyError)"),
        (envelope(headers=[1]), "unreadable: its envelope cannot be read (AttributeError)"),
        (b"{}", "unreadable: its envelope has no properties"),
        (b"\xff\xfe", "unreadable: its envelope is not JSON (JSONDecodeError)"),
        (b"[" * 100_000, "unreadable: its envelope is not JSON (RecursionError)"),
    ],
)
def test_what_is_no_step_has_its_reason(raw: bytes, reason: str) -> None:
    assert fault(raw) == reason


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
    max_leaves=10,
)


class Odd:
    """A message of anything, as a client's would be after it has read a forged one."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    @property
    def payload(self) -> Any:
        return self.decoded


@given(
    headers=st.dictionaries(st.sampled_from([*HEADERS, "chain", "x"]), anything).map(lambda h: HEADERS | h) | anything,
    decoded=st.tuples(anything, anything, anything).map(list) | anything,
    properties=anything, delivery_info=anything, content_type=st.just("application/json") | anything,
    content_encoding=st.just("utf-8") | anything,
)  # fmt: skip
def test_nothing_makes_it_fail(**parts: Any) -> None:
    found = fault_of(Odd(**parts))
    assert found is None or (found[0] and found[1] == one_line(found[1]))


@given(st.binary())
def test_no_bytes_make_reading_fail_but_by_saying_why(raw: bytes) -> None:
    assert fault(raw)


@pytest.mark.parametrize(
    "parts",
    [
        {
            "body": b"\x00\xff",
            "headers": {"a": b"\xff", "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), "price": Decimal(1)},
        },
        {"body": "text", "headers": {b"key": memoryview(b"v"), "nested": {"a": [1]}}},
        {"body": "\xe9", "content_encoding": "latin-1", "bytes": b"\xe9"},
        {"body": "\ud800", "bytes": "\ud800".encode("utf-8", "surrogatepass")},
        {"body": "é", "content_encoding": "unheard-of", "bytes": "é".encode()},
        {"body": None, "bytes": b""},
        {"body": b"x" * 10_000_000},
        {"body": b"x", "headers": {"n": 10**5000}},
        {"body": b"x", "headers": json.loads('{"a":' + "[" * 900 + "]" * 900 + "}")},
    ],
)
def test_a_message_of_a_broker_that_does_not_keep_its_bytes_is_written_as_an_envelope(parts: dict[str, Any]) -> None:
    """RabbitMQ: the parts are what there is, and of the body none is lost."""
    given_bytes = parts.pop("bytes", parts["body"])
    whole = {"headers": {}, "content_type": "application/json", "content_encoding": None, "delivery_info": {}}
    raw = bytes_of(Odd(**whole | {"properties": {"application_headers": {"x": 1}, "priority": 3}} | parts))
    read = json.loads(raw)
    expected = given_bytes.encode() if isinstance(given_bytes, str) else given_bytes
    assert base64.b64decode(read["body"]) == expected
    assert "application_headers" not in read["properties"]


def test_what_was_written_as_an_envelope_is_read_as_the_message_that_it_was() -> None:
    first = message_of(envelope())
    again = message_of(bytes_of(first))
    assert (again.payload, again.headers, again.content_type) == (first.payload, first.headers, first.content_type)
    assert fault_of(again) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n b\tc", "a b c"), ("\x1b[31m", r"\x1b[31m"), ("\ud800", r"\ud800"), ("x" * 400, "x" * 299 + "…"), ("", "")],
)
def test_any_text_is_one_line(text: str, line: str) -> None:
    assert one_line(text) == line
    assert one_line(line) == line
