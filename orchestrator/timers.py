"""Timers: has what waits in runs taken up when its time has come: retries, sleeps, timeouts of runs.

What waits is in the ledger, with each run; a sorted set over all runs says when to look at which. Waiting holds no
worker and no message. A run that the set does not name (its writer died in between) is found overdue by the rescuer.
"""

from __future__ import annotations

from orchestrator.errors import NotFoundError
from orchestrator.leading import LeadingService
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

#: How late, at most, something is that another process has put in meanwhile.
PERIOD_S = 0.2
_FOLLOWER_S = 1.0
#: Runs taken up in one turn.
_BATCH = 500


class Timers(LeadingService):
    """The timers of all runs; of several processes one takes them up."""

    role = "timers"

    def turn(self) -> float:
        leads, now_ms = self.lead()
        if not leads:
            return _FOLLOWER_S
        runs, following = self._engine.ledger.due(now_ms, _BATCH)
        for run in runs:
            try:
                self._engine.fire(run)
            except NotFoundError as exc:
                log.warning("timer_of_no_run", run=run, error=str(exc))
        return PERIOD_S if following is None else min(PERIOD_S, max(0.0, (following - now_ms) / 1000))
