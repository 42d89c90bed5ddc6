"""What people ask for, by the command line or by the API: each thing that takes more than one call is done here."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.cloud_events import attributes_of
from orchestrator.deadletters import REASONS, DeadLetter, DeadLetters, Filter, parse_since
from orchestrator.dispatcher import manual_event
from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, shorten, unknown
from orchestrator.eventlog import NOT_IN_FORCE
from orchestrator.events import Event, foreign_fault, replay_of
from orchestrator.ledger.queries import Queries
from orchestrator.runs import cost_of, rfc3339, run_id
from orchestrator.settings import mask_url
from orchestrator.workflows import Workflow

#: The source of events that say none.
OWN_SOURCE = "orchestrator:emit"
#: What in an entry of `on:` may be the URL of a server.
_URLS = ("url", "endpoint_url", "queue")
#: Letters a second: one in a quarter of an hour.
_LEAST_RATE = 0.001


def workflow_in_force(engine: Engine, name: str) -> Workflow:
    """Return the definition in force of a workflow. Raises NotFoundError."""
    known = engine.ledger.workflows()
    if name not in known:
        raise NotFoundError(f"{unknown('workflow', name, known)} (in force: {', '.join(known) or 'none'})")
    return Workflow.from_json(known[name]["workflow"])


def shown(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition (`Workflow.to_json`) as people see it: without the passwords of URLs in its `on:`."""
    entries = [
        {
            kind: {name: mask_url(value) if name in _URLS and isinstance(value, str) else value for name, value in of}
            for kind, of in ((kind, given.items()) for kind, given in entry.items())
        }
        for entry in definition.get("on", ())
    ]
    return {**definition, "on": entries} if entries else dict(definition)


def explain_workflow(engine: Engine, name: str, *, since: str, limit: int) -> list[dict[str, Any]]:
    """Return what events of late were to a workflow, and why. Raises NotFoundError for one that none of them knew."""
    since_ms = parse_since(since, engine.ledger.now_ms())
    found = engine.events.explain_workflow(name, since_ms=since_ms, limit=limit)
    if all(one["reason"] == NOT_IN_FORCE for one in found):
        workflow_in_force(engine, name)
    return found


def costs(engine: Engine, *, since: str) -> dict[str, Any]:
    """Return what runs have taken since then (as 7d, or a time with its zone), by workflow, the dearest first.

    `items` has workflow, runs, wall_s, cpu_s and gb_s, also of workflows in force that had none: nothing is taken when
    nothing happens. `total` adds them up. A nested run counts with its own workflow. Raises InputError.
    """
    since_ms = parse_since(since, engine.ledger.now_ms())
    found = Queries(engine.ledger, engine.payloads).costs(since_ms)
    nothing = {"runs": 0, **cost_of((None, None, None))}
    by_workflow = {name: found.get(name, nothing) for name in {*found, *engine.ledger.workflows()}}
    dearest = sorted(by_workflow, key=lambda name: (-by_workflow[name]["gb_s"], -by_workflow[name]["cpu_s"], name))
    total = {key: round(sum(one[key] for one in by_workflow.values()), 6) for key in nothing}
    items = [{"workflow": name, **by_workflow[name]} for name in dearest]
    return {"since": rfc3339(since_ms), "items": items, "total": total}


def start_run(engine: Engine, name: str, given: Mapping[str, Any], *, key: str | None = None) -> tuple[str, Event]:
    """Ask for a run of a workflow by hand: (its id, the event that starts it). The same key never starts two.

    Raises NotFoundError, InputError for an input that does not fit, UnavailableError if the broker is away.
    """
    event = manual_event(name, dict(given), event_id=key or str(uuid.uuid4()))
    # Checked here for the one who asks; the dispatcher checks it again.
    workflow_in_force(engine, name).resolve_params(given, event.to_json())
    _check(event)
    engine.bus.publish([event])
    return run_id(name, event.source, event.id), event


def _check(event: Event) -> None:
    """Raise InputError for an event that the dispatcher would set aside, as long as somebody is there to be told."""
    Event.from_json(event.to_json())


def read_event(body: object) -> Event:
    """Return the event that somebody emits: a CloudEvent, or as much of one as they care to say: `type` and `data`.

    Raises InputError, also for one that claims to be ours.
    """
    given = attributes_of(body)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = {"specversion": "1.0", "id": str(uuid.uuid4()), "time": moment, "source": "-"} | given
    event = Event.from_json(said)
    fault = foreign_fault(event)
    if fault:
        raise InputError(fault)
    return event if "source" in given else Event.from_json(said | {"source": OWN_SOURCE})


def replay_event(engine: Engine, event: str) -> Event:
    """Have an event dealt with anew, by its id or key, and return what is on the bus now.

    Raises NotFoundError, InputError, UnavailableError.
    """
    found = engine.events.get(event)["event"]
    if found is None:
        raise InputError(f"the data of event {event!r} is gone; it cannot be replayed")
    again = replay_of(Event.from_json(found), uuid.uuid4().hex[:8])
    engine.bus.publish([again])
    return again


def cancel_runs(engine: Engine, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Cancel runs, all of them or, if one is not known, none: [{"id", "cancelled", "state"}]. Raises NotFoundError."""
    for run in runs:
        engine.ledger.plan_of(run)
    return [{"id": run, "cancelled": engine.cancel(run), "state": engine.ledger.outcome(run)[0]} for run in runs]


def cancel_step(engine: Engine, run: str, step: str, index: int | None = None) -> dict[str, Any]:
    """Cancel one step, or one item of it: {"id", "step", "index", "cancelled", "state"}. Raises as the engine does."""
    slot = step if index is None else f"{step}/{index}"
    cancelled = engine.cancel_step(run, slot)
    state = engine.ledger.state_of(run, slot)
    return {"id": run, "step": step, "index": index, "cancelled": cancelled, "state": state}


def read_logs(
    queries: Queries,
    run: str,
    step: str | None,
    index: int | None,
    *,
    limit: int | None = None,
    after: str | None = None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Return what attempts of a run printed and how they failed, and the cursor of the next page.

    [{"step", "index", "attempt", "text", "error"}]. Raises NotFoundError for a step that it does not have.
    """
    steps = [one.id for one in queries.run(run).steps]
    if step is not None and step not in steps:
        raise NotFoundError(f"run {run} has no step {step!r}; it has {', '.join(steps)}")
    found, cursor = queries.logs(run, step, index, limit=limit, after=after)
    entries = []
    for slot, attempt, text, error in found:
        name, _, item = slot.partition("/")
        number = int(item) if item else None
        entries.append({"step": name, "index": number, "attempt": attempt, "text": text, "error": error})
    return entries, cursor


def filter_of(
    *,
    workflow: str | None = None,
    step: str | None = None,
    reason: str | None = None,
    fingerprint: str | None = None,
    since: str | None = None,
    run: str | None = None,
) -> Filter:
    """Return which dead letters are meant. Raises InputError."""
    if reason is not None and reason not in REASONS:
        raise InputError(f"--reason: {unknown('reason', reason, REASONS)}; there are {', '.join(REASONS)}")
    since_ms = None if since is None else parse_since(since, time.time_ns() // 1_000_000)
    return Filter(workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, run=run, since_ms=since_ms)


def choose_letters(
    letters: DeadLetters, ids: Sequence[str], which: Filter, *, everything: bool
) -> Sequence[DeadLetter]:
    """Return the letters that were meant; never all of them by accident. Raises InputError, NotFoundError."""
    if ids:
        if everything or not which.is_empty:
            raise InputError("give ids or a filter, not both")
        return letters.listed(ids)
    if which.is_empty and not everything:
        raise InputError("which dead letters? give ids, a filter such as --fingerprint, or --all")
    return list(letters.all(which))


def parse_rate(text: str | None) -> float:
    """Return how many a second `10/s` is; 0 for None. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*s)?\s*", text or "0", re.ASCII)
    if match is None or (text is not None and float(match[1]) < _LEAST_RATE):
        raise InputError(f"--rate must be a number of letters a second, as 10/s, not {shorten(text)}")
    return float(match[1])
