"""Keeper: looks after dead letters: makes letters of what was set aside, reports them, drops those past retention."""

from __future__ import annotations

import time

from orchestrator.engine import Engine
from orchestrator.leading import LeadingService
from orchestrator.reports import Reporter, drain_unreported
from orchestrator.settings import read_reference

_PERIOD_S = 1.0
_TRIM_EVERY_S = 600.0


class Keeper(LeadingService):
    """The keeper of all dead letters; of several processes one is at work."""

    role = "keeper"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._reporter = Reporter(dsn) if (dsn := read_reference(engine.settings.sentry_dsn)) else None
        self._trim_at = 0.0

    def stop(self) -> None:
        super().stop()
        if self._reporter is not None:
            self._reporter.close()

    def turn(self) -> float:
        leads, now_ms = self.lead()
        if not leads:
            return _PERIOD_S
        letters = self._engine.dead_letters
        drained = letters.drain()
        if self._reporter is not None:
            drain_unreported(self._engine.ledger.client, letters.report, self._reporter)
        if time.monotonic() >= self._trim_at:
            letters.trim(now_ms)
            self._trim_at = time.monotonic() + _TRIM_EVERY_S
        return 0.0 if drained else _PERIOD_S
