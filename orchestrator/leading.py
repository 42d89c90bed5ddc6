"""Leading: work that one of several processes does, and another takes over within LEADER_MS when that one is gone.

For a moment two may think that they lead: what they do must be harmless when done twice.
"""

from __future__ import annotations

import threading
import uuid

from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.service import Service
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

#: Pause after a turn that has failed, and of who follows.
_PAUSE_S = 1.0


class LeadingService:
    """The loop, in a thread of its own; a subclass says what is done in a turn."""

    #: Who leads does so in this role.
    role: str

    def __init__(self, engine: Engine) -> None:
        # One of its own that waits for no server: else it would not know that one was away, nor that its lead ran out.
        self._engine = Engine(engine.settings, app=engine.app, patience_s=0.0)
        self._service = Service(self.role, self._loop)
        self._outage = Outage(log, self.role)
        self._me = uuid.uuid4().hex
        self._leads = False

    def start(self) -> None:
        """Begin; returns at once. A second start does nothing."""
        self._service.start()

    def stop(self) -> None:
        """End; returns when the turn in work is done. Another process may lead at once."""
        self._service.stop()
        try:
            self._engine.ledger.resign(self.role, self._me)
        except UnavailableError:
            log.info("lead_left_to_run_out", role=self.role)
        self._engine.counters.close()
        self._engine.ledger.client.close()

    def lead(self) -> tuple[bool, int]:
        """Take or keep the lead: (whether we have it, server's time in ms). Raises UnavailableError."""
        leads, now_ms = self._engine.ledger.lead(self.role, self._me)
        if leads != self._leads:
            change = f"{self.role}_{'leads' if leads else 'follows'}"
            log.info(change)
            self._leads = leads
        return leads, now_ms

    def turn(self) -> float:
        """Do what there is to do, if we lead; answers for how many seconds nothing further is. May raise anything."""
        raise NotImplementedError

    def _loop(self, stopping: threading.Event) -> None:
        wait_s = _PAUSE_S
        while not stopping.wait(wait_s):
            wait_s = self.try_turn()

    def try_turn(self) -> float:
        """Do a turn, and outlive it; answers after how many seconds the next is due."""
        try:
            wait_s = self.turn()
            self._outage.ends()
        except UnavailableError as exc:
            self._outage.begins(exc)
        except Exception:  # the loop owns the thread
            log.exception("turn_failed", role=self.role)
        else:
            return wait_s
        return _PAUSE_S
