"""What is known of the objects of a bucket: one short record for each key, which all who tell of objects share.

A sighting is claimed first, emitted then and confirmed last. The claim decides, atomically, what the sighting is: a new
version, one that is known, or one whose claimant died before its event was confirmed, which is emitted again under the
id of the first claim. So whoever tells of one version, and however often, it has one event.

A record has the two latest versions of its key, in about 55 bytes each, and further ones of the same day: who tells of
them may lag behind by several overwrites. The records of a bucket lie in many small hashes, which Redis keeps without
overhead (about 100 bytes of memory a key). Each record bears the day on which its key was last seen; those that a
complete listing has not seen are swept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from importlib import resources
from typing import Any

from orchestrator.events import digest
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import Ledger
from orchestrator.sightings import Sighting

#: Into how many hashes the records of a bucket are divided.
SHARDS = 16_384
#: How long records outlive the last that was said of them, for a bucket that nobody watches any more.
_TTL_S = 400 * 86_400
_HEX = re.compile(r"[0-9A-F]+\Z")


class Verdict(StrEnum):
    """What a sighting is."""

    #: A version that nobody has told of.
    NEW = "new"
    #: A version that was claimed and not confirmed: it is to be emitted, under the id of that claim.
    AGAIN = "again"
    #: A version whose event was emitted, or that is not to have one.
    KNOWN = "known"
    #: Overtaken: a put of an object that was removed since, a removal of one that was put since.
    LATE = "late"
    #: Of a listing: not the version that is known; it may also be an earlier one that has left the record since.
    CHANGED = "changed"


class How(StrEnum):
    """What is to become of a sighting."""

    #: A notification told it.
    TOLD = "n"
    #: A listing shows it, which may be older than the record.
    LISTED = "u"
    #: A listing shows it, and it is certain that the object is like that now.
    CERTAIN = "l"
    #: A listing shows it, and if nothing is known of its key it is to be known, without an event.
    SKIPPED = "s"


@dataclass(frozen=True, slots=True)
class Claim:
    """What was decided about a sighting; `event_id` is empty if it is not to be emitted."""

    sighting: Sighting
    verdict: Verdict
    event_id: str


@lru_cache(maxsize=1)
def _text() -> str:
    return resources.files("orchestrator.ledger").joinpath("objects.lua").read_text()


class ObjectRecords:
    """The records of one bucket, by the source of its events. Safe to share between threads.

    All verbs are atomic and raise UnavailableError if the server is away.
    """

    def __init__(self, ledger: Ledger, source: str) -> None:
        self._ledger = ledger
        self._bucket = digest("objects", source)[:16]
        self._script = ledger.client.register_script(_text())

    def claim(self, sightings: Sequence[tuple[Sighting, How]]) -> list[Claim]:
        """Decide what each sighting is, in turn, and note it; those to be emitted have an id."""
        if not sightings:
            return []
        places = [self._place(sighting.key) for sighting, _ in sightings]
        argv: list[str | int] = ["claim", _TTL_S]
        for (seen, how), (_, field) in zip(sightings, places, strict=True):
            kind = "r" if seen.removed else "c" if seen.modified_ms is None else "l"
            version = seen.version_id if seen.version_id != "null" else None
            modified = "" if seen.modified_ms is None else seen.modified_ms
            argv += [
                field, how, kind, _short(seen.etag, 6), _short(version, 4), seen.at_ms, modified,
                _order(seen.sequencer), seen.identity,
            ]  # fmt: skip
        answer = self._call([key for key, _ in places], argv)
        return [Claim(sighting, Verdict(answer[2 * n]), answer[2 * n + 1]) for n, (sighting, _) in enumerate(sightings)]

    def confirm(self, claims: Sequence[Claim]) -> None:
        """Note that the events of these claims are on the bus; idempotent."""
        places = [self._place(claim.sighting.key) for claim in claims]
        if places:
            pairs = [part for claim, (_, field) in zip(claims, places, strict=True) for part in (field, claim.event_id)]
            self._call([key for key, _ in places], ["confirm", _TTL_S, *pairs])

    def sweep(self, first: int, last: int, before_day: int) -> int:
        """Drop the records in shards `first` to `last` (excluded) that were last seen before that day; how many."""
        shards = [keys.objects_key(self._bucket, f"{n:04x}") for n in range(first, last)]
        return int(self._call(shards, ["sweep", _TTL_S, before_day]))

    def listing(self) -> dict[str, Any]:
        """Return how far the bucket was listed, as `keep_listing` was last given it; empty if it never was."""
        text = self._ledger.guard(lambda: self._ledger.client.get(keys.listing_key(self._bucket)))
        return dict(json.loads(text)) if text else {}

    def keep_listing(self, state: dict[str, Any]) -> None:
        """Keep how far the bucket was listed."""
        key, text = keys.listing_key(self._bucket), json.dumps(state)
        self._ledger.guard(lambda: self._ledger.client.set(key, text, ex=_TTL_S))

    def _call(self, shards: list[str], argv: list[str | int]) -> Any:
        return self._ledger.guard(lambda: self._script(keys=shards, args=argv))

    def _place(self, key: str) -> tuple[str, str]:
        """Return the hash and the field of a key's record."""
        hashed = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        shard = int.from_bytes(hashed[:2], "big") % SHARDS
        return keys.objects_key(self._bucket, f"{shard:04x}"), base64.urlsafe_b64encode(hashed[2:11]).decode()


def _short(text: str | None, size: int) -> str:
    if not text:
        return ""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()[:size]).decode().rstrip("=")


def _order(sequencer: str | None) -> str:
    """Return what sorts as text as sequencers do: as hex digits, the shorter one filled up with zeros on its right."""
    text = (sequencer or "").upper()
    return (text.rstrip("0") or "0") if _HEX.match(text) and len(text) <= 64 else ""
