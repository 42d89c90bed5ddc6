"""Engine: the ledger and the broker together; what the dispatcher, the workers and the rescuer do with runs.

The order is always the same: write to the ledger (which notes in its outbox what is to be published), publish, clear
the outbox. A process that dies in between leaves rows in the outbox, and `repair` publishes them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from celery import Celery

from orchestrator import canvas
from orchestrator.celery_app import broker_errors, make_app
from orchestrator.errors import UnavailableError
from orchestrator.ledger import Ledger
from orchestrator.ledger.ledger import connect
from orchestrator.payloads import FileBlobs, Payloads
from orchestrator.plan import Plan
from orchestrator.settings import Settings, mask_url

#: The id of a run is on the list of those in flight before the run is there: for no longer than this.
_STARTING_MS = 600_000


class Engine:
    """What starts runs and keeps them going. Safe to share between threads."""

    def __init__(
        self, settings: Settings, *, app: Celery | None = None, patience_s: float = 5.0, timeout_s: float = 10.0
    ) -> None:
        self.settings = settings
        self.app = make_app(settings) if app is None else app
        self.ledger = Ledger(
            connect(settings.ledger_url, patience_s=patience_s, timeout_s=timeout_s), retention_s=settings.retention_s
        )
        self.payloads = Payloads(FileBlobs(settings.blobs_dir), inline_bytes=settings.payload_bytes)
        self.plan = lru_cache(maxsize=256)(self.ledger.plan)

    def close(self) -> None:
        """Close connections; using the engine afterwards opens new ones."""
        self.ledger.client.close()
        self.app.close()

    def publish(self, run: str, plan: Plan, units: Sequence[str]) -> None:
        """Publish units that have become ready and clear them from the outbox.

        Raises UnavailableError if the broker is away: the units stay in the outbox, where `repair` finds them.
        """
        if not units:
            return
        ready = canvas.ready(self.app, plan, run, units)
        try:
            canvas.publish(self.app, ready)
        except broker_errors(self.app) as exc:
            raise UnavailableError(
                f"the broker at {mask_url(self.settings.broker_url)} cannot be used ({exc}); "
                "start it, or set broker_url"
            ) from exc
        self.ledger.clear(run, units)

    def start(
        self,
        run: str,
        plan: Plan,
        *,
        event: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start a run and publish its first canvas; False if that run exists already. Idempotent by `run`."""
        started = self.ledger.start(
            run,
            plan,
            event=self.payloads.pack(event, f"runs/{run}/event"),
            event_id=str(event.get("id", "")),
            run_input=self.payloads.pack(params, f"runs/{run}/input"),
            created_ms=now_ms(),
            parent=parent,
        )
        if started:
            self.publish(run, plan, plan.roots)
        return started

    def tell_parent(self, run: str, parent: str) -> None:
        """Tell the step that waits for this run, which has ended, how; then the run is in flight no more. Idempotent.

        `parent` is the JSON that a nested run was started with: run, step, index; empty if nobody waits.
        """
        if not parent:
            self.ledger.close(run)
            return
        where = json.loads(parent)
        state, output, error = self.ledger.outcome(run)
        tail = f',"run":{json.dumps(run)}'
        if state != "succeeded":
            reason = json.loads(error) if error else {"type": "Failed", "message": f"run {run} {state}"}
            tail += f',"error":{json.dumps(reason)}'
        answer = self.ledger.resolve(
            where["run"],
            where["step"],
            where["index"],
            run,
            "succeeded" if state == "succeeded" else "failed",
            payload=output if state == "succeeded" else "",
            tail=tail,
        )
        if answer.publish:
            self.publish(where["run"], self.plan(self.ledger.plan_of(where["run"])), answer.publish)
        if not self.ledger.clear(run, ["^parent"]):
            self.ledger.close(run)

    def repair(self, run: str, *, with_leases: bool = True) -> tuple[int, int]:
        """Publish again what a dead process left of this run: (units published, of which a worker was lost with).

        Takes a run that has ended off the list of those in flight. `with_leases`: give up those that have run out.
        """
        state, again, lost, left = self.ledger.sweep(run, with_leases=with_leases)
        units = [unit for unit in again if unit != "^parent"]
        if units:
            self.publish(run, self.plan(self.ledger.plan_of(run)), units)
        if "^parent" in again:
            self.tell_parent(run, self.ledger.parent_of(run))
        elif not state:
            self.ledger.drop(run, now_ms() - _STARTING_MS)
        elif state in ("succeeded", "failed", "cancelled") and not left:
            self.ledger.close(run)
        return len(units), lost

    def give_up(self, run: str, reason: str) -> None:
        """End a run that cannot go on as failed, and tell the step that waits for it; idempotent."""
        done, parent = self.ledger.give_up(run, {"type": "RunLost", "message": reason})
        if done:
            self.tell_parent(run, parent)

    def housekeep(self) -> None:
        """Drop what is past its retention: the blobs of old runs, and their places in the indexes."""
        for run in self.ledger.trim(now_ms() - self.settings.retention_s * 1000):
            self.payloads.delete_run(run)


def now_ms() -> int:
    """Return the time as ms since the epoch."""
    return time.time_ns() // 1_000_000
