"""Commands: what a worker answers to Celery's tools (orchestrator/remote_control.py): of steps, never of messages."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.ledger import keys
from orchestrator.remote_control import Command, revoke
from orchestrator.telemetry import get_logger
from workers.slots import Slots, Work
from workers.task_events import Monitoring, Told

log = get_logger(__name__)


class Commands:
    """Answers for one worker. `controller` gives Celery's worker object once it is there."""

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        monitoring: Monitoring,
        *,
        pool: str,
        worker: str,
        controller: Callable[[], Any],
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._monitoring = monitoring
        self._pool = pool
        self._worker = worker
        self._controller = controller
        self._since = time.time()

    def by_name(self) -> Mapping[str, Command]:
        """Return what is answered to which command."""
        nothing: dict[str, Command] = dict.fromkeys(
            ("scheduled", "reserved", "revoked", "registered"), lambda **_: []
        )  # what Celery knows of these are messages; steps that wait are in the ledger
        return nothing | {
            "ping": lambda **_: {"ok": "pong"},
            "stats": self._stats,
            "active": self._active,
            "active_queues": self._active_queues,
            "conf": self._conf,
            "revoke": partial(revoke, self._engine),
            "heartbeat": lambda **_: self._monitoring.beat(),
            "enable_events": lambda **_: {"ok": "task events enabled"},  # the control process sees to it
            "disable_events": lambda **_: {"ok": "they stop by themselves when nobody asks for them"},
        }

    def _conf(self, **_: Any) -> dict[str, Any]:
        settings = asdict(self._engine.settings.pool(self._pool))
        return {f"pool.{name}": value if value is None else str(value) for name, value in settings.items()}

    def _stats(self, **_: Any) -> dict[str, Any]:
        """Describe the worker as Celery's do: but its counts, which are of messages."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found: dict[str, Any] = {
            "pid": os.getpid(),
            "uptime": round(time.time() - self._since),
            "clock": str(self._engine.app.clock.value),
            "total": {},
            "pool": {},
            "rusage": {"utime": usage.ru_utime, "stime": usage.ru_stime, "maxrss": usage.ru_maxrss},
        }
        controller = self._controller()
        if controller is not None and controller.pool is not None:
            processes = controller.pool.info.get("processes", [])
            found["pool"] = {"implementation": type(controller.pool).__name__, "processes": processes}
            found["pool"]["max-concurrency"] = self._slots.count
        if controller is not None and controller.consumer is not None:
            found["prefetch_count"] = getattr(controller.consumer.qos, "value", None)
            broker = controller.consumer.connection
            if broker is not None:
                found["broker"] = {
                    name: value
                    for name, value in broker.info().items()
                    if name in ("hostname", "port", "transport", "virtual_host", "heartbeat")
                }
        return found

    def _active_queues(self, **_: Any) -> list[dict[str, Any]]:
        controller = self._controller()
        consumer = None if controller is None else getattr(controller.consumer, "task_consumer", None)
        return [] if consumer is None else [dict(queue.as_dict(recurse=True)) for queue in consumer.queues]

    def _active(self, **_: Any) -> list[dict[str, Any]]:
        works = [work for slot in range(self._slots.count) if (work := self._slots.read(slot)) and work.unit]
        workflows = self._workflows({work.run for work in works})
        return [self._shown(work, workflows.get(work.run, "?")) for work in works]

    def _workflows(self, runs: set[str]) -> dict[str, str]:
        ledger = self._engine.ledger
        try:
            with ledger.client.pipeline(transaction=False) as pipe:
                for run in runs:
                    pipe.hget(keys.run_key(run, "run"), "workflow")
                return dict(zip(runs, ledger.guard(pipe.execute), strict=True))
        except UnavailableError:
            return {}

    def _shown(self, work: Work, workflow: str) -> dict[str, Any]:
        since = time.time() - (time.monotonic() - work.since)
        told = Told(run=work.run, workflow=workflow, slot=work.slot, attempt=work.attempt, since=since)
        return {
            "id": told.id,
            "name": told.name,
            "type": told.name,
            "args": [told.run],
            "kwargs": told.kwargs,
            "hostname": self._worker,
            "time_start": since,
            "acknowledged": True,
            "delivery_info": {},
            "worker_pid": work.pid,
        }
