"""How results look: tables for people, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.errors import InputError

_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "upstream_failed": "red",
    "running": "cyan",
    "queued": "yellow",
    "retrying": "yellow",
    "cancelled": "magenta",
    "skipped": "bright_black",
    "scheduled": "bright_black",
}


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, or a terminal that is not UTF-8
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def survive_any_text() -> None:
    """Have stdout and stderr write what their encoding cannot say as an escape, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; states are coloured on a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(coloured(cell) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=200, no_color=True)
    console.print(table)


def coloured(cell: object) -> Text:
    """Return a cell; a state has its colour."""
    text = "" if cell is None else str(cell)
    return Text(text, style=_COLOURS.get(text, ""))


def duration(started: str | None, finished: str | None) -> str:
    """Return how long something took, for people."""
    from datetime import datetime

    if not started or not finished:
        return ""
    seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def one_line(value: Any, limit: int = 80) -> str:
    """Return a value as JSON of at most about `limit` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def confirm(question: str, instead: str) -> None:
    """Ask, and go on only after a yes. Raises InputError where nobody can be asked: `instead` is what to give then."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} nobody is there to be asked: give {instead}")
    typer.confirm(question, abort=True, err=True)


def say(line: str) -> None:
    """Print one line for the person in front of `up`."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
    sys.stdout.flush()
