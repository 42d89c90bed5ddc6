"""Runs: list, show, wait for, cancel, go on with, start anew, read what they printed."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from orchestrator import operations
from orchestrator.api import shapes
from orchestrator.api.answers import Json, Refusal
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.gate import needs
from orchestrator.api.place import (
    LONGEST_WAIT_S,
    ROOT,
    After,
    Limit,
    Place,
    Wait,
    first_or_after,
    page,
    router,
    says,
    seconds,
)
from orchestrator.engine import Engine
from orchestrator.errors import NotFoundError
from orchestrator.resume import check, rerun, resume
from orchestrator.runs import RunState
from orchestrator.tokens import Scope

_LOOK_S = (0.02, 1.0)

LogLimit = Annotated[int, Query(ge=1, le=200, description="How many attempts at most.")]


class Resume(Asked):
    """How to go on with a run."""

    keep_definition: bool = Field(default=False, description="Go on with the definition that the run has.")
    take_definition: bool = Field(default=False, description="Go on with the one in force, though it has changed.")
    dry_run: bool = Field(default=False, description="Only say what would be kept and what would run.")


async def wait_for(engine: Engine, run: str, seconds: float, request: Request) -> bool:
    """Wait for the end of a run, up to so many seconds; answers whether it has ended.

    Holds no thread meanwhile, and gives up when nobody waits for the answer any more.
    """
    until, pause_s = time.monotonic() + seconds, _LOOK_S[0]
    while True:
        state = (await run_in_threadpool(engine.ledger.outcome, run))[0]
        left_s = until - time.monotonic()
        has_ended = bool(state) and RunState(state).is_end
        if has_ended or left_s <= 0 or await request.is_disconnected():
            return has_ended
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.5, _LOOK_S[1])


def make_router(place: Place) -> APIRouter:
    routes = router()
    engine, queries = place.engine, place.queries

    @routes.get("/runs", **says(shapes.Runs))
    def list_runs(
        workflow: str | None = None, state: RunState | None = None, limit: Limit = 50, after: After = None
    ) -> Json:
        """List runs, newest first."""
        try:
            found, cursor = queries.runs(limit=limit, after=after, workflow=workflow, state=state)
        except NotFoundError as exc:
            raise first_or_after(after, exc) from exc
        return page((one.to_json(with_steps=False) for one in found), cursor)

    @routes.get("/runs/{run}", **says(shapes.Run | shapes.StepRun | shapes.StepRuns))
    async def show_run(
        request: Request,
        run: str,
        step: Annotated[str | None, Query(description="Only this step; of a fan-out, its items.")] = None,
        wait: Wait = None,
        limit: Limit = 50,
        after: After = None,
    ) -> Json:
        """Show a run with its steps, or one step, or the items of a fan-out."""
        wait_s = seconds("wait", wait, LONGEST_WAIT_S)
        if wait_s:
            await run_in_threadpool(engine.ledger.plan_of, run)
            await wait_for(engine, run, wait_s, request)
        return await run_in_threadpool(_show, place, run, step, limit, after)

    @routes.get("/runs/{run}/logs", **says(shapes.Logs))
    def show_logs(
        run: str,
        step: str | None = None,
        index: Annotated[int | None, Query(ge=0)] = None,
        limit: LogLimit = 50,
        after: After = None,
    ) -> Json:
        """Show what each attempt of a run's steps printed and logged, and the errors of those that failed."""
        try:
            found, cursor = operations.read_logs(queries, run, step, index, limit=limit, after=after)
        except NotFoundError as exc:
            raise (first_or_after(after, exc) if "cursor" in str(exc) else exc) from exc
        return page(found, cursor)

    @routes.post("/runs/{run}/cancel", **says(shapes.Cancelled, changes=True))
    @needs(Scope.RUN)
    def cancel_run(run: str) -> Json:
        """Cancel a run and those nested in it: what has not begun never will, and steps at work are told to stop."""
        return Json(operations.cancel_runs(engine, [run])[0])

    @routes.post("/runs/{run}/steps/{step}/cancel", **says(shapes.StepCancelled, changes=True))
    @needs(Scope.RUN)
    def cancel_step(
        run: str,
        step: str,
        request: Request,
        index: Annotated[int | None, Query(ge=0, description="Only this item of a fan-out.")] = None,
    ) -> Json:
        """Cancel one step, with its items or its nested run; the rest goes on, below it as if it had failed."""
        request.state.entry.note(index=index)
        return Json(operations.cancel_step(engine, run, step, index))

    @routes.post(
        "/runs/{run}/resume", **says(shapes.Resumed, changes=True), openapi_extra=schema_of(Resume, required=False)
    )
    @needs(Scope.RUN)
    def resume_run(run: str, request: Request, body: Body) -> Json:
        """Go on with a run that failed or was cancelled, from the steps on that failed or never ended."""
        asked = read_body(body, Resume)
        request.state.entry.note(dry_run=asked.dry_run, keep_definition=asked.keep_definition)
        found = check(engine, run, keep_definition=asked.keep_definition)
        if asked.dry_run:
            return Json(found.to_json())
        if found.definition_changed and not (asked.keep_definition or asked.take_definition):
            raise Refusal(
                409,
                f"the definition of {found.workflow} has changed; go on with the one in force by take_definition, or "
                "with the run's own by keep_definition",
            )
        episode = resume(engine, run, keep_definition=asked.keep_definition, episode=found.episode)
        return Json(found.to_json() | {"episode": episode})

    @routes.post("/runs/{run}/rerun", **says(shapes.Rerun, status=201, changes=True))
    @needs(Scope.RUN)
    def rerun_run(run: str, request: Request) -> Json:
        """Start a new run of the same event, with the definition in force."""
        new = rerun(engine, run)
        request.state.entry.add(run=new)
        return Json({"id": new, "rerun_of": run}, status_code=201, headers={"Location": f"{ROOT}/runs/{new}"})

    return routes


def _show(place: Place, run: str, step: str | None, limit: int, after: str | None) -> Json:
    if step is None:
        return Json(place.queries.run(run).to_json())
    one = place.queries.step(run, step)
    if one.items is None:
        return Json(one.to_json())
    try:
        items, cursor = place.queries.items(run, step, limit=limit, after=after)
    except NotFoundError as exc:
        raise first_or_after(after, exc) from exc
    return page((item.to_json() for item in items), cursor)
