"""What the API answers: JSON, and problems (RFC 9457) for whatever goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import redis
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from orchestrator.errors import (
    DefinitionError,
    ExpressionError,
    InFlightError,
    InputError,
    NotFoundError,
    OrchestratorError,
    PayloadError,
    UnavailableError,
    one_line,
)
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_S = 5
#: The first of these that an error is says its status.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (InFlightError, 409),
    (InputError, 422),
    (ExpressionError, 422),
    (DefinitionError, 422),
    (PayloadError, 422),
    (UnavailableError, 503),
    (redis.RedisError, 503),
)
_MESSAGE_CHARACTERS = 1000
#: Options of the command line, as errors name them; here they are parameters, or members of the body.
_OPTION = re.compile(r"(?<![\w-])--(?=[a-z])")


class Json(JSONResponse):
    """Any JSON value, also text that no encoding has (half of a surrogate pair), which is then escaped."""

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            return json.dumps(content, separators=(",", ":")).encode()


class Refusal(Exception):  # noqa: N818 -- says what it is: an answer, and no fault of ours
    """A request that is answered with a problem."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """Return the answer that says what is wrong, in one line."""
    said = dict(headers or {})
    if status == 503:
        said.setdefault("Retry-After", str(RETRY_AFTER_S))
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail} | members
    return Json(body, status_code=status, headers=said, media_type=PROBLEM_TYPE)


def status_of(exc: Exception) -> int:
    """Return the status that an error is answered with."""
    if isinstance(exc, Refusal):
        return exc.status
    if isinstance(exc, HTTPException):
        return exc.status_code
    if isinstance(exc, RequestValidationError):
        return 422
    return next((status for kind, status in _STATUS if isinstance(exc, kind)), 500)


def problem_of(exc: Exception) -> Response:
    """Return the answer to a request that ended in an error."""
    status = status_of(exc)
    if isinstance(exc, Refusal):
        return problem(status, exc.detail, headers=exc.headers)
    if isinstance(exc, HTTPException):
        return problem(status, str(exc.detail), headers=exc.headers)
    if isinstance(exc, RequestValidationError):
        return invalid(exc.errors())
    if isinstance(exc, redis.RedisError):
        log.warning("api_without_ledger", error=str(exc))
        return problem(status, "the ledger cannot be used; try again")
    if isinstance(exc, OrchestratorError) and status != 500:
        return problem(status, one_line(_OPTION.sub("", str(exc)), _MESSAGE_CHARACTERS))
    log.error("api_failed", exc_info=exc)
    return problem(500, "something went wrong here; the log of the gateway has what")


def invalid(errors: Any) -> Response:
    """Return the answer that names every fault of parameters or a body: {"field", "message"}."""
    faults = []
    for error in errors:
        place = [str(part) for part in error["loc"] if part not in ("query", "path", "body")]
        faults.append({"field": ".".join(place), "message": one_line(str(error["msg"]))})
    detail = "; ".join(
        f"{fault['field']}: {fault['message']}" if fault["field"] else fault["message"] for fault in faults
    )
    return problem(422, one_line(detail, _MESSAGE_CHARACTERS), errors=faults)


def install(app: FastAPI) -> None:
    """Have every error of an application answered with a problem."""

    async def handle(_: Request, exc: Exception) -> Response:
        return problem_of(exc)

    for kind in (HTTPException, RequestValidationError, OrchestratorError, redis.RedisError, Refusal):
        app.add_exception_handler(kind, handle)
