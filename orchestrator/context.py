"""Context: what a step's function may ask about its own run, by a parameter named `context`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One attempt of a step.

    `index` is the item's place in a fan-out, None in other steps; `attempt` counts from 1. `deadline` is when the
    step is stopped: by its own timeout (24 hours if it has none), or by that of its run. `idempotency_key` is the same
    over attempts, redrives and resumes of this step (or item), and new on a rerun: give it to whatever must not be done
    twice.
    """

    run_id: str
    step_id: str
    workflow: str
    attempt: int
    index: int | None
    deadline: datetime
    logger: logging.Logger
    _load_event: Callable[[], dict[str, Any]] = field(repr=False)

    @property
    def event(self) -> Event:
        """The event that started the run."""
        return Event.from_json(self._load_event())

    @property
    def idempotency_key(self) -> str:
        """run + step + index."""
        return f"{self.run_id}/{self.step_id}" + ("" if self.index is None else f"/{self.index}")
