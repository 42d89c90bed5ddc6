"""Dispatcher: event -> matching workflows -> runs.

For each event: drop it if its source + id was seen inside the dedupe window, ask every workflow's `on:`, start the
runs (their ids come from the event, so a repeat starts nothing), write the verdicts down, and only then let the bus
forget it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.engine import Engine, now_ms
from orchestrator.errors import InputError, OrchestratorError, UnavailableError
from orchestrator.events import FILE_CREATED, MANUAL, Event
from orchestrator.patterns import EventPattern
from orchestrator.plan import Plan
from orchestrator.runs import StepError, run_id
from orchestrator.service import Service
from orchestrator.subscriptions import OnEvent, OnFile, file_source
from orchestrator.telemetry import Outage, bound, get_logger
from orchestrator.workflows import Workflow

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Rule:
    plan: Plan
    sources: frozenset[str]
    patterns: tuple[EventPattern, ...]

    @classmethod
    def of(cls, workflow: Workflow) -> _Rule:
        return cls(
            Plan.of(workflow),
            frozenset(file_source(workflow.name, on.path) for on in workflow.on if isinstance(on, OnFile)),
            tuple(EventPattern.compile(on.pattern) for on in workflow.on if isinstance(on, OnEvent)),
        )

    def verdict(self, event: Event, body: dict[str, Any]) -> str | None:
        """Return None if the workflow asked for this event, else why it did not."""
        if event.type == MANUAL and event.source == "orchestrator:run":
            return None if event.subject == self.plan.workflow.name else "the event is for another workflow"
        if event.type == FILE_CREATED and event.source in self.sources:
            return None
        reasons = []
        for pattern in self.patterns:
            mismatch = pattern.explain(body)
            if mismatch is None:
                return None
            reasons.append(str(mismatch))
        return "; ".join(reasons) or "no `on:` entry asks for such events"


class Dispatcher:
    """Takes events off the bus, in a thread of its own, and starts what they ask for."""

    def __init__(
        self, engine: Engine, bus: EventBus, *, on_start: Callable[[str, str, Event], None] | None = None
    ) -> None:
        self._engine = engine
        self._on_start = on_start
        self._rules: tuple[_Rule, ...] = ()
        self._outage = Outage(log, "dispatcher")
        self._service = Service("dispatcher", lambda stopping: bus.consume(self._receive, stopping))

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force for the events that come from now on; also in the ledger, for whoever asks it."""
        rules = tuple(_Rule.of(workflow) for workflow in workflows)
        self._engine.ledger.publish_workflows(rule.plan for rule in rules)
        self._rules = rules

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

    def dispatch(self, event: Event) -> dict[str, str]:
        """Start what an event asks for and return the verdict of each workflow; idempotent.

        Raises UnavailableError if the ledger or the broker is away: then it is to be dispatched again.
        """
        ledger = self._engine.ledger
        if ledger.seen(event):
            log.info("event_seen_before", source=event.source)
            return {}
        body = event.to_json()
        verdicts: dict[str, str] = {}
        for rule in self._rules:
            name = rule.plan.workflow.name
            refusal = rule.verdict(event, body)
            verdicts[name] = refusal if refusal is not None else self._start(rule.plan, event, body)
        if event.type == MANUAL and event.subject not in verdicts:
            verdicts[str(event.subject)] = "no such workflow is in force"
        ledger.mark_seen(event, verdicts, accepted_ms=now_ms(), dedupe_s=self._engine.settings.dedupe_s)
        return verdicts

    def _start(self, plan: Plan, event: Event, body: dict[str, Any]) -> str:
        name = plan.workflow.name
        run = run_id(name, event.source, event.id)
        given = event.data if event.type == MANUAL and isinstance(event.data, dict) else {}
        try:
            params = plan.workflow.resolve_params(given, body)
            started = self._engine.start(run, plan, event=body, params=params)
        except UnavailableError:
            raise
        except OrchestratorError as exc:
            started = self._engine.ledger.start_failed(
                run,
                workflow=name,
                plan=plan.hash,
                event=self._engine.payloads.pack(body, f"runs/{run}/event"),
                event_id=event.id,
                created_ms=now_ms(),
                error=json.dumps(StepError(type=type(exc).__name__, message=str(exc)).to_json()),
            )
            # Its text quotes the input; the run has it.
            log.error("run_refused", run=run, workflow=name, error=type(exc).__name__)
            return f"started run {run}, which failed at once: {exc}"
        if started and self._on_start is not None:
            self._on_start(run, name, event)
        return f"started run {run}"


def manual_event(workflow: str, data: object, *, event_id: str) -> Event:
    """Return the event that starts a workflow by hand, with `data` as its input."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Event(id=event_id, source="orchestrator:run", type=MANUAL, subject=workflow, time=moment, data=data)
