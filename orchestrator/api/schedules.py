"""Schedules: list, show, pause, go on with, make up for the past. What changes one asks for `admin`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.place import After, Limit, Place, page, router, says
from orchestrator.schedules import Schedules


class Backfill(Asked):
    """Which times of a schedule are made up for."""

    model_config = ConfigDict(validate_by_name=False)

    start: str = Field(alias="from", description="The first time, or date: RFC 3339.")
    end: str = Field(alias="to", description="The last time, or date: RFC 3339.")
    dry_run: bool = Field(default=False, description="Only say what would run.")
    max_parallel: int | None = Field(default=None, ge=1, description="How many of these runs are in flight at most.")


def make_router(place: Place) -> APIRouter:
    routes, schedules = router(), Schedules(place.engine)

    @routes.get("/schedules", **says(shapes.Schedules))
    def list_schedules(limit: Limit = 50, after: After = None) -> Json:
        """List schedules, with the next five times at which each is due."""
        return page(*schedules.page(limit, after))

    @routes.get("/schedules/{schedule}", **says(shapes.Schedule))
    def show_schedule(schedule: str) -> Json:
        """Show a schedule and its backfills."""
        return Json(schedules.show(schedule))

    @routes.post("/schedules/{schedule}/pause", **says(shapes.Schedule, changes=True))
    def pause_schedule(schedule: str) -> Json:
        """Have a schedule start nothing until it is resumed."""
        return Json(schedules.pause(schedule))

    @routes.post("/schedules/{schedule}/resume", **says(shapes.Schedule, changes=True))
    def resume_schedule(schedule: str) -> Json:
        """Have a schedule go on from now; what was due meanwhile is not made up for."""
        return Json(schedules.resume(schedule))

    @routes.post(
        "/schedules/{schedule}/backfill", **says(shapes.Backfill, changes=True), openapi_extra=schema_of(Backfill)
    )
    def backfill_schedule(schedule: str, request: Request, body: Body) -> Json:
        """Run a workflow for each time at which its schedule was due, with low priority; none that has run already."""
        asked = read_body(body, Backfill)
        request.state.entry.note(**{"from": asked.start, "to": asked.end, "dry_run": asked.dry_run or None})
        return Json(
            schedules.backfill(schedule, asked.start, asked.end, dry_run=asked.dry_run, max_parallel=asked.max_parallel)
        )

    @routes.delete("/schedules/{schedule}/backfill", **says(shapes.BackfillsCancelled, changes=True))
    def cancel_backfill(schedule: str) -> Json:
        """Stop the backfills of a schedule; runs that have started go on."""
        return Json({"schedule": schedule, "cancelled": schedules.cancel_backfill(schedule)})

    return routes
