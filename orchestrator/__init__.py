"""An event-driven, serverless workflow orchestrator on message queues.

    from orchestrator import on, task, workflow

These are the names that a project imports; everything else is reached by the command line and the API.
"""

from orchestrator.context import Context
from orchestrator.events import Event
from orchestrator.outputs import errors_of, event, index, item, secrets, state_of
from orchestrator.tracing import on, task, workflow

__all__ = [
    "Context",
    "Event",
    "errors_of",
    "event",
    "index",
    "item",
    "on",
    "secrets",
    "state_of",
    "task",
    "workflow",
]
