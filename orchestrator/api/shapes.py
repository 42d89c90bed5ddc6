"""What the API answers, for OpenAPI: the objects of `--json`. They are made elsewhere; here they are described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from orchestrator.runs import RunState, StepRunState


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What is wrong, which thing it is about, and what to do, in one line.")
    errors: list[dict[str, str]] | None = Field(default=None, description="Of parameters and bodies: every fault.")


class Error(BaseModel):
    type: str
    message: str


class Usage(BaseModel):
    wall_s: float
    cpu_s: float
    memory: int | None = Field(description="Bytes, at the peak; null: not known.")
    queued_s: float = Field(description="For how long it waited before.")


class Cost(BaseModel):
    wall_s: float
    cpu_s: float
    gb_s: float = Field(description="GB-seconds: the peak of memory for as long as it took.")


class TotalCost(Cost):
    runs: int


class WorkflowCost(TotalCost):
    workflow: str


class Costs(BaseModel):
    since: str
    items: list[WorkflowCost]
    total: TotalCost


class StepRun(BaseModel):
    id: str
    state: StepRunState
    index: int | None = None
    attempts: int
    started_at: str | None
    finished_at: str | None
    worker: str | None
    code: str | None
    error: Error | None
    items: dict[str, int] | None = Field(description="Of a fan-out: its items by state.")
    output: Any
    run: str | None = Field(default=None, description="The nested run.")
    due_at: str | None = None
    usage: Usage | None = Field(description="What the last attempt took.")
    cost: Cost | None = Field(default=None, description="What all attempts took, of all items; none for an item.")


class RunInList(BaseModel):
    id: str
    workflow: str
    state: RunState
    episode: int
    event_id: str
    plan: str
    parent: dict[str, Any] | None
    input: Any
    output: Any
    error: Error | None
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    cost: Cost = Field(description="What all attempts of its steps took; nested runs have their own.")


class Run(RunInList):
    steps: list[StepRun]


class Page(BaseModel):
    items: list[Any]
    next: str | None = Field(description="What `after` takes for the next page; null: this is the last.")


class Runs(Page):
    items: list[RunInList]


class StepRuns(Page):
    items: list[StepRun]


class LogEntry(BaseModel):
    step: str
    index: int | None
    attempt: int
    text: str
    error: Error | None


class Logs(Page):
    items: list[LogEntry]


class Started(BaseModel):
    id: str
    workflow: str
    event_id: str


class Cancelled(BaseModel):
    id: str
    cancelled: bool = Field(description="Whether this request has asked for it; not if it has ended, or is asked for.")
    state: RunState


class StepCancelled(BaseModel):
    id: str = Field(description="The run.")
    step: str
    index: int | None
    cancelled: bool = Field(description="Whether this request has asked for it; not if it has ended, or is asked for.")
    state: StepRunState = Field(description="What is at work is told to stop, and is `running` until it does.")


class Resumed(BaseModel):
    run: str
    workflow: str
    episode: int
    definition_changed: bool
    keeps: list[str]
    again: dict[str, str]
    gone: list[str]


class Rerun(BaseModel):
    id: str
    rerun_of: str


class Workflow(BaseModel):
    name: str
    steps: list[dict[str, Any]]


class Workflows(Page):
    items: list[Workflow]


class Canvas(BaseModel):
    when: str
    canvas: str


class Canvases(Page):
    items: list[Canvas]


class Event(BaseModel):
    """A CloudEvent in its JSON format."""

    specversion: str
    id: str
    source: str
    type: str
    time: str


class Verdict(BaseModel):
    """What an event was to a workflow."""

    verdict: str
    run: str | None
    reason: str | None


class EventRecord(BaseModel):
    key: str = Field(description="By which it is found where its id is not enough.")
    event: Event | None
    accepted_at: str
    verdict: str = Field(description="The best of its verdicts: started, refused, no_match; or loop.")
    duplicates: int = Field(description="How often it came again.")
    duplicate_at: str | None
    verdicts: dict[str, Verdict]


class EventRecords(Page):
    items: list[EventRecord]


class WorkflowEvent(Verdict):
    key: str
    event_id: str | None
    type: str | None
    source: str | None
    subject: str | None
    accepted_at: str
    duplicates: int


class WorkflowEvents(Page):
    items: list[WorkflowEvent]


class Events(Page):
    items: list[Event]


class DeadLetter(BaseModel):
    id: str
    kind: str
    reason: str
    detail: str
    fingerprint: str
    first_at: str
    last_at: str
    count: int
    queue: str
    workflow: str | None
    run: str | None
    step: str | None
    index: int | None
    event_id: str | None
    error: Error | None
    episode: int
    attempts: int
    losses: int


class DeadLetters(Page):
    items: list[DeadLetter]


class Group(BaseModel):
    fingerprint: str
    count: int
    reason: str
    detail: str
    first_at: str
    last_at: str
    example: str


class Groups(Page):
    items: list[Group]


class Redriven(BaseModel):
    sent: list[str]
    succeeded: list[str]
    skipped: dict[str, str]
    left: list[str]
    stopped: str | None


class Discarded(BaseModel):
    discarded: int


class AuditEntry(BaseModel):
    id: str
    at: str
    who: str = Field(description="The name of the token, or `loopback`.")
    address: str
    action: str
    target: str | None
    status: int | None = Field(description="Of the answer; null: it is not known what came of it.")
    about: dict[str, Any]


class AuditEntries(Page):
    items: list[AuditEntry]


class Schedule(BaseModel):
    name: str
    workflow: str
    spec: dict[str, Any]
    paused: bool
    last_due_at: str | None
    next_due_at: list[str] = Field(description="The next five times.")
    backfills: list[dict[str, Any]] | None = None


class Schedules(Page):
    items: list[Schedule]


class Backfill(BaseModel):
    """A backfill, or with `dry_run` what it would be: how many times are `due`, `known` to have run, `to_run`."""

    schedule: str
    workflow: str
    max_parallel: int


class BackfillsCancelled(BaseModel):
    schedule: str
    cancelled: int


class Pool(BaseModel):
    name: str
    size: int = Field(description="Processes that there are.")
    busy: int
    workers: int
    backlog: int = Field(description="Messages that wait.")
    oldest_age_s: float | None = Field(description="For how long the oldest has; null: none, or the broker cannot say.")
    arrival_rate: float | None = Field(description="Messages a second that come.")
    service_rate: float | None = Field(description="Messages a second that are done.")
    service_s: float | None = Field(description="What one takes; half of them take less.")
    clears_in_s: float | None = Field(description="When nothing will wait any more; null: not in sight.")
    desired: int | None = Field(description="Processes that there are to be, as the autoscaler has decided last.")
    desired_workers: int | None
    pinned: int | None = Field(description="The size that was set by hand.")
    why: str
    decided_at: str | None = Field(description="Since when it is to have this size.")
    reported_at: str | None = Field(description="When the autoscaler looked last.")
    faults: list[str]
    members: list[dict[str, Any]] | None = Field(default=None, description="Its workers.")


class AutoscalerSeen(BaseModel):
    reported_at: str | None
    fault: str = Field(description="Since when it is silent; empty: it is not.")


class Pools(Page):
    items: list[Pool]
    autoscaler: AutoscalerSeen
