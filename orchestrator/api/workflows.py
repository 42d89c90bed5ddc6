"""Workflows in force: list, show, draw, start."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field
from redis import RedisError
from starlette.concurrency import run_in_threadpool

from orchestrator import canvas, drawing, operations
from orchestrator.api import shapes
from orchestrator.api.answers import Json
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.gate import needs
from orchestrator.api.place import LONGEST_WAIT_S, ROOT, Limit, Place, Wait, page, router, says, seconds
from orchestrator.api.runs import wait_for
from orchestrator.deadletters import parse_since
from orchestrator.errors import UnavailableError
from orchestrator.plan import Plan
from orchestrator.tokens import Scope

_FORMS = {"tree": drawing.tree, "mermaid": drawing.mermaid, "dot": drawing.dot}


class Start(Asked):
    """How to start a workflow by hand."""

    input: dict[str, Any] = Field(default_factory=dict, description="The workflow's params.")
    key: str | None = Field(
        default=None, min_length=1, max_length=500, description="The same key never starts the workflow twice."
    )


def make_router(place: Place) -> APIRouter:
    routes = router()
    engine = place.engine

    @routes.get("/workflows", **says(shapes.Workflows))
    def list_workflows() -> Json:
        """List the workflows in force."""
        return page((operations.shown(known["workflow"]) for known in engine.ledger.workflows().values()), None)

    @routes.get("/workflows/{workflow}", **says(shapes.Workflow))
    def show_workflow(workflow: str) -> Json:
        """Show the definition in force of a workflow."""
        return Json(operations.shown(operations.workflow_in_force(engine, workflow).to_json()))

    @routes.get(
        "/workflows/{workflow}/graph",
        **says(None, response_class=PlainTextResponse),
    )
    def draw_workflow(workflow: str, format: Literal["tree", "mermaid", "dot"] = "tree") -> Response:  # noqa: A002
        """Draw a workflow."""
        drawn = _FORMS[format](Plan.of(operations.workflow_in_force(engine, workflow)))
        return PlainTextResponse(drawn.encode("utf-8", "backslashreplace"))

    @routes.get("/workflows/{workflow}/build", **says(shapes.Canvases))
    def build_workflow(workflow: str) -> Json:
        """Show the Celery canvases that a run of a workflow publishes."""
        plan = Plan.of(operations.workflow_in_force(engine, workflow))
        return page(({"when": when, "canvas": repr(built)} for when, built in canvas.build(engine.app, plan)), None)

    @routes.get("/workflows/{workflow}/events", **says(shapes.WorkflowEvents))
    def explain_workflow(
        workflow: str,
        since: Annotated[str, Query(description="How far back, as 1h, or a time with its zone.")] = "1h",
        limit: Limit = 50,
    ) -> Json:
        """Say what each event of late was to a workflow, newest first: the run that it started, or why none."""
        since_ms = parse_since(since, engine.ledger.now_ms())
        return page(engine.events.explain_workflow(workflow, since_ms=since_ms, limit=limit), None)

    @routes.post(
        "/workflows/{workflow}/runs",
        **says(shapes.Started, status=202, changes=True, also={200: shapes.Run}),
        openapi_extra=schema_of(Start, required=False),
    )
    @needs(Scope.RUN)
    async def start_run(workflow: str, request: Request, body: Body, wait: Wait = None) -> Json:
        """Start a workflow by hand; with `wait` the answer is the run when it has ended (200), if that is in time."""
        wait_s = seconds("wait", wait, LONGEST_WAIT_S)

        def start() -> tuple[str, str]:
            asked = read_body(body, Start)
            run, event = operations.start_run(engine, workflow, asked.input, key=asked.key)
            return run, event.id

        run, event_id = await run_in_threadpool(start)
        request.state.entry.add(run=run)
        with suppress(UnavailableError, RedisError):  # it is asked for, whatever can be seen of it now
            if wait_s and await wait_for(engine, run, wait_s, request):
                return Json(await run_in_threadpool(lambda: place.queries.run(run).to_json()))
        started = {"id": run, "workflow": workflow, "event_id": event_id}
        return Json(started, status_code=202, headers={"Location": f"{ROOT}/runs/{run}"})

    return routes
