"""Dead letters: list, show, send back, drop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from orchestrator import operations
from orchestrator.api import shapes
from orchestrator.api.answers import Json, Refusal
from orchestrator.api.bodies import Asked, Body, read_body, schema_of
from orchestrator.api.gate import needs
from orchestrator.api.place import After, Limit, Place, first_or_after, page, router, says, seconds
from orchestrator.deadletters import DeadLetter
from orchestrator.errors import InputError, NotFoundError
from orchestrator.redrive import Options, Redrive, Summary
from orchestrator.tokens import Scope

_LONGEST_S = 300.0
#: So many at a time: each may take long, and holds a thread.
_REDRIVES = 4

_Result = TypeVar("_Result")


class Chosen(Asked):
    """Which dead letters are meant: ids, or a filter, or all."""

    ids: list[str] = Field(default_factory=list, max_length=10_000)
    workflow: str | None = None
    step: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    since: str | None = Field(default=None, description="2h ago, or a time with its zone.")
    run: str | None = None
    all: bool = False


class RedriveAsked(Chosen):
    """Which dead letters are sent back, and how."""

    input: Any = Field(default=None, description="Laid over the arguments of the steps; or the mended event.")
    rate: str | None = Field(default=None, description="How many a second at most, as 10/s.")
    canary: int = Field(default=0, ge=0, le=1000, description="Send so many first; the rest only if they succeed.")
    timeout: str = Field(default="30s", description="How long to wait for a run that is going on.")


def make_router(place: Place) -> APIRouter:
    routes = router()
    engine, letters = place.engine, place.engine.dead_letters
    redrives = threading.BoundedSemaphore(_REDRIVES)

    def choose(asked: Chosen, request: Request) -> list[DeadLetter]:
        which = {name: getattr(asked, name) for name in ("workflow", "step", "reason", "fingerprint", "since", "run")}
        request.state.entry.note(ids=asked.ids, **which, all=asked.all or None)
        return list(operations.choose_letters(letters, asked.ids, operations.filter_of(**which), everything=asked.all))

    @routes.get("/dead-letters", **says(shapes.DeadLetters))
    def list_dead_letters(
        workflow: str | None = None,
        step: str | None = None,
        reason: str | None = None,
        fingerprint: str | None = None,
        since: Annotated[str | None, Query(description="2h ago, or a time with its zone.")] = None,
        run: str | None = None,
        limit: Limit = 50,
        after: After = None,
    ) -> Json:
        """List dead letters, newest first."""
        which = operations.filter_of(
            workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, since=since, run=run
        )
        try:
            found, cursor = letters.list(which, limit, after)
        except NotFoundError as exc:
            raise first_or_after(after, exc) from exc
        return page((one.to_json() for one in found), cursor)

    @routes.get("/dead-letters/groups", **says(shapes.Groups))
    def group_dead_letters(
        workflow: str | None = None,
        step: str | None = None,
        reason: str | None = None,
        fingerprint: str | None = None,
        since: Annotated[str | None, Query(description="2h ago, or a time with its zone.")] = None,
        run: str | None = None,
        limit: Limit = 50,
    ) -> Json:
        """List the causes of dead letters, the most frequent first."""
        which = operations.filter_of(
            workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, since=since, run=run
        )
        return page((group.to_json() for group in letters.groups(which)[:limit]), None)

    @routes.get("/dead-letters/{letter}", **says(shapes.DeadLetter))
    def show_dead_letter(letter: str) -> Json:
        """Show a dead letter with all that is known: every attempt and loss of a step, the bytes of a message."""
        return Json(letters.show(letters.get(letter)))

    @routes.get("/dead-letters/{letter}/raw", **says(None, response_class=Response))
    def show_bytes(letter: str) -> Response:
        """Answer the bytes of a message or event as they came."""
        found = letters.get(letter)
        if found.kind == "step":
            raise InputError(f"dead letter {found.id} is a step, which has no bytes")
        headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
        return Response(letters.raw(found.id) or b"", media_type="application/octet-stream", headers=headers)

    @routes.post("/dead-letters/redrive", **says(shapes.Redriven, changes=True), openapi_extra=schema_of(RedriveAsked))
    @needs(Scope.RUN)
    async def redrive_dead_letters(request: Request, body: Body) -> Json:
        """Send dead letters back: steps go on in their runs. Answers when they are sent and the canaries have ended."""

        def work() -> Summary:
            asked = read_body(body, RedriveAsked)
            options = Options(
                mended=asked.input,
                rate=operations.parse_rate(asked.rate),
                canary=asked.canary,
                timeout_s=seconds("timeout", asked.timeout, _LONGEST_S),
            )
            return Redrive(engine, letters, options).run(choose(asked, request))

        if not redrives.acquire(blocking=False):
            raise Refusal(503, "as many redrives as may be are at work here; try again when one has ended")
        summary = await _in_a_thread_of_its_own(work, redrives.release)
        request.state.entry.add(sent=len(summary.sent), skipped=len(summary.skipped), left=len(summary.left))
        return Json(summary.to_json())

    @routes.post("/dead-letters/discard", **says(shapes.Discarded, changes=True), openapi_extra=schema_of(Chosen))
    @needs(Scope.ADMIN)
    def discard_dead_letters(request: Request, body: Body) -> Json:
        """Drop dead letters, with the bytes of messages; runs stay as they are."""
        chosen = choose(read_body(body, Chosen), request)
        count = letters.discard([one.id for one in chosen])
        request.state.entry.add(discarded=count)
        return Json({"discarded": count})

    return routes


async def _in_a_thread_of_its_own(work: Callable[[], _Result], done: Callable[[], None]) -> _Result:
    """Answer what `work` answers; unlike that of a thread pool, its thread does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(result: _Result | None, fault: Exception | None) -> None:
        if future.done():
            return
        if fault is not None:
            future.set_exception(fault)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # it is one if there is no fault

    def run() -> None:
        result, fault = None, None
        try:
            result = work()
        except Exception as exc:  # noqa: BLE001 -- it is raised to who waits
            fault = exc
        finally:
            done()
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(settle, result, fault)

    threading.Thread(target=run, name="redrive", daemon=True).start()
    return await future
