"""Durations as people write them: a number of seconds, or a number with a unit (`500ms`, `1s`, `5m`, `2h`, `1d`).

And points in time as RFC 3339 writes them, with a zone.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)\s*\Z", re.ASCII)
_LONGEST = timedelta(days=36500)
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII)


def parse_duration(text: str | float) -> timedelta:
    """Return the duration that `text` says.

    Raises ValueError, in words for a person, for what is not a duration, is negative or is above a century.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"must be a duration, such as 30, 500ms, 1s, 5m, 2h or 1d, not {text!r}")
    if isinstance(text, str):
        match = _DURATION.match(text)
        seconds = float(match[1]) * _UNITS[match[2]] if match else math.nan
    else:
        seconds = math.inf if abs(text) > _LONGEST.total_seconds() else float(text)
    if math.isnan(seconds) or seconds < 0 or text == -math.inf:
        raise ValueError(f"must be a duration, such as 30, 500ms, 1s, 5m, 2h or 1d, not {text!r}")
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"{text!r} is too long; the longest duration is {_LONGEST.days}d")
    return timedelta(seconds=seconds)


def parse_time(text: str) -> datetime:
    """Return the time that RFC 3339 text says, in UTC. Raises ValueError, in words for a person, for anything else."""
    if isinstance(text, str) and _TIME.match(text):
        try:
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise ValueError(
        f"must be a time with its zone, such as 2026-01-31T06:00:00Z or 2026-01-31T06:00:00+01:00, not {text!r}"
    )
