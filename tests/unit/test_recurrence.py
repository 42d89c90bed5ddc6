"""When schedules are due: examples on the days on which clocks change, properties against a plain look at a clock."""

from __future__ import annotations

import zoneinfo
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.recurrence import (
    OnSchedule,
    due_times,
    dues,
    jitter,
    last_due,
    parse_moment,
    recurrence_digest,
    schedule_faults,
    utc_text,
)

SUN = {"latitude": 48.85, "longitude": 2.35, "timezone": "Europe/Paris"}


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def ids(on: OnSchedule, after: str, count: int) -> list[str]:
    return [due.id for due in islice(dues(on, at(after)), count)]


def local(on: OnSchedule, after: str, count: int) -> list[str]:
    zone = zoneinfo.ZoneInfo(on.timezone)
    found = islice(due_times(on, at(after)), count)
    return [one.astimezone(zone).strftime("%d %H:%M%z") for one in found]


@pytest.mark.parametrize(
    ("zone", "cron", "after", "expected"),
    [
        # Clocks go forward: Paris 02:00 -> 03:00.
        ("Europe/Paris", "30 2 * * *", "2026-03-28", ["28 02:30+0100", "29 03:00+0200", "30 02:30+0200"]),
        ("Europe/Paris", "0,30 2 * * *", "2026-03-28T12:00", ["29 03:00+0200", "30 02:00+0200"]),
        ("Europe/Paris", "0 2,3 * * *", "2026-03-28T12:00", ["29 03:00+0200", "30 02:00+0200", "30 03:00+0200"]),
        ("Europe/Paris", "30 * * * *", "2026-03-29T00:00", ["29 01:30+0100", "29 03:30+0200", "29 04:30+0200"]),
        ("Europe/Paris", "*/30 2 * * *", "2026-03-28T12:00", ["30 02:00+0200", "30 02:30+0200"]),
        ("Europe/Paris", "15 30 2 * * *", "2026-03-28T12:00", ["29 03:00+0200", "30 02:30+0200"]),
        # Clocks go back: Paris 03:00 -> 02:00.
        ("Europe/Paris", "30 2 * * *", "2026-10-24T12:00", ["25 02:30+0200", "26 02:30+0100"]),
        ("Europe/Paris", "30 2 * * *", "2026-10-25T01:10", ["26 02:30+0100", "27 02:30+0100"]),
        ("Europe/Paris", "0 * * * *", "2026-10-24T23:30", ["25 02:00+0200", "25 02:00+0100", "25 03:00+0100"]),
        ("Europe/Paris", "*/30 2 * * *", "2026-10-24T12:00",
         ["25 02:00+0200", "25 02:30+0200", "25 02:00+0100", "25 02:30+0100", "26 02:00+0100"]),
        # New York, at 2 as well, on other days; the clocks of London change at 1.
        ("America/New_York", "30 2 * * *", "2026-03-07T12:00", ["08 03:00-0400", "09 02:30-0400"]),
        ("America/New_York", "30 1 * * *", "2026-10-31T12:00", ["01 01:30-0400", "02 01:30-0500"]),
        ("Europe/London", "30 1 * * *", "2026-03-28T12:00", ["29 02:00+0100", "30 01:30+0100"]),
        # Lord Howe: by half an hour, from an offset of ten and a half.
        ("Australia/Lord_Howe", "15 2 * * *", "2026-10-03T00:00", ["04 02:30+1100", "05 02:15+1100"]),
        ("Australia/Lord_Howe", "45 1 * * *", "2026-04-04T00:00", ["05 01:45+1100", "06 01:45+1030"]),
        ("Australia/Lord_Howe", "*/20 1 * * *", "2026-04-04T12:00",
         ["05 01:00+1100", "05 01:20+1100", "05 01:40+1100", "05 01:40+1030", "06 01:00+1030"]),
        # Midnight that does not exist (Beirut, Santiago), and a whole day (Samoa).
        ("Asia/Beirut", "@daily", "2026-03-28T00:00", ["29 01:00+0300", "30 00:00+0300"]),
        ("Pacific/Apia", "0 12 * * *", "2011-12-29T00:00", ["29 12:00-1000", "31 00:00+1400", "31 12:00+1400"]),
        # Offsets of a quarter.
        ("Asia/Kathmandu", "0 6 * * *", "2026-01-01", ["01 06:00+0545", "02 06:00+0545"]),
        ("Pacific/Chatham", "45 2 * * *", "2026-09-26", ["27 03:45+1345", "28 02:45+1345"]),
    ],
)  # fmt: skip
def test_cron_on_the_days_on_which_clocks_change(zone: str, cron: str, after: str, expected: list[str]) -> None:
    assert local(OnSchedule(cron=cron, timezone=zone), after, len(expected)) == expected


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("@hourly", "2026-01-01T00:00", ["2026-01-01T01:00:00Z"]),
        ("@DAILY", "2026-01-01T00:00", ["2026-01-02T00:00:00Z"]),
        ("@weekly", "2026-01-01T00:00", ["2026-01-04T00:00:00Z"]),
        ("@monthly", "2026-01-31T00:00", ["2026-02-01T00:00:00Z"]),
        ("@yearly", "2026-01-31T00:00", ["2027-01-01T00:00:00Z"]),
        ("0 6 * * mon-fri", "2026-01-02T12:00", ["2026-01-05T06:00:00Z"]),
        ("*/20 * * * * *", "2026-01-01T00:00", ["2026-01-01T00:00:20Z", "2026-01-01T00:00:40Z"]),
        ("0 0 29 2 *", "2096-02-29T00:00", ["2104-02-29T00:00:00Z"]),
        ("0 0 L * *", "2028-02-01T00:00", ["2028-02-29T00:00:00Z", "2028-03-31T00:00:00Z"]),
        ("0 0 13 * FRI", "2026-02-01T00:00", ["2026-02-06T00:00:00Z", "2026-02-13T00:00:00Z"]),
    ],
)  # fmt: skip
def test_cron(cron: str, after: str, expected: list[str]) -> None:
    on = OnSchedule(cron=cron)
    assert schedule_faults(on) == []
    assert ids(on, after, len(expected)) == expected


def test_every_is_counted_from_the_start_or_the_epoch() -> None:
    assert ids(OnSchedule(every_s=7 * 3600), "1970-01-01T00:00", 2) == ["1970-01-01T07:00:00Z", "1970-01-01T14:00:00Z"]
    on = OnSchedule(every_s=90, start="2026-01-01T00:00:10Z", end="2026-01-01T00:03:10Z")
    assert ids(on, "2020-01-01", 9) == ["2026-01-01T00:00:10Z", "2026-01-01T00:01:40Z", "2026-01-01T00:03:10Z"]
    assert ids(on, "2026-01-01T00:00:10", 1) == ["2026-01-01T00:01:40Z"]
    assert ids(OnSchedule(every_s=0.25), "2026-01-01", 2) == [
        "2026-01-01T00:00:00.250000Z",
        "2026-01-01T00:00:00.500000Z",
    ]
    # A day is 24 hours, also where it has 23.
    assert local(OnSchedule(every_s=86400, timezone="Europe/Paris"), "2026-03-28T01:00", 2) == [
        "29 01:00+0100", "30 02:00+0200"
    ]  # fmt: skip


def test_at_are_times_in_turn_and_each_once() -> None:
    on = OnSchedule(
        at=("2026-05-01T12:00:00+02:00", "2026-05-01T10:00:00Z", "2026-01-01", "2026-03-29 02:30"),
        timezone="Europe/Paris",
    )
    assert ids(on, "2020-01-01", 9) == ["2025-12-31T23:00:00Z", "2026-03-29T01:00:00Z", "2026-05-01T10:00:00Z"]


def test_the_sun() -> None:
    """Against the almanac: Paris, 2026-06-21: sunrise 05:47, noon 13:52, sunset 21:58 (CEST)."""
    found = {}
    for event in ("dawn_civil", "sunrise", "solar_noon", "sunset", "dusk_civil"):
        (due,) = islice(dues(OnSchedule(solar=event, **SUN), at("2026-06-20T23:00")), 1)
        assert due.id == "2026-06-21"
        found[event] = due.at.astimezone(zoneinfo.ZoneInfo("Europe/Paris")).strftime("%H:%M")
    assert found["sunrise"] in ("05:46", "05:47", "05:48")
    assert found["solar_noon"] in ("13:51", "13:52", "13:53")
    assert found["sunset"] in ("21:57", "21:58", "21:59")
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize(
    ("latitude", "longitude", "zone"),
    [
        (69.65, 18.96, "Europe/Oslo"), (-36.85, 174.76, "Pacific/Auckland"), (-13.83, -171.77, "Pacific/Apia"),
        (61.2, -149.9, "America/Anchorage"), (0.0, 180.0, "UTC"), (0.0, -180.0, "UTC"),
        (1.87, -157.4, "Pacific/Kiritimati"),
        (78.2, 15.6, "Arctic/Longyearbyen"), (90.0, 0.0, "UTC"), (-54.8, -68.3, "America/Argentina/Ushuaia"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("event", ["sunrise", "sunset", "solar_noon", "dawn_civil", "dusk_astronomical"])
def test_the_sun_everywhere(event: str, latitude: float, longitude: float, zone: str) -> None:
    """No date comes twice, all ascend, two are a day apart or more, and who begins later finds the same."""
    on = OnSchedule(solar=event, latitude=latitude, longitude=longitude, timezone=zone)
    assert schedule_faults(on) == []
    year = list(dues(on, at("2026-01-01"), at("2027-01-01")))
    assert len({due.id for due in year}) == len(year)
    for before, due in pairwise(year):
        assert timedelta(hours=20) < due.at - before.at
    for due in year[::40]:
        assert next(dues(on, due.at - timedelta(microseconds=1))) == due
        assert all(later.at > due.at for later in islice(dues(on, due.at), 2))
    if abs(latitude) < 45:
        assert len(year) in (364, 365, 366)


def test_near_the_poles_there_are_days_without() -> None:
    on = OnSchedule(solar="sunrise", latitude=69.65, longitude=18.96, timezone="Europe/Oslo")
    days = [due.id for due in dues(on, at("2026-01-01"), at("2026-12-31"))]
    assert not [day for day in days if "2026-05-25" < day < "2026-07-15" or day > "2026-12-01"]


# Properties

ZONES = st.sampled_from(
    ["UTC", "Europe/Paris", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Santiago",
     "Africa/Casablanca", "Pacific/Chatham", "Asia/Beirut", "Antarctica/Troll", "Europe/Dublin"]
)  # fmt: skip
MOMENTS = st.integers(0, 4 * 365 * 86_400).map(lambda seconds: at("2025-01-01") + timedelta(seconds=seconds))
CRONS = st.tuples(
    st.one_of(st.just("*"), st.sampled_from(["*/7", "*/15"]), st.sets(st.integers(0, 59), min_size=1, max_size=4)),
    st.one_of(st.just("*"), st.sampled_from(["*/2", "*/5"]), st.sets(st.integers(0, 4), min_size=1, max_size=4)),
)


def _text(field: str | set[int]) -> str:
    return field if isinstance(field, str) else ",".join(map(str, sorted(field)))


def _values(field: str | set[int], count: int) -> set[int]:
    return set(range(0, count, int(field[2:] or 1))) if isinstance(field, str) else field


@settings(max_examples=150)
@given(cron=CRONS, zone=ZONES, near=MOMENTS)
def test_cron_is_what_a_look_at_the_clock_finds(cron: Any, zone: str, near: datetime) -> None:
    """Go through three days minute by minute, with a change of the clocks in them where there is one near."""
    clock = zoneinfo.ZoneInfo(zone)
    shift = next(
        (
            near + timedelta(days=d)
            for d in range(200)
            if (near + timedelta(days=d)).astimezone(clock).utcoffset()
            != (near + timedelta(days=d + 1)).astimezone(clock).utcoffset()
        ),
        near,
    )
    begin = shift.replace(minute=0, second=0, microsecond=0) - timedelta(days=1)
    minutes, hours = _values(cron[0], 60), _values(cron[1], 24)
    is_fixed = not any(isinstance(field, str) for field in cron)
    expected, shown = [], set()
    before: datetime | None = None
    for n in range(-24 * 60, 3 * 24 * 60):
        moment = begin + timedelta(minutes=n)
        wall = moment.astimezone(clock).replace(tzinfo=None)
        is_due = wall.minute in minutes and wall.hour in hours and not (is_fixed and wall in shown)
        if is_fixed and before is not None and wall - before > timedelta(minutes=1):
            skipped = [before + timedelta(minutes=m) for m in range(1, int((wall - before).total_seconds() // 60))]
            is_due = is_due or any(one.minute in minutes and one.hour in hours for one in skipped)
        shown.add(wall)
        before = wall
        if is_due and n > 0:
            expected.append(moment)
    on = OnSchedule(cron=f"{_text(cron[0])} {_text(cron[1])} * * *", timezone=zone)
    assert list(due_times(on, begin, begin + timedelta(minutes=3 * 24 * 60 - 1))) == expected


SCHEDULES = st.one_of(
    st.builds(
        lambda cron, zone: OnSchedule(cron=f"{_text(cron[0])} {_text(cron[1])} * * *", timezone=zone), CRONS, ZONES
    ),
    st.builds(OnSchedule, every_s=st.integers(1, 10**7), start=st.just("2025-06-01T00:00:00.500Z")),
    st.builds(OnSchedule, at=st.lists(MOMENTS.map(utc_text), min_size=1, max_size=5).map(tuple)),
    st.builds(OnSchedule, solar=st.sampled_from(["sunrise", "sunset"]), latitude=st.floats(-90, 90),
              longitude=st.floats(-180, 180), timezone=ZONES),
)  # fmt: skip


@settings(max_examples=200)
@given(on=SCHEDULES, after=MOMENTS, skip=st.integers(1, 30))
def test_whoever_asks_from_when_finds_the_same(on: OnSchedule, after: datetime, skip: int) -> None:
    assert schedule_faults(on) == []
    found = list(islice(dues(on, after), 40))
    assert all(after < due.at for due in found)
    assert all(one.at < other.at for one, other in pairwise(found))
    assert len({due.id for due in found}) == len(found)
    if len(found) > skip:
        assert list(islice(dues(on, found[skip - 1].at), 40 - skip)) == found[skip:]
        assert list(dues(on, after, found[skip].at)) == found[: skip + 1]
        assert last_due(on, found[skip].at) == found[skip]
        assert last_due(on, found[skip].at - timedelta(microseconds=1)) == found[skip - 1]


@given(seconds=st.floats(0, 86400), due=MOMENTS)
def test_jitter_depends_on_name_and_time_alone(seconds: float, due: datetime) -> None:
    on = OnSchedule(every_s=1, jitter_s=seconds)
    (one,) = islice(dues(on, due), 1)
    assert timedelta(0) <= jitter("a", on, one) <= timedelta(seconds=seconds)
    assert jitter("a", on, one) == jitter("a", on, one)
    assert seconds < 1 or jitter("a", on, one) != jitter("b", on, one)


def test_bounds_of_the_calendar() -> None:
    """Nothing fails at the ends of time, and what is due only there is not looked for without end."""
    beginning, end = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    for on in (
        OnSchedule(cron="0 0 29 2 *", timezone="Asia/Tokyo"),
        OnSchedule(every_s=3e8),
        OnSchedule(solar="sunset", **SUN),
    ):
        assert next(due_times(on, beginning)).year >= 1970
        assert list(due_times(on, end)) == []
        assert last_due(on, beginning) is None
        assert last_due(on, end) is not None
    assert last_due(OnSchedule(at=("2026-01-01T00:00:00Z",)), at("2025-01-01")) is None


def test_digest_is_of_when_it_is_due() -> None:
    daily = OnSchedule(cron="@daily")
    same = [OnSchedule(cron="@daily", jitter_s=5), OnSchedule(cron="@daily", end="2030-01-01", catchup="all", name="x")]
    others = [OnSchedule(cron="@daily", timezone="Asia/Tokyo"), OnSchedule(cron="@hourly"), OnSchedule(every_s=1)]
    assert {recurrence_digest(one) for one in same} == {recurrence_digest(daily)}
    assert len({recurrence_digest(one) for one in [daily, *others]}) == 4
    assert recurrence_digest(OnSchedule(every_s=1, start="2026-01-01")) != recurrence_digest(OnSchedule(every_s=1))


def test_a_time_without_zone_is_that_of_the_schedule() -> None:
    assert parse_moment("2026-07-01T08:00:00", "Europe/Paris") == at("2026-07-01T06:00")
    assert parse_moment("2026-07-01", "Europe/Paris") == at("2026-06-30T22:00")
    assert parse_moment("2026-07-01", "Europe/Paris", is_end=True) == at("2026-07-01T22:00") - timedelta(microseconds=1)
    assert parse_moment("2026-07-01T08:00:00+01:00", "Europe/Paris") == at("2026-07-01T07:00")


_NO_ZONE = "timezone: unknown time zone '{}'; did you mean 'Europe/Paris'?"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ": a schedule has exactly one of"),
        ({"cron": "@daily", "every_s": 1}, ": a schedule has exactly one of"),
        ({"cron": "61 * * * *"}, "cron: bad minute '61' in '61 * * * *'"),
        ({"cron": "* 24 * * *"}, "cron: bad hour '24'"),
        ({"cron": "61 24 * * *"}, "cron: bad minute '61', hour '24' in '61 24 * * *'"),
        ({"cron": "* * 0 * *"}, "cron: bad day-of-month '0'"),
        ({"cron": "* * * JANUARY *"}, "cron: bad month 'JANUARY'"),
        ({"cron": "* * * * FUN"}, "cron: bad day-of-week 'FUN'"),
        ({"cron": "60 * * * * *"}, "cron: bad second '60'"),
        ({"cron": "5-1 * * * *"}, "cron: bad minute '5-1'"),
        ({"cron": "*/0 * * * *"}, "cron: bad minute '*/0'"),
        ({"cron": "1,,2 * * * *"}, "cron: bad minute '1,,2'"),
        ({"cron": "* * * *"}, "cron: '* * * *' has 4 fields; it must have 5"),
        ({"cron": "* * * * * * *"}, "cron: '* * * * * * *' has 7 fields"),
        ({"cron": "0 0 30 2 *"}, "cron: '0 0 30 2 *' is never due"),
        ({"cron": "0 0 31 4,6,9,11 *"}, "cron: '0 0 31 4,6,9,11 *' is never due"),
        ({"cron": "0 0 31 2 */2"}, "cron: '0 0 31 2 */2' is never due"),
        ({"cron": "@reboot"}, "cron: must be one of @yearly"),
        ({"cron": "@every 5m"}, "cron: must be one of @yearly, @annually"),
        ({"cron": ""}, "cron: '' has 0 fields"),
        ({"cron": "@daily", "timezone": "Europe/Pariss"}, _NO_ZONE.format("Europe/Pariss")),
        ({"cron": "@daily", "timezone": "europe/paris"}, _NO_ZONE.format("europe/paris")),
        ({"cron": "@daily", "timezone": "../etc/passwd"}, "timezone: unknown time zone"),
        ({"cron": "@daily", "timezone": "/etc/localtime"}, "timezone: unknown time zone"),
        ({"cron": "@daily", "timezone": "right/UTC"}, "timezone: 'right/UTC' is not the same everywhere"),
        ({"cron": "@daily", "timezone": "localtime"}, "timezone: 'localtime' is not the same everywhere"),
        ({"cron": "@daily", "timezone": "Europe"}, "timezone: unknown time zone 'Europe'"),
        ({"cron": "@daily", "start": "tomorrow"}, "start: must be a time with its zone"),
        ({"cron": "@daily", "end": "2026-02-30"}, "end: must be a time with its zone"),
        ({"cron": "@daily", "end": "1026-02-03"}, "end: must be a time from 1970 to 8999"),
        ({"cron": "@daily", "start": "2026-02-01", "end": "2026-01-31"}, "end: 2026-01-31 is before `start`"),
        ({"cron": "@yearly", "start": "2026-02-01", "end": "2026-12-31"}, "end: nothing is due between"),
        ({"cron": "@daily", "jitter_s": 1e6}, "jitter: must be at most 24h"),
        ({"cron": "@daily", "latitude": 1.0}, "latitude: is for `solar:` alone"),
        ({"cron": "@daily", "name": "a b"}, "name: must be letters, digits"),
        ({"every_s": 0.05}, "every: must be at least 100ms"),
        ({"at": ("2026-01-01T25:00:00Z",)}, "at: must be a time with its zone"),
        ({"solar": "sunrise"}, "latitude: `solar:` needs `latitude:` and `longitude:`"),
        ({"solar": "sunup", "latitude": 1.0, "longitude": 1.0}, "solar: must be one of dawn_astronomical"),
        ({"solar": "sunset", "latitude": 91.0, "longitude": 1.0}, "latitude: must be from -90 to 90 degrees, not 91"),
        ({"solar": "sunset", "latitude": 1.0, "longitude": float("nan")}, "longitude: must be from -180 to 180"),
    ],
)  # fmt: skip
def test_each_refusal_names_the_field(given: dict[str, Any], expected: str) -> None:
    faults = [f"{field}: {message}" for field, message in schedule_faults(OnSchedule(**given))]
    assert any(fault.startswith(expected) for fault in faults), faults


@settings(max_examples=300)
@given(st.text(alphabet="0123456789*/,-#LW@ aMONJé²", max_size=30))
def test_no_text_is_more_than_a_fault(text: str) -> None:
    """Whatever stands there is sound, and due one day, or a fault."""
    on = OnSchedule(cron=text)
    if not schedule_faults(on):
        assert next(due_times(on, at("2026-01-01")), None) is not None
