"""What the ledger can tell: runs, their steps and items, logs, events. Reads only; never part of a decision.

Lists answer at most `limit` entries, newest first, and a cursor for the rest (the id of the last one), or None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import NotFoundError
from orchestrator.ledger import keys
from orchestrator.ledger.keys import USED
from orchestrator.ledger.ledger import Ledger
from orchestrator.payloads import Payloads
from orchestrator.plan import Plan
from orchestrator.runs import Run, RunState, StepRun, StepRunState, cost_of, rfc3339
from orchestrator.workflows import END

_PAGE = 200
#: A page of runs ends early when their inputs and outputs come to more than this.
_PAGE_BYTES = 16 * 1024 * 1024
_INDEX = re.compile(r"\d{1,9}\Z", re.ASCII)


class Queries:
    """Reads of one ledger; every call raises NotFoundError for an id that is not known."""

    def __init__(self, ledger: Ledger, payloads: Payloads) -> None:
        self._ledger = ledger
        self._client = ledger.client
        self._payloads = payloads

    def run(self, run: str, *, with_steps: bool = True) -> Run:
        """Return a run, with one StepRun for each step of its plan, in the plan's topological order."""
        fields = self._client.hgetall(keys.run_key(run, "run"))
        if not fields:
            raise NotFoundError(f"run {run!r} is not known; see `orchestrator runs list`")
        steps: tuple[StepRun, ...] = ()
        if with_steps and "left" in fields:  # else it was refused before it had any
            plan = self._ledger.plan(fields["plan"])
            steps = tuple(self._step_run(run, plan, step_id) for step_id in plan.topological())
        return self._run(run, fields, steps)

    def runs(
        self, *, limit: int = 50, after: str | None = None, workflow: str | None = None, state: str | None = None
    ) -> tuple[list[Run], str | None]:
        """Return runs without their steps, and the cursor of the next page."""
        found: list[Run] = []
        size = 0
        for ids in self._newest(keys.RUNS, after, _PAGE if workflow or state else min(_PAGE, limit + 1)):
            heads = zip(ids, self._many(ids, "workflow", "state"), strict=True)
            wanted = [run for run, (name, at) in heads if at and workflow in (None, name) and state in (None, at)]
            for run, fields in zip(wanted, self._many(wanted), strict=True):
                if len(found) == limit or size > _PAGE_BYTES:
                    return found, found[-1].id
                if fields:
                    found.append(self._run(run, fields, ()))
                    size += self._payloads.size(fields.get("input", "")) + self._payloads.size(fields.get("output", ""))
        return found, None

    def _many(self, runs: Sequence[str], *names: str) -> list[Any]:
        """Read many runs: their fields, or only the values of those named."""
        with self._client.pipeline(transaction=False) as pipe:
            for run in runs:
                if names:
                    pipe.hmget(keys.run_key(run, "run"), names)
                else:
                    pipe.hgetall(keys.run_key(run, "run"))
            rows: list[Any] = pipe.execute()
        return rows

    def _newest(self, index: str, after: str | None, size: int) -> Iterator[list[str]]:
        """Give the ids on an index, newest first, in pages."""
        start = 0
        if after is not None:
            rank = self._client.zrevrank(index, after)
            if rank is None:
                raise NotFoundError(f"--after {after}: no such cursor; begin without it")
            start = int(rank) + 1
        while ids := [str(one) for one in self._client.zrange(index, start, start + size - 1, desc=True)]:
            yield ids
            start += len(ids)

    def costs(self, since_ms: int) -> dict[str, dict[str, float]]:
        """Return what the runs that were made since then have taken, by workflow: `runs`, and as Run.cost."""
        found: dict[str, dict[str, float]] = {}
        runs = self._ledger.guard(lambda: self._client.zrange(keys.RUNS, since_ms, "+inf", byscore=True))
        for lo in range(0, len(runs), _PAGE):
            for workflow, *used in self._many(runs[lo : lo + _PAGE], "workflow", *(f"used_{name}" for name in USED)):
                if workflow is not None:  # gone meanwhile
                    totals = found.setdefault(workflow, {"runs": 0, **cost_of((None, None, None))})
                    totals["runs"] += 1
                    for name, value in cost_of(used).items():
                        totals[name] = round(totals[name] + value, 6)
        return found

    def _run(self, run: str, fields: dict[str, str], steps: tuple[StepRun, ...]) -> Run:
        return Run(
            id=run,
            workflow=fields["workflow"],
            state=RunState(fields["state"]),
            episode=int(fields["episode"]),
            event_id=fields["event_id"],
            plan=fields["plan"],
            input=self._payloads.unpack_or_none(fields.get("input", "")),
            output=self._payloads.unpack_or_none(fields.get("output", "")),
            error=json.loads(fields["error"]) if fields.get("error") else None,
            created_at=rfc3339(int(fields["created_at"])) or "",
            started_at=_time(fields.get("started_at")),
            finished_at=_time(fields.get("finished_at")),
            parent=_parent(fields.get("parent")),
            cancel_requested="cancel_requested" in fields,
            cost=cost_of([fields.get(f"used_{name}") for name in USED]),
            steps=steps,
        )

    def _step_run(self, run: str, plan: Plan, step_id: str) -> StepRun:
        count = None
        if plan.steps[step_id].is_fan_out:
            count = self._client.hget(keys.run_key(run, "states"), f"n:{step_id}")
        slot = self._slots(run, [step_id], with_output=count is None)[0]
        used = self._client.hmget(keys.run_key(run, "attempts"), [f"{step_id}#{name}" for name in USED])
        slot = replace(slot, cost=cost_of(used))
        if count is None:
            return slot
        counts: dict[str, int] = {}
        for item in self._pages(run, step_id, int(count)):
            counts[item] = counts.get(item, 0) + 1
        return StepRun(
            id=slot.id, state=slot.state, attempts=slot.attempts, losses=slot.losses, started_at=slot.started_at,
            finished_at=slot.finished_at, worker=slot.worker, code=slot.code,
            error=self._ledger.failure(run, step_id) if slot.state is StepRunState.FAILED else None,
            items=counts, cost=slot.cost,
        )  # fmt: skip

    def _pages(self, run: str, step_id: str, count: int) -> Iterator[str]:
        for lo in range(0, count, 1000):
            fields = [f"{step_id}/{index}" for index in range(lo, min(lo + 1000, count))]
            for state in self._client.hmget(keys.run_key(run, "states"), fields):
                yield state or "queued"

    def _slots(self, run: str, slots: Sequence[str], *, with_output: bool = True) -> list[StepRun]:
        """Read steps or items (`step/index`)."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.run_key(run, "states"), slots)
            pipe.hmget(keys.run_key(run, "states"), [f"w:{slot}" for slot in slots])
            pipe.hmget(keys.run_key(run, "outputs"), slots)
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slot}#a" for slot in slots])
            pipe.hmget(keys.run_key(run, "attempts"), [f"{slot}#l" for slot in slots])
            pipe.zmscore(keys.run_key(run, "timers"), [_unit(slot) for slot in slots])
            pipe.zmscore(keys.run_key(run, "timers"), [f"~{slot}" for slot in slots])
            states, nested, outputs, retries, losses, due, wakes = pipe.execute()
        made = [int(retry or 0) for retry in retries]
        records = self._client.hmget(
            keys.run_key(run, "attempts"),
            [f"{slot}@{n + more}" for slot, n in zip(slots, made, strict=True) for more in (0, 1)],
        )
        found = []
        for n, slot in enumerate(slots):
            has_begun = records[2 * n + 1] is not None
            state = StepRunState(states[n] or ("queued" if "/" in slot else "scheduled"))
            before = records[2 * n] if state is StepRunState.RETRYING else None
            record = json.loads(records[2 * n + 1] or before or "{}")
            step_id, _, index = slot.partition("/")
            found.append(
                StepRun(
                    id=step_id,
                    index=int(index) if index else None,
                    state=state,
                    attempts=made[n] + has_begun,
                    losses=int(losses[n] or 0),
                    started_at=rfc3339(record.get("started_at")),
                    finished_at=rfc3339(record.get("finished_at")),
                    worker=record.get("worker"),
                    code=record.get("code"),
                    error=record.get("error"),
                    output=self._payloads.unpack_or_none(outputs[n] or "") if with_output else None,
                    run=nested[n] if nested[n] != "~" else None,
                    due_at=rfc3339(due[n] or wakes[n]),
                    usage=record.get("usage"),
                )
            )
        return found

    def step(self, run: str, step_id: str) -> StepRun:
        """Return one step of a run, with its output."""
        plan = self._ledger.plan(self._ledger.plan_of(run))
        if step_id not in plan.steps:
            raise NotFoundError(f"run {run} has no step {step_id!r}; it has {', '.join(plan.steps)}")
        return self._step_run(run, plan, step_id)

    def items(
        self, run: str, step_id: str, *, limit: int = 50, after: str | None = None
    ) -> tuple[list[StepRun], str | None]:
        """Return items of a fan-out in their order, and the cursor of the next page."""
        self.step(run, step_id)
        count = int(self._client.hget(keys.run_key(run, "states"), f"n:{step_id}") or 0)
        if after is not None and not _INDEX.match(after):
            raise NotFoundError(f"--after {after}: no such cursor; begin without it")
        lo = 0 if after is None else int(after) + 1
        hi = min(lo + limit, count)
        slots = [f"{step_id}/{index}" for index in range(lo, hi)]
        return (self._slots(run, slots) if slots else []), (str(hi - 1) if hi < count else None)

    def logs(
        self,
        run: str,
        step_id: str | None = None,
        index: int | None = None,
        *,
        limit: int | None = None,
        after: str | None = None,
    ) -> tuple[list[tuple[str, int, str, Mapping[str, Any] | None]], str | None]:
        """Return what attempts printed and logged, and their errors: (step or step/index, attempt, text, error), in the
        plan's order, and the cursor of the next page; attempts with neither are left out."""
        order = {step: n for n, step in enumerate((END, *self._ledger.plan(self._ledger.plan_of(run)).topological()))}
        errors = {
            field: error
            for field, record in self._client.hgetall(keys.run_key(run, "attempts")).items()
            if "@" in field and (error := json.loads(record).get("error"))
        }
        found = []
        for field in {*self._client.hkeys(keys.run_key(run, "logs")), *errors}:
            slot, _, attempt = str(field).rpartition("@")
            step, _, item = slot.partition("/")
            if step in order and step_id in (None, step) and (index is None or item == str(index)):
                found.append((order[step], int(item or -1), int(attempt), slot, str(field)))
        found.sort()
        names = [row[-1] for row in found]
        if after is not None and after not in names:
            raise NotFoundError(f"--after {after}: no such cursor; begin without it")
        lo = 0 if after is None else names.index(after) + 1
        page = found[lo:] if limit is None else found[lo : lo + limit]
        texts = self._client.hmget(keys.run_key(run, "logs"), [row[-1] for row in page]) if page else []
        rows = [
            (slot, n, str(text or ""), errors.get(field))
            for (_, _, n, slot, field), text in zip(page, texts, strict=True)
        ]
        return rows, names[lo + len(page) - 1] if lo + len(page) < len(names) else None


def _time(text: str | None) -> str | None:
    return rfc3339(int(text)) if text else None


def _unit(slot: str) -> str:
    """Return the unit in which a slot is taken again by itself."""
    step_id, _, index = slot.partition("/")
    return f"{step_id}/{index}-{int(index) + 1}" if index else step_id


def _parent(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    parent: dict[str, Any] = json.loads(text)
    parent["index"] = None if parent["index"] < 0 else parent["index"]
    parent.pop("attempt", None)
    return parent
