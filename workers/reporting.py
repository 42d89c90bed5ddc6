"""Reporting: once a second a worker says how it is, and is told its target.

Until an autoscaler that leads has told a new worker its target, it stands by: others may have all that the pool, or the
machine, has.
"""

from __future__ import annotations

import os
import socket
import time

from orchestrator.engine import Engine, now_ms
from orchestrator.errors import UnavailableError
from orchestrator.pools import PoolKind, WorkerReport
from orchestrator.releases import release
from orchestrator.telemetry import get_logger
from workers.machine import Machine
from workers.sizing import Sizing
from workers.slots import Slots
from workers.step import Identity

log = get_logger(__name__)

#: How often a worker reports; what the autoscaler should know at once goes with the watch's next look.
REPORT_S = 1.0
#: An autoscaler that tells a worker nothing for so long is in no state to: the worker goes by what it sees itself.
_UNTOLD_S = 5.0


class Reporting:
    """The reports of one worker. Used by the watch alone."""

    def __init__(
        self, engine: Engine, slots: Slots, sizing: Sizing, identity: Identity, *, pool: str, kind: PoolKind
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._sizing = sizing
        self._identity = identity
        self._pool = pool
        self._kind = kind
        self._host = socket.gethostname()
        self._version = release()
        self._started_ms = now_ms()
        self._report_at = 0.0
        self._untold_since: float | None = None

    def turn(self, now: float) -> None:
        """Report if it is time to. Raises UnavailableError; the worker then goes by its last target."""
        if now < self._report_at and not self._sizing.has_news:
            return
        self._report_at = now + REPORT_S
        self._sizing.has_news = False
        target, is_led, self._slots.is_monitored = self._engine.pools.report(self._report())
        if is_led and target is None:
            target = self._until_told(now)
        else:
            self._untold_since = None
        self._sizing.target = target

    def _until_told(self, now: float) -> int | None:
        """Have the autoscaler look at once, and ask again; meanwhile all stays as it is (a new worker stands by)."""
        if self._untold_since is None:
            self._untold_since = now
            self._engine.pools.ring([self._pool])
        if now - self._untold_since > _UNTOLD_S:
            return None
        self._report_at = now
        return self._sizing.target

    def end(self) -> None:
        """Take the worker off the list; it ends."""
        try:
            self._engine.pools.withdraw([self._identity.worker])
        except UnavailableError:
            log.info("worker_not_withdrawn", worker=self._identity.worker)

    def _report(self) -> WorkerReport:
        now, machine, sizing = time.monotonic(), Machine.look(), self._sizing
        since = [since for slot in range(self._slots.count) if (since := self._slots.message_since(slot))]
        told = [self._slots.served(slot) for slot in range(self._slots.count)]
        in_work = [round(now - one, 3) for one in since]
        return WorkerReport(
            worker=self._identity.worker,
            pool=self._pool,
            host=self._host,
            pid=os.getpid(),
            version=self._version,
            code=self._identity.code,
            kind=self._kind,
            started_ms=self._started_ms,
            seen_ms=now_ms(),
            ceiling=sizing.ceiling,
            size=sizing.size,
            # A process that starts for a message is at work as well.
            in_work=in_work + [0.0] * min(sizing.unbegun, max(0, sizing.size - len(in_work))),
            served=[sum(counts) for counts in zip(*(served for _, served in told), strict=True)],
            process_s=round(sizing.process_s, 3),
            busy_s=round(sum(busy_s for busy_s, _ in told) + sum(in_work), 3),
            cores=max(1, int(machine.cores)),
            memory=machine.memory,
            memory_available=machine.memory_available,
            gpus=len(machine.gpus),
            is_draining=self._slots.is_draining,
            fault=sizing.fault,
        )
