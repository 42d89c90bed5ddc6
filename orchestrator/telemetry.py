"""Logs: structlog everywhere, on stderr; for people on a terminal, JSON otherwise. Also for the standard `logging`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


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


_OURS = ("orchestrator", "workers", "triggers")


def configure_logging(*, verbose: bool = False, is_terminal: bool | None = None) -> None:
    """Set logging up for this process; calling it again replaces what was set up."""
    terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    last: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if terminal:
        last.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
