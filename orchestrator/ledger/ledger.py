"""The ledger's verbs: each is one atomic script and one round trip (ledger.lua; the keys are in keys.py).

Who may write what is decided by the *fence*: taking a unit mints a number that is higher than any before in the run;
a verb that comes with another number than the unit's last is refused. A unit that is taken is held by a *lease*, which
whoever runs it renews; when it runs out, the rescuer publishes the unit again and the next one to take it wins.

No verb here blocks other than for Redis itself. A server that is away is waited for as long as `patience_s` says;
then UnavailableError.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import islice
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from orchestrator.errors import NotFoundError, UnavailableError
from orchestrator.events import digest
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.runs import RunState
from orchestrator.telemetry import get_logger
from orchestrator.workflows import Workflow

log = get_logger(__name__)

#: How long a lease holds without being renewed, and how often whoever runs a unit renews it.
LEASE_MS = 10_000
RENEW_S = 2.5
#: States of `complete` after which a slot waits for its time.
_PUT_OFF = ("retrying", "postponed", "sleeping")
#: How long who leads does so without saying so again.
LEADER_MS = 3_000
#: A row that has waited this long in the outbox was left behind by a process that died.
OUTBOX_AGE_MS = 5_000

#: Refusals that redis-py has a class for (and then cuts the code from their text).
_REFUSALS = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)


#: Those that it has none for; of a pipeline it says first which command was refused.
_REFUSAL = re.compile(r"(?:^|caused error: )(?:MISCONF|NOREPLICAS|BUSY) ")


@lru_cache(maxsize=1)
def _text() -> str:
    return resources.files("orchestrator.ledger").joinpath("ledger.lua").read_text()


@dataclass(frozen=True, slots=True)
class Taken:
    """A unit that this process now runs: a link, or the item `index` of a header part.

    `attempt` counts over all episodes, `tries` (this attempt included) and `losses` in this one. `postponed_ms`: how
    long ago it was put off first because no function was found for it. `mended` is the payload of arguments to be laid
    over those of the definition, or empty.
    `inputs` has (step id, state, payload or payloads, failures) for each step that is read; it is empty for a further
    item of the same part. `meta` is (workflow, plan, event, input, created_at, episode, event id, deadline, phase,
    state and error that the run comes to, priority or empty); `chunk` (items per chunk, number, payload) the items
    around `index`; both are empty if the caller said that it knows them. For the end of a run in which a step failed,
    `chunk` has every step and its state, in turn. `count` is the fan-out's size.
    """

    unit: str
    fence: int
    index: int
    attempt: int
    tries: int
    losses: int
    postponed_ms: int
    mended: str
    now_ms: int
    inputs: list[Any]
    meta: list[str]
    chunk: list[Any]
    count: int

    @property
    def step(self) -> str:
        return self.unit.partition("/")[0]

    @property
    def slot(self) -> str:
        return self.step if self.index < 0 else f"{self.step}/{self.index}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb decided.

    `verdict`: `ok`/`go`, `done` (was done before), `held` (somebody runs it), `early`, `refused` (somebody took over),
    `unknown` (no such run). `taken` is what to run next in this process, `publish` the units that have become ready.
    """

    verdict: str
    taken: Taken | None = None
    publish: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class How:
    """Who takes a unit and what it knows already (so that it is not sent again).

    `record` is the opening of the attempt's record: JSON without its closing brace, which names who takes; no two that
    run at the same time have the same. `known_run` is the episode and phase of the run that the caller knows.
    """

    record: str
    lease_ms: int = LEASE_MS
    known_run: str = ""
    known_chunk: str = ""

    def argv(self) -> tuple[str | int, ...]:
        return self.lease_ms, self.record, self.known_run, self.known_chunk


def connect(url: str, *, patience_s: float = 0.0, timeout_s: float = 10.0, decode_responses: bool = True) -> Any:
    """Return a client of the server at `url` that waits up to about `patience_s` for a server that is away.

    An answer that takes longer than `timeout_s` counts as none, and the connection as lost.

    (Any: redis-py's types do not know that `decode_responses` makes every answer a str.)
    """
    cap, base = 1.0, 0.05
    retries = max(1, round(patience_s / cap) + 4) if patience_s else 1
    return redis.Redis.from_url(
        url,
        decode_responses=decode_responses,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, 5.0),
        health_check_interval=0,
        retry=Retry(ExponentialWithJitterBackoff(cap=cap, base=base), retries),
        retry_on_error=[redis.BusyLoadingError, redis.ConnectionError, redis.TimeoutError],
    )


class Ledger:
    """The verbs on runs. Safe to share between threads; after a fork each process has its own connections."""

    def __init__(self, client: Any, *, retention_s: int = 30 * 86400, failed_retention_s: int = 0) -> None:
        self.client = client
        self._script = client.register_script(_text())
        self.retention_s = retention_s
        self._last = f"{retention_s},{max(retention_s, failed_retention_s)},{keys.RUN_ENDED}"

    def _call(self, run: str, *argv: str | int) -> Any:
        return self.guard(lambda: self._script(keys=keys.run_keys(run), args=(*argv, self._last)))

    def _call_many(self, calls: Sequence[tuple[str, tuple[str | int, ...]]]) -> list[Any]:
        """Call verbs on many runs in one round trip; only those that a repeat does not harm.

        The answer is None where a run is so broken that the verb fails on it: it is logged, and harms no other.
        """

        def execute() -> list[Any]:
            with self.client.pipeline(transaction=False) as pipe:
                for run, argv in calls:
                    run_keys = keys.run_keys(run)
                    pipe.evalsha(self._script.sha, len(run_keys), *run_keys, *argv, self._last)
                return list(pipe.execute(raise_on_error=False))

        answers = self.guard(execute)
        if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
            self.guard(lambda: self.client.script_load(self._script.script))
            answers = self.guard(execute)
        for n, answer in enumerate(answers):
            if isinstance(answer, redis.RedisError):
                if _is_away(answer):
                    raise unavailable(self.client, answer) from answer
                log.error("verb_failed", run=calls[n][0], verb=calls[n][1][0], error=str(answer))
                answers[n] = None
        return list(answers)

    # Plans and definitions

    def put_plan(self, plan: Plan) -> None:
        """Store a plan by its hash; idempotent."""
        self.guard(lambda: self.client.set(keys.plan_key(plan.hash), plan.to_json(), nx=True))

    def plan(self, plan_hash: str) -> Plan:
        """Return a stored plan. Raises NotFoundError."""
        text = self.guard(lambda: self.client.get(keys.plan_key(plan_hash)))
        if text is None:
            raise NotFoundError(f"plan {plan_hash} is not in the ledger")
        return Plan.from_json(str(text))

    def publish_workflows(self, plans: Iterable[Plan], *, followed: Iterable[str] = ()) -> str:
        """Put the definitions in force: those given, and no others. Plans of runs in flight stay.

        `followed` says the ends of which runs are events (`followed_runs`). Answers the hash of these definitions, by
        which `definitions` finds them.
        """
        rows, hashes = {}, {}
        for plan in plans:
            self.put_plan(plan)
            hashes[plan.workflow.name] = plan.hash
            rows[plan.workflow.name] = json.dumps({"plan": plan.hash, "workflow": plan.workflow.to_json()})
        text = json.dumps(hashes)
        definitions = digest(text)[:16]
        with self.client.pipeline(transaction=True) as pipe:
            pipe.delete(keys.WORKFLOWS)
            if rows:
                pipe.hset(keys.WORKFLOWS, mapping=rows)
            pipe.set(keys.definitions_key(definitions), text)
            pipe.set(keys.FOLLOWED, json.dumps(sorted(followed)))
            self.guard(pipe.execute)
        return definitions

    def definitions(self, definitions: str) -> list[Workflow]:
        """Return the workflows that were in force under a hash; none if that is no longer known."""
        text = self.guard(lambda: self.client.get(keys.definitions_key(definitions)))
        names = list(json.loads(text).values()) if text else []
        texts = self.guard(lambda: self.client.mget([keys.plan_key(name) for name in names])) if names else []
        return [Plan.from_json(text).workflow for text in texts if text]

    def followed_runs(self) -> frozenset[str]:
        """Return the ends of which runs are events, as `workflow:state`, or `*:state` for those of all workflows."""
        return frozenset(json.loads(self.guard(lambda: self.client.get(keys.FOLLOWED)) or "[]"))

    def workflows(self) -> dict[str, dict[str, Any]]:
        """Return the definitions in force: name -> {"plan": hash, "workflow": Workflow.to_json()}."""
        rows = self.guard(lambda: self.client.hgetall(keys.WORKFLOWS))
        return {name: json.loads(text) for name, text in sorted(rows.items())}

    def workflow_plan(self, name: str) -> str:
        """Return the hash of the plan in force of a workflow. Raises NotFoundError."""
        text = self.guard(lambda: self.client.hget(keys.WORKFLOWS, name))
        if text is None:
            raise NotFoundError(f"workflow {name!r} is not known here")
        return str(json.loads(text)["plan"])

    # Runs

    def start(
        self,
        run: str,
        plan: Plan,
        *,
        event: str,
        event_id: str,
        run_input: str,
        created_ms: int,
        parent: Mapping[str, Any] | None = None,
        timeout_ms: int = 0,
        priority: str = "normal",
    ) -> bool:
        """Write a run with its first units in the outbox; False if that run exists. Idempotent by id.

        `event` and `run_input` are payloads; `timeout_ms` (0: none) is how long it may take. The indexes are written
        first: a kill in between leaves an id without a run, which the rescuer drops, and whoever caused the run tries
        again.
        """
        self.index(run, created_ms)
        rows = plan.graph_rows
        fields: dict[str, str] = {"workflow": plan.workflow.name, "plan": plan.hash, "state": "queued"}
        fields |= {"event": event, "event_id": event_id, "input": run_input, "left": str(len(plan.main))}
        if parent is not None:
            fields["parent"] = json.dumps(parent)
        if plan.has_hooks:
            fields["hooks"] = "1"
        if priority != "normal":
            fields["priority"] = priority
        answer = self._call(
            run, "start", timeout_ms, len(rows), *_flat(rows), len(plan.roots), *plan.roots, *_flat(fields)
        )
        if answer[0] == "started" and timeout_ms:
            self._expect(run, created_ms + timeout_ms)
        return bool(answer[0] == "started")

    def _expect(self, run: str, due_ms: int) -> None:
        """Note when something in a run is due, so that it is taken up in time; else the rescuer finds it later."""
        self.guard(lambda: self.client.zadd(keys.TIMERS, {run: due_ms}, lt=True))

    def start_failed(
        self, run: str, *, workflow: str, plan: str, event: str, event_id: str, created_ms: int, error: str
    ) -> bool:
        """Write a run that failed before its first step (its input was wrong); False if that run exists."""
        self.index(run, created_ms, active=False)
        fields = {"workflow": workflow, "plan": plan, "event": event, "event_id": event_id}
        fields |= {"created_at": str(created_ms), "error": error}
        return bool(self._call(run, "refuse", *_flat(fields)))

    def index(self, run: str, created_ms: int, *, active: bool = True) -> None:
        """Put a run on the list of all runs, and of those in flight; idempotent."""
        with self.client.pipeline(transaction=False) as pipe:
            pipe.zadd(keys.RUNS, {run: created_ms}, nx=True)
            if active:
                pipe.zadd(keys.ACTIVE, {run: created_ms}, nx=True)
            self.guard(pipe.execute)

    def close(self, run: str) -> tuple[str, str]:
        """Take a run that has ended, with an empty outbox, off the list of those in flight; one reopened stays.

        Answers its workflow and state to the one who did so, for each episode once; empty texts to all others.
        """
        with self.client.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.ACTIVE, run)
            pipe.hmget(keys.run_key(run, "run"), "workflow", "state", "created_at")
            was_there, (workflow, state, created) = self.guard(pipe.execute)
        if state is not None and not RunState(state).is_end:
            self.index(run, int(created))
            return "", ""
        return (workflow, state) if was_there and state else ("", "")

    def drop(self, run: str, before_ms: int) -> None:
        """Take an id without a run off that list, if it was put there before: a younger one may be just starting."""
        created = self.guard(lambda: self.client.zscore(keys.ACTIVE, run))
        if created is not None and created < before_ms:
            self.close(run)

    def is_active(self, run: str) -> bool:
        """Tell whether a run is on the list of those in flight: it has not ended, or something is left to do for it."""
        return self.guard(lambda: self.client.zscore(keys.ACTIVE, run)) is not None

    def active(self) -> list[str]:
        """Return the runs in flight, oldest first."""
        return [str(run) for run in self.guard(lambda: self.client.zrange(keys.ACTIVE, 0, -1))]

    def plans_in_flight(self) -> set[str]:
        """Return the hashes of the plans that the runs in flight started with."""
        with self.client.pipeline(transaction=False) as pipe:
            for run in self.active():
                pipe.hget(keys.run_key(run, "run"), "plan")
            return {str(plan) for plan in self.guard(pipe.execute) if plan is not None}

    # Steps

    def begin(self, run: str, units: Sequence[str], how: How) -> Answer:
        """Take the first unit of a message that has not ended. Verdicts: go, done, held, early, unknown.

        A unit that was begun is held until the sweep (or `abandon`) has given up its lease, run out or not. Only who
        has taken it gets it again: the answer was lost, for a process asks only when it runs nothing.
        """
        return _answer(self._call(run, "begin", *how.argv(), *units))

    def complete(
        self,
        run: str,
        taken: Taken,
        state: str,
        *,
        payload: str = "",
        tail: str = "",
        log: str = "",
        delay_ms: int = 0,
        usage: Sequence[int] = (),
        how: How,
        inline: str,
    ) -> Answer:
        """Record the outcome of what was taken, settle the joins below, and take what comes next.

        `state`: succeeded, failed, skipped, cancelled, or waiting (for the nested run whose id is `payload`); or, for
        `delay_ms`: retrying (the attempt has failed and another follows), postponed (there was none, and it is taken
        again), sleeping (then it has succeeded). `tail` is JSON members to add to the attempt's record, with a leading
        comma; `usage` is added to what the step and the run have used: us on the clock, us of processors, MB-ms of
        memory. `inline` is this worker's pool; empty takes nothing further.
        Verdicts: ok, done (a repeat), refused (somebody took over).
        """
        answer = self._call(
            run, "complete", taken.unit, taken.fence, taken.index, state, payload, tail, log, delay_ms,
            ":".join(map(str, usage)), *how.argv(), inline,
        )  # fmt: skip
        if state in _PUT_OFF and answer[0] == "ok":
            self._expect(run, taken.now_ms + delay_ms)
        return _answer(answer)

    def expand(
        self,
        run: str,
        taken: Taken,
        count: int,
        *,
        size: int,
        max_parallel: int,
        per: int,
        chunks: Sequence[str],
        how: How,
        inline: str,
    ) -> Answer:
        """Record that a fan-out has `count` items, in header parts of `size`. Verdicts as `complete`."""
        return _answer(
            self._call(
                run, "expand", taken.unit, taken.fence, count, size, max_parallel, per, *how.argv(), inline, *chunks
            )
        )

    def resolve(
        self,
        run: str,
        step: str,
        index: int,
        attempt: int,
        child: str,
        state: str,
        *,
        payload: str,
        tail: str,
        now_ms: int,
        delay_ms: int = 0,
    ) -> Answer:
        """Record the end of the nested run of an attempt of a step or item (index -1: the step itself); first one wins.

        `state`: succeeded, failed, or retrying (in `delay_ms`, with a run of its own).
        """
        answer = self._call(run, "resolve", step, index, attempt, child, state, payload, tail, delay_ms)
        if state == "retrying" and answer[0] == "ok":
            self._expect(run, now_ms + delay_ms)
        return _answer(answer)

    def finish(self, run: str, taken: Taken, state: str, *, payload: str, error: str) -> Answer:
        """Record what a run comes to; its hooks follow, or its end. Verdicts: ok, done, refused."""
        return _answer(self._call(run, "finish", taken.fence, state, payload, error))

    def cancel(self, run: str, phase: str = "") -> Answer:
        """Have nothing further of a phase of a run begin, and what is in work be told to stop; durable and idempotent.

        Verdicts: ok, done (it has ended, is in another phase, or is being cancelled already).
        """
        answer = self._call(run, "cancel", phase)
        if answer[0] == "ok":
            self._expect(run, 0)  # whoever looks at what is due finds a run that is no longer as it was
        return _answer(answer)

    def cancel_step(self, run: str, slot: str, attempt: int = 0) -> Answer:
        """Cancel one step, with its items or its nested run, or one item (`step/index`); durable and idempotent.

        What is not at work ends at once, as cancelled, and what is downstream of it as if it had failed; what is at
        work is told to stop. The rest of the run goes on. With `attempt`, one that is over is left as it is.
        Verdicts: ok, done (it has ended, or is being cancelled already), unknown (no such run), no_step, no_item,
        no_attempt, early (a hook, or an item of a fan-out, that is not there yet).
        """
        answer = self._call(run, "cancel_step", slot, attempt)
        if answer[0] == "ok":
            self._expect(run, 0)  # as in `cancel`
        return _answer(answer)

    def phase_of(self, run: str) -> str:
        """Return the phase that a run is in (main: empty). Raises NotFoundError."""
        state, phase = self.guard(lambda: self.client.hmget(keys.run_key(run, "run"), "state", "phase"))
        if state is None:
            raise NotFoundError(f"run {run} is not known; see `orchestrator runs list`")
        return str(phase or "")

    def fire(self, run: str) -> list[str]:
        """Take up what in a run waited for a time that has come; answers the rows to publish."""
        rows, following = self._call(run, "fire")
        if following:
            self._expect(run, int(following))
        return list(rows)

    def due(self, now_ms: int, limit: int) -> tuple[list[str], int | None]:
        """Answer runs in which something is due, and when the next after these is; they are noted no longer."""
        found = self.guard(lambda: self.client.zrange(keys.TIMERS, 0, limit, withscores=True))
        runs = [str(run) for run, due in found if due <= now_ms][:limit]
        if runs:
            self.guard(lambda: self.client.zrem(keys.TIMERS, *runs))
        later = [int(due) for _, due in found[len(runs) :]]
        return runs, later[0] if later else None

    def reopen(self, run: str, episode: int, reopening: Mapping[str, Any]) -> Answer:
        """Open the episode after `episode`, which has ended; `reopening` as resume.py makes it.

        Verdicts: ok, unknown, in_flight, changed (the last episode is another).
        """
        # With an id, as in `cancel`: who asks again is not somebody who was slower.
        answer = self._call(run, "reopen", episode, json.dumps(reopening), uuid.uuid4().hex)
        if answer[0] == "ok":
            created = self.guard(lambda: self.client.hget(keys.run_key(run, "run"), "created_at"))
            self.index(run, int(created))
            if reopening["timeout_ms"]:
                self._expect(run, self.now_ms() + int(reopening["timeout_ms"]))
        return _answer(answer)

    def hold_back(self, run: str, rows: Sequence[str]) -> None:
        """Have the rescuer leave `^await` rows of a run that was reopened alone for some seconds more."""
        for lo in range(0, len(rows), 1000):
            self._call(run, "hold_back", *rows[lo : lo + 1000])

    def now_ms(self) -> int:
        """Return the server's time."""
        seconds, micros = self.guard(self.client.time)
        return int(seconds) * 1000 + int(micros) // 1000

    def child_of(self, run: str, slot: str) -> str:
        """Return the id of the nested run that a slot waits for, or empty."""
        return str(self.guard(lambda: self.client.hget(keys.run_key(run, "states"), f"w:{slot}")) or "")

    def is_waiting(self, run: str, slot: str) -> bool:
        """Tell whether a slot waits for its nested run, in a run that is not to be stopped."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.hmget(keys.run_key(run, "run"), "state", "stopping")
            pipe.hget(keys.run_key(run, "states"), slot)
            (state, stopping), slot_state = self.guard(pipe.execute)
        return state == "running" and stopping is None and slot_state == "running"

    def state_of(self, run: str, slot: str) -> str:
        """Return the state of a step or item; what the ledger knows nothing of has not begun."""
        state = self.guard(lambda: self.client.hget(keys.run_key(run, "states"), slot))
        return str(state or ("queued" if "/" in slot else "scheduled"))

    def worker_of(self, run: str, slot: str, attempt: int) -> str:
        """Return which process ran an attempt, as worker/pid; empty if none has."""
        record = self.guard(lambda: self.client.hget(keys.run_key(run, "attempts"), f"{slot}@{attempt}"))
        return str(json.loads(record or "{}").get("worker", ""))

    def attempts_of(self, run: str, slot: str) -> tuple[int, int]:
        """Return which attempt a slot is at: (over all episodes, in this one)."""
        retries, before = self.guard(lambda: self.client.hmget(keys.run_key(run, "attempts"), f"{slot}#a", f"{slot}#b"))
        return 1 + int(retries or 0), 1 + int(retries or 0) - int(before or 0)

    def priority_of(self, run: str) -> str:
        """Return the priority of a run: high, normal or low."""
        return str(self.guard(lambda: self.client.hget(keys.run_key(run, "run"), "priority")) or "normal")

    def plan_of(self, run: str) -> str:
        """Return the hash of the plan that a run started with. Raises NotFoundError."""
        plan = self.guard(lambda: self.client.hget(keys.run_key(run, "run"), "plan"))
        if plan is None:
            raise NotFoundError(f"run {run} is not known; see `orchestrator runs list`")
        return str(plan)

    def parent_of(self, run: str) -> str:
        """Return the JSON of the step that waits for a nested run; empty for other runs."""
        return str(self.guard(lambda: self.client.hget(keys.run_key(run, "run"), "parent")) or "")

    def outcome(self, run: str) -> tuple[str, str, str]:
        """Return (state, payload of the output, JSON of the error) of a run; empty strings for what is not there."""
        fields = self.guard(lambda: self.client.hmget(keys.run_key(run, "run"), "state", "output", "error"))
        state, output, error = fields
        return state or "", output or "", error or ""

    def ending(self, run: str) -> dict[str, str]:
        """Return what is known of a run that may have ended; empty if it is not known. All values are text."""
        fields = ("workflow", "state", "episode", "output", "error", "event", "finished_at")
        values = self.guard(lambda: self.client.hmget(keys.run_key(run, "run"), fields))
        return {} if values[1] is None else {name: value or "" for name, value in zip(fields, values, strict=True)}

    def failure(self, run: str, step: str) -> dict[str, Any]:
        """Return the error of a failed step, or of its first failed item, with `step` and `index` in it."""
        found = self.failures(run, [step], limit=1)
        return found[0] if found else {"type": "Unknown", "message": "", "step": step}

    def failures(self, run: str, steps: Iterable[str], limit: int = 100) -> list[dict[str, Any]]:
        """Return the errors of failed steps and items of a run, with `step` and `index`; at most `limit`."""

        def read() -> list[dict[str, Any]]:
            slots = (slot for step in steps for slot in self._failed(run, step))
            return [self._error(run, slot) for slot in islice(slots, limit)]

        found: list[dict[str, Any]] = self.guard(read)
        return found

    def _failed(self, run: str, step: str) -> Iterator[str]:
        """Give the slots of a step that have failed: itself, or its items."""
        count = self.client.hget(keys.run_key(run, "states"), f"n:{step}")
        slots = [step] if count is None else [f"{step}/{index}" for index in range(int(count))]
        for lo in range(0, len(slots), 1000):
            batch = slots[lo : lo + 1000]
            states = self.client.hmget(keys.run_key(run, "states"), batch)
            yield from (slot for slot, state in zip(batch, states, strict=True) if state == "failed")

    def _error(self, run: str, slot: str) -> dict[str, Any]:
        retries = int(self.client.hget(keys.run_key(run, "attempts"), f"{slot}#a") or 0)
        record = json.loads(self.client.hget(keys.run_key(run, "attempts"), f"{slot}@{retries + 1}") or "{}")
        error: dict[str, Any] = record.get("error") or {"type": "Unknown", "message": ""}
        step, _, index = slot.partition("/")
        error["step"] = step
        if index:
            error["index"] = int(index)
        return error

    def losses(self, run: str, slot: str) -> list[dict[str, Any]]:
        """Return what each loss of a slot was, oldest first: {"at": ms, "reason", "worker"}."""
        text = self.guard(lambda: self.client.hget(keys.run_key(run, "attempts"), f"{slot}#x"))
        found: list[dict[str, Any]] = json.loads(f"[{text or ''}]")
        return found

    def clear(self, run: str, units: Sequence[str]) -> int:
        """Take units that were published out of the outbox; answers how many rows are left."""
        return int(self._call(run, "clear", *units))

    def renew(
        self, held: Iterable[tuple[str, str, int]], lease_ms: int = LEASE_MS
    ) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Renew leases, given as (run, unit, fence), in one round trip.

        Answers (run, unit) of those taken over, and of those that are to be stopped, as their run is. A lease that the
        sweep has given up is the caller's again if nobody has taken over yet.
        """
        by_run: dict[str, list[str | int]] = {}
        for run, unit, fence in held:
            by_run.setdefault(run, []).extend((unit, fence))
        if not by_run:
            return set(), set()
        answers = self._call_many([(run, ("renew", lease_ms, *pairs)) for run, pairs in by_run.items()])
        gone, stopping = (
            {(run, unit) for run, answer in zip(by_run, answers, strict=True) for unit in (answer or ((), ()))[which]}
            for which in (0, 1)
        )
        return gone, stopping

    def abandon(self, run: str, record: str, reason: str) -> tuple[list[str], list[str]]:
        """Give up what a process that has died had taken in a run: (the units, rows to publish).

        `record` is that of its How, and has to be of that process alone; `reason` says how it died.
        """
        lost, rows = self._call(run, "abandon", record, reason)
        return list(lost), list(rows)

    def give_back(self, run: str, unit: str, fence: int, size: int) -> list[str]:
        """Give back the items of a part that were not begun, as parts of `size`; answers the new units."""
        return list(self._call(run, "give_back", unit, fence, size))

    def look(self, runs: Sequence[str], outbox_age_ms: int = OUTBOX_AGE_MS) -> tuple[list[str], dict[str, str]]:
        """Look at many runs in one round trip: (those that `sweep` would do something for, those that are idle).

        A run that is not in flight is among the former. A run is idle if it goes on only when a message of its is
        taken; the text with it, whose last part is the hash of its plan, changes with all that happens in the run.
        """
        if not runs:
            return [], {}
        answered = list(zip(runs, self._call_many([(run, ("look", outbox_age_ms)) for run in runs]), strict=True))
        return [run for run, answer in answered if answer == 1], {run: a for run, a in answered if isinstance(a, str)}

    def sweep(
        self, run: str, outbox_age_ms: int = OUTBOX_AGE_MS, *, with_leases: bool = True
    ) -> tuple[str, list[str], int, int]:
        """Answer (state or "", units to publish again, how many of them were lost, rows in the outbox).

        `with_leases`: give up those that have run out.
        """
        state, again, lost, left = self._call(run, "sweep", outbox_age_ms, "1" if with_leases else "")
        return state, list(again), lost, left

    def limbo(self, idle: Mapping[str, str]) -> dict[str, tuple[list[str], bool]]:
        """Say what idle runs wait for, given as `look` did: the units that wait for a message, whether for time alone.

        One round trip. Of a run that has moved since: nothing, and False.
        """
        answers = self._call_many([(run, ("limbo", version)) for run, version in idle.items()]) if idle else []
        return {
            run: (list(answer[0]), bool(answer[1])) if answer else ([], False)
            for run, answer in zip(idle, answers, strict=True)
        }

    def expected(self, runs: Sequence[str]) -> dict[str, float | None]:
        """Return when something is noted to be due in runs, ms; None where nothing is."""
        scores = self.guard(lambda: self.client.zmscore(keys.TIMERS, list(runs))) if runs else []
        return dict(zip(runs, scores, strict=True))

    def give_up(self, run: str, error: Mapping[str, Any]) -> list[str]:
        """End a run that cannot go on as failed; answers the chores that this makes, none if it was not in flight."""
        return list(self._call(run, "give_up", json.dumps(error)))

    def lead(self, role: str, who: str, lease_ms: int = LEADER_MS) -> tuple[bool, int]:
        """Take or keep the lead in a role, of which one of several processes has it: (has it, server's time in ms).

        For a moment two may think that they lead: what they do must be harmless when done twice.
        """
        key = keys.leader_key(role)
        with self.client.pipeline(transaction=False) as pipe:
            pipe.set(key, who, nx=True, px=lease_ms)
            pipe.get(key)
            pipe.time()
            _, leader, (seconds, micros) = self.guard(pipe.execute)
        if leader == who:
            self.guard(lambda: self.client.pexpire(key, lease_ms))
        return leader == who, seconds * 1000 + micros // 1000

    def server_started_ms(self) -> int:
        """Return when the server was started, by its clock, to the second."""
        with self.client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.info("server")
            (seconds, _), info = self.guard(pipe.execute)
        return (int(seconds) - int(info["uptime_in_seconds"])) * 1000

    def resign(self, role: str, who: str) -> None:
        """Let somebody else lead at once."""
        key = keys.leader_key(role)
        if self.guard(lambda: self.client.get(key)) == who:
            self.guard(lambda: self.client.delete(key))

    def log(self, run: str, slot: str, attempt: int, text: str) -> None:
        """Keep the captured text, so far, of an attempt that is still going on."""
        self._call(run, "log", slot, attempt, text)

    # What comes in

    def set_aside(self, raw: bytes, reason: str, now_ms: int, *, detail: str = "", queue: str = "") -> None:
        """Keep the bytes of a message that nobody can process, until they are a dead letter (deadletters.py)."""
        record = keys.set_aside_record(raw, reason, now_ms, detail=detail, queue=queue)
        self.guard(lambda: self.client.lpush(keys.SET_ASIDE, record))

    # File marks (triggers/files.py)

    def read(self, source: str) -> dict[str, str]:
        """Return the files that a watch has handled: path -> identity."""
        return dict(self.guard(lambda: self.client.hgetall(keys.marks_key(source))))

    def write(self, source: str, marks: Mapping[str, str]) -> None:
        """Mark files as handled. Raises UnavailableError."""
        self.guard(lambda: self.client.hset(keys.marks_key(source), mapping=dict(marks)))

    def forget(self, source: str, paths: Iterable[str]) -> None:
        """Forget files that are gone. Raises UnavailableError."""
        gone = list(paths)
        if gone:
            self.guard(lambda: self.client.hdel(keys.marks_key(source), *gone))

    def is_up(self) -> bool:
        """Tell whether the server answers; a refusal is an answer (its disk may be full), and it can be read."""
        try:
            return bool(self.client.ping())
        except redis.ResponseError:
            return True
        except redis.RedisError:
            return False

    def refusal(self) -> str:
        """Say why the server cannot be used, as it is away or takes no writes; empty if it can."""
        try:
            self.guard(lambda: self.client.set(keys.PROBE, "1", px=1))
        except UnavailableError as exc:
            return str(exc)
        return ""

    def trim(self, before_ms: int) -> list[str]:
        """Take runs older than that off the index; answers them (some may still be in flight)."""
        old = [str(run) for run in self.guard(lambda: self.client.zrange(keys.RUNS, "-inf", before_ms, byscore=True))]
        with self.client.pipeline(transaction=False) as pipe:
            for run in old:
                pipe.exists(keys.run_key(run, "run"))
            gone = [run for run, there in zip(old, self.guard(pipe.execute), strict=True) if not there]
        with self.client.pipeline(transaction=False) as pipe:
            if gone:
                pipe.zrem(keys.RUNS, *gone)
            self.guard(pipe.execute)
        return gone

    def guard(self, command: Any) -> Any:
        """Run a command on the server; raises UnavailableError if it is away, or takes none."""
        try:
            return command()
        except redis.RedisError as exc:
            if _is_away(exc):
                raise unavailable(self.client, exc) from exc
            raise


def _is_away(exc: redis.RedisError) -> bool:
    """Tell whether the server cannot be used now, as opposed to finding fault with what it was asked."""
    if not isinstance(exc, redis.ResponseError):
        return True
    return isinstance(exc, _REFUSALS) or _REFUSAL.search(str(exc)) is not None


def unavailable(client: Any, exc: Exception) -> UnavailableError:
    """Say in one line that the server of `client` is away, without its password, and what to do."""
    options = client.connection_pool.connection_kwargs
    where = options.get("path") or f"{options.get('host')}:{options.get('port')}"
    reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    return UnavailableError(f"Redis at {where} cannot be used ({reason}); start it, or set ledger_url and broker_url")


def _answer(reply: Sequence[Any]) -> Answer:
    if len(reply) == 1:
        return Answer(reply[0])
    return Answer(reply[0], Taken(*reply[1]) if reply[1] else None, tuple(reply[2]))


def _flat(mapping: Mapping[str, str]) -> list[str]:
    return [part for pair in mapping.items() for part in pair]
