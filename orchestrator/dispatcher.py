"""Dispatcher: event -> matching workflows -> runs.

For each event: drop it if its source + id was seen inside the dedupe window, ask every workflow's `on:`, start the
runs (their ids come from the event, so a repeat starts nothing), write the verdicts down, and only then let the bus
forget it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.counters import field
from orchestrator.engine import Engine, now_ms
from orchestrator.errors import InputError, OrchestratorError, UnavailableError
from orchestrator.eventlog import Verdict
from orchestrator.events import MANUAL, MANUAL_SOURCE, Event
from orchestrator.matching import Matcher, is_by_hand
from orchestrator.plan import Plan
from orchestrator.runs import StepError, run_id
from orchestrator.service import Service
from orchestrator.telemetry import Outage, bound, get_logger
from orchestrator.workflows import Workflow

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _InForce:
    """The definitions that hold for the events that come now."""

    plans: Mapping[str, Plan]
    matcher: Matcher
    hash: str


class Dispatcher:
    """Takes events off the bus, in a thread of its own, and starts what they ask for."""

    def __init__(self, engine: Engine, *, on_start: Callable[[str, str, Event], None] | None = None) -> None:
        self._engine = engine
        self._on_start = on_start
        self._in_force = _InForce({}, Matcher(()), "")
        self._outage = Outage(log, "dispatcher")
        self._service = Service("dispatcher", lambda stopping: engine.bus.consume(self._receive, stopping))

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force for the events that come from now on; also in the ledger, for whoever asks it."""
        plans = {workflow.name: Plan.of(workflow) for workflow in workflows}
        matcher = Matcher(plan.workflow for plan in plans.values())
        definitions = self._engine.ledger.publish_workflows(plans.values(), followed=matcher.followed())
        self._in_force = _InForce(plans, matcher, definitions)

    def start(self) -> None:
        """Begin to take events; returns at once. A second start does nothing."""
        self._service.start()

    def stop(self) -> None:
        """Take nothing new; returns when the event in work is done."""
        self._service.stop()

    def _receive(self, body: object, raw: bytes) -> None:
        try:
            event = Event.from_json(body)
        except InputError as exc:
            # What it found instead is a piece of the body.
            self._set_aside(raw, "not_an_event", str(exc).partition(", not ")[0])
            return
        except Exception as exc:  # noqa: BLE001 -- JSON that is read may still be too deep or too large to be shown
            self._set_aside(raw, "not_an_event", f"it cannot be read as an event ({type(exc).__name__})")
            return
        with bound(event_id=event.id):
            self._insist(event, raw)

    def _insist(self, event: Event, raw: bytes) -> None:
        wait_s = 0.1
        while True:
            try:
                self.dispatch(event)
                self._outage.ends()
                return
            except UnavailableError as exc:
                self._outage.begins(exc)
                if self._service.stopping.wait(wait_s):
                    raise
                wait_s = min(wait_s * 2, 5.0)
            except Exception as exc:  # noqa: BLE001 -- trying again would not help it, and would hold up all others
                self._set_aside(raw, "dispatch", f"it could not be dispatched: {type(exc).__name__}: {exc}")
                return

    def _set_aside(self, raw: bytes, reason: str, detail: str) -> None:
        self._engine.ledger.set_aside(raw, reason, now_ms(), detail=detail, queue=EVENT_QUEUE)
        log.error("event_set_aside", reason=reason)  # the detail may quote the event

    def dispatch(self, event: Event) -> dict[str, Verdict]:
        """Start what an event asks for and return the verdict of each workflow that asked for it; idempotent.

        Raises UnavailableError if the ledger or the broker is away: then it is to be dispatched again.
        """
        events, in_force = self._engine.events, self._in_force
        if events.seen(event):
            events.note_again(event, now_ms())
            log.info("event_seen_before", source=event.source)
            return {}
        verdicts: dict[str, Verdict] = {}
        is_loop = event.hops > self._engine.settings.maximum_hops
        if is_loop:
            detail = f"{event.hops} runs have caused each other, the last of workflow {event.subject}; see maximum_hops"
            self._set_aside(json.dumps(event.to_json()).encode(), "loop", detail)
        else:
            body = event.to_json()
            for name in in_force.matcher.match(body):
                verdicts[name] = self._start(in_force.plans[name], event, body)
            if is_by_hand(body) and not verdicts:
                verdicts[str(event.subject)] = Verdict(verdict="no_match", reason="no such workflow is in force")
        events.note(event, verdicts, definitions=in_force.hash, now_ms=now_ms(), loop=is_loop)
        return verdicts

    def _start(self, plan: Plan, event: Event, body: dict[str, Any]) -> Verdict:
        name = plan.workflow.name
        run = run_id(name, event.source, event.id)
        given = event.data if is_by_hand(body) and isinstance(event.data, dict) else {}
        try:
            params = plan.workflow.resolve_params(given, body)
            started = self._engine.start(run, plan, event=body, params=params)
        except UnavailableError:
            raise
        except OrchestratorError as exc:
            is_new = self._engine.ledger.start_failed(
                run,
                workflow=name,
                plan=plan.hash,
                event=self._engine.payloads.pack(body, f"runs/{run}/event"),
                event_id=event.id,
                created_ms=now_ms(),
                error=json.dumps(StepError(type=type(exc).__name__, message=str(exc)).to_json()),
            )
            if is_new:
                self._engine.counters.add(field("runs", workflow=name, state="failed"))
            self._engine.tell_followers(run)
            # Its text quotes the input; the run has it.
            log.error("run_refused", run=run, workflow=name, error=type(exc).__name__)
            return Verdict(verdict="refused", run=run, reason=str(exc))
        if started and self._on_start is not None:
            self._on_start(run, name, event)
        return Verdict(verdict="started", run=run)


def manual_event(workflow: str, data: object, *, event_id: str) -> Event:
    """Return the event that starts a workflow by hand, with `data` as its input."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Event(id=event_id, source=MANUAL_SOURCE, type=MANUAL, subject=workflow, time=moment, data=data)
