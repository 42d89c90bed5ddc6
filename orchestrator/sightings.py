"""Sighting: what somebody tells of an object in a bucket; pure. Notifications and listings both come down to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from orchestrator.events import S3_EVENTS, Event, digest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Somebody tells that an object was made, or removed.

    `at_ms` is when that was, by the store's clock. What a listing shows has `modified_ms`, and `at_ms` is when it was
    listed. Everything but the key may be missing, for there are stores that do not tell it.
    """

    key: str
    removed: bool = False
    etag: str | None = None
    version_id: str | None = None
    sequencer: str | None = None
    size: int | None = None
    event_name: str | None = None
    at_ms: int = 0
    modified_ms: int | None = None

    @property
    def identity(self) -> str:
        """The id of its event, if nobody told of the same version before."""
        if self.modified_ms is not None:
            parts = ["listed", self.key, self.etag or "", str(self.modified_ms)]
        else:
            kind = "removed" if self.removed else "created"
            when = "" if self.sequencer else str(self.at_ms)
            parts = [kind, self.key, self.version_id or "", self.sequencer or "", self.etag or "", when]
        return digest(*parts)[:32]

    @property
    def is_of_one_version(self) -> bool:
        """Whether a single version was removed for good, which says nothing of the object."""
        return (
            self.removed
            and self.version_id not in (None, "", "null")
            and not (self.event_name or "").endswith("DeleteMarkerCreated")
        )

    def event(self, source: str, bucket: str, event_id: str) -> Event:
        """Return its event, whose time is that of the object."""
        return Event(
            id=event_id,
            source=source,
            type=S3_EVENTS["removed" if self.removed else "created"],
            time=_rfc3339(self.at_ms if self.modified_ms is None else self.modified_ms),
            subject=self.key,
            data={
                "bucket": bucket,
                "key": self.key,
                "size": self.size,
                "etag": self.etag,
                "version_id": self.version_id,
                "sequencer": self.sequencer,
                "event_name": self.event_name,
            },
        )


def _rfc3339(moment_ms: int) -> str:
    """A time is whatever somebody sent: what no calendar has becomes the epoch."""
    try:
        moment = _EPOCH + timedelta(milliseconds=moment_ms)
    except OverflowError:
        moment = _EPOCH
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
