"""What the records of a bucket's objects promise, on the real server."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from orchestrator.engine import Engine
from orchestrator.ledger.objects import SHARDS, Claim, How, ObjectRecords, Verdict
from orchestrator.sightings import Sighting

NEW, AGAIN, KNOWN, LATE, CHANGED = Verdict
#: No whole second, as which EventBridge would tell it.
T = 1_700_000_000_001
#: What S3 says of one second later.
SECOND = 1000


@pytest.fixture
def records(engine: Engine) -> ObjectRecords:
    return ObjectRecords(engine.ledger, "orchestrator:s3/bucket")


def put(etag: str = "a", at: int = 0, **more: Any) -> Sighting:
    return Sighting(**{"key": "k", "etag": etag, "at_ms": T + at} | more)


def removal(at: int = 0, **more: Any) -> Sighting:
    return put(at=at, removed=True, **more)


def shown(etag: str = "a", modified: int = 0, listed: int = 60_000, **more: Any) -> Sighting:
    return put(etag, listed, modified_ms=T + modified, **more)


def claim(records: ObjectRecords, sighting: Sighting, how: How | None = None) -> Claim:
    given = how or (How.TOLD if sighting.modified_ms is None else How.LISTED)
    (found,) = records.claim([(sighting, given)])
    return found


def tell(records: ObjectRecords, *sightings: Sighting) -> list[Verdict]:
    """Claim and confirm each."""
    verdicts = []
    for sighting in sightings:
        found = claim(records, sighting)
        records.confirm([found] if found.event_id else [])
        verdicts.append(found.verdict)
    return verdicts


# ---- notifications alone


def test_a_version_is_claimed_once_and_known_when_it_is_confirmed(records: ObjectRecords) -> None:
    first = claim(records, put(sequencer="01"))
    assert (first.verdict, first.event_id) == (NEW, put(sequencer="01").identity)
    again = claim(records, put(sequencer="01"))
    assert (again.verdict, again.event_id) == (AGAIN, first.event_id)
    records.confirm([again])
    records.confirm([again])
    assert claim(records, put(sequencer="01")) == Claim(put(sequencer="01"), KNOWN, "")


@pytest.mark.parametrize(
    ("told", "verdicts"),
    [
        # an overwrite
        ([put("a"), put("b", 1)], [NEW, NEW]),
        ([put("a", sequencer="01"), put("a", 1, sequencer="02")], [NEW, NEW]),
        ([put("a", version_id="v1"), put("a", 1, version_id="v2")], [NEW, NEW]),
        ([put("a"), put("a", 60_000)], [NEW, NEW]),
        # the same one, told twice; a multipart upload may be, with other names and times
        ([put("a"), put("a")], [NEW, KNOWN]),
        ([put("a"), put("a", 3, event_name="ObjectCreated:CompleteMultipartUpload")], [NEW, KNOWN]),
        ([put("a", sequencer="01"), put("a", 9_000_000, sequencer="01")], [NEW, KNOWN]),
        ([put("a", version_id="null"), put("a")], [NEW, KNOWN]),
        # by two forms, of which one has less
        ([put("a", sequencer="01", version_id="v"), put("a", 200)], [NEW, KNOWN]),
        ([put("a", 200), put("a", sequencer="01", version_id="v")], [NEW, KNOWN]),
        # there and back again
        ([put("a"), put("b", 1), put("a", 2)], [NEW, NEW, NEW]),
        ([put("a"), put("b", 1), put("a")], [NEW, NEW, KNOWN]),
        ([put("a"), removal(1), put("a", 2)], [NEW, NEW, NEW]),
        ([put("a"), removal(1), put("a")], [NEW, NEW, KNOWN]),
        # out of order: two puts are two events
        ([put("b", 0, sequencer="02"), put("a", 0, sequencer="01")], [NEW, NEW]),
        ([put("b", 0, sequencer="02"), put("a", 0, sequencer="01"), put("b", 0, sequencer="02")], [NEW, NEW, KNOWN]),
        # a put that comes after its delete, and the other way round
        ([removal(0, sequencer="02"), put("a", 0, sequencer="01")], [NEW, LATE]),
        ([removal(5, sequencer="01"), put("a", 0, sequencer="02")], [NEW, NEW]),
        ([removal(5), put("a", 4)], [NEW, LATE]),
        ([removal(5), put("a", 5)], [NEW, NEW]),
        ([put("a", 0, sequencer="02"), removal(0, sequencer="01")], [NEW, LATE]),
        ([removal(0, sequencer="01"), removal(0, sequencer="01")], [NEW, KNOWN]),
        # sequencers of several lengths: the shorter one is filled up on its right
        ([removal(0, sequencer="00A1"), put("a", 0, sequencer="00A05")], [NEW, LATE]),
        ([removal(0, sequencer="00A"), put("a", 0, sequencer="00A05")], [NEW, NEW]),
        ([put("a", 0, sequencer="00a0"), put("a", 0, sequencer="00A")], [NEW, KNOWN]),
        # one that is the same for all says nothing: the eTag and the time do
        ([put("a", 0, sequencer="c"), put("b", 1, sequencer="c"), put("a", 2, sequencer="c")], [NEW, NEW, NEW]),
        ([put("a", 0, sequencer="c"), removal(1, sequencer="c"), put("a", 2, sequencer="c")], [NEW, NEW, NEW]),
        ([put("a", 0, sequencer="c"), put("a", 4, sequencer="c")], [NEW, KNOWN]),
        # and one that nobody can compare
        ([put("a", 0, sequencer="zz"), put("b", 1, sequencer="yy")], [NEW, NEW]),
    ],
)
def test_what_is_told(records: ObjectRecords, told: list[Sighting], verdicts: list[Verdict]) -> None:
    assert tell(records, *told) == verdicts


def test_events_of_versions_that_look_alike_have_ids_of_their_own(records: ObjectRecords) -> None:
    told = [put("a", 0, sequencer="c"), put("b", 1, sequencer="c"), put("a", 2, sequencer="c")]
    assert len({claim(records, one).event_id for one in told}) == 3


def test_of_many_at_once_each_version_has_one_id(records: ObjectRecords) -> None:
    found: list[str] = []

    def work() -> None:
        for n in range(50):
            claims = records.claim([(put("a", 1, key=f"k{n}"), How.TOLD), (put("a", 2, key=f"k{n}"), How.TOLD)])
            found.extend(one.event_id for one in claims if one.event_id)
            records.confirm(claims[:1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 50


# ---- listings


@pytest.mark.parametrize(
    ("known", "seen", "verdict"),
    [
        ([], shown(), NEW),
        ([shown()], shown(listed=99_000), KNOWN),
        ([put("a")], shown("a", 0), KNOWN),
        ([put("a", 400)], shown("a", 0), KNOWN),  # listings have whole seconds
        ([put("a", 3_600_000)], shown("a", 0, 7_200_000), KNOWN),  # of an upload in parts they say when it began
        ([put("a")], shown("a", 30_000), CHANGED),
        ([put("a")], shown("b", 30_000), CHANGED),
        ([put("a"), put("b", 1)], shown("a", 0), KNOWN),  # read before the second came
        ([put("a"), removal(1)], shown("a", 0), KNOWN),
        ([removal(0)], shown("a", 30_000), CHANGED),
        ([put("", 0)], shown("a", 0), KNOWN),  # told by who says no eTag
    ],
)
def test_what_a_listing_shows(records: ObjectRecords, known: list[Sighting], seen: Sighting, verdict: Verdict) -> None:
    for one in known:
        tell(records, one)
    assert claim(records, seen).verdict is verdict
    if verdict is CHANGED:
        assert claim(records, seen, How.CERTAIN).verdict is NEW


def test_what_was_listed_is_known_when_its_notification_comes(records: ObjectRecords) -> None:
    found = claim(records, shown("a", 0, 60_000))
    late = claim(records, put("a", 300, sequencer="01"))
    assert (late.verdict, late.event_id) == (AGAIN, found.event_id)
    records.confirm([late])
    assert tell(records, put("a", 300, sequencer="01"), shown("a", 0, 90_000)) == [KNOWN, KNOWN]
    assert tell(records, put("a", 70_000, sequencer="02")) == [NEW]


def test_an_overwrite_after_the_listing_is_new_though_it_has_the_same_content(records: ObjectRecords) -> None:
    assert tell(records, shown("a", 0, 60_000), put("a", 62_000)) == [NEW, NEW]


def test_one_that_was_listed_and_overwritten_is_known_when_its_notification_comes_last(records: ObjectRecords) -> None:
    told = [shown("a", 0, 60_000), put("b", 70_000, sequencer="02"), put("a", 300, sequencer="01")]
    assert tell(records, *told) == [NEW, NEW, KNOWN]


def test_what_is_skipped_is_known(records: ObjectRecords) -> None:
    found = claim(records, shown("a", 0), How.SKIPPED)
    assert (found.verdict, found.event_id) == (KNOWN, "")
    assert claim(records, shown("a", 0)).verdict is KNOWN
    assert claim(records, shown("b", 70_000), How.SKIPPED).verdict is CHANGED


# ---- keeping them


def test_a_bucket_of_another_store_has_records_of_its_own(engine: Engine, records: ObjectRecords) -> None:
    tell(records, put("a"))
    other = ObjectRecords(engine.ledger, "orchestrator:s3/bucket?endpoint=http%3A%2F%2Fx")
    assert claim(other, put("a")).verdict is NEW


def test_records_that_no_listing_has_seen_are_swept(engine: Engine, records: ObjectRecords) -> None:
    tell(records, put("a"), put("a", key="l"))
    today = engine.ledger.now_ms() // 86_400_000
    assert records.sweep(0, SHARDS // 2, today) + records.sweep(SHARDS // 2, SHARDS, today) == 0
    assert sum(records.sweep(first, first + 512, today + 1) for first in range(0, SHARDS, 512)) == 2
    assert claim(records, put("a")).verdict is NEW


def test_every_key_has_a_ttl(engine: Engine, records: ObjectRecords) -> None:
    tell(records, put("a"), removal(1))
    records.keep_listing({"after": "ä"})
    assert records.listing() == {"after": "ä"}
    found = engine.ledger.client.keys("orchestrator:{s3:*")
    assert len(found) == 2
    assert all(engine.ledger.client.ttl(key) > 86_400 for key in found)


def test_many_records_take_little_memory(engine: Engine, records: ObjectRecords) -> None:

    def memory() -> int:
        return int(engine.ledger.client.info("memory")["used_memory"])

    tell(records, put("a"))
    before = memory()
    for first in range(0, 100_000, 1000):
        page = [put(f"{n}", sequencer=f"00{n:015X}F", key=f"some/prefix/{n}") for n in range(first, first + 1000)]
        records.confirm(records.claim([(one, How.TOLD) for one in page]))
    assert (memory() - before) / 100_000 < 200


# ---- in any order


def test_who_tells_of_several_overwrites_at_once_repeats_none(records: ObjectRecords) -> None:
    """By a second queue, in a form without sequencers, and after a listing has found one of them."""
    puts = [put(etag, at) for at, etag in enumerate("abcdef")]
    assert tell(records, shown("a", 0, listed=0), *puts[1:]) == [NEW] * 6
    assert tell(records, *puts) == [KNOWN] * 6


def test_of_a_key_that_is_seldom_overwritten_two_versions_are_kept(records: ObjectRecords, engine: Engine) -> None:
    day = 86_400_000
    assert tell(records, *[put("a", at * day) for at in range(5)]) == [NEW] * 5
    client = engine.ledger.client
    (record,) = [record for key in client.keys("*") if client.type(key) == "hash" for record in client.hvals(key)]
    assert record.count("|") == 2


@pytest.mark.parametrize("seed", range(40))
def test_each_version_has_one_event_whoever_tells_of_it_and_in_any_order(records: ObjectRecords, seed: int) -> None:
    """By S3 and by EventBridge, which cuts times off, with and without sequencers, repeated, and by listings."""
    chance = random.Random(seed)
    has_sequencers, at = chance.random() < 0.5, 0
    told: list[tuple[str, Sighting, How]] = []
    for etag in "abcdef"[: chance.randrange(2, 7)]:
        at += chance.choice((300, 2000, 7000, 600_000))
        order = f"{at:016X}" if has_sequencers else None
        told += [(etag, put(etag, at, sequencer=order), How.TOLD)] * chance.choice((1, 2))
        told += [(etag, put(etag, at // 1000 * 1000, sequencer=order), How.TOLD)]
    chance.shuffle(told)
    # The bucket is listed when all has happened: it shows the last.
    told.insert(chance.randrange(len(told)), (etag, shown(etag, at // 1000 * 1000, listed=at + 1000), How.CERTAIN))
    found: dict[str, set[str]] = {}
    for version, sighting, how in told:
        one = claim(records, sighting, how)
        if one.event_id:
            found.setdefault(version, set()).add(one.event_id)
            if chance.random() < 0.7:  # else it is killed before it has confirmed, and somebody tells of it again
                records.confirm([one])
    ids = [event_id for of_version in found.values() for event_id in of_version]
    assert len(ids) == len(set(ids)) == len({version for version, _, _ in told})
