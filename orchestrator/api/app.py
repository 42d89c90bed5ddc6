"""The API: `/api/v1`, with its OpenAPI description at `/api/v1/openapi.json`."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from orchestrator.api import audits, costs, deadletters, events, pools, runs, schedules, shapes, workflows
from orchestrator.api.answers import install
from orchestrator.api.gate import Gate
from orchestrator.api.place import ROOT, Place
from orchestrator.audit import Audit
from orchestrator.engine import Engine
from orchestrator.ledger.queries import Queries

_ABOUT = """
Runs, events, dead letters, workflows, schedules and pools. Objects are those of the command line's `--json`; lists
answer `items` and a cursor `next`, which `after` takes. Errors are problem+json (RFC 9457).
"""
#: How long one answer of the ledger may take; a server that is away is not waited for.
_TIMEOUT_S = 2.0


def make_app(engine: Engine) -> FastAPI:
    """Return the API on the servers of an engine, as an ASGI application that serves all below `/api/v1`.

    It asks for tokens unless the engine's settings have it on loopback, and there are none. It needs no lifespan.
    """
    # One that waits for no server: who asks is told at once that it is away.
    own = Engine(engine.settings, app=engine.app, patience_s=0.0, timeout_s=_TIMEOUT_S)
    place = Place(own, Queries(own.ledger, own.payloads))
    app = FastAPI(
        title="Orchestrator",
        version=version("orchestrator"),
        description=_ABOUT,
        openapi_url=f"{ROOT}/openapi.json",
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.audit = Audit(own.ledger)
    for part in (runs, events, deadletters, workflows, schedules, costs, pools, audits):
        app.include_router(part.make_router(place), prefix=ROOT)
    install(app)
    app.add_middleware(Gate, engine=own)
    describe = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            found = describe()
            parts = found.setdefault("components", {})
            parts.setdefault("schemas", {})["Problem"] = shapes.Problem.model_json_schema()
            parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"token": []}, {}]
        return dict(app.openapi_schema or {})

    app.openapi = openapi  # type: ignore[method-assign]
    return app
