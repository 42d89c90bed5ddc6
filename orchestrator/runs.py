"""Run and StepRun: what the ledger records, as a person and the API see it; their states and legal moves.

    scheduled -> queued -> running -> succeeded | failed | skipped
        |                     ^  |
        |                     |  +-> retrying -> queued
        +-> upstream_failed | skipped          (decided by the join, without running)

A cancel that was asked for is a flag of the run (`cancel_requested`), not a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from orchestrator.events import digest


class RunState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        return not RUN_MOVES[self]


class StepRunState(StrEnum):
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    UPSTREAM_FAILED = "upstream_failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        return not STEP_RUN_MOVES[self]


#: The legal moves within one episode. (A later episode puts ended steps back to `scheduled`.)
RUN_MOVES: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.FAILED, RunState.CANCELLED}),
    RunState.RUNNING: frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
}

STEP_RUN_MOVES: Mapping[StepRunState, frozenset[StepRunState]] = {
    StepRunState.SCHEDULED: frozenset(
        {StepRunState.QUEUED, StepRunState.SKIPPED, StepRunState.UPSTREAM_FAILED, StepRunState.CANCELLED}
    ),
    StepRunState.QUEUED: frozenset({StepRunState.RUNNING, StepRunState.CANCELLED}),
    StepRunState.RUNNING: frozenset(
        {
            StepRunState.SUCCEEDED,
            StepRunState.FAILED,
            StepRunState.SKIPPED,
            StepRunState.RETRYING,
            StepRunState.CANCELLED,
        }
    ),
    StepRunState.RETRYING: frozenset({StepRunState.QUEUED, StepRunState.CANCELLED}),
    StepRunState.SUCCEEDED: frozenset(),
    StepRunState.FAILED: frozenset(),
    StepRunState.SKIPPED: frozenset(),
    StepRunState.UPSTREAM_FAILED: frozenset(),
    StepRunState.CANCELLED: frozenset(),
}


def run_id(workflow: str, source: str, event_id: str) -> str:
    """Return the id of the run that an event starts: the same event never starts a workflow twice (G2)."""
    return digest("run", workflow, source, event_id)[:24]


def child_run_id(parent: str, step: str, index: int | None, attempt: int) -> str:
    """Return the id of the run that an attempt of a step with `workflow:` starts; a repeat of it finds the same run."""
    again = () if attempt == 1 else (str(attempt),)
    return digest("child", parent, step, "" if index is None else str(index), *again)[:24]


def rerun_id(run: str, number: int) -> str:
    """Return the id of the number-th run (from 1) that is started anew from the event of another."""
    return digest("rerun", run, str(number))[:24]


def task_id(run: str, slot: str, attempt: int) -> str:
    """Return by what Celery's tools know one attempt of a step or item (`step/index`): `run:step[:index]:attempt`."""
    return f"{run}:{slot.replace('/', ':')}:{attempt}"


def parse_task_id(text: str) -> tuple[str, str, int]:
    """Return (run, step or step/index, attempt) of what `task_id` made. Raises ValueError."""
    run, step, *index, attempt = text.split(":") if text.count(":") in (2, 3) else ("", "", "")
    if not run or not step or not all(one.isdecimal() and one.isascii() for one in (*index, attempt)):
        raise ValueError(f"{text!r} is no task id as RUN:STEP:ATTEMPT or RUN:STEP:INDEX:ATTEMPT")
    return run, "/".join((step, *index)), int(attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepError:
    """Why a step or a run failed.

    `traceback` is cut to the user's frames and may be empty; `frames` are those as (file relative to the project, line,
    function), outermost first. `reason` is that of the dead letter that may come of it (deadletters.py). `kinds` are
    the names of the error's class and its base classes, bare and qualified, for a RetryPolicy; they are not recorded.
    """

    type: str
    message: str
    traceback: str = ""
    step: str | None = None
    index: int | None = None
    reason: str = "error"
    frames: tuple[tuple[str, int, str], ...] = ()
    kinds: tuple[str, ...] = ()

    def fingerprint(self, task: str) -> str:
        """Return what failures of the same cause have in common: error type and user's frames, without lines.

        What was ended from outside may be anywhere in the task's function: of it only the task counts.
        """
        where = [f"{file}:{function}" for file, _, function in self.frames] if self.reason == "error" else []
        kind = self.message if self.reason == "worker_lost" else self.type
        return digest(self.reason, kind, *(where or [task]))[:12]

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"type": self.type, "message": self.message}
        for name in ("traceback", "step", "index"):
            value = getattr(self, name)
            if value not in (None, ""):
                body[name] = value
        if self.reason != "error":
            body["reason"] = self.reason
        if self.frames:
            body["frames"] = self.frames
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """One step of a run, or one item of a fan-out (`index` is not None).

    `items` counts the items of a fan-out by state; None for other steps. Times are RFC 3339 in UTC. `code` is the hash
    of the project's code that ran the last attempt; `losses` counts workers that died or lost their lease in it.
    `error` is that of the last attempt; `due_at` when the next one, or the end of a wait, is due; `run` a nested run.
    `usage` is what the last attempt took: wall_s, cpu_s, memory (bytes at its peak; null: not known), queued_s (its
    wait before). `cost` adds up all attempts, of all items: wall_s, cpu_s, gb_s; None for an item.
    """

    id: str
    state: StepRunState
    index: int | None = None
    attempts: int = 0
    losses: int = 0
    started_at: str | None = None
    finished_at: str | None = None
    worker: str | None = None
    code: str | None = None
    error: Mapping[str, Any] | None = None
    items: Mapping[str, int] | None = None
    output: Any = None
    run: str | None = None
    due_at: str | None = None
    usage: Mapping[str, Any] | None = None
    cost: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "state": str(self.state),
            "attempts": self.attempts,
            "losses": self.losses,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "worker": self.worker,
            "code": self.code,
            "error": self.error,
            "items": None if self.items is None else dict(self.items),
            "output": self.output,
            "usage": self.usage,
        }
        if self.cost is not None:
            body["cost"] = self.cost
        if self.index is not None:
            body["index"] = self.index
        if self.run is not None:
            body["run"] = self.run
        if self.due_at is not None:
            body["due_at"] = self.due_at
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of a workflow. `input` holds the parameters as they were resolved.

    `cost` adds up what all attempts of its steps took, over all episodes: wall_s, cpu_s, gb_s (GB-seconds: the peak of
    the process's memory for as long as the attempt took). Nested runs have their own.
    """

    id: str
    workflow: str
    state: RunState
    episode: int
    event_id: str
    plan: str
    input: Any = None
    output: Any = None
    error: Mapping[str, Any] | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    parent: Mapping[str, Any] | None = None
    cancel_requested: bool = False
    cost: Mapping[str, float] = field(default_factory=lambda: cost_of((None, None, None)))
    steps: tuple[StepRun, ...] = ()

    def to_json(self, *, with_steps: bool = True) -> dict[str, Any]:
        """Return the run as the API shows it; in lists without its steps, which were not read."""
        body: dict[str, Any] = {
            "id": self.id,
            "workflow": self.workflow,
            "state": str(self.state),
            "episode": self.episode,
            "event_id": self.event_id,
            "plan": self.plan,
            "parent": self.parent,
            "input": self.input,
            "output": self.output,
            "error": self.error,
            "cancel_requested": self.cancel_requested,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "cost": self.cost,
        }
        if with_steps:
            body["steps"] = [step.to_json() for step in self.steps]
        return body


def cost_of(used: Sequence[str | None]) -> dict[str, float]:
    """Return what the ledger has added up (us on the clock, us of processors, MB-ms) as seconds and GB-seconds."""
    wall_s, cpu_s, gb_s = (round(int(number or 0) / 1e6, 6) for number in used)
    return {"wall_s": wall_s, "cpu_s": cpu_s, "gb_s": gb_s}


def rfc3339(milliseconds: int | float | None) -> str | None:
    """Return a time given in ms since the epoch as RFC 3339 in UTC; None for None."""
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
