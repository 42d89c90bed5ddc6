"""Plan: a workflow's graph made ready to run; pure data, stored by hash.

A plan says for each step what is upstream and downstream of it, what its expressions read, and the *path* that
begins at it: the steps in a row, with one way in and one way out and of one pool, that one chain message may
carry. Where paths meet (joins) and part (forks) is left to the ledger, which knows only edges and counts: so a
step starts as soon as its own upstream steps have ended, in graphs too that nested chains and chords cannot say.

The node END (`$end`) follows all steps: it evaluates the run's output and says what the run comes to. Then those of
`on_failure` (if it failed) and of `finally` run, each a graph of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.expressions import References, references
from orchestrator.workflows import DEFAULT_POOL, END, Phase, Step, TriggerRule, Workflow

#: A chain message carries at most this many links, so that no message grows with the workflow.
MAX_LINKS = 25
#: A header part carries at most this many items of a fan-out, and a fan-out aims at no more parts than MAX_PARTS.
MAX_ITEMS = 64
MAX_PARTS = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The graph of one version of a workflow. Equal definitions have equal hashes.

    `on:` and descriptions are not part of it: changing them changes no run.
    """

    workflow: Workflow
    hash: str
    steps: Mapping[str, Step]
    upstream: Mapping[str, tuple[str, ...]]
    downstream: Mapping[str, tuple[str, ...]]
    reads: Mapping[str, References] = field(repr=False)

    @classmethod
    def of(cls, workflow: Workflow) -> Plan:
        """Make the plan of a workflow that has no faults. Raises ValueError if it has some."""
        faults = workflow.faults()
        if faults:
            raise ValueError(f"workflow {workflow.name!r} has faults: {faults}")
        return cls._of_valid(workflow)

    @classmethod
    def _of_valid(cls, workflow: Workflow) -> Plan:
        steps = {step.id: step for step in workflow.steps}
        upstream = {step.id: workflow.upstream_of(step) for step in workflow.steps}
        downstream: dict[str, list[str]] = {step_id: [] for step_id in steps}
        for step_id, above in upstream.items():
            for up in above:
                downstream[up].append(step_id)
        reads = {step.id: step.reads() for step in workflow.steps}
        plan = cls(
            workflow=workflow,
            hash=_hash(workflow),
            steps=steps,
            upstream=upstream,
            downstream={step_id: tuple(below) for step_id, below in downstream.items()},
            reads=reads,
        )
        reads[END] = plan._reads_of_end()
        return plan

    def to_json(self) -> str:
        """Return the plan as text; what the hash is taken of, apart from descriptions."""
        return _dump(self.workflow.to_json())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote. The workflow was checked before it was stored and is not checked again."""
        return cls._of_valid(Workflow.from_json(json.loads(text)))

    def of_phase(self, phase: Phase) -> tuple[str, ...]:
        """Return the steps of a phase, in the order of the definition."""
        return tuple(step_id for step_id, step in self.steps.items() if step.phase is phase)

    @cached_property
    def main(self) -> tuple[str, ...]:
        """The steps that are no hooks."""
        return self.of_phase(Phase.STEPS)

    @cached_property
    def has_hooks(self) -> bool:
        return len(self.main) < len(self.steps)

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The steps, hooks apart, that nothing is upstream of."""
        return tuple(step_id for step_id in self.main if not self.upstream[step_id])

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The steps, hooks apart, that nothing is downstream of."""
        return tuple(step_id for step_id in self.main if not self.downstream[step_id])

    @cached_property
    def pools(self) -> frozenset[str]:
        return frozenset(self.pool(step_id) for step_id in self.steps)

    @cached_property
    def timeout_ms(self) -> int:
        """How long an episode of a run may take; 0: as long as it likes."""
        return round((self.workflow.timeout_s or 0) * 1000)

    def pool(self, step_id: str) -> str:
        """Return the pool of a step; END and waits, which any pool may take, go to the first there is."""
        if step_id != END and not self.steps[step_id].is_wait:
            return self.steps[step_id].pool or DEFAULT_POOL
        return next((step.pool for step in self.steps.values() if not step.is_wait), "") or DEFAULT_POOL

    def closure(self, step_ids: Iterable[str]) -> set[str]:
        """Return these steps and all that is downstream of them."""
        found = set(step_ids)
        stack = list(found)
        while stack:
            below = [step_id for step_id in self.downstream[stack.pop()] if step_id not in found]
            found.update(below)
            stack += below
        return found

    def path(self, step_id: str) -> tuple[str, ...]:
        """Return the links that one chain message beginning at this step carries.

        The path goes on while there is one way out and one way in, in the same pool. It ends at a fan-out, at a nested
        workflow and at a wait, whose end no link waits for, and after MAX_LINKS.
        """
        path = [step_id]
        while step_id != END and len(path) < MAX_LINKS:
            step = self.steps[step_id]
            below = self.downstream[step_id]
            if step.is_fan_out or step.workflow is not None or step.is_wait or len(below) != 1:
                break
            (following,) = below
            if len(self.upstream[following]) != 1 or self.pool(following) != self.pool(step.id):
                break
            path.append(following)
            step_id = following
        return tuple(path)

    def segments(self) -> dict[str, tuple[str, ...]]:
        """Return every path that is published when all goes well, by its first step, in topological order."""
        covered: set[str] = set()
        found: dict[str, tuple[str, ...]] = {}
        for step_id in self.topological():
            if step_id not in covered:
                found[step_id] = self.path(step_id)
                covered.update(found[step_id])
        return found

    def topological(self) -> list[str]:
        """Return the step ids, each after its upstream steps, in the order of the definition where that is free.

        Hooks come last.
        """
        waiting = {step_id: len(above) for step_id, above in self.upstream.items()}
        order: list[str] = []
        for phase in Phase:
            ready = [step_id for step_id in self.of_phase(phase) if not waiting[step_id]]
            for step_id in ready:
                for below in self.downstream[step_id]:
                    waiting[below] -= 1
                    if not waiting[below]:
                        ready.append(below)
            order += ready
        return order

    @cached_property
    def graph_rows(self) -> dict[str, str]:
        """Per step, what the ledger needs of it, as JSON: [pool, rule, upstreams, [downstream], [read], flags, phase].

        `pool` is `*` where any may take it; `read` names the steps whose output or state the step's expressions read;
        flags: f = fan-out, n = nested workflow; phase is empty for the main steps.
        """
        rows = {
            step_id: _dump(
                [
                    "*" if step.is_wait else self.pool(step.id),
                    str(step.trigger_rule),
                    len(self.upstream[step_id]),
                    list(self.downstream[step_id]),
                    sorted(self.reads[step_id].step_ids),
                    ("f" if step.is_fan_out else "") + ("n" if step.workflow is not None else ""),
                    "" if step.phase is Phase.STEPS else str(step.phase),
                ]
            )
            for step_id, step in self.steps.items()
        }
        rows[END] = _dump(
            ["*", str(TriggerRule.ALL_DONE), len(self.main), [], sorted(self.reads[END].step_ids), "", ""]
        )
        return rows

    def _reads_of_end(self) -> References:
        if self.workflow.has_output:
            return references(self.workflow.output)
        return References(names=frozenset(self.leaves))

    def unhandled(self, states: Mapping[str, str]) -> list[str]:
        """Return the failed steps whose failure no step took up by its trigger_rule, given all final states.

        A failure is taken up by a step that ran downstream of it with `all_done` or `one_failed`, next to it or with
        only `upstream_failed` steps between. A step that was cancelled (in an earlier episode, and not sent back) is
        among them whatever ran after it: nobody knows what it would have come to.
        """
        return [
            step_id
            for step_id in self.main
            if states[step_id] == "cancelled" or (states[step_id] == "failed" and not self._taken_up(step_id, states))
        ]

    def _taken_up(self, step_id: str, states: Mapping[str, str]) -> bool:
        stack, seen = [step_id], {step_id}
        while stack:
            for below in self.downstream[stack.pop()]:
                if below in seen:
                    continue
                seen.add(below)
                if self.steps[below].trigger_rule.takes_up_failure and states[below] in ("succeeded", "failed"):
                    return True
                if states[below] == "upstream_failed":
                    stack.append(below)
        return False


def parts(count: int, *, max_parallel: int | None = None) -> list[tuple[int, int]]:
    """Divide a fan-out of `count` items into header parts (lo, hi).

    With `max_parallel` each part is one item, because a part that ends is what lets the next one begin. Else a part
    is as large as keeps the number of messages near MAX_PARTS, but no larger than MAX_ITEMS: items that turn out to
    be long are given back and shared anew while they wait (workers/watch.py), so a large part is never a barrier.
    """
    size = 1 if max_parallel is not None else min(MAX_ITEMS, -(-count // MAX_PARTS))
    return [(lo, min(lo + size, count)) for lo in range(0, count, max(size, 1))]


def _hash(workflow: Workflow) -> str:
    body = workflow.to_json()
    body.pop("on", None)
    body.pop("description", None)
    body["steps"] = [{k: v for k, v in step.items() if k != "description"} for step in body["steps"]]
    return hashlib.sha256(_dump(body).encode()).hexdigest()[:16]


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
