"""An event-driven, serverless workflow orchestrator on message queues.

    from orchestrator import on, task, workflow

These are the names that a project imports; everything else is reached by the command line and the API.
"""

from orchestrator.context import Context
from orchestrator.events import Event
from orchestrator.tracing import errors, on, state, task, workflow

__all__ = ["Context", "Event", "errors", "on", "state", "task", "workflow"]
