"""What workflows have taken."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from orchestrator import operations
from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.place import Place, router, says


def make_router(place: Place) -> APIRouter:
    routes = router()

    @routes.get("/costs", **says(shapes.Costs))
    def show_costs(
        since: Annotated[str, Query(description="Runs made since then: as 7d, or a time with its zone.")] = "30d",
    ) -> Json:
        """Show what the steps of each workflow have taken, the dearest first."""
        return Json(operations.costs(place.engine, since=since))

    return routes
