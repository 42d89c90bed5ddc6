"""Recurrence: when a schedule is due; pure, no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OnSchedule:
    """`on: - schedule:`: start at due times (triggers/beat.py).

    Exactly one of `cron`, `every_s`, `solar` and `at` says when. Times are RFC 3339 text. `name` tells the schedules of
    one workflow apart.
    """

    name: str = ""
    cron: str | None = None
    every_s: float | None = None
    solar: str | None = None
    at: tuple[str, ...] = ()
    latitude: float | None = None
    longitude: float | None = None
    timezone: str = "UTC"
    jitter_s: float = 0.0
    start: str | None = None
    end: str | None = None
    catchup: str = "none"


def schedule_faults(on: OnSchedule) -> list[tuple[str, str]]:
    """Return (field, message) for everything that is wrong with when a schedule is due."""
    given = [on.cron is not None, on.every_s is not None, on.solar is not None, bool(on.at)]
    return [] if sum(given) == 1 else [("cron", "a schedule has exactly one of `cron:`, `every:`, `solar:` and `at:`")]
