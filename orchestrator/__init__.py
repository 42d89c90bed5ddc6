"""An event-driven, serverless workflow orchestrator on message queues.

    from orchestrator import on, task, workflow

These are the names that a project imports; everything else is reached by the command line and the API.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.context import Context
    from orchestrator.events import Event
    from orchestrator.outputs import errors_of, event, index, item, secrets, state_of
    from orchestrator.retries import RetryPolicy
    from orchestrator.signals import Fail, Retry, StepCancelled, StepTimeout
    from orchestrator.tracing import on, sleep, task, until, workflow

__all__ = [
    "Context",
    "Event",
    "Fail",
    "Retry",
    "RetryPolicy",
    "StepCancelled",
    "StepTimeout",
    "errors_of",
    "event",
    "index",
    "item",
    "on",
    "secrets",
    "sleep",
    "state_of",
    "task",
    "until",
    "workflow",
]

_HOMES = {
    "Context": "context",
    "Event": "events",
    "RetryPolicy": "retries",
    **dict.fromkeys(("Fail", "Retry", "StepCancelled", "StepTimeout"), "signals"),
    **dict.fromkeys(("on", "sleep", "task", "until", "workflow"), "tracing"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: the processes of `up` import this package and need none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"orchestrator.{_HOMES.get(name, 'outputs')}"), name)
