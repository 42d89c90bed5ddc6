"""The event of an object."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from orchestrator.events import S3_EVENTS, Event
from orchestrator.ledger.objects import Sighting


def object_event(source: str, bucket: str, sighting: Sighting, event_id: str) -> Event:
    """Return the event of a sighting; its time is that of the object."""
    moment_ms = sighting.at_ms if sighting.modified_ms is None else sighting.modified_ms
    return Event(
        id=event_id,
        source=source,
        type=S3_EVENTS["removed" if sighting.removed else "created"],
        time=_rfc3339(moment_ms),
        subject=sighting.key,
        data={
            "bucket": bucket,
            "key": sighting.key,
            "size": sighting.size,
            "etag": sighting.etag,
            "version_id": sighting.version_id,
            "sequencer": sighting.sequencer,
            "event_name": sighting.event_name,
        },
    )


def _rfc3339(moment_ms: int) -> str:
    """A time is whatever somebody sent: what no calendar has becomes the epoch."""
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=moment_ms)
    except OverflowError:
        moment = datetime(1970, 1, 1, tzinfo=UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
