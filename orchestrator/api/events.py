"""Events: list, show, emit."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from orchestrator import operations
from orchestrator.api import shapes
from orchestrator.api.answers import Json, Refusal
from orchestrator.api.bodies import Body, read_json, schema_of
from orchestrator.api.gate import needs
from orchestrator.api.place import ROOT, After, Limit, Place, first_or_after, page, router, says
from orchestrator.errors import InputError, NotFoundError
from orchestrator.eventlog import VERDICTS
from orchestrator.events import Event
from orchestrator.tokens import Scope

#: As many events come in one batch at most.
_BATCH = 1000
#: A page takes no longer than it takes to look at so many.
_LOOKED_AT = 20_000
_BATCH_TYPE = "application/cloudevents-batch+json"

Verdict = Literal["started", "refused", "no_match", "loop"]
assert set(get_args(Verdict)) == set(VERDICTS)
Text = Annotated[str, Field(min_length=1)]


class Emit(BaseModel):
    """An event of one's own: a CloudEvent in its JSON format, or as much of one as there is to say."""

    model_config = ConfigDict(extra="allow")

    type: Text = Field(description="What happened, as shop.order.placed.")
    source: Text | None = Field(default=None, description="Who says so.")
    id: Text | None = Field(default=None, description="Identity within the source; else a new one.")
    subject: str | None = Field(default=None, description="What it happened to.")
    time: str | None = None
    data: Any = None


_SINGLE = Emit.model_json_schema()
_BODIES: dict[str, Any] = {
    "application/cloudevents+json": _SINGLE,
    _BATCH_TYPE: {"type": "array", "items": _SINGLE, "minItems": 1, "maxItems": _BATCH},
}


def make_router(place: Place) -> APIRouter:
    routes = router()
    events, bus = place.engine.events, place.engine.bus

    @routes.get("/events", **says(shapes.EventRecords))
    def list_events(
        verdict: Annotated[Verdict | None, Query(description="Only those that came to this.")] = None,
        type: Annotated[str | None, Query(description="Only events of this type.")] = None,  # noqa: A002
        limit: Limit = 50,
        after: After = None,
    ) -> Json:
        """List events, newest first, with what came of them. A page may have fewer than `limit`, or none, and a `next`:
        so many were looked at.
        """
        try:
            return page(*events.page(limit=limit, after=after, verdict=verdict, type_=type, most=_LOOKED_AT))
        except NotFoundError as exc:
            raise first_or_after(after, exc) from exc

    # An id may have slashes in it; one that ends as the addresses below do has its event found by its key.

    @routes.get("/events/{event:path}/explain", **says(shapes.EventRecord))
    def explain_event(event: str) -> Json:
        """Say why an event started what it did and nothing else: the verdict of every workflow, and its reason."""
        return Json(events.explain(event))

    @routes.post("/events/{event:path}/replay", **says(shapes.Event, status=202, changes=True))
    @needs(Scope.RUN)
    def replay_event(event: str, request: Request) -> Json:
        """Have an event dealt with anew, by the definitions in force now: it starts new runs."""
        again = operations.replay_event(place.engine, event)
        request.state.entry.add(event=again.id)
        return _accepted(again)

    @routes.get("/events/{event:path}", **says(shapes.EventRecord))
    def show_event(event: str) -> Json:
        """Show an event, by its id or key, and the runs that it started."""
        return Json(events.get(event))

    @routes.post(
        "/events",
        **says(shapes.Event | shapes.Events, status=202, changes=True),
        openapi_extra=schema_of(Emit, **_BODIES),
    )
    @needs(Scope.RUN)
    def emit_events(request: Request, body: Body) -> Json:
        """Put an event of one's own on the bus, or a batch: all of it, or none. Accepted once the bus has it."""
        value = read_json(body)
        is_batch = request.headers.get("content-type", "").partition(";")[0].strip().lower() == _BATCH_TYPE
        if is_batch and not isinstance(value, list):
            raise InputError(f"a body of {_BATCH_TYPE} must be an array of events")
        if is_batch and not 0 < len(value) <= _BATCH:
            raise Refusal(413 if value else 422, f"a batch has 1 to {_BATCH} events, not {len(value)}")
        found = [operations.read_event(one) for one in (value if is_batch else [value])]
        request.state.entry.note(events=[event.id for event in found], types=sorted({event.type for event in found}))
        bus.publish(found)
        if is_batch:
            return Json({"items": [event.to_json() for event in found], "next": None}, status_code=202)
        return _accepted(found[0])

    return routes


def _accepted(event: Event) -> Json:
    return Json(event.to_json(), status_code=202, headers={"Location": f"{ROOT}/events/{event.key}"})
