"""Rescuer: repairs what a dead process left behind.

It looks at the runs in flight once a second: units that have waited in a run's outbox longer than any live process
leaves them there are published again, and so are units whose lease ran out. Both are harmless when done twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import structlog

from orchestrator.engine import Engine
from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.ledger.ledger import LEASE_MS
from orchestrator.service import Service

log = structlog.get_logger(__name__)

PERIOD_S = 1.0
_HOUSEKEEPING_ROUNDS = 600
#: Runs looked at in one round trip.
_BATCH = 200


class Rescuer:
    """The loop, in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        # One of its own that waits for no server: else it would not know that one was away.
        self._engine = Engine(engine.settings, app=engine.app, patience_s=0.0)
        self._service = Service("rescuer", self._loop)

    def start(self) -> None:
        """Begin; returns at once. A second start does nothing."""
        self._service.start()

    def stop(self) -> None:
        """End; returns when the round in work is done."""
        self._service.stop()
        self._engine.ledger.client.close()

    def _loop(self, stopping: threading.Event) -> None:
        is_away, rounds = False, 0
        while not stopping.wait(PERIOD_S):
            try:
                if is_away:
                    # While the server was away nobody could renew a lease: give the living time to do it.
                    if not self._engine.ledger.is_up() or stopping.wait(LEASE_MS / 1000):
                        continue
                    log.info("rescuer_is_back")
                    is_away = False
                self.round()
                rounds += 1
                if rounds % _HOUSEKEEPING_ROUNDS == 1:
                    self._engine.housekeep()
            except UnavailableError as exc:
                if not is_away:
                    log.warning("rescuer_waits", error=str(exc))
                is_away = True
            except Exception:  # this loop owns the thread
                log.exception("rescue_failed")

    def round(self) -> int:
        """Look once at every run in flight and return how many units were published again."""
        published = 0
        for run in self._needing_care():
            if self._service.stopping.is_set():
                break
            try:
                again, lost = self._engine.repair(run)
            except UnavailableError:
                raise
            except OrchestratorError as exc:
                log.error("run_cannot_be_repaired", run=run, error=str(exc))
                continue
            except Exception:  # one bad run must not end the care for the others
                log.exception("run_cannot_be_repaired", run=run)
                continue
            if again:
                log.warning("units_published_again", run=run, units=again, lost=lost)
                published += again
        return published

    def _needing_care(self) -> Iterator[str]:
        runs = self._engine.ledger.active()
        for lo in range(0, len(runs), _BATCH):
            yield from self._engine.ledger.needing_care(runs[lo : lo + _BATCH])
