"""Health and metrics: `/healthz`, `/readyz`, `/metrics`; open to whoever reaches their port, quick without servers."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from orchestrator.api.answers import Json, install, problem
from orchestrator.engine import Engine
from orchestrator.metrics import Metrics


def make_health(engine: Engine) -> FastAPI:
    """Return health and metrics of the servers of an engine, as an ASGI application. It needs no lifespan."""
    metrics = Metrics(engine)
    app = FastAPI(title="Orchestrator: health", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install(app)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        """Answer as long as this process does."""
        return Json({"ok": True})

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    def readyz() -> Response:
        """Answer 200 if the ledger can be written to and the broker is there, else 503, and why."""
        faults = metrics.faults()
        if faults:
            return problem(503, "; ".join(faults))
        return Json({"ok": True})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    def show_metrics(request: Request) -> Response:
        """Answer what Prometheus asks for."""
        text, content_type = metrics.expose(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)

    return app
