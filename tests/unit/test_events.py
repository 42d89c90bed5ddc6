"""Events: the envelope and the identity."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InputError
from orchestrator.events import Event, digest

BODY = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "time": "2026-01-01T00:00:00Z", "data": {"a": 1}}


def test_an_event_comes_back_from_its_json_with_its_extensions() -> None:
    event = Event.from_json(BODY | {"traceparent": "00-x", "subject": "f"})
    assert event.extensions == {"traceparent": "00-x"}
    assert Event.from_json(event.to_json()) == event


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specversion": "0.3"}, "specversion must be '1.0', not '0.3'"),
        ({"id": ""}, "id must be a string that is not empty"),
        ({"source": None}, "source must be a string that is not empty"),
        ({"type": 3}, "type must be a string that is not empty"),
        ({"subject": 3}, "subject must be a string"),
        ({"time": 3}, "time must be a string"),
        ({"data": [float("nan")]}, "it is not JSON"),
        ({"data": {"n": float("inf")}}, "it is not JSON"),
        ({"id": "\udcff"}, "a text in it is not Unicode"),
    ],
)
def test_what_is_no_event_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Event.from_json(BODY | change)


def test_what_is_nested_too_deeply_is_refused_however_deep_the_calls_are() -> None:
    """What passes at the door must pass wherever it is read and written later, with more calls on the stack."""

    def called(depth: int, levels: int) -> Event:
        if depth:
            return called(depth - 1, levels)
        data: list[Any] = []
        for _ in range(levels):
            data = [data]
        return Event.from_json(BODY | {"data": data})

    for depth in (0, 500):
        called(depth, 190)
        for levels in (210, 900):
            with pytest.raises(InputError, match=r"nested|not JSON"):
                called(depth, levels)


def test_something_else_than_an_object_is_refused() -> None:
    with pytest.raises(InputError, match="must be a JSON object, not list"):
        Event.from_json([])


@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_the_digest_knows_where_a_part_ends(one: list[str], two: list[str]) -> None:
    assert (digest(*one) == digest(*two)) == (one == two)
