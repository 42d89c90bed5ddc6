"""What a delivery is made into."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from orchestrator.errors import InputError
from orchestrator.events import Event
from orchestrator.strict_json import NotJsonError, read_json
from triggers.delivery import Delivery, cloud_events, joined, parsed, received

NOW = "2026-01-31T12:00:00.000Z"


def _delivery(body: bytes = b"", content_type: str = "application/json", **headers: str) -> Delivery:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Delivery(method="POST", query=b"", headers={"content-type": content_type, **named}, body=body)


def _data(delivery: Delivery, **options: Any) -> dict[str, Any]:
    event = received("p", delivery, parsed(delivery), delivery_id="1", time=NOW, **options)
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event
    data: dict[str, Any] = event.data
    return data


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
)
def test_json_is_parsed_if_the_content_type_says_so(content_type: str) -> None:
    assert _data(_delivery(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\u00e9"]}', content_type))["body"] == {
        "a": [1, 2.5, None, "é"]
    }


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"NaN", b"[Infinity]", b"1e999", b'"\\ud800"', b"[" * 101 + b"]" * 101, b"[" * 100_000, b"1" * 5000],
)
def test_what_is_no_json_stays_text(body: bytes) -> None:
    assert _data(_delivery(body))["body"] == body.decode()


def test_levels_in_texts_do_not_count() -> None:
    assert read_json(b'{"a": "' + b"[{" * 500 + b'", "b": "\\"[[["}') == {"a": "[{" * 500, "b": '"[[['}
    assert read_json(b"[" * 100 + b"]" * 100)
    with pytest.raises(NotJsonError, match="100 levels"):
        read_json(b'{"a":' * 101 + b"1" + b"}" * 101)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", [b'\\"', b'"', b'"\\', b"\\", b'"[', b'["', b"{", b'{"a":', b"[[]", b"\\u0", b"1e9,"])
def test_no_text_takes_long_to_be_refused(piece: bytes) -> None:
    """What takes more than linear time for 3 MB takes minutes."""
    for start in (b"", b'"', b"[" * 101, b"[" * 101 + b'"'):
        with pytest.raises(NotJsonError):
            read_json(start + piece * (3_000_000 // len(piece)))


def test_other_bodies_are_text_or_base64() -> None:
    assert _data(_delivery(b"a=1&b=2", "application/x-www-form-urlencoded"))["body"] == "a=1&b=2"
    binary = _data(_delivery(b"\xff\x00", "application/octet-stream"))
    assert (binary["body"], binary["encoding"]) == (base64.b64encode(b"\xff\x00").decode(), "base64")


def test_raw_keeps_the_text_as_it_came() -> None:
    assert _data(_delivery(b'{"a":  1.0}'), raw=True)["body"] == '{"a":  1.0}'


def test_an_event_says_how_it_came() -> None:
    delivery = Delivery(
        method="PUT",
        query=b"a=1&b=2&b=3&c=&%ff=%ff",
        headers=joined([(b"X-A", b"1"), (b"x-a", b"\xe9"), (b"Authorization", b"Bearer x")]),
        body=b"",
    )
    event = received("a/b", delivery, None, delivery_id="7", time=NOW, hidden=frozenset({"authorization"}))
    assert (event.source, event.id, event.type) == ("orchestrator:webhook/a/b", "7", "orchestrator.webhook.received")
    assert event.extensions == {"trigger": "webhook:a/b"}
    assert event.data == {
        "path": "a/b",
        "method": "PUT",
        "content_type": None,
        "query": {"a": "1", "b": ["2", "3"], "c": "", "\ufffd": "\ufffd"},
        "headers": {"x-a": "1, é"},
        "body": "",
    }


def test_ids_and_queries_are_bounded() -> None:
    with pytest.raises(InputError, match="id is longer"):
        received("p", _delivery(), None, delivery_id="x" * 513, time=NOW)
    many = Delivery(method="GET", query=b"&".join(b"a=1" for _ in range(201)), headers={}, body=b"")
    with pytest.raises(InputError, match="more than 200 fields"):
        received("p", many, None, delivery_id="x", time=NOW)


# CloudEvents

CORE = {"specversion": "1.0", "id": "e1", "source": "/s", "type": "com.example.t"}


def _structured(body: Any, content_type: str = "application/cloudevents+json; charset=utf-8") -> list[Event]:
    return cloud_events("p", _delivery(json.dumps(body).encode(), content_type), time=NOW)


def test_a_structured_event_is_taken_as_it_is() -> None:
    (event,) = _structured(CORE | {"data": {"a": 1}, "subject": "x", "time": "2026-01-01T00:00:00Z", "myext": True})
    assert (event.id, event.source, event.type, event.subject) == ("e1", "/s", "com.example.t", "x")
    assert (event.time, event.data) == ("2026-01-01T00:00:00Z", {"a": 1})
    assert event.extensions == {"myext": True, "trigger": "webhook:p"}


def test_a_binary_event_has_its_attributes_in_headers() -> None:
    headers = {f"ce_{name}": value for name, value in CORE.items()} | {"ce_subject": "a%20b", "ce_myext": "1"}
    (event,) = cloud_events("p", _delivery(b'{"a": 1}', **headers), time=NOW)
    assert (event.id, event.subject, event.data, event.time) == ("e1", "a b", {"a": 1}, NOW)
    (text,) = cloud_events("p", _delivery(b"hello", "text/plain", **headers), time=NOW)
    assert text.data == "hello"
    (binary,) = cloud_events("p", _delivery(b"\xff", "image/png", **headers), time=NOW)
    assert (binary.data, binary.extensions["dataencoding"]) == ("/w==", "base64")
    (empty,) = cloud_events("p", _delivery(b"", **headers), time=NOW)
    assert empty.data is None


def test_a_batch_is_all_its_events() -> None:
    events = _structured([CORE, CORE | {"id": "e2"}], "application/cloudevents-batch+json")
    assert [event.id for event in events] == ["e1", "e2"]
    assert _structured([], "application/cloudevents-batch+json") == []


def test_data_in_base64_is_decoded() -> None:
    encoded = base64.b64encode(b'{"a": 1}').decode()
    (event,) = _structured(CORE | {"datacontenttype": "application/json", "data_base64": encoded})
    assert event.data == {"a": 1}
    (text,) = _structured(CORE | {"data_base64": encoded})
    assert text.data == '{"a": 1}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "must be a JSON object"),
        (CORE | {"specversion": "0.3"}, "specversion"),
        (CORE | {"id": ""}, "id must be"),
        (CORE | {"source": 1}, "source must be"),
        (CORE | {"type": None}, "type must be"),
        (CORE | {"time": "yesterday"}, "time must be RFC 3339"),
        (CORE | {"time": "2026-01-01T00:00:00"}, "time must be RFC 3339"),
        (CORE | {"Ext": 1}, "a-z and 0-9"),
        (CORE | {"ext": {"a": 1}}, "must be a text"),
        (CORE | {"ext": 1.5}, "must be a text"),
        (CORE | {"data_base64": "%"}, "base64"),
        (CORE | {"data_base64": 5}, "base64"),
        (CORE | {"type": "orchestrator.manual"}, "not for others"),
        (CORE | {"source": "orchestrator:run"}, "not for others"),
        (CORE | {"source": "file:///etc"}, "not for others"),
        (CORE | {"trigger": "webhook:other"}, "not for others"),
        (CORE | {"hops": 0}, "not for others"),
        (CORE | {"causationid": "x"}, "not for others"),
        (CORE | {"id": "x" * 600}, "longer than"),
        (CORE | {"subject": "\ud800"}, "not Unicode"),
    ],
)
def test_what_is_wrong_with_a_cloud_event_is_said(body: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        _structured(body)
    if isinstance(body, dict):
        with pytest.raises(InputError, match=reason):
            _structured([CORE, body], "application/cloudevents-batch+json")
