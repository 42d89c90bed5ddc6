"""Failures: what the record of an attempt says of the error that ended it, and of what it was called with."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import (
    ExpressionError,
    OrchestratorError,
    PayloadError,
    SettingsError,
    TaskNotFoundError,
)
from orchestrator.modules import relative
from orchestrator.payloads import dumps
from orchestrator.retries import kinds_of
from orchestrator.runs import StepError
from orchestrator.signals import Fail, Retry, StepCancelled, StepTimeout
from workers.capture import Captured

_MESSAGE_CHARACTERS = 4000
_TRACEBACK_CHARACTERS = 16_000
_FRAME_LIMIT = 30
_INPUT_CHARACTERS = 16_000


class WorkerLostError(OrchestratorError):
    """The process that ran a step died too often."""

    def __init__(self, last: str, times: int) -> None:
        self.last = last
        super().__init__(
            f"the process that ran this step died {times} times, the last time: {last}; it is not tried again"
        )


#: Named without the module that they happen to be in.
_OURS = (OrchestratorError, StepTimeout, StepCancelled, Retry, Fail)
#: Errors of ours whose message says it all: a traceback would only show our own code.
_PLAIN = (ExpressionError, PayloadError, SettingsError, TaskNotFoundError, WorkerLostError)
_REASONS: Mapping[type[BaseException], str] = {
    StepTimeout: "timeout",
    MemoryError: "memory",
    WorkerLostError: "worker_lost",
    TaskNotFoundError: "unknown_task",
}


def describe_error(exc: BaseException, project: Path, mask: Callable[[str], str] = str) -> StepError:
    """Return what an error was, its traceback and frames cut to those of the user's project, its texts masked."""
    kind = type(exc)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__") and not isinstance(exc, _OURS):
        name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(exc)
    except BaseException as broken:  # noqa: BLE001 -- an error whose text cannot be made is still an error
        message = f"(its message could not be made: {type(broken).__name__})"
    if isinstance(exc, SystemExit):
        message = f"the step called sys.exit({message})"
    if isinstance(exc, MemoryError) and not message:
        message = "no memory was left to it (see its `memory:`)"
    return StepError(
        type=mask(name),
        # Masked before they are cut: half a secret would not be found.
        message=mask(message)[:_MESSAGE_CHARACTERS],
        traceback="" if isinstance(exc, _PLAIN) else mask(_user_traceback(exc, project))[-_TRACEBACK_CHARACTERS:],
        reason=next((reason for cause, reason in _REASONS.items() if isinstance(exc, cause)), "error"),
        frames=_user_frames(exc, project),
        kinds=kinds_of(kind),
    )


def _user_frames(exc: BaseException, project: Path) -> tuple[tuple[str, int, str], ...]:
    frames = (
        (frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(exc.__traceback__)
    )
    users = [(relative(project, file), line, name) for file, line, name in frames if _is_users(file, project)]
    return tuple(users[-_FRAME_LIMIT:])


def _user_traceback(exc: BaseException, project: Path) -> str:
    try:
        report = traceback.TracebackException.from_exception(exc, limit=-_FRAME_LIMIT, compact=True)
        one: traceback.TracebackException | None = report
        while one is not None:
            users = [frame for frame in one.stack if _is_users(frame.filename, project)]
            ours = str(Path(__file__).parent)
            one.stack = traceback.StackSummary.from_list(
                users or [frame for frame in one.stack if not frame.filename.startswith(ours)]
            )
            one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        return "".join(report.format())
    except Exception as broken:  # noqa: BLE001 -- of a SyntaxError that somebody has made by hand, for one
        return f"(its traceback could not be made: {type(broken).__name__})"


def _is_users(filename: str, project: Path) -> bool:
    return filename.startswith(f"{project}{os.sep}") and "site-packages" not in filename


def input_of(arguments: Mapping[str, Any], captured: Captured) -> str:
    """Return a member for the attempt's record: the arguments of the call, secrets masked.

    None if they are large, or what JSON does not have.
    """
    try:
        text = dumps(_masked(arguments, captured))
    except (PayloadError, RecursionError, ValueError):  # an expression may give what JSON does not have
        return ""
    return f',"input":{text}' if arguments and len(text) <= _INPUT_CHARACTERS else ""


def _masked(value: Any, captured: Captured) -> Any:
    if isinstance(value, str):
        return captured.mask(value)
    if isinstance(value, dict):
        return {captured.mask(str(key)): _masked(element, captured) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(element, captured) for element in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = captured.mask(str(value))
        return value if text == str(value) else text
    return value
