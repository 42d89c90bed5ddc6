"""What is asked for and what is said of dead letters, as far as no server is needed."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.deadletters import DeadLetter, Filter, fingerprint_of, parse_since
from orchestrator.errors import InputError
from orchestrator.operations import parse_rate
from orchestrator.redrive import _batches, _canaries

NOW_MS = 1_800_000_000_000


def letter(letter_id: str, run: str = "", **changes: Any) -> DeadLetter:
    made = DeadLetter(
        id=letter_id, kind="step" if run else "message", reason="error", detail="d", fingerprint="f",
        first_at=1, last_at=2, run=run or None, step=letter_id if run else None,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("text", "ms"),
    [("2h", NOW_MS - 7_200_000), ("0", NOW_MS), ("2026-01-31T08:00Z", 1_769_846_400_000),
     ("2026-01-31T09:00:00+01:00", 1_769_846_400_000)],
)  # fmt: skip
def test_since_is_a_duration_or_a_time(text: str, ms: int) -> None:
    assert parse_since(text, NOW_MS) == ms


@pytest.mark.parametrize("text", ["", "2026-01-31T08:00", "yesterday", "2x", "-2h"])
def test_since_is_nothing_else(text: str) -> None:
    with pytest.raises(InputError, match="--since must be a duration"):
        parse_since(text, NOW_MS)


def test_a_record_is_read_as_it_was_written_also_that_of_a_later_version() -> None:
    one = letter("a", "r", error={"type": "T", "message": "m"}, index=3)
    assert DeadLetter.from_record(one.to_record()) == one
    assert DeadLetter.from_record(one.to_record()[:-1] + ', "new": 1}') == one
    assert one.slot == "a/3"
    assert one.to_json()["last_at"] == "1970-01-01T00:00:00.002Z"


def test_an_empty_filter_takes_all() -> None:
    assert Filter().is_empty
    assert Filter().takes(letter("a"))
    assert not Filter(since_ms=0).is_empty
    assert not Filter(workflow="w").takes(letter("a"))


def test_a_fingerprint_is_of_what_is_said_and_not_of_its_numbers() -> None:
    assert fingerprint_of("body", "byte 17 of 'a'") == fingerprint_of("body", "byte 5 of 'bc'")
    assert fingerprint_of("body", "byte 17") != fingerprint_of("envelope", "byte 17")
    assert fingerprint_of("unknown_task", "the task a.b") != fingerprint_of("unknown_task", "the task c.d")


def test_steps_of_a_run_go_together_and_canaries_over_many_runs() -> None:
    all_ = [letter("a", "r"), letter("m"), letter("b", "r"), letter("c", "s"), letter("n"), letter("d", "r")]
    assert [[one.id for one in batch] for batch in _batches(all_)] == [["a", "b", "d"], ["m"], ["c"], ["n"]]
    steps = [one for one in all_ if one.run]
    assert [one.id for one in _canaries(steps, 2)] == ["a", "c"]
    assert [one.id for one in _canaries(steps, 3)] == ["a", "c", "b"]
    assert len(_canaries(steps, 10)) == 4
    assert _canaries(steps, 0) == []


@pytest.mark.parametrize(("text", "rate"), [("10/s", 10), ("0.5", 0.5), (" 3 / s ", 3), (None, 0)])
def test_a_rate(text: str | None, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--reason", "eror"], "unknown reason 'eror'.*error"),
        (["list", "--since", "then"], "--since must be"),
        (["redrive", "--rate", "fast"], "--rate must be a number of letters a second"),
        (["redrive", "--rate", "0"], "--rate must be"),
        (["redrive", "--timeout", "5x"], "--timeout must be a duration"),
        (["redrive", "--input", "{"], "--input is not JSON"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["dead-letters", *arguments, "--project", str(tmp_path)], catch_exceptions=False)


def test_text_of_a_letter_cannot_harm_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.cli.deadletters import _print

    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", written)
    _print(letter("a", queue="q").to_json() | {"raw": "\x1b[2J"})
    written.flush()
    assert b"\x1b" not in written.buffer.getvalue()  # type: ignore[attr-defined]
