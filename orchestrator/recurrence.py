"""Recurrence: when a schedule is due; pure, no clock.

A schedule is due at instants, each with an id that is unique in the schedule (RFC 3339 in UTC; of `solar` the local
date). They ascend strictly, and depend on the schedule alone: whoever asks, and from when, finds the same ones.

On the two days on which clocks change, as Debian's cron has it:

| cron | clocks go forward | clocks go back |
|---|---|---|
| hour and minute fixed (neither begins with `*`) | what is in the gap is due once, when it ends | the first time |
| otherwise (`*/15 * * * *`, `0 * * * *`) | what is in the gap does not exist | both times |

`every` counts seconds, not hours on a clock: of neither day it takes notice.
"""

from __future__ import annotations

import heapq
import json
import re
import zoneinfo
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from itertools import islice

from cronsim import CronSim, CronSimError

from orchestrator.durations import parse_time
from orchestrator.errors import nearest, one_of, shorten
from orchestrator.events import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class OnSchedule:
    """`on: - schedule:`: start at due times (triggers/beat.py).

    Exactly one of `cron`, `every_s`, `solar` and `at` says when. Times are RFC 3339 text; one without a zone, or a date
    alone, is meant in `timezone`. `name` tells the schedules of one workflow apart.
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


@dataclass(frozen=True, slots=True, order=True)
class Due:
    """One time at which a schedule is due, with its id."""

    at: datetime
    id: str


#: What is before or after is not asked for; it leaves room for every zone.
_FIRST = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime(9000, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)
_DAY = timedelta(days=1)
#: No zone moves its clocks twice in that time.
_NEAR = timedelta(hours=26)
#: A cron that is not due in so many years never is.
_CRON_YEARS = 50
_FAR = timedelta(days=366 * _CRON_YEARS)
_LEAST_EVERY_MS = 100
_MOST_JITTER_S = 86_400.0

_ALIASES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip
_CRON_FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_LOCAL_TIME = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d+)?)?)?\Z", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\Z")

#: Event of the sun -> its angle below the zenith (None: the noon), and whether the sun rises then.
_SUN_RADIUS = 32.0 / (60.0 * 2.0)
_SOLAR: dict[str, tuple[float | None, bool]] = {
    "dawn_astronomical": (108.0, True), "dawn_nautical": (102.0, True), "dawn_civil": (96.0, True),
    "sunrise": (90.0 + _SUN_RADIUS, True), "solar_noon": (None, True), "sunset": (90.0 + _SUN_RADIUS, False),
    "dusk_civil": (96.0, False), "dusk_nautical": (102.0, False), "dusk_astronomical": (108.0, False),
}  # fmt: skip


# When


def dues(on: OnSchedule, after: datetime, until: datetime | None = None) -> Iterator[Due]:
    """Give, lazily and in turn, when a sound schedule is due later than `after`, and not later than `until`.

    Both are aware. What is before `start` or after `end` is not due.
    """
    bounds = [_LAST] if until is None else [_LAST, until]
    if on.end is not None:
        bounds.append(parse_moment(on.end, on.timezone, is_end=True))
    last, after = min(bounds), max(after, _FIRST - _TICK)
    if on.start is not None:
        after = max(after, parse_moment(on.start, on.timezone) - _TICK)
    if after >= last:
        return
    for due in _all(on, after.astimezone(UTC), last.astimezone(UTC)):
        if due.at > last:
            return
        yield due


def due_times(on: OnSchedule, after: datetime, until: datetime | None = None) -> Iterator[datetime]:
    """Give the times alone, in UTC; as `dues`."""
    return (due.at for due in dues(on, after, until))


def last_due(on: OnSchedule, until: datetime, after: datetime = _FIRST - _TICK) -> Due | None:
    """Return when a schedule was due last, not later than `until` and later than `after`; None if it was not.

    Looks back `_CRON_YEARS` years at most, and costs about as much as a look at the time since.
    """
    until = min(until, _LAST)
    if until < _FIRST:
        return None
    after = max(after, until - _FAR)
    back = timedelta(minutes=1)
    while True:
        begin = max(after, until - back)
        last = None
        for due in dues(on, begin, until):
            last = due
        if last is not None or begin <= after:
            return last
        back *= 8


def jitter(name: str, on: OnSchedule, due: Due) -> timedelta:
    """Return for how long a due time is put off; it depends on the schedule's name and that time alone."""
    if not on.jitter_s:
        return timedelta(0)
    share = int(digest("jitter", name, due.id)[:12], 16) / 16**12
    return timedelta(seconds=share * on.jitter_s)


def recurrence_digest(on: OnSchedule) -> str:
    """Return a digest of what says when a schedule is due, without its bounds."""
    start = on.start if on.every_s is not None else None
    spec = [on.cron, on.every_s, on.solar, on.at, on.latitude, on.longitude, on.timezone, start]
    return digest("recurrence", json.dumps(spec))[:16]


def describe_recurrence(on: OnSchedule) -> str:
    """Return in a few words when a schedule is due."""
    if on.cron is not None:
        return f"cron {on.cron}"
    if on.every_s is not None:
        return f"every {on.every_s:g} s"
    return on.solar if on.solar is not None else f"at {', '.join(on.at)}"


def _all(on: OnSchedule, after: datetime, last: datetime) -> Iterator[Due]:
    if on.cron is not None:
        found = _cron(on.cron, on.timezone, after, last)
    elif on.every_s is not None:
        found = _every(round(on.every_s * 1000), _anchor(on), after, last)
    elif on.solar is not None:
        return _sun(on, after, last)
    else:
        moments = sorted({parse_moment(text, on.timezone) for text in on.at})
        found = iter(moments[bisect_right(moments, after) :])
    return (Due(at, utc_text(at)) for at in found)


def _anchor(on: OnSchedule) -> datetime:
    return _FIRST if on.start is None else parse_moment(on.start, on.timezone)


def _every(every_ms: int, anchor: datetime, after: datetime, last: datetime) -> Iterator[datetime]:
    step = timedelta(milliseconds=every_ms)
    number = (after - anchor) // step + 1
    while anchor + number * step <= last:
        yield anchor + number * step
        number += 1


def _cron(expression: str, timezone: str, after: datetime, last: datetime) -> Iterator[datetime]:
    """Have cronsim find times on the wall clock, which know no zone, and see which instants these are."""
    fields = _ALIASES.get(expression.strip().lower(), expression).split()
    zone = zoneinfo.ZoneInfo(timezone)
    is_fixed = not fields[-5].startswith("*") and not fields[-4].startswith("*")
    walls: Iterator[datetime] = CronSim(" ".join(fields), _before(after, zone))
    if zone.key == "UTC":
        yield from (wall.replace(tzinfo=UTC) for wall in walls)
        return
    emitted = after
    waiting: list[datetime] = []  # the second passes of an hour that comes twice
    for wall in walls:
        instants = _fixed(wall, zone) if is_fixed else _passes(wall, zone)
        # Nothing that is still to come can be due before this wall's first pass.
        first = wall.replace(tzinfo=zone).astimezone(UTC)
        for instant in instants:
            heapq.heappush(waiting, instant)
        while waiting and waiting[0] <= first:
            due = heapq.heappop(waiting)
            if due > emitted:
                emitted = due
                yield due
        if first > last:
            break
    for due in sorted(waiting):
        if due > emitted:
            emitted = due
            yield due


def _before(after: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    """Return a time on the wall clock such that whatever is due after `after` is later than it."""
    offsets = [_offset(after + delta, zone) for delta in (-_NEAR, timedelta(0), _NEAR)]
    wall = (after + offsets[1]).replace(tzinfo=None)
    return wall if max(offsets) == min(offsets) else wall - (max(offsets) - min(offsets)) - timedelta(seconds=1)


def _offset(instant: datetime, zone: zoneinfo.ZoneInfo) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta(0)


def _passes(wall: datetime, zone: zoneinfo.ZoneInfo) -> list[datetime]:
    """Return the instants at which the clocks of a zone show a time: one, none in a gap, two when they go back."""
    both = {wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)}
    return sorted(one for one in both if one.astimezone(zone).replace(tzinfo=None) == wall)


def _fixed(wall: datetime, zone: zoneinfo.ZoneInfo) -> list[datetime]:
    """Return the first instant at which clocks show a time; in a gap, when it ends."""
    return _passes(wall, zone)[:1] or [_end_of_gap(wall, zone)]


def _end_of_gap(wall: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    low, high = sorted(wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    before = _offset(low, zone)
    while high - low > timedelta(seconds=1):
        middle = low + (high - low) // 2
        middle = middle.replace(microsecond=0)
        low, high = (middle, high) if _offset(middle, zone) == before else (low, middle)
    return high


def _sun(on: OnSchedule, after: datetime, last: datetime) -> Iterator[Due]:
    """Go through the days at the place; their mean noon tells the local date, and each has an event once at most."""
    zone, east = zoneinfo.ZoneInfo(on.timezone), timedelta(minutes=4 * (on.longitude or 0.0))
    # A day's event is within 36 hours of its noon, and so on one of the days around.
    day = (after + east).date() - 2 * _DAY
    emitted = after
    while True:
        noon = datetime.combine(day, time(12), UTC) - east
        if noon - 2 * _DAY > last:
            return
        at = _sun_at(str(on.solar), day, on.latitude or 0.0, on.longitude or 0.0)
        if at is not None and at > emitted:
            emitted = at
            yield Due(at, noon.astimezone(zone).date().isoformat())
        day += _DAY


@lru_cache(maxsize=1024)
def _sun_at(event: str, day: date, latitude: float, longitude: float) -> datetime | None:
    """Return the second of an event of the sun on a day at the place; None on days without it (near the poles)."""
    from astral import Observer, SunDirection  # noqa: I001 -- 20 ms that only who has such a schedule shall pay
    from astral import sun

    observer = Observer(latitude, longitude)
    zenith, rises = _SOLAR[event]
    noon = sun.noon(observer, day)
    if zenith is None:
        return noon
    try:
        found = sun.time_of_transit(observer, day, zenith, SunDirection.RISING if rises else SunDirection.SETTING)
    except ValueError:
        return None
    # astral brings it into the day as clocks in Greenwich have it.
    begin = noon - timedelta(hours=13 if rises else 1)
    return (begin + (found - begin) % _DAY).replace(microsecond=0)


def utc_text(moment: datetime) -> str:
    """Return an instant as RFC 3339 in UTC, to the second where that says all."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="auto")
    return f"{text}Z"


def parse_moment(text: str, timezone: str, *, is_end: bool = False) -> datetime:
    """Return the instant that a text says: RFC 3339, or without a zone (also: a date alone) on the clocks of a zone.

    A date alone is its beginning, with `is_end` its last moment. Raises ValueError, in words for a person.
    """
    if not isinstance(text, str) or not _LOCAL_TIME.match(text):
        found = parse_time(text)
    else:
        try:
            wall = datetime.fromisoformat(text.upper())
            if len(text) == 10 and is_end:
                found = _fixed(wall + _DAY, zoneinfo.ZoneInfo(timezone))[0] - _TICK
            else:
                found = _fixed(wall, zoneinfo.ZoneInfo(timezone))[0]
        except (ValueError, OverflowError):
            found = parse_time(text)  # which says what is wrong
    if not _FIRST <= found <= _LAST:
        raise ValueError(f"must be a time from 1970 to 8999, not {text!r}")
    return found


# What is wrong


def schedule_faults(on: OnSchedule) -> list[tuple[str, str]]:
    """Return (field, message) for everything that is wrong with when a schedule is due."""
    found = []
    if on.name and not _NAME.match(on.name):
        found.append(("name", f"must be letters, digits, _ and -, not {shorten(on.name)}"))
    given = [on.cron is not None, on.every_s is not None, on.solar is not None, bool(on.at)]
    if sum(given) != 1:
        found.append(("", "a schedule has exactly one of `cron:`, `every:`, `solar:` and `at:`"))
    zone = _zone_fault(on.timezone)
    found += [("timezone", zone)] if zone else []
    found += _bounds_faults(on if not zone else replace(on, timezone="UTC"))
    if on.cron is not None:
        fault = _cron_fault(on.cron)
        found += [("cron", fault)] if fault else []
    if on.every_s is not None and round(on.every_s * 1000) < _LEAST_EVERY_MS:
        found.append(("every", f"must be at least {_LEAST_EVERY_MS}ms"))
    if not 0 <= on.jitter_s <= _MOST_JITTER_S:
        found.append(("jitter", f"must be at most {_MOST_JITTER_S / 3600:g}h"))
    found += _place_faults(on)
    if not found and on.start is not None and on.end is not None and next(dues(on, _FIRST - _TICK), None) is None:
        found.append(("end", "nothing is due between `start` and `end`"))
    return found


def _zone_fault(timezone: str) -> str:
    """Say what is wrong with the name of a time zone; empty if nothing is."""
    if timezone.startswith(("right/", "posix/")) or timezone in ("localtime", "posixrules", "Factory"):
        return f"{timezone!r} is not the same everywhere; use an IANA name, such as Europe/Paris"
    try:
        zoneinfo.ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        names = sorted(zoneinfo.available_timezones())
        folded = {name.lower(): name for name in names}
        hint = folded.get(timezone.lower().replace(" ", "_"))
        near = f"did you mean {hint!r}?" if hint else nearest(timezone, names)
        near = near if near.startswith("did") else "use an IANA name, such as Europe/Paris"
        return f"unknown time zone {shorten(timezone)}; {near}"
    return ""


def _bounds_faults(on: OnSchedule) -> list[tuple[str, str]]:
    found, moments = [], {}
    for field, texts in (("at", on.at), ("start", on.start), ("end", on.end)):
        for text in (texts,) if isinstance(texts, str) else texts or ():
            try:
                moments[field] = parse_moment(text, on.timezone, is_end=field == "end")
            except ValueError as exc:
                found.append((field, str(exc)))
    if "start" in moments and "end" in moments and moments["end"] < moments["start"]:
        found.append(("end", f"{on.end} is before `start`, {on.start}"))
    return found


def _cron_fault(expression: str) -> str:
    """Say what is wrong with a cron expression, and in which of its fields, all of them; empty if nothing is."""
    text = expression.strip()
    if text.startswith("@"):
        if text.lower() in _ALIASES:
            return ""
        return one_of(_ALIASES, text) + ("; for intervals use `every:`" if text.lower().startswith("@every") else "")
    fields = text.split()
    if len(fields) not in (5, 6):
        wanted = "5 (minute hour day-of-month month day-of-week), or 6 with seconds first"
        return f"{shorten(text)} has {len(fields)} fields; it must have {wanted}"
    names = _CRON_FIELDS[-len(fields) :]
    bad = [f"{name} {shorten(field)}" for name, field in zip(names, fields, strict=True) if not _parses(name, field)]
    if bad:
        return f"bad {', '.join(bad)} in {shorten(text)}"
    try:
        walls = CronSim(text, datetime(2000, 1, 1))  # noqa: DTZ001 -- a wall clock's time has no zone
        if next(islice(walls, 1), None) is not None:
            return ""
    except CronSimError:
        pass
    return f"{shorten(text)} is never due: no month of it has such a day-of-month"


def _parses(name: str, field: str) -> bool:
    """Tell whether one field by itself is sound."""
    fields = ["*"] * len(_CRON_FIELDS)
    fields[_CRON_FIELDS.index(name)] = field
    try:
        CronSim(" ".join(fields), datetime(2000, 1, 1))  # noqa: DTZ001 -- as above
    except (CronSimError, ValueError, AssertionError, RecursionError):
        return False
    return True


def _place_faults(on: OnSchedule) -> list[tuple[str, str]]:
    found = []
    for field, value, most in (("latitude", on.latitude, 90.0), ("longitude", on.longitude, 180.0)):
        if on.solar is None:
            found += [(field, "is for `solar:` alone")] if value is not None else []
        elif value is None:
            found.append((field, "`solar:` needs `latitude:` and `longitude:`"))
        elif not -most <= value <= most:
            found.append((field, f"must be from {-most:g} to {most:g} degrees, not {value:g}"))
    if on.solar is not None and on.solar not in _SOLAR:
        found.append(("solar", one_of(_SOLAR, on.solar)))
    return found
