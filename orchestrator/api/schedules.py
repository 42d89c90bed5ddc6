"""Schedules: list, show, pause, go on with, fill in what they have missed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.gate import needs
from orchestrator.api.place import Place, page, router, says
from orchestrator.tokens import Scope


class Backfill(Asked):
    """Which times of a schedule are made up for."""

    start: str = Field(description="From this time on; RFC 3339, or a date.")
    end: str = Field(description="Up to this time.")
    dry_run: bool = Field(default=False, description="Only say which times these are.")
    max_parallel: int | None = Field(default=None, ge=1, le=10_000, description="How many runs at a time.")


def make_router(place: Place) -> APIRouter:
    routes = router()

    def schedules() -> Any:
        return import_module("orchestrator.schedules").Schedules(place.engine)

    @routes.get("/schedules", **says(shapes.Schedules))
    def list_schedules() -> Json:
        """List schedules with their next due times."""
        return page(schedules().list(), None)

    @routes.get("/schedules/{schedule}", **says(shapes.Schedule))
    def show_schedule(schedule: str) -> Json:
        """Show a schedule."""
        return Json(schedules().show(schedule))

    @routes.post("/schedules/{schedule}/pause", **says(shapes.Schedule, changes=True))
    @needs(Scope.ADMIN)
    def pause_schedule(schedule: str) -> Json:
        """Have a schedule start nothing until it is resumed."""
        schedules().pause(schedule)
        return Json(schedules().show(schedule))

    @routes.post("/schedules/{schedule}/resume", **says(shapes.Schedule, changes=True))
    @needs(Scope.ADMIN)
    def resume_schedule(schedule: str) -> Json:
        """Have a schedule go on."""
        schedules().resume(schedule)
        return Json(schedules().show(schedule))

    @routes.post(
        "/schedules/{schedule}/backfill", **says(shapes.Backfill, changes=True), openapi_extra=schema_of(Backfill)
    )
    @needs(Scope.ADMIN)
    def backfill_schedule(schedule: str, request: Request, body: Body) -> Json:
        """Start the runs of a schedule's past times that have not run, on low priority."""
        asked = read_body(body, Backfill)
        request.state.entry.note(start=asked.start, end=asked.end, max_parallel=asked.max_parallel)
        return Json(
            schedules().backfill(
                schedule, asked.start, asked.end, dry_run=asked.dry_run, max_parallel=asked.max_parallel
            )
        )

    return routes
