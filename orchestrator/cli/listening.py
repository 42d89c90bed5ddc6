"""What starts workflows, said in a few words each: for the greeting of `up` and for lists."""

from __future__ import annotations

from collections.abc import Container, Iterable
from datetime import datetime
from pathlib import Path

from orchestrator.recurrence import OnSchedule, describe_recurrence, due_times, utc_text
from orchestrator.settings import mask_url
from orchestrator.subscriptions import (
    On,
    OnEvent,
    OnFile,
    OnQueue,
    OnRun,
    OnS3,
    OnWebhook,
    kind_of_on,
    schedule_name,
)
from orchestrator.workflows import Workflow


def listened_to(
    workflows: Iterable[Workflow], gateway: str, now: datetime, paused: Container[str]
) -> list[tuple[str, str]]:
    """Return (kind, what is listened to and for whom) for all entries; `gateway` is its URL, `now` is aware.

    Schedules say when they are due next, unless their names are among the `paused`.
    """
    found = []
    for workflow in workflows:
        for on in workflow.on:
            about = describe_on(workflow.name, on)
            if isinstance(on, OnWebhook):
                about = gateway + about + ("" if on.verify is not None else ", open to everybody who reaches it,")
            if isinstance(on, OnSchedule):
                due = next(due_times(on, now), None)
                if schedule_name(workflow.name, on) in paused:
                    about += ", paused"
                else:
                    about += f", next at {utc_text(due)}" if due is not None else ", never due again"
            found.append((kind_of_on(on), f"{about} for {workflow.name}"))
    return found


def describe_on(workflow: str, on: On) -> str:
    """Return what an entry of a workflow listens to, in a few words and without passwords."""
    match on:
        case OnFile():
            return str(Path(on.path) / on.glob)
        case OnS3():
            return f"{on.bucket}/{on.prefix}*{on.suffix}"
        case OnWebhook():
            return f"/hooks/{on.path}"
        case OnSchedule():
            return f"{schedule_name(workflow, on)}: {describe_recurrence(on)} ({on.timezone})"
        case OnQueue():
            return f"{on.queue} at {mask_url(on.url)}"
        case OnRun():
            return f"{', '.join(on.workflow)}: {', '.join(on.state)}"
        case OnEvent():
            types = on.pattern.get("type", ())
            return ", ".join(one if isinstance(one, str) else "..." for one in types) or "a pattern"
