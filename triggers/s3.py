"""The S3 trigger: an object that was made in a bucket, or removed from it, becomes one event.

    notifications.py   what a message says --+
    notified.py        the queue ------------+--> the records of the bucket: claim --> the bus --> confirm
    listing.py         what the bucket has --+    (orchestrator/ledger/objects.py)

**Nothing is lost.** Notifications are hints, for they may be lost, late or sent to nobody. What counts is the bucket:
it is listed when we start and every `reconcile`, after the queue is empty. A message is deleted, and a page of a
listing left behind, only when the events are on the bus.

**Nothing starts twice.** Both share one record for each key. A claim on it is made before the event is emitted, and
binds the version to the event's id: whoever tells of the same version after a kill -9 in between emits the same event,
and after the confirmation none. A version is told by its eTag, and by versionId, sequencer and time as far as a form of
telling has them.

**Order.** Sequencers say what came first, where both have one, and else the time. A put that comes after the object's
later removal starts nothing, nor does a removal that comes after a later put. Two puts are two events in any order.

What a queue tells is emitted whether or not a workflow asks for that key, so that `events explain` can say why nothing
started. Of a listing only those keys are emitted that somebody asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import groupby

from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.subscriptions import OnS3
from orchestrator.workflows import Workflow
from triggers.aws import Queue
from triggers.listing import Bucket, ListingTrigger, Scope
from triggers.notified import QueueTrigger
from triggers.supervisor import Trigger

#: So many events may wait on the bus before we wait too: a bucket may have a million objects at the first look.
BUS_FULL = 10_000


def s3_triggers(
    workflows: Iterable[Workflow], *, engine: Engine, emit: Callable[[Sequence[Event]], None]
) -> dict[Hashable, Callable[[], Trigger]]:
    """Return what makes a trigger for each queue, and for each bucket, that workflows ask for."""

    def is_full() -> bool:
        return engine.bus.depth() >= BUS_FULL

    entries = [on for workflow in workflows for on in workflow.on if isinstance(on, OnS3)]
    found: dict[Hashable, Callable[[], Trigger]] = {}
    for queue in {queue_of(on) for on in entries if on.queue is not None}:
        found[queue] = partial(QueueTrigger, queue, ledger=engine.ledger, emit=emit, is_full=is_full)
    for bucket in buckets_of(entries):
        found[bucket] = partial(ListingTrigger, bucket, engine=engine, emit=emit, is_full=is_full)
    return found


def queue_of(on: OnS3) -> Queue:
    """Return the queue of an entry that has one."""
    return Queue(name=str(on.queue), region=on.region, endpoint_url=(on.endpoint_url or "").rstrip("/") or None)


def buckets_of(entries: Iterable[OnS3]) -> list[Bucket]:
    """Return what is to be listed: each bucket once, as often as the most eager of its entries asks."""
    return [
        Bucket(
            name=name,
            region=next((on.region for on in group if on.region), None),
            endpoint_url=endpoint_url or None,
            period_s=min(min(on.poll_s or on.reconcile_s, on.reconcile_s) for on in group),
            scopes=tuple(sorted({Scope(on.prefix, on.suffix, on.existing == "skip") for on in group if _lists(on)})),
            queues=tuple(sorted({queue_of(on) for on in group if on.queue is not None}, key=str)),
        )
        for (name, endpoint_url), group in _by_bucket(entries)
        if any(_lists(on) for on in group)
    ]


def _lists(on: OnS3) -> bool:
    """Whether a listing can tell what an entry asks for: it shows what is there, and not what is gone."""
    return "created" in on.events


def _by_bucket(entries: Iterable[OnS3]) -> list[tuple[tuple[str, str], list[OnS3]]]:
    def bucket(on: OnS3) -> tuple[str, str]:
        return on.bucket, (on.endpoint_url or "").rstrip("/")

    ordered = sorted(entries, key=lambda on: (*bucket(on), on.region or "", on.prefix, on.suffix))
    return [(key, list(group)) for key, group in groupby(ordered, bucket)]
