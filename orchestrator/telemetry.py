"""Logs: one line for each, on stderr; for people on a terminal, JSON otherwise.

    ours    get_logger(__name__).info("run_freed", run=...)  ──────────────────────────┐
    user's  structlog, unless they configure it  ──> logging ──> Logger.callHandlers ──┴─> mask, context, one line

Ours depend on nothing that a user can configure: neither on `logging` nor on structlog's defaults. The user's and those
of libraries are taken where `logging` hands a record to its handlers, whatever handlers there are (as Sentry's
integration does it): `basicConfig`, `dictConfig` and handlers of their own work as everywhere and harm nothing of ours.

Lines of ours hold no bodies: ids, counts, names and reasons, each cut to a length.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import Any, NoReturn, TextIO

import structlog

#: Loggers of what a process is made of: WARNING and above, without extra fields, which may hold the bodies of messages.
MACHINERY = ("celery", "kombu", "amqp", "billiard", "redis", "asyncio", "uvicorn")

#: Longest texts: of ours, of the user's, of a traceback (its end is what tells).
_OUR_CHARACTERS = 500
_USERS_CHARACTERS = 16_000
_TRACEBACK_CHARACTERS = 16_000
#: Of a list or mapping as many elements are written, and of what is nested as many levels.
_ELEMENTS = 100
_LEVELS = 5

#: Attributes that every record has; what else it has came by `extra=`.
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_STRUCTURED = "_structlog"


class Outage:
    """Whether something that is needed is away: one log line when it goes, one when it is back."""

    def __init__(self, logger: Any, what: str) -> None:
        self._log = logger
        self._what = what
        self.is_on = False

    def begins(self, error: object, **about: object) -> None:
        """Note that it is away; logs `<what>_waits` unless that is known."""
        if not self.is_on:
            self._log.warning(f"{self._what}_waits", error=str(error), **about)
        self.is_on = True

    def ends(self) -> None:
        """Note that it works; logs `<what>_goes_on` if it did not before."""
        if self.is_on:
            self._log.info(f"{self._what}_goes_on")
        self.is_on = False


# What lines are about


@dataclass(frozen=True, slots=True)
class _Scope:
    names: Mapping[str, object]
    mask: Callable[[str], str] | None


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)
#: Scopes of the steps in work in this process, the one that began last at the end.
_of_steps: list[_Scope] = []
#: Of the process: its role, and its pool.
_process: dict[str, object] = {}


@contextmanager
def bound(*, mask: Callable[[str], str] | None = None, is_step: bool = False, **names: object) -> Iterator[None]:
    """Add `names` to every line that is written in this block, and mask the texts of these lines.

    Blocks nest: an inner one adds to the outer. With `is_step` the names are also those of threads that have none of
    their own, as those that a step starts (of several steps at a time: of the one that began last), and what the step
    binds in structlog's context is forgotten at its end.
    """
    outer = _scope.get()
    scope = _Scope({**outer.names, **names}, mask or outer.mask) if outer else _Scope(names, mask)
    token = _scope.set(scope)
    if is_step:
        _of_steps.append(scope)
    try:
        yield
    finally:
        _scope.reset(token)
        if is_step:
            _of_steps.remove(scope)
            structlog.contextvars.clear_contextvars()


def _current() -> _Scope:
    scope = _scope.get()
    if scope is None:
        last = _of_steps[-1:]
        scope = last[0] if last else _Scope({}, None)
    return scope


# Ours


def get_logger(name: str) -> Any:
    """Return the structlog logger of a module of ours; what users configure does not change it."""
    return structlog.wrap_logger(
        _Name(name),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        context_class=dict,
        cache_logger_on_first_use=True,
    )


@dataclass(frozen=True, slots=True)
class _Name:
    """What stands in the place of a logger: the last processor has written the line already."""

    name: str


def _write_ours(logger: _Name, level: str, line: dict[str, Any]) -> NoReturn:
    exc_info = line.pop("exc_info", None)
    event = line.pop("event")
    _write(level, logger.name, event, line, exc_info, at=datetime.now(UTC), is_ours=True)
    raise structlog.DropEvent


#: Of our loggers; a list, so that a test can put its own in the place of the last.
processors: list[Any] = [_write_ours]


# The user's, and the libraries'


def _for_logging(_: Any, level: str, line: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """Make a call to `logging` of a structlog line: readable for any handler, and with its fields for us."""
    options: dict[str, Any] = {name: line.pop(name) for name in ("exc_info", "stack_info") if name in line}
    event = line.pop("event", "")
    text = " ".join([str(event), *(f"{name}={value}" for name, value in line.items())])
    return (text,), options | {"extra": {_STRUCTURED: (event, line)}}


def message_of(record: logging.LogRecord) -> str:
    """Return the text of a record; also of one whose arguments do not fit."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 -- a bad log call does not fail the step, and is not lost
        return f"{record.msg} {record.args}"


def _write_record(record: logging.LogRecord) -> None:
    event: object
    if hasattr(record, _STRUCTURED):
        event, fields = getattr(record, _STRUCTURED)
    elif record.name.partition(".")[0] in MACHINERY:
        event, fields = message_of(record), {}
    else:
        event = message_of(record)
        fields = {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
    if record.stack_info:
        fields = {**fields, "stack": record.stack_info}
    at = datetime.fromtimestamp(record.created, UTC)
    _write(record.levelname.lower(), record.name, event, fields, record.exc_info, at=at, is_ours=False)


def _hook(hand_on: Callable[[logging.Logger, logging.LogRecord], None]) -> Any:
    @wraps(hand_on)
    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        try:
            hand_on(logger, record)
        finally:
            _write_record(record)

    call_handlers.is_ours = True  # type: ignore[attr-defined]
    return call_handlers


# A line


def _write(
    level: str, logger: str, event: object, fields: Mapping[str, object], exc_info: Any, *, at: datetime, is_ours: bool
) -> None:
    scope = _current()
    cut = _Cut(scope.mask, _OUR_CHARACTERS if is_ours else _USERS_CHARACTERS)
    line: dict[str, Any] = {
        "event": cut.text(event),
        "level": level,
        "logger": logger,
        "timestamp": at.isoformat().replace("+00:00", "Z"),
        **_process,
        **scope.names,
    }
    for key, value in fields.items():
        name = cut.text(key)
        while name in line and not is_ours:  # ids that lines are looked for by are ours alone
            name += "_"
        line[name] = cut.value(value)
    exc = _exception(exc_info)
    if exc is not None:
        line["exception"] = {
            "type": type(exc).__name__,
            "message": cut.text(exc),
            "traceback": _Cut(scope.mask, _TRACEBACK_CHARACTERS).end("".join(traceback.format_exception(exc))),
        }
    _out.write(line)


def _exception(exc_info: Any) -> BaseException | None:
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    elif exc_info is True or exc_info == 1:
        exc_info = sys.exc_info()[1]
    return exc_info if isinstance(exc_info, BaseException) else None


class _Cut:
    """Makes what is written of a value: JSON, masked, bounded. Never raises."""

    def __init__(self, mask: Callable[[str], str] | None, characters: int) -> None:
        self._mask = mask or (lambda text: text)
        self._characters = characters

    def text(self, value: object) -> str:
        text = self._masked(value)
        return text if len(text) <= self._characters else f"{text[: self._characters]}…"

    def end(self, value: str) -> str:
        text = self._masked(value)
        return text if len(text) <= self._characters else f"…{text[-self._characters :]}"

    def _masked(self, value: object) -> str:
        try:
            return self._mask(str(value))
        except Exception as exc:  # noqa: BLE001 -- whatever the __str__ of a user's object raises
            return f"(its text could not be made: {type(exc).__name__})"

    def _is_plain(self, number: float) -> bool:
        """Tell whether JSON has this number, and it is no secret."""
        try:
            text = str(number)
        except ValueError:  # more digits than Python writes
            return False
        return self._mask(text) == text and text not in ("nan", "inf", "-inf")

    def value(self, value: object, levels: int = _LEVELS) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return value if self._is_plain(value) else self.text(value)
        if levels and type(value) is dict:
            rows = list(value.items())[:_ELEMENTS]
            return {self.text(key): self.value(element, levels - 1) for key, element in rows}
        if levels and isinstance(value, list | tuple | set | frozenset):
            return [self.value(element, levels - 1) for element in list(value)[:_ELEMENTS]]
        return self.text(value)


class _Out:
    """Where lines go. Until `configure_logging`: to what stderr is just then."""

    def __init__(self, stream: TextIO | None = None, *, is_terminal: bool | None = None) -> None:
        self._stream = stream
        self._is_terminal = is_terminal
        self._console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)

    def write(self, line: dict[str, Any]) -> None:
        stream = sys.stderr if self._stream is None else self._stream
        try:
            if stream.isatty() if self._is_terminal is None else self._is_terminal:
                if "exception" in line:
                    line["exception"] = line["exception"]["traceback"]
                text = str(self._console(None, line["level"], line))
            else:
                text = json.dumps(line)
            # In one call, so that lines of several threads do not mix; and without a lock, which a fork could inherit.
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # nobody takes our lines any more (closed, or no stderr at all): the work goes on


_out = _Out()


def configure_logging(*, role: str = "", pool: str = "", is_terminal: bool | None = None) -> None:
    """Set logging up for this process; every line says its role and pool. Calling it again replaces what was set up."""
    global _out
    _out = _Out(sys.stderr, is_terminal=sys.stderr.isatty() if is_terminal is None else is_terminal)
    _process.clear()
    _process.update({name: value for name, value in (("role", role), ("pool", pool)) if value})
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _for_logging,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = []
    root.setLevel(logging.WARNING)
    logging.lastResort = logging.NullHandler()
    for name in MACHINERY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if not hasattr(logging.Logger.callHandlers, "is_ours"):
        logging.Logger.callHandlers = _hook(logging.Logger.callHandlers)  # type: ignore[method-assign]
