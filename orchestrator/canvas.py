"""Plan -> Celery canvas. The only place where signatures are made and published.

A message carries ids, never data: a *link* is `(run, step)`, a *header part* `(run, step, lo, hi)`. A path becomes
a `chain`, independent paths a `group`, a fan-out with its fan-in a `chord`. They are published as they are, but for
two things that the ledger does better (docs/decisions/0001): a chord sends its header and leaves its body to the
ledger, and so no message carries a `chord`; and a group never stands inside a chain.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

from celery import Celery
from celery.canvas import Signature, chain, chord, group

from orchestrator.celery_app import CONFIRM_TIMEOUT_S, STEP_TASK, publishing, queue_name
from orchestrator.plan import Plan, parts

#: Header of a message: when it was published, ms.
QUEUED_AT = "queued_at"


def link(app: Celery, plan: Plan, run: str, step: str, priority: str = "normal") -> Signature:
    """Return the signature of one link."""
    return _signature(app, plan, step, (run, step), priority)


def header_part(app: Celery, plan: Plan, run: str, step: str, lo: int, hi: int, priority: str = "normal") -> Signature:
    """Return the signature of the items lo to hi-1 of a fan-out."""
    return _signature(app, plan, step, (run, step, lo, hi), priority)


def _signature(app: Celery, plan: Plan, step: str, ids: tuple[str | int, ...], priority: str) -> Signature:
    queue = queue_name(plan.pool(step), priority)
    return app.signature(STEP_TASK, args=ids, immutable=True, queue=queue, ignore_result=True)


def path(app: Celery, plan: Plan, run: str, step: str, priority: str = "normal") -> Signature:
    """Return the chain of the links that begin at `step`; a lone link is no chain."""
    links = [link(app, plan, run, step_id, priority) for step_id in plan.path(step)]
    return links[0] if len(links) == 1 else chain(*links, app=app)


def fan_out(
    app: Celery, plan: Plan, run: str, step: str, ranges: Iterable[tuple[int, int]], priority: str = "normal"
) -> Signature:
    """Return the chord of a fan-out: its header parts, and as body what follows its end."""
    header = [header_part(app, plan, run, step, lo, hi, priority) for lo, hi in ranges]
    below = plan.downstream[step]
    body = _together(app, [path(app, plan, run, step_id, priority) for step_id in below]) if below else None
    return chord(header, body, app=app) if body is not None else group(header, app=app)


def ready(app: Celery, plan: Plan, run: str, units: Sequence[str], priority: str = "normal") -> Signature:
    """Return the canvas of units that have become ready: links by path, header parts by fan-out."""
    paths = []
    ranges: dict[str, list[tuple[int, int]]] = {}
    for unit in units:
        step, _, span = unit.partition("/")
        if span:
            lo, _, hi = span.partition("-")
            ranges.setdefault(step, []).append((int(lo), int(hi)))
        else:
            paths.append(path(app, plan, run, step, priority))
    fan_outs = (fan_out(app, plan, run, step, spans, priority) for step, spans in ranges.items())
    return _together(app, [*paths, *fan_outs])


def _together(app: Celery, canvases: Sequence[Signature]) -> Signature:
    return canvases[0] if len(canvases) == 1 else group(canvases, app=app)


def messages(canvas: Signature) -> Iterator[Signature]:
    """Return what is published of a canvas, each one message: links, chains, header parts; never a chord's body."""
    if isinstance(canvas, chord):
        yield from canvas.tasks
    elif isinstance(canvas, group):
        for member in canvas.tasks:
            yield from messages(member)
    else:
        yield canvas


def publish(app: Celery, canvas: Signature) -> int:
    """Publish a canvas in one pipeline and return the number of messages.

    Returns when the broker has them. Not idempotent: the ledger makes a repeat harmless.
    Raises kombu's OperationalError if the broker is away.
    """
    sent = list(messages(canvas))
    headers = {QUEUED_AT: time.time_ns() // 1_000_000}
    with publishing(app) as producer:
        # A pipeline of one costs more than the one message.
        with producer.batch() if len(sent) > 1 else nullcontext():
            for message in sent:
                message.apply_async(producer=producer, confirm_timeout=CONFIRM_TIMEOUT_S, headers=headers)
    return len(sent)


def build(app: Celery, plan: Plan, run: str = "RUN", items: int = 3) -> list[tuple[str, Signature]]:
    """Return the canvases that a run of this plan publishes when all goes well: (when, canvas).

    Fan-outs, whose size is known only in the run, are shown with `items` items.
    """
    found = [("at the start", ready(app, plan, run, plan.roots))]
    for step_id in plan.topological():
        if plan.steps[step_id].is_fan_out:
            spans = parts(items, max_parallel=plan.steps[step_id].max_parallel)
            found.append((f"when {step_id} has its list", fan_out(app, plan, run, step_id, spans)))
    for step_id in plan.segments():
        above = plan.upstream[step_id]
        if above:
            found.append(
                (f"when {', '.join(above)} {'has' if len(above) == 1 else 'have'} ended", path(app, plan, run, step_id))
            )
    return found
