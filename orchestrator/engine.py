"""Engine: the ledger and the broker together; what the dispatcher, the workers and the rescuer do with runs.

The order is always the same: write to the ledger (which notes in its outbox what is to be published), publish, clear
the outbox. A process that dies in between leaves rows in the outbox, and `repair` publishes them again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from celery import Celery

from orchestrator import canvas
from orchestrator.bus import EventBus
from orchestrator.celery_app import PRIORITIES, broker_errors, make_app
from orchestrator.counters import Counters, field
from orchestrator.deadletters import DeadLetters
from orchestrator.errors import InputError, NotFoundError, UnavailableError
from orchestrator.eventlog import EventLog
from orchestrator.events import CAUSATION, HOPS, PRIORITY, RUN_EVENTS, RUNS_SOURCE, Event
from orchestrator.ledger import Ledger
from orchestrator.ledger.ledger import connect
from orchestrator.ledger.pools import PoolRecords
from orchestrator.payloads import FileBlobs, Payloads
from orchestrator.plan import Plan
from orchestrator.runs import RunState, child_run_id, rfc3339
from orchestrator.settings import Settings, mask_url
from orchestrator.subscriptions import schedule_source
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

#: Rows of the outbox that begin so are chores (ledger/keys.py), and not to be published.
CHORES = "!^"
#: The autoscaler is woken this often at most by one process for one pool.
_RING_S = 1.0
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
            connect(settings.ledger_url, patience_s=patience_s, timeout_s=timeout_s),
            retention_s=settings.retention_s,
            failed_retention_s=settings.dead_letters_retention_s,
        )
        self.payloads = Payloads(FileBlobs(settings.blobs_dir), inline_bytes=settings.payload_bytes)
        self.dead_letters = DeadLetters(self.ledger, self.payloads, settings)
        self.events = EventLog(self.ledger, self.payloads, settings)
        self.bus = EventBus(self.app)
        self.counters = Counters(self.ledger)
        self.pools = PoolRecords(self.ledger)
        self._rung: dict[str, float] = {}
        self.plan = lru_cache(maxsize=256)(self.ledger.plan)

    def close(self) -> None:
        """Close connections; using the engine afterwards opens new ones."""
        self.counters.close()
        self.ledger.client.close()
        self.app.close()

    def publish(self, run: str, rows: Sequence[str], *, plan: Plan | None = None, priority: str | None = None) -> None:
        """Publish units that have become ready, do the chores among the rows, and clear them from the outbox.

        Raises UnavailableError if a server is away: the rows stay in the outbox, where `repair` finds them;
        NotFoundError if the run's plan is gone. `plan` and `priority` are those of the run, if they are at hand.
        """
        units = [row for row in rows if row[0] not in CHORES]
        slots = [row[1:] for row in rows if row[0] == "!"]
        if units:
            self._publish(
                run, plan or self.plan(self.ledger.plan_of(run)), units, priority or self.ledger.priority_of(run)
            )
        if slots:
            self.dead_letters.bury(run, slots)
        for row in rows:
            if row.startswith(("^cancel:", "^await:")):
                self._see_to_child(run, row.partition(":")[2], cancel=row.startswith("^cancel:"))
        has_ended = "^ended" in rows or "^parent" in rows  # the second is what earlier versions wrote
        if has_ended:
            self._tell_parent(run)
        outbox = [row for row in rows if row != "^close"]
        left = self.ledger.clear(run, outbox) if outbox else 0
        if not left and (has_ended or "^close" in rows):
            self._close(run)

    def _close(self, run: str) -> None:
        """Tell whoever follows a run that has ended, take it off the list of those in flight, and count it."""
        self.tell_followers(run)
        workflow, state = self.ledger.close(run)
        if state:
            self.counters.add(field("runs", workflow=workflow, state=state))

    def tell_followers(self, run: str) -> None:
        """Put the event of a run's end on the bus, if it has ended and a workflow in force may ask for it; idempotent.

        Raises UnavailableError.
        """
        followed = self.ledger.followed_runs()
        if not followed:
            return
        fields = self.ledger.ending(run)
        if not {f"{fields.get('workflow')}:{fields.get('state')}", f"*:{fields.get('state')}"} & followed:
            return
        self.bus.publish([run_event(run, fields, self.payloads)])

    def _publish(self, run: str, plan: Plan, units: Sequence[str], priority: str) -> None:
        ready = canvas.ready(self.app, plan, run, units, priority)
        try:
            canvas.publish(self.app, ready)
        except broker_errors(self.app) as exc:
            raise UnavailableError(
                f"the broker at {mask_url(self.settings.broker_url)} cannot be used ({exc}); "
                "start it, or set broker_url"
            ) from exc
        self._ring({plan.pool(unit.partition("/")[0]) for unit in units})

    def pools_in_use(self) -> set[str]:
        """Return the pools for which workflows in force, or runs in flight, have steps. Raises UnavailableError."""
        plans = {str(row["plan"]) for row in self.ledger.workflows().values()} | self.ledger.plans_in_flight()
        found: set[str] = set()
        for plan in plans:
            try:
                found |= self.plan(plan).pools
            except NotFoundError:
                continue  # the rescuer ends its runs
        return found

    def _ring(self, pools: Iterable[str]) -> None:
        """Wake the autoscaler for pools to which something was published, if this process has not just done so."""
        now = time.monotonic()
        quiet = [pool for pool in pools if now - self._rung.get(pool, -_RING_S) >= _RING_S]
        if not quiet:
            return
        self._rung.update(dict.fromkeys(quiet, now))
        try:
            self.pools.ring(quiet)
        except UnavailableError as exc:  # it looks by itself, a little later
            log.info("autoscaler_not_woken", pools=quiet, error=str(exc))

    def start(
        self,
        run: str,
        plan: Plan,
        *,
        event: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: Mapping[str, Any] | None = None,
        timeout_ms: int = 0,
    ) -> bool:
        """Start a run and publish its first canvas; False if that run exists already. Idempotent by `run`.

        `parent` (run, step, index, attempt) waits for it; with `timeout_ms` it may take no longer, nor than its
        workflow says.
        """
        priority = _priority_of(event)
        started = self.ledger.start(
            run,
            plan,
            event=self.payloads.pack(event, f"runs/{run}/event"),
            event_id=str(event.get("id", "")),
            run_input=self.payloads.pack(params, f"runs/{run}/input"),
            created_ms=now_ms(),
            parent=parent,
            timeout_ms=min(filter(None, (timeout_ms, plan.timeout_ms)), default=0),
            priority=priority,
        )
        if started:
            self.counters.add(field("runs_started", workflow=plan.workflow.name))
            self.publish(run, plan.roots, plan=plan, priority=priority)
        return started

    def cancel(self, run: str) -> bool:
        """Cancel a run and the runs nested in it: what has not begun never will, what is in work is told to stop.

        If its hooks are at work these are what is cancelled. Durable once this has returned, and idempotent; False if
        it has ended or is being cancelled already. Raises NotFoundError.
        """
        return self._cancel(run, self.ledger.phase_of(run))

    def _cancel(self, run: str, phase: str) -> bool:
        answer = self.ledger.cancel(run, phase)
        self.publish(run, answer.publish)
        return answer.verdict == "ok"

    def cancel_step(self, run: str, slot: str, attempt: int = 0) -> bool:
        """Cancel one step of a run, with its items and what is nested in it, or one item (`step/index`).

        The rest of the run goes on; what is downstream goes on as if it had failed. Durable once this has returned,
        and idempotent; False if it has ended or is being cancelled already, or if `attempt` is given and over.
        Raises NotFoundError, InputError for what is not there yet.
        """
        step = slot.partition("/")[0]
        answer = self.ledger.cancel_step(run, slot, attempt)
        match answer.verdict:
            case "unknown":
                raise NotFoundError(f"run {run} is not known; see `orchestrator runs list`")
            case "no_step":
                there = ", ".join(self.plan(self.ledger.plan_of(run)).steps)
                raise NotFoundError(f"run {run} has no step {step!r}; it has {there}")
            case "no_item":
                raise NotFoundError(f"step {step} of run {run} has no item {slot.partition('/')[2]}")
            case "no_attempt":
                raise NotFoundError(f"step {slot} of run {run} has no attempt {attempt}")
            case "early":
                raise InputError(f"{slot} of run {run} is not there yet; cancel it when it is, or the whole run")
        self.publish(run, answer.publish)
        return answer.verdict == "ok"

    def fire(self, run: str) -> int:
        """Take up what in a run waited for a time that has come; answers how much is published. Idempotent."""
        rows = self.ledger.fire(run)
        self.publish(run, rows)
        return len(rows)

    def _tell_parent(self, run: str) -> None:
        """Tell the step that waits for this run, which has ended, how; idempotent."""
        parent = self.ledger.parent_of(run)
        if parent:
            where = json.loads(parent)
            self._resolve(where["run"], where["step"], where["index"], where.get("attempt", 1), run)

    def _see_to_child(self, run: str, slot: str, *, cancel: bool) -> None:
        """Look after the nested run of a slot: cancel it, also if the slot waits no more, or note how it has ended."""
        step, _, index = slot.partition("/")
        attempt = self.ledger.attempts_of(run, slot)[0]
        child, is_known = self.ledger.child_of(run, slot), True
        if not child:
            if not cancel:
                return
            # It was begun, and nobody could say any more whether its nested run was started.
            child, is_known = child_run_id(run, step, int(index) if index else None, attempt), False
        state = self.ledger.outcome(child)[0]
        if state and not RunState(state).is_end:
            if cancel or not self.ledger.is_waiting(run, slot):
                self._cancel(child, "")
        elif is_known:
            self._resolve(run, step, int(index or -1), attempt, child)

    def _resolve(self, run: str, step: str, index: int, attempt: int, child: str) -> None:
        """Record how the nested run of an attempt of a step has ended; a failure may be tried again."""
        state, output, error = self.ledger.outcome(child)
        tail, outcome, delay_ms, now = f',"run":{json.dumps(child)}', "succeeded", 0, 0
        plan = self.plan(self.ledger.plan_of(run))
        if state != "succeeded":
            why = f"run {child} {state or 'is gone'}"
            reason = json.loads(error) if error else {"type": "Failed", "message": why}
            tail += f',"error":{json.dumps(reason)}'
            outcome, slot = "failed", step if index < 0 else f"{step}/{index}"
            waiting = plan.steps.get(step)  # a changed definition may not have it
            policy = waiting.retry if waiting is not None else None
            tries = self.ledger.attempts_of(run, slot)[1]
            if policy is not None and state == "failed" and policy.may_retry(tries, [reason["type"]]):
                outcome, now = "retrying", self.ledger.now_ms()
                delay_ms = round(policy.delay_s(tries, random.random()) * 1000)  # noqa: S311 -- spreads load
        answer = self.ledger.resolve(
            run, step, index, attempt, child, outcome,
            payload=output if outcome == "succeeded" else "", tail=tail, now_ms=now, delay_ms=delay_ms,
        )  # fmt: skip
        if answer.verdict == "ok":
            self.counters.add(field("steps", workflow=plan.workflow.name, state=outcome))
        self.publish(run, answer.publish)

    def repair(self, run: str, *, with_leases: bool = True) -> tuple[int, int]:
        """Publish again what a dead process left of this run: (units published, of which a worker was lost with).

        Takes a run that has ended off the list of those in flight, and takes up what is overdue in others.
        `with_leases`: give up those that have run out.
        """
        state, again, lost, left = self.ledger.sweep(run, with_leases=with_leases)
        self.publish(run, again)
        if not state:
            self.ledger.drop(run, now_ms() - _STARTING_MS)
        elif not RunState(state).is_end:
            self.fire(run)
        elif not left:
            self._close(run)
        return len(again), lost

    def give_up(self, run: str, reason: str) -> None:
        """End a run that cannot go on as failed, and tell the step that waits for it; idempotent."""
        self.publish(run, self.ledger.give_up(run, {"type": "RunLost", "message": reason}))

    def housekeep(self) -> None:
        """Drop what is past its retention: the blobs of old runs, their places in the indexes, and events."""
        for run in self.ledger.trim(now_ms() - self.settings.retention_s * 1000):
            self.payloads.delete(f"runs/{run}")
        self.events.trim(now_ms())


def run_event(run: str, fields: Mapping[str, str], payloads: Payloads) -> Event:
    """Return the event of a run's end, made of what `Ledger.ending` has; the same each time.

    An output that is kept as a blob does not travel: then `output` is null and `output_omitted` true.
    """
    cause = payloads.unpack_or_none(fields["event"]) or {}
    hops = cause.get(HOPS, 0)
    data: dict[str, Any] = {
        "run": run,
        "workflow": fields["workflow"],
        "state": fields["state"],
        "episode": int(fields["episode"]),
        "output": None if fields["output"].startswith("@") else payloads.unpack(fields["output"]),
        "error": json.loads(fields["error"]) if fields["error"] else None,
    }
    if fields["output"].startswith("@"):
        data["output_omitted"] = True
    return Event(
        id=f"{run}.{fields['episode']}",
        source=RUNS_SOURCE,
        type=RUN_EVENTS[fields["state"]],
        subject=fields["workflow"],
        time=rfc3339(int(fields["finished_at"] or 0)) or "",
        data=data,
        extensions={CAUSATION: str(cause.get("id", "")), HOPS: (hops if isinstance(hops, int) else 0) + 1},
    )


def _priority_of(event: Mapping[str, Any]) -> str:
    """Return the priority of the runs of an event. Only schedules say one; what others call `priority` is theirs."""
    said = event.get(PRIORITY)
    is_ours = str(event.get("source", "")).startswith(schedule_source(""))
    return str(said) if is_ours and said in PRIORITIES else "normal"


def now_ms() -> int:
    """Return the time as ms since the epoch."""
    return time.time_ns() // 1_000_000
