"""What a child tells of its steps, and what becomes of it when nobody reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.ledger import Taken
from orchestrator.runs import StepError
from workers.slots import Slots
from workers.task_events import Pipe, StepEvents


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(1)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def taken(attempt: int = 1, index: int = -1) -> Taken:
    unit = "a" if index < 0 else "a/0-9"
    return Taken(unit, 1, index, attempt, attempt, 0, 0, "", 0, [], [], [], 0)


def told(pipe: Pipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pipe.read()]


def test_nothing_is_told_while_nobody_watches(slots: Slots, pipe: Pipe) -> None:
    events = StepEvents(pipe, slots)
    events.end(events.begin("r", "w", taken()), "succeeded")
    assert told(pipe) == []


def test_a_step_is_told_of_when_it_begins_and_when_it_ends(slots: Slots, pipe: Pipe) -> None:
    slots.is_monitored = True
    events = StepEvents(pipe, slots)
    begun = events.begin("r", "w", taken(attempt=2, index=3))
    received, started = told(pipe)
    assert (received["type"], received["uuid"], received["name"]) == ("task-received", "r:a:3:2", "w.a")
    assert (received["args"], received["kwargs"], received["retries"]) == ("r", "{'item': 3}", 1)
    assert (started["type"], started["pid"]) == ("task-started", os.getpid())
    assert received["timestamp"] == started["timestamp"]
    events.end(begun, "succeeded")
    (ended,) = told(pipe)
    assert (ended["type"], ended["uuid"]) == ("task-succeeded", "r:a:3:2")
    assert ended["runtime"] >= 0


def test_of_a_step_that_began_unwatched_all_is_told_at_its_end(slots: Slots, pipe: Pipe) -> None:
    events = StepEvents(pipe, slots)
    begun = events.begin("r", "w", taken())
    slots.is_monitored = True
    events.end(begun, "failed", error=StepError(type="Boom", message="a\nb " + "x" * 1000))
    received, started, failed = told(pipe)
    assert [one["type"] for one in (received, started, failed)] == ["task-received", "task-started", "task-failed"]
    assert failed["exception"].startswith("Boom: a b xxx")
    assert len(failed["exception"]) == 300


def test_a_pipe_that_nobody_reads_loses_whole_lines_and_holds_up_nobody(slots: Slots, pipe: Pipe) -> None:
    slots.is_monitored = True
    events = StepEvents(pipe, slots)
    for _ in range(20_000):
        events.end(events.begin("r", "w", taken()), "succeeded")
    found = told(pipe)
    assert 0 < len(found) < 60_000
    assert all(one["uuid"] == "r:a:1" for one in found)
    events.begin("r", "w", taken())
    assert len(told(pipe)) == 2


def test_what_is_too_long_for_one_piece_is_not_told(slots: Slots, pipe: Pipe) -> None:
    slots.is_monitored = True
    events = StepEvents(pipe, slots)
    events.begin("r" * 5000, "w", taken())
    assert told(pipe) == []
