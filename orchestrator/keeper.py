"""Keeper: looks after dead letters: makes letters of what was set aside, drops those past retention."""

from __future__ import annotations

import time

from orchestrator.engine import Engine
from orchestrator.leading import LeadingService

_PERIOD_S = 1.0
_TRIM_EVERY_S = 600.0


class Keeper(LeadingService):
    """Drains what was set aside, and trims; of several processes one is at work."""

    role = "keeper"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._trim_at = 0.0

    def turn(self) -> float:
        leads, now_ms = self.lead()
        if not leads:
            return _PERIOD_S
        drained = self._engine.dead_letters.drain()
        if time.monotonic() >= self._trim_at:
            self._engine.dead_letters.trim(now_ms)
            self._trim_at = time.monotonic() + _TRIM_EVERY_S
        return 0.0 if drained else _PERIOD_S
