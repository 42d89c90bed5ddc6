"""Pools: list, show, set their sizes by hand. The last asks for `admin`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field

from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.place import After, Limit, Place, router, says
from orchestrator.sizes import MAXIMUM, Sizes


class ScaleAsked(Asked):
    """The size of a pool, whatever its `min` and `max`; `auto`: the autoscaler decides."""

    size: int | Literal["auto"] = Field(description=f"0 to {MAXIMUM}, or auto.")


def make_router(place: Place) -> APIRouter:
    routes, sizes = router(), Sizes(place.engine)

    @routes.get("/pools", **says(shapes.Pools))
    def list_pools(limit: Limit = 50, after: After = None) -> Json:
        """List pools: their size, what waits for them, what the autoscaler decided last and why."""
        pools, cursor, autoscaler = sizes.page(limit, after)
        return Json({"items": pools, "next": cursor, "autoscaler": autoscaler})

    @routes.get("/pools/{pool}", **says(shapes.Pool))
    def show_pool(pool: str) -> Json:
        """Show a pool and its workers."""
        return Json(sizes.show(pool))

    @routes.post("/pools/{pool}/scale", **says(shapes.Pool, changes=True), openapi_extra=schema_of(ScaleAsked))
    def scale_pool(pool: str, request: Request, body: Body) -> Json:
        """Set the size of a pool by hand, or have the autoscaler decide again."""
        asked = read_body(body, ScaleAsked)
        request.state.entry.note(size=str(asked.size))
        return Json(sizes.scale(pool, None if asked.size == "auto" else asked.size))

    return routes
