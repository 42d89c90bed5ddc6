"""What the endpoints work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query

from orchestrator.api.answers import PROBLEM_TYPE, Json, Refusal
from orchestrator.api.gate import Route
from orchestrator.durations import parse_duration
from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, shorten
from orchestrator.ledger.queries import Queries

#: Where all addresses begin.
ROOT = "/api/v1"
#: A request waits no longer than that for the end of a run.
LONGEST_WAIT_S = 300.0

Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]
After = Annotated[str | None, Query(description="The cursor `next` of the page before.")]
Wait = Annotated[str | None, Query(description="How long to wait for the end of the run, as 30s; at most 5m.")]

_PROBLEM: dict[str, Any] = {"content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
_EVERYWHERE = {
    401: "there is no token, or it is worthless",
    403: "the token does not allow this",
    404: "it is not known",
    422: "a parameter or the body does not fit",
    503: "a server is away; try again",
}
_CHANGES = {400: "the body is not JSON", 409: "not as it is now", 413: "the body is too large", 415: "it is not JSON"}


@dataclass(frozen=True, slots=True)
class Place:
    """The servers, and what can be asked of them."""

    engine: Engine
    queries: Queries


def router() -> APIRouter:
    """Return a router whose routes are those of the gate."""
    return APIRouter(route_class=Route)


def says(
    model: Any, *, status: int = 200, changes: bool = False, also: Mapping[int, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return what OpenAPI is to say of an endpoint: what it answers when all goes well, by status, and the problems."""
    problems: dict[int, Any] = {code: _PROBLEM | {"description": why} for code, why in _EVERYWHERE.items()}
    if changes:
        problems |= {code: _PROBLEM | {"description": why} for code, why in _CHANGES.items()}
    problems |= {code: {"model": answer} for code, answer in (also or {}).items()}
    return {"response_model": model, "status_code": status, "responses": problems, "response_class": Json} | more


def seconds(name: str, text: str | None, longest_s: float) -> float:
    """Return the seconds of a parameter that is a duration; 0 for None."""
    try:
        found = 0.0 if text is None else parse_duration(text).total_seconds()
    except ValueError as exc:
        raise InputError(f"{name} {exc}") from exc
    if found > longest_s:
        raise InputError(f"{name} must be at most {longest_s:g}s, not {text}")
    return found


def page(items: Any, cursor: str | None) -> Json:
    """Return a page of a list."""
    return Json({"items": list(items), "next": cursor})


def first_or_after(after: str | None, exc: NotFoundError) -> Exception:
    """Return what a list is to raise: that its cursor is not known is the fault of the parameter."""
    return exc if after is None else Refusal(422, f"after: no such cursor: {shorten(after)}; begin without it")
