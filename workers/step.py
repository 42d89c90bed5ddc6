"""The step task: carries the links or items of one message through the ledger, one after the other.

    message -> begin -> [ run -> complete + begin of the next -> publish what else is ready ]* -> end of the message

The ledger decides all: what is to be run first (a redelivered message goes on at its first unfinished link), what comes
next in this process (the next link of the chain, the next item of the part, or whatever a join has made ready in this
pool), and what is to be published for others. The message is only the occasion; losing or repeating it is harmless.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import Reject

from orchestrator.canvas import QUEUED_AT
from orchestrator.celery_app import STEP_TASK
from orchestrator.context import Context
from orchestrator.counters import field as counter
from orchestrator.durations import parse_duration, parse_time
from orchestrator.engine import Engine
from orchestrator.errors import (
    ExpressionError,
    PayloadError,
    TaskNotFoundError,
    UnavailableError,
)
from orchestrator.expressions import evaluate, references
from orchestrator.ledger import Answer, Taken
from orchestrator.ledger.ledger import How
from orchestrator.payloads import dumps
from orchestrator.plan import MAX_LINKS, Plan, parts
from orchestrator.project import resolve_task, takes_context
from orchestrator.runs import StepError, child_run_id, rfc3339
from orchestrator.settings import read_secret
from orchestrator.signals import StepCancelled
from orchestrator.telemetry import Outage, bound, get_logger
from orchestrator.workflows import END, Step
from workers.capture import Captured, Flusher
from workers.failures import WorkerLostError, describe_error, input_of
from workers.interrupts import Interrupts, timeout_of
from workers.memory import limited
from workers.outcome import of_error
from workers.slots import Slots
from workers.surroundings import restored
from workers.task_events import StepEvents, Told
from workers.usage import Meter

log = get_logger(__name__)

_T = TypeVar("_T")

#: An import lends the standard streams of all threads.
_importing = threading.Lock()

_RUNS_KNOWN = 128
#: No time in ms is later.
_LATEST_MS = 2**53
#: Outcomes of attempts that metrics count.
_COUNTED = frozenset({"succeeded", "failed", "skipped", "cancelled", "retrying"})
#: A function that cannot be found is looked for again after this long.
_DEPLOY_LOOK_MS = 10_000
#: How long to wait before a server that is away is asked again.
_WAIT_S = 1.0


@dataclass(slots=True)
class _RunInfo:
    """What does not change in a run, kept by the process that has seen it."""

    id: str
    plan: Plan
    #: Its episode and phase: in another one it is read anew.
    version: str
    event_id: str
    event_payload: str
    input_payload: str
    #: When its timeout ends it, ms since the epoch; 0: never.
    deadline_ms: int
    priority: str
    names: dict[str, Any]
    loaded: dict[str, Any] = field(default_factory=dict)


class _CannotWaitError(UnavailableError):
    """The worker is to stop, and what its step needs is away: no outcome of the step, which comes again."""


class _Secrets(Mapping[str, str]):
    """`secrets` in expressions: read when asked for, and remembered so that captured text is masked."""

    def __init__(self, references: Mapping[str, str], captured: Captured) -> None:
        self._references = references
        self._captured = captured

    def __getitem__(self, name: str) -> str:
        if name not in self._references:
            raise ExpressionError(f"secret {name!r} is not declared; add it under [secrets] as env:NAME or file:PATH")
        value = read_secret(self._references[name])
        if value:
            self._captured.hide(value)
        return value

    def __contains__(self, name: object) -> bool:
        return True  # so that an unknown one is our error and not an undefined name

    def __iter__(self) -> Any:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)


@dataclass(frozen=True, slots=True)
class Identity:
    """By what a worker is known in the ledger: its name, and the hash of the code that it has loaded."""

    worker: str
    code: str

    @property
    def pool(self) -> str:
        """The pool of the worker: its name begins with it."""
        return self.worker.partition("@")[0]

    def record(self, pid: int) -> str:
        """Return the opening of the records of attempts that the child `pid` makes (ledger.How)."""
        return json.dumps({"worker": f"{self.worker}/{pid}", "code": self.code})[:-1]

    def record_of_thread(self, slot: int) -> str:
        """Return that of the records that a thread of the worker makes, by its slot."""
        return json.dumps({"worker": f"{self.worker}/thread-{slot}", "code": self.code})[:-1]


class StepRunner:
    """Runs what messages bring, in one process (or thread) of a worker."""

    def __init__(
        self,
        engine: Engine,
        identity: Identity,
        *,
        pool: str,
        slots: Slots | None,
        slot: int,
        events: StepEvents | None = None,
        is_thread: bool = False,
    ) -> None:
        self._engine = engine
        self._ledger = engine.ledger
        self._payloads = engine.payloads
        self._settings = engine.settings
        self._pool = pool
        self._slots = slots
        self._slot = slot
        self._is_thread = is_thread
        # A signal reaches the main thread alone.
        self._interrupts = None if slots is None or is_thread else Interrupts(slots, slot)
        self._events = events
        self._record = identity.record_of_thread(slot) if is_thread else identity.record(os.getpid())
        self._runs: OrderedDict[str, _RunInfo] = OrderedDict()
        self._tasks: dict[str, tuple[Callable[..., Any], bool]] = {}
        self._chunk: tuple[str, int, list[Any]] = ("", 1, [])
        self._steps, self._most_steps = 0, engine.settings.pool(pool).max_tasks_per_process
        self._flusher = Flusher()
        self._meter = Meter()
        #: Of the ledger, as seen by this process.
        self.outage = Outage(log, "step")

    @property
    def is_draining(self) -> bool:
        """Whether nothing further shall be begun: the worker is to stop, or this process is to leave it."""
        return self._slots is not None and (self._slots.is_draining or self._slots.is_leaving(self._slot, os.getpid()))

    @property
    def _is_stopping(self) -> bool:
        return self._slots is not None and self._slots.is_draining

    def end(self) -> None:
        """Hand in what was counted; the process ends."""
        self._engine.counters.close()

    def carry(self, run: str, units: list[str], queued_ms: int | None = None) -> None:
        """Run what a message carries, which was published at `queued_ms`, from its first unfinished unit on.

        Returns when there is nothing more for this process to do in this message. Whatever happens to the process,
        what it had taken is found by its lease, and what it had made ready in the outbox. Raises UnavailableError if
        the ledger is away for so long that nothing could be taken, or that the worker, told to stop, must do so.
        """
        links = 0
        unit, names, inputs, unit_since = "", {}, [], 0.0  # type: str, dict[str, Any], list[Any], float
        if self._slots is not None:
            self._slots.begin_message(self._slot)
        is_done = False
        try:
            # Where to look for what we have taken, should we die before we could note that.
            self._note(run)
            answer = self._ledger.begin(run, units, self._how(run))
            begun = time.time() if answer.taken is not None else None
            while answer.taken is not None:
                taken = answer.taken
                if taken.unit != unit:
                    unit, names, inputs, unit_since = taken.unit, {}, taken.inputs, time.monotonic()
                    links += 1
                # Before all else, which may take long: from here on the parent renews the lease.
                self._note(run, taken, unit_since)
                info = self._info(run, taken)
                self._publish(run, answer.publish)
                self._count()
                # A link that goes on from another one was ready that moment; items wait for those before them.
                has_waited = links == 1 or taken.index >= 0
                queued_s = time.time() - queued_ms / 1000 if queued_ms is not None and has_waited else 0.0
                answer = self._run(info, taken, names, inputs, links, queued_s)
            is_done = True
        finally:
            if self._slots is not None:
                self._slots.clear(self._slot)
                end = self._slots.end_message if is_done else self._slots.forget_message
                end(self._slot)
        self._publish(run, answer.publish)
        if begun is not None and queued_ms is not None:
            self._engine.counters.observe("queue_seconds", max(0.0, begun - queued_ms / 1000), pool=self._pool)
        if answer.verdict == "refused":
            log.error(
                "step_was_taken_over", run=run, unit=unit, reason="its lease had run out; its outcome is not kept"
            )
        elif answer.verdict not in ("ok", "go", "done", "held"):
            log.info("message_dropped", run=run, unit=units[0], verdict=answer.verdict)

    def _count(self) -> None:
        """Count a step; after the last that this process is to run, it leaves."""
        self._steps += 1
        if self._steps == self._most_steps and self._slots is not None:
            self._slots.spend(self._slot)

    def _note(self, run: str, taken: Taken | None = None, unit_since: float = 0.0) -> None:
        """Tell the parent what this process runs, or that it is about to take something in a run."""
        if self._slots is not None:
            fence, attempt, tries, index, unit = (0, 0, 0, -1, "")
            if taken is not None:
                fence, attempt, tries, index, unit = taken.fence, taken.attempt, taken.tries, taken.index, taken.unit
            self._slots.write(
                self._slot, fence=fence, attempt=attempt, tries=tries, index=index, run=run, unit=unit,
                unit_since=unit_since,
            )  # fmt: skip

    def _publish(self, run: str, rows: Sequence[str]) -> None:
        """Publish what has become ready; with a server away it stays in the outbox, for the rescuer."""
        if rows:
            info = self._runs.get(run)
            try:
                if info is None:
                    self._engine.publish(run, rows)
                else:
                    self._engine.publish(run, rows, plan=info.plan, priority=info.priority)
            except UnavailableError as exc:
                log.warning("left_to_rescuer", run=run, units=len(rows), error=str(exc))

    def _insist(self, verb: Callable[[], _T]) -> _T:
        """Do what a repeat does not harm until the servers allow it: a step that was run is not to be lost to them.

        Raises _CannotWaitError only when the worker is to stop and its grace period has passed.
        """
        stop_at = float("inf")
        while True:
            try:
                done = verb()
            except UnavailableError as exc:
                if self._is_stopping:
                    stop_at = min(stop_at, time.monotonic() + self._settings.grace_s)
                if self._slots is None or time.monotonic() > stop_at:
                    raise _CannotWaitError(str(exc)) from exc
                self.outage.begins(exc)
                time.sleep(_WAIT_S)
            else:
                self.outage.ends()
                return done

    def _inline(self, links: int, taken: Taken) -> str:
        """Return the pool to take more of after what ran: none when draining, nor past the links of one message."""
        if self.is_draining:
            return ""
        return self._pool if links < MAX_LINKS or taken.index >= 0 else ""

    def _how(self, run: str, known_chunk: str = "") -> How:
        info = self._runs.get(run)
        return How(self._record, known_run=info.version if info is not None else "", known_chunk=known_chunk)

    def _info(self, run: str, taken: Taken) -> _RunInfo:
        if not taken.meta:
            self._runs.move_to_end(run)
            return self._runs[run]
        (
            workflow,
            plan_hash,
            event,
            run_input,
            created_ms,
            episode,
            event_id,
            deadline,
            phase,
            state,
            error,
            priority,
        ) = taken.meta
        plan = self._engine.plan(plan_hash)
        facts: dict[str, Any] = {
            "id": run,
            "workflow": workflow,
            "created_at": rfc3339(int(created_ms)),
            "episode": int(episode),
        }
        if phase:
            facts["state"] = state
            facts["error"] = json.loads(error) if error else None
            facts["failures"] = self._ledger.failures(run, plan.main)
        info = _RunInfo(
            run, plan, episode + phase, event_id, event, run_input, int(deadline or 0), priority or "normal",
            {"run": facts},
        )  # fmt: skip
        self._runs[run] = info
        while len(self._runs) > _RUNS_KNOWN:
            self._runs.popitem(last=False)
        return info

    def _inputs(self, inputs: list[Any]) -> dict[str, Any]:
        """Make the names of upstream steps: their outputs, and `steps` with their state, errors and output."""
        names: dict[str, Any] = {}
        steps: dict[str, Any] = {}
        for step_id, state, value, failures in inputs:
            output = self._payloads.unpack_all(value) if isinstance(value, list) else self._payloads.unpack(value)
            errors = []
            for index, record in failures:
                error = json.loads(record or "{}").get("error", {})
                errors.append(error if index < 0 else error | {"index": index})
            names[step_id] = output
            steps[step_id] = {"state": state, "output": output, "errors": errors}
        names["steps"] = steps
        return names

    def _load(self, info: _RunInfo, name: str, payload: str) -> Any:
        if name not in info.loaded:
            info.loaded[name] = self._payloads.unpack(payload)
        return info.loaded[name]

    def _names_for(self, info: _RunInfo, template: Any, names: Mapping[str, Any], captured: Captured) -> dict[str, Any]:
        """Add what a template reads of `event`, `params` and `secrets`: they are not unpacked for nothing."""
        wanted = references(template).names
        names = dict(names)
        if "event" in wanted:
            names["event"] = self._load(info, "event", info.event_payload)
        if "params" in wanted:
            names["params"] = self._load(info, "params", info.input_payload)
        if "secrets" in wanted:
            names["secrets"] = _Secrets(self._settings.secrets, captured)
        return names

    def _run(
        self, info: _RunInfo, taken: Taken, names: dict[str, Any], inputs: list[Any], links: int, queued_s: float
    ) -> Answer:
        """Run what was taken, which has waited for queued_s, and record how it ended; answers what comes next.

        `names` is filled from `inputs` for the first item of a part, and stays for the others.
        """
        if taken.step == END:
            return self._insist(lambda: self._finish(info, taken, inputs))
        step = info.plan.steps[taken.step]
        captured = Captured(self._settings.log_bytes)
        with bound(
            mask=captured.mask, is_step=True, event_id=info.event_id, run=info.id, workflow=info.plan.workflow.name,
            step=taken.slot, attempt=taken.attempt, pool=self._pool,
        ):  # fmt: skip
            try:
                cpu_s = self._meter.start(queued_s)
                if self._slots is not None:
                    self._slots.note_base(self._slot, cpu_s, queued_s)
                return self._attempt(info, taken, step, captured, names, inputs, links)
            except UnavailableError:
                raise
            except Exception as exc:
                if self._slots is None:
                    raise
                if self._is_thread:
                    log.exception("thread_failed")
                    return self._give_up(info, f"an error in its thread: {type(exc).__name__}: {exc}")
                # Whatever the step has made of this process, or brought us that we cannot record: its slot says what
                # it ran, so that the parent counts a loss and has it started again by another process.
                log.exception("child_failed")
                os._exit(1)

    def _give_up(self, info: _RunInfo, reason: str) -> Answer:
        """Have what this thread ran started again: a loss, as if it had died, but the others live on."""
        _, rows = self._insist(lambda: self._ledger.abandon(info.id, self._record, reason))
        return Answer("ok", publish=tuple(rows))

    def _attempt(
        self,
        info: _RunInfo,
        taken: Taken,
        step: Step,
        captured: Captured,
        names: dict[str, Any],
        inputs: list[Any],
        links: int,
    ) -> Answer:
        state, payload, tail, delay_ms = "succeeded", "", "", 0
        arguments: dict[str, Any] = {}
        error: StepError | None = None
        told = None if self._events is None else self._events.begin(info.id, info.plan.workflow.name, taken)
        try:
            if taken.losses >= self._settings.maximum_losses:
                raise WorkerLostError(self._ledger.losses(info.id, taken.slot)[-1]["reason"], taken.losses)
            if not names:
                names |= info.names | self._inputs(inputs)
            if taken.index >= 0:
                names["item"], names["index"] = self._item(info, taken), taken.index
            if step.is_fan_out and taken.index < 0:
                if self._is_wanted(info, step, names, captured, per_item=False):
                    count, answer = self._expand(info, taken, step, names, captured, links)
                    self._tell_end(told, "succeeded", answer, result=f"{count} items")
                    return answer
                state = "skipped"
            elif not self._is_wanted(info, step, names, captured, per_item=step.is_fan_out):
                state = "skipped"
            elif step.is_wait:
                delay_ms = self._wait_ms(info, taken, step, names, captured)
                state = "sleeping" if delay_ms else "succeeded"
            else:
                arguments = dict(self._evaluate(info, step, step.with_, names, captured))
                if taken.mended:
                    arguments |= self._payloads.unpack(taken.mended)
                if step.workflow is not None:
                    payload = self._insist(partial(self._start_nested, info, taken, step, arguments))
                    state = "waiting"
                else:
                    text = self._call(info, taken, step, _copy(arguments), captured)
                    payload = self._insist(partial(self._payloads.pack_text, text, self._blob(info, taken)))
        except _CannotWaitError:
            raise
        except BaseException as exc:  # noqa: BLE001 -- whatever a step raises is its outcome
            payload = ""
            left_ms = self._settings.deploy_wait_s * 1000 - taken.postponed_ms
            if isinstance(exc, StepCancelled) and self._interrupts is not None and self._interrupts.is_cancelled:
                state = "cancelled"
            elif isinstance(exc, TaskNotFoundError) and left_ms > 0:
                state, delay_ms = "postponed", min(_DEPLOY_LOOK_MS, left_ms)
                error = StepError(type="TaskNotFoundError", message=str(exc))
                log.warning("task_not_found", error=str(exc), gives_up_in_s=left_ms // 1000)
            else:
                error = describe_error(exc, self._settings.project, captured.mask)
                outcome = of_error(error, step, taken.tries, exc)
                state, tail, delay_ms = outcome.state, outcome.tail + input_of(arguments, captured), outcome.delay_ms
                log.info("step_failed", error=error.type, state=state)
        usage = self._meter.stop()
        tail += usage.tail()
        answer = self._insist(
            lambda: self._ledger.complete(
                info.id, taken, state, payload=payload, tail=tail, log=captured.text(), delay_ms=delay_ms,
                usage=usage.totals(), how=self._how(info.id, self._known_chunk(info.id)),
                inline=self._inline(links, taken),
            )
        )  # fmt: skip
        if state in _COUNTED and answer.verdict == "ok":
            counters, workflow = self._engine.counters, info.plan.workflow.name
            counters.add(counter("steps", workflow=workflow, state=state))
            usage.count(counters, workflow=workflow, pool=self._pool)
        self._tell_end(told, state, answer, error=error)
        return answer

    def _tell_end(
        self, told: Told | None, state: str, answer: Answer, *, error: StepError | None = None, result: str = ""
    ) -> None:
        """Tell who watches how an attempt has ended, unless the ledger has not taken it."""
        if told is not None and self._events is not None and answer.verdict == "ok":
            self._events.end(told, state, error=error, result=result)

    def _evaluate(self, info: _RunInfo, step: Step, template: Any, names: dict[str, Any], captured: Captured) -> Any:
        """Evaluate an expression of a step, which may take for ever as its function may."""
        given = (template, self._names_for(info, template, names, captured))
        return self._guarded(lambda: evaluate(*given), {}, timeout_of(step), time.monotonic())

    def _wait_ms(self, info: _RunInfo, taken: Taken, step: Step, names: dict[str, Any], captured: Captured) -> int:
        """Return how long a step that only waits still has to, in ms."""
        template = step.sleep if step.sleep is not None else step.until
        value = self._evaluate(info, step, template, names, captured)
        try:
            if step.sleep is not None:
                return round(parse_duration(value).total_seconds() * 1000)
            return max(0, round(parse_time(value).timestamp() * 1000) - taken.now_ms)
        except ValueError as exc:
            raise ExpressionError(f"{'sleep' if step.sleep is not None else 'until'} {exc}") from exc

    def _is_wanted(
        self, info: _RunInfo, step: Step, names: dict[str, Any], captured: Captured, *, per_item: bool
    ) -> bool:
        """Evaluate `if`. In a fan-out it is asked once per item if it reads the item, else once for the step."""
        if step.if_ is None:
            return True
        if step.is_fan_out and per_item != bool(references(step.if_).names & {"item", "index"}):
            return True
        return bool(self._evaluate(info, step, step.if_, names, captured))

    def _expand(
        self, info: _RunInfo, taken: Taken, step: Step, names: dict[str, Any], captured: Captured, links: int
    ) -> tuple[int, Answer]:
        items = self._evaluate(info, step, step.foreach, names, captured)
        if not isinstance(items, list):
            raise ExpressionError(f"foreach must give a list, not {type(items).__name__}")
        ranges = parts(len(items), max_parallel=step.max_parallel)
        key = self._blob(info, taken) + "-items"
        per, chunks = self._insist(partial(self._payloads.pack_items, items, key)) if items else (1, [])
        return len(items), self._insist(
            lambda: self._ledger.expand(
                info.id, taken, len(items),
                size=ranges[0][1] - ranges[0][0] if ranges else 1,
                max_parallel=step.max_parallel or 0, per=per, chunks=chunks,
                how=self._how(info.id), inline=self._inline(links, taken),
            )
        )  # fmt: skip

    def _known_chunk(self, run: str) -> str:
        name = self._chunk[0]
        return name.removeprefix(run + "/") if name.startswith(run + "/") else ""

    def _item(self, info: _RunInfo, taken: Taken) -> Any:
        if taken.chunk:
            per, number, payload = taken.chunk
            self._chunk = (f"{info.id}/{taken.step}:{number}", per, self._payloads.unpack(payload))
        _, per, items = self._chunk
        return items[taken.index % per]

    def _start_nested(self, info: _RunInfo, taken: Taken, step: Step, arguments: Mapping[str, Any]) -> str:
        assert step.workflow is not None
        index = taken.index if taken.index >= 0 else None
        child = child_run_id(info.id, taken.step, index, taken.attempt)
        plan = self._engine.plan(self._ledger.workflow_plan(step.workflow))
        event = self._load(info, "event", info.event_payload)
        params = plan.workflow.resolve_params(arguments, event)
        parent = {"run": info.id, "step": taken.step, "index": taken.index, "attempt": taken.attempt}
        timeout_ms = round((step.timeout_s or 0) * 1000)
        self._engine.start(child, plan, event=event, params=params, parent=parent, timeout_ms=timeout_ms)
        return child

    def _call(self, info: _RunInfo, taken: Taken, step: Step, arguments: dict[str, Any], captured: Captured) -> str:
        """Call the step's function and return what it returns as JSON.

        All that is the user's code is under the deadline: also the import of the module, and what makes JSON of the
        result.
        """
        assert step.task is not None
        since, timeout_s = time.monotonic(), timeout_of(step)
        function, with_context = self._guarded(self._function, {"reference": step.task}, timeout_s, since)
        if with_context:
            deadline = datetime.now(UTC) + timedelta(seconds=timeout_s)
            if info.deadline_ms:
                deadline = min(deadline, datetime.fromtimestamp(info.deadline_ms / 1000, UTC))
            arguments["context"] = Context(
                run_id=info.id,
                step_id=taken.step,
                workflow=info.plan.workflow.name,
                attempt=taken.attempt,
                index=taken.index if taken.index >= 0 else None,
                deadline=deadline,
                logger=logging.getLogger(f"{info.plan.workflow.name}.{taken.step}"),
                _load_event=lambda: _copy(self._load(info, "event", info.event_payload)),
            )
        with captured:
            self._flusher.watch(captured, partial(self._ledger.log, info.id, taken.slot, taken.attempt))
            try:
                with self._surroundings(step):
                    given = {"function": function, "arguments": arguments, "slot": taken.slot}
                    text: str = self._guarded(_result, given, timeout_s, since)
                    return text
            finally:
                self._flusher.forget()

    @contextmanager
    def _surroundings(self, step: Step) -> Iterator[None]:
        """Guard what a function may leave changed or use up; what belongs to the process is no thread's to guard."""
        if self._is_thread:
            yield
        else:
            with restored(), nullcontext() if step.memory is None else limited(step.memory):
                yield

    def _guarded(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float, since: float
    ) -> Any:
        if self._interrupts is None:
            return function(**arguments)
        return self._interrupts.call(function, arguments, timeout_s, since)

    def _function(self, reference: str) -> tuple[Callable[..., Any], bool]:
        """Return a task's function, and whether it takes the context."""
        if reference not in self._tasks:
            with _importing:
                function = resolve_task(self._settings.project, reference)
            self._tasks[reference] = (function, takes_context(function))
        return self._tasks[reference]

    def _finish(self, info: _RunInfo, taken: Taken, inputs: list[Any]) -> Answer:
        """Say what the run comes to: its state and its output."""
        plan, error, payload = info.plan, "", ""
        states = dict(zip(taken.chunk[::2], taken.chunk[1::2], strict=True))
        unhandled = plan.unhandled(states) if states else []
        if taken.losses >= self._settings.maximum_losses:
            lost = WorkerLostError(self._ledger.losses(info.id, END)[-1]["reason"], taken.losses)
            error = json.dumps(StepError(type="WorkerLostError", message=f"output: {lost}").to_json())
        elif unhandled:
            error = json.dumps(self._failure(info.id, unhandled[0], states[unhandled[0]]))
        else:
            try:
                names = info.names | self._inputs(inputs)
                output: Any
                if plan.workflow.has_output:
                    template = plan.workflow.output
                    output = evaluate(template, self._names_for(info, template, names, Captured(0)))
                elif len(plan.leaves) == 1:
                    output = names[plan.leaves[0]]
                else:
                    output = {leaf: names[leaf] for leaf in plan.leaves}
                payload = self._payloads.pack(output, self._blob(info, taken))
            except UnavailableError:
                raise
            except Exception as exc:  # noqa: BLE001 -- whatever is wrong with it, the run is to end
                error = json.dumps(StepError(type=type(exc).__name__, message=f"output: {exc}").to_json())
        state = "failed" if error else "succeeded"
        return self._ledger.finish(info.id, taken, state, payload=payload, error=error)

    def _failure(self, run: str, step: str, state: str) -> dict[str, Any]:
        if state == "failed":
            return self._ledger.failure(run, step)
        why = f"step {step} was cancelled and has not run since; go on with `orchestrator runs resume {run}`"
        return StepError(type="StepCancelled", message=why, step=step).to_json()

    @staticmethod
    def _blob(info: _RunInfo, taken: Taken) -> str:
        return f"runs/{info.id}/{taken.slot}-{taken.fence}"


def _result(function: Callable[..., Any], arguments: Mapping[str, Any], slot: str) -> str:
    value = function(**arguments)
    try:
        return dumps(value)
    except PayloadError as exc:
        raise PayloadError(f"step {slot}: its result is {exc}") from exc


def _copy(value: Any) -> Any:
    """Return JSON data of which nothing is shared: a step may change what it is given, and others are given it too."""
    if isinstance(value, dict):
        return {key: _copy(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_copy(element) for element in value]
    return value


class StepTask(Task):  # type: ignore[misc]  # celery has no types
    """The one Celery task: a link `(run, step)` with the links behind it, or a header part `(run, step, lo, hi)`."""

    name = STEP_TASK
    ignore_result = True
    acks_late = True

    def __init__(self) -> None:
        self._here = threading.local()

    @property
    def runner(self) -> StepRunner:
        """The runner of this thread: made when a child of the worker starts, or one of its threads (worker.py)."""
        return self._here.runner  # type: ignore[no-any-return]

    @runner.setter
    def runner(self, runner: StepRunner) -> None:
        self._here.runner = runner

    def run(self, run: str, step: str, lo: int | None = None, hi: int | None = None) -> None:
        following = self.request.chain or []
        # trace_task would publish the rest of the chain after us; the ledger has it.
        self.request.chain = None
        if lo is not None:
            units = [f"{step}/{lo}-{hi}"]
        else:
            units = [step, *(signature["args"][1] for signature in reversed(following))]
        if self.runner.is_draining:
            raise Reject("the worker stops", requeue=True)
        queued_ms = self.request.get(QUEUED_AT)
        if not isinstance(queued_ms, int) or not 0 < queued_ms < _LATEST_MS:  # whoever published it
            queued_ms = None
        try:
            self.runner.carry(run, units, queued_ms)
        except UnavailableError as exc:
            # Nothing but the message may know of a unit that was not begun.
            self.runner.outage.begins(exc)
            if not self.runner.is_draining:
                time.sleep(_WAIT_S)
            raise Reject(str(exc), requeue=True) from exc
        self.runner.outage.ends()
