"""The audit log: who has changed what."""

from __future__ import annotations

from fastapi import APIRouter

from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.gate import needs
from orchestrator.api.place import After, Limit, Place, first_or_after, page, router, says
from orchestrator.audit import Audit
from orchestrator.errors import NotFoundError
from orchestrator.tokens import Scope


def make_router(place: Place) -> APIRouter:
    routes = router()
    audit = Audit(place.engine.ledger)

    @routes.get("/audit", **says(shapes.AuditEntries))
    @needs(Scope.ADMIN)
    def list_audit(limit: Limit = 50, after: After = None) -> Json:
        """List who asked for which change, and what came of it, newest first."""
        try:
            return page(*audit.list(limit=limit, after=after))
        except NotFoundError as exc:
            raise first_or_after(after, exc) from exc

    return routes
