"""Event: a fact, in a CloudEvents 1.0 envelope.

`source` + `id` is its identity (CloudEvents 1.0 spec, "id": producers MUST ensure that source + id is unique for each
distinct event). Events are deduplicated by it and by the trigger that they came by (`Event.key`); runs by it alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.errors import InputError

SPEC_VERSION = "1.0"

FILE_CREATED = "orchestrator.file.created"
MANUAL = "orchestrator.manual"
#: Source of the events that start one workflow by hand; its name is their subject.
MANUAL_SOURCE = "orchestrator:run"
RUNS_SOURCE = "orchestrator:runs"
S3_EVENTS = {"created": "orchestrator.s3.object.created", "removed": "orchestrator.s3.object.removed"}
WEBHOOK_RECEIVED = "orchestrator.webhook.received"
SCHEDULE_DUE = "orchestrator.schedule.due"
QUEUE_MESSAGE = "orchestrator.queue.message"
RUN_EVENTS = {state: f"orchestrator.run.{state}" for state in ("succeeded", "failed", "cancelled")}

#: Extension attributes of ours, which nobody else may set: the trigger that an event came by, the id of the event that
#: caused it, and how many runs there were between it and the first cause.
TRIGGER, CAUSATION, HOPS = "trigger", "causationid", "hops"
#: Of a schedule's event: the priority of the run that it starts.
PRIORITY = "priority"

#: How many lists and mappings may lie within each other: all who read an event, at whatever depth of calls, can.
_DEEPEST = 200

_ATTRIBUTES = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A fact. Immutable; `data` is any JSON value and belongs to whoever reads it: never change it in place.

    `time` is RFC 3339 in UTC. `extensions` are CloudEvents extension attributes (names `[a-z0-9]`).
    """

    id: str
    source: str
    type: str
    time: str
    subject: str | None = None
    data: Any = None
    extensions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hops(self) -> int:
        """How many runs there were between this event and the first that caused it."""
        hops = self.extensions.get(HOPS, 0)
        return hops if isinstance(hops, int) and not isinstance(hops, bool) else 0

    @property
    def key(self) -> str:
        """Digest of `source` + `id`, and of the trigger if it says one; 40 hex digits, safe in keys and file names.

        A sender's event that comes to two webhooks or queues is for the workflows of both; and what somebody who may
        deliver to one of them claims to be another's event does not keep that one away.
        """
        trigger = self.extensions.get(TRIGGER)
        return digest(self.source, self.id, *([trigger] if isinstance(trigger, str) else ()))

    def to_json(self) -> dict[str, Any]:
        """Return the CloudEvents JSON format (structured mode) of this event."""
        body: dict[str, Any] = {
            "specversion": SPEC_VERSION,
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "time": self.time,
        }
        if self.subject is not None:
            body["subject"] = self.subject
        body.update(self.extensions)
        body["datacontenttype"] = "application/json"
        body["data"] = self.data
        return body

    @classmethod
    def from_json(cls, body: object) -> Event:
        """Read the CloudEvents JSON format. Raises InputError that names the attribute which is wrong."""
        if not isinstance(body, dict):
            raise InputError(f"an event must be a JSON object, not {type(body).__name__}")
        if body.get("specversion") != SPEC_VERSION:
            raise InputError(f"event: specversion must be {SPEC_VERSION!r}, not {body.get('specversion')!r}")
        for name in ("id", "source", "type"):
            if not isinstance(body.get(name), str) or not body[name]:
                raise InputError(f"event: {name} must be a string that is not empty, not {body.get(name)!r}")
        try:
            # Also what Python reads and writes but JSON does not have, and text that no encoding has.
            json.dumps([body.get("data"), *body.values()], allow_nan=False)
            "".join(text for text in body.values() if isinstance(text, str)).encode()
        except UnicodeEncodeError as exc:
            raise InputError("event: a text in it is not Unicode") from exc
        except (ValueError, RecursionError) as exc:
            raise InputError(f"event: it is not JSON: {exc}") from exc
        if _is_deeper(body, _DEEPEST):
            raise InputError(f"event: it is nested more than {_DEEPEST} deep")
        for name in ("time", "subject"):
            if not isinstance(body.get(name, ""), str):
                raise InputError(f"event: {name} must be a string, not {body[name]!r}")
        return cls(
            id=body["id"],
            source=body["source"],
            type=body["type"],
            time=body.get("time", ""),
            subject=body.get("subject"),
            data=body.get("data"),
            extensions={k: v for k, v in body.items() if k not in _ATTRIBUTES},
        )


def _is_deeper(value: object, levels: int) -> bool:
    """Tell whether a JSON value has more than so many lists and mappings within each other."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def digest(*parts: str) -> str:
    """Return 40 hex digits that depend on each part and on where one part ends and the next begins."""
    hasher = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        hasher.update(len(encoded).to_bytes(8, "big"))
        hasher.update(encoded)
    return hasher.hexdigest()[:40]


def replay_of(event: Event, replay: str) -> Event:
    """Return the event that has an event dealt with anew, under an id made of the old one and the replay's."""
    return replace(event, id=f"{event.id}~{replay}", extensions={**event.extensions, CAUSATION: event.id})


def foreign_fault(event: Event) -> str | None:
    """Say why an event cannot come from outside (a webhook, a queue, the API): it claims to be one of ours."""
    if event.type.startswith("orchestrator."):
        return f"event: types that begin with `orchestrator.` are not for others to use, as {event.type!r}"
    if event.source.startswith(("orchestrator:", "file://")):
        return f"event: sources that begin with `orchestrator:` or `file://` are not for others, as {event.source!r}"
    for name in (TRIGGER, CAUSATION, HOPS):
        if name in event.extensions:
            return f"event: the attribute {name!r} is not for others to set"
    return None
