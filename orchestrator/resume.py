"""Going on with a run that has ended: redrive, resume, rerun.

A further *episode* keeps the outputs that are there and runs again what is named, and all that is downstream of it, as
if nothing had happened. What is to be kept is worked out here, from the record of the episode that has ended and does
not change any more; the ledger opens the next one only if that is still the last. So of two people who do the same at
once one has the effect, and the other is told.

A nested run takes the run that waits for it along, and a resumed run the nested ones that have failed.

Everything here raises UnavailableError if the server is away; then it may have had its effect, or not.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import redis

from orchestrator.engine import Engine
from orchestrator.errors import InFlightError, InputError, NotFoundError
from orchestrator.events import MANUAL
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import unavailable
from orchestrator.plan import Plan
from orchestrator.runs import RunState, rerun_id
from orchestrator.workflows import Step

#: Keys of a step that may change without its output being another.
_HARMLESS = frozenset({"retry", "timeout", "memory", "pool", "max_parallel", "description"})
#: How often the rescuer is asked to wait while many nested runs are resumed; less than ledger.lua's AWAIT_MS.
_HOLD_BACK_S = 2.0
_AGAIN = ("failed", "cancelled")
_KEPT = ("succeeded", "skipped")
_WHY = {"failed": "failed", "cancelled": "was cancelled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Redriven:
    """What `redrive` did: the slots that run again in this episode, and why others do not."""

    run: str
    episode: int
    slots: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What resuming a run would do: steps whose output is kept, steps that run again with the reason, steps that are
    gone.

    `definition_changed`: the workflow's definition in force is not the one that the run has.
    """

    run: str
    workflow: str
    episode: int
    definition_changed: bool
    keeps: tuple[str, ...]
    again: Mapping[str, str]
    gone: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "workflow": self.workflow,
            "episode": self.episode,
            "definition_changed": self.definition_changed,
            "keeps": list(self.keeps),
            "again": dict(self.again),
            "gone": list(self.gone),
        }


def redrive(engine: Engine, run: str, slots: Mapping[str, Any | None]) -> Redriven:
    """Run failed steps or items (`step/index`) of a run again, in a new episode of it, and what is downstream of them.

    A value that is not None is a JSON object laid over the arguments of the call, by key. Slots that have not failed
    are skipped. Raises NotFoundError, InFlightError.
    """
    record = _Record(engine, run)
    skipped = {slot: why for slot in slots if (why := record.why_not(slot))}
    wanted = [slot for slot in slots if slot not in skipped]
    if not wanted:
        return Redriven(run=run, episode=record.episode, slots=(), skipped=skipped)
    chosen = _Choice(record.plan)
    for slot in wanted:
        chosen.add(slot)
    chosen.mended = {
        # A name of its own: who is faster must not get what another has mended.
        slot: engine.payloads.pack(value, f"runs/{run}/{slot}-mended-{record.episode}-{uuid.uuid4().hex}")
        for slot in wanted
        if (value := slots[slot]) is not None
    }
    episode = _reopen(engine, record, chosen)
    return Redriven(run=run, episode=episode, slots=tuple(wanted), skipped=skipped)


def check(engine: Engine, run: str, *, keep_definition: bool = False) -> Check:
    """Say what `resume` would do. Raises NotFoundError, InFlightError, InputError as it does."""
    record = _Record(engine, run)
    if record.fields.get("parent"):
        _waiting(engine, run, json.loads(record.fields["parent"]))
    return _Resuming(engine, record, keep_definition=keep_definition).check()


def resume(engine: Engine, run: str, *, keep_definition: bool = False, episode: int | None = None) -> int:
    """Go on with a run that has failed or was cancelled, in a new episode, and return its number.

    Steps that have failed or never ended run again, and what is downstream of them; the other outputs stay. The
    definition in force is taken, if it is another, and then changed steps run again, too; with `keep_definition` that
    of the run is. With `episode` only if that is the last one. Nested runs that have failed are resumed as well. Raises
    NotFoundError, InFlightError (somebody was faster), InputError (it has succeeded, or never began).
    """
    record = _Record(engine, run)
    if episode is not None and episode != record.episode:
        raise InFlightError(f"run {run} is in episode {record.episode} by now; look at it again")
    resuming = _Resuming(engine, record, keep_definition=keep_definition)
    return _reopen(engine, record, resuming.choice, plan=resuming.plan, run_input=resuming.run_input)


def rerun(engine: Engine, run: str) -> str:
    """Start a new run of the event of another, with the definition in force, and return its id.

    Of two at the same moment one has the effect. Raises NotFoundError, InputError (the event does not fit the
    definition, or the run is nested).
    """
    fields = _ask(engine, lambda client: client.hgetall(keys.run_key(run, "run")))
    if not fields:
        raise NotFoundError(f"run {run} is not known; see `orchestrator runs list`")
    if fields.get("parent"):
        raise InputError(f"run {run} is nested; rerun {json.loads(fields['parent'])['run']}, or resume this one")
    number = int(fields.get("reruns") or 0) + 1
    plan = engine.plan(engine.ledger.workflow_plan(fields["workflow"]))
    event = engine.payloads.unpack(fields["event"])
    given = event["data"] if event["type"] == MANUAL and isinstance(event.get("data"), dict) else {}
    params = plan.workflow.resolve_params(given, event)
    new = rerun_id(run, number)
    engine.start(new, plan, event=event, params=params)
    _ask(engine, lambda client: client.hset(keys.run_key(run, "run"), "reruns", number))
    return new


def _ask(engine: Engine, command: Callable[[Any], Any]) -> Any:
    """Ask the server of the ledger. Raises UnavailableError."""
    try:
        return command(engine.ledger.client)
    except redis.RedisError as exc:
        raise unavailable(engine.ledger.client, exc) from exc


class _Record:
    """What is recorded of a run whose episode has ended."""

    def __init__(self, engine: Engine, run: str) -> None:
        with engine.ledger.client.pipeline(transaction=True) as pipe:
            pipe.hgetall(keys.run_key(run, "run"))
            pipe.hgetall(keys.run_key(run, "states"))
            self.fields, self.states = _ask(engine, lambda _: pipe.execute())
        self.run = run
        if not self.fields:
            raise NotFoundError(f"run {run} is not known, or past its retention; see `orchestrator runs list`")
        if "left" not in self.fields:
            raise InputError(f"run {run} failed before its first step; rerun it when its definition fits the event")
        self.state = RunState(self.fields["state"])
        if not self.state.is_end:
            raise InFlightError(
                f"run {run} is going on; wait for its end (`orchestrator runs wait {run}`), or cancel it"
            )
        self.episode = int(self.fields["episode"])
        self.plan = engine.plan(self.fields["plan"])

    def why_not(self, slot: str) -> str:
        """Say why a slot cannot run again; empty if it can."""
        step = slot.partition("/")[0]
        if step not in self.plan.main:
            return "it is a hook: resume the run" if step in self.plan.steps else "the run has no such step"
        state = self.states.get(slot, "scheduled")
        if state not in _AGAIN:
            return f"it has not failed: it is {state}"
        return "its items have failed, not the step: send them back" if f"n:{slot}" in self.states else ""

    def items(self, step: str) -> list[int]:
        """Return the items of a fan-out that have failed or never ended."""
        count = int(self.states.get(f"n:{step}", 0))
        return [index for index in range(count) if self.states.get(f"{step}/{index}") not in _KEPT]

    def child(self, slot: str) -> str:
        """Return the nested run that a slot has waited for, or empty."""
        child: str = self.states.get(f"w:{slot}", "")
        return child if child != "~" else ""


class _Choice:
    """What is to run again: whole steps, items, and slots whose nested run goes on."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: set[str] = set()
        self.items: dict[str, list[int]] = {}
        self.waits: dict[str, str] = {}
        self.mended: dict[str, str] = {}
        self.gone: list[str] = []

    def add(self, slot: str) -> None:
        step, _, index = slot.partition("/")
        if index:
            self.items.setdefault(step, []).append(int(index))
        else:
            self.steps.add(step)

    def to_json(self, record: _Record, run_input: str, parent: str | None) -> dict[str, Any]:
        """Return what Ledger.reopen takes: closed under "is downstream of"."""
        begun = self.steps | self.items.keys() | {slot.partition("/")[0] for slot in self.waits}
        reset = self.steps | self.plan.closure(step for above in begun for step in self.plan.downstream[above])
        items: dict[str, Any] = {}
        for step in (self.items.keys() | {slot.partition("/")[0] for slot in self.waits if "/" in slot}) - reset:
            items[step] = {
                "items": sorted(self.items.get(step, [])),
                "waits": {
                    slot.partition("/")[2]: child
                    for slot, child in self.waits.items()
                    if slot.partition("/")[0] == step
                },
                "parallel": self.plan.steps[step].max_parallel or 0,
            }
        changed = self.plan.hash != record.fields["plan"]
        return {
            "plan": self.plan.hash,
            "input": run_input,
            "graph": self.plan.graph_rows if changed else None,
            "hooks": self.plan.has_hooks,
            "reset": [step for step in self.plan.topological() if step in reset],
            "gone": self.gone,
            "items": items,
            "waits": {slot: child for slot, child in self.waits.items() if "/" not in slot and slot not in reset},
            # An item of a list that is made anew may be another by then.
            "mended": {
                slot: text for slot, text in self.mended.items() if "/" not in slot or slot.split("/")[0] in items
            },
            "timeout_ms": self.plan.timeout_ms,
            "parent": parent,
        }


class _Resuming:
    """Works out what of a run can be kept."""

    def __init__(self, engine: Engine, record: _Record, *, keep_definition: bool) -> None:
        self._record = record
        if record.state is RunState.SUCCEEDED:
            raise InputError(
                f"run {record.run} has succeeded; start it anew with `orchestrator runs rerun {record.run}`"
            )
        self.plan = record.plan
        if not keep_definition:
            try:
                self.plan = engine.plan(engine.ledger.workflow_plan(record.fields["workflow"]))
            except NotFoundError:
                self.plan = record.plan  # no longer in force: it goes on as it was
        self.changed = self.plan.hash != record.plan.hash
        self.run_input: str = record.fields["input"]
        changed_params = self._resolve_params(engine) if self.changed else frozenset()
        self.again: dict[str, str] = {}
        self.choice = _Choice(self.plan)
        # A main step that has become a hook is gone, too: hooks begin as if they never had.
        self.choice.gone = [
            step_id
            for step_id in record.plan.steps
            if step_id not in (self.plan.main if step_id in record.plan.main else self.plan.steps)
        ]
        for step_id in self.plan.topological():
            if step_id in self.plan.main:
                step = self.plan.steps[step_id]
                anew = self._why_anew(step, changed_params)
                why = anew or self._why_missing(step)
                if why:
                    self.again[step_id] = why
                    self._choose(engine, step_id, is_whole=bool(anew))

    def check(self) -> Check:
        record = self._record
        return Check(
            run=record.run,
            workflow=record.fields["workflow"],
            episode=record.episode,
            definition_changed=self.changed,
            keeps=tuple(step for step in self.plan.main if step not in self.again),
            again=self.again,
            gone=tuple(self.choice.gone),
        )

    def _resolve_params(self, engine: Engine) -> frozenset[str]:
        """Resolve the parameters of the changed definition; answers those that are not as before."""
        old = engine.payloads.unpack(self._record.fields["input"]) or {}
        event = engine.payloads.unpack(self._record.fields["event"])
        given = {name: value for name, value in old.items() if name in self.plan.workflow.params}
        new = self.plan.workflow.resolve_params(given, event)
        self.run_input = engine.payloads.pack(new, f"runs/{self._record.run}/input-{self._record.episode + 1}")
        return frozenset(name for name in old.keys() | new.keys() if old.get(name, ...) != new.get(name, ...))

    def _why_anew(self, step: Step, changed_params: frozenset[str]) -> str:
        """Say why nothing that there is of a step can be kept; empty if it can."""
        record = self._record
        for above in self.plan.upstream[step.id]:
            if above in self.again:
                return f"runs after {above}"
        if step.id not in record.plan.main:
            return "is new"
        if self.changed:
            differs = _difference(record.plan.steps[step.id], step)
            if differs:
                return f"its definition changed ({', '.join(differs)})"
            read = self.plan.reads[step.id]
            if "params" in read.names and (
                moved := sorted(read.params & changed_params if read.params else changed_params)
            ):
                return f"reads params that are others now ({', '.join(moved)})"
            if self.plan.upstream[step.id] != record.plan.upstream[step.id]:
                return "what it needs changed"
        return ""

    def _why_missing(self, step: Step) -> str:
        """Say what of a step is not there; empty if all of it is."""
        record = self._record
        state = record.states.get(step.id, "scheduled")
        if state in _KEPT:
            return ""
        items = record.items(step.id)
        if items:
            return f"{len(items)} of its items {'is' if len(items) == 1 else 'are'} missing"
        return _WHY.get(state, "has not run")

    def _choose(self, engine: Engine, step_id: str, *, is_whole: bool) -> None:
        """Take a step as a whole, or only its items, or the nested runs that it waited for."""
        record = self._record
        slots = [step_id]
        if not is_whole and (items := record.items(step_id)):
            slots = [f"{step_id}/{index}" for index in items]
        for slot in slots:
            child = "" if is_whole else record.child(slot)
            if child and _can_go_on(engine, child):
                self.choice.waits[slot] = child
            else:
                self.choice.add(slot)


def _difference(old: Step, new: Step) -> list[str]:
    before, after = old.to_json(), new.to_json()
    return sorted(
        key for key in before.keys() | after.keys() if key not in _HARMLESS and before.get(key) != after.get(key)
    )


def _can_go_on(engine: Engine, child: str) -> bool:
    state, left = _ask(engine, lambda client: client.hmget(keys.run_key(child, "run"), "state", "left"))
    return left is not None and state in _AGAIN


def _reopen(
    engine: Engine,
    record: _Record,
    choice: _Choice,
    *,
    plan: Plan | None = None,
    run_input: str | None = None,
    parent: str | None = None,
    with_children: bool = True,
) -> int:
    """Open the next episode, after those of the runs that wait for this one; answers its number.

    `parent`, if whoever waits for it waits already; not `with_children`, if somebody else reopens those that it waits
    for.
    """
    run = record.run
    waiting = json.loads(record.fields["parent"]) if parent is None and record.fields.get("parent") else None
    if waiting is not None:
        parent = _lift(engine, run, waiting)
    reopening = choice.to_json(record, run_input if run_input is not None else record.fields["input"], parent)
    if parent is not None:
        reopening["timeout_ms"] = _shorter_ms(reopening["timeout_ms"], engine, json.loads(parent))
    reopening["failed"] = list(_failed(record, reopening))
    if engine.ledger.is_active(run):  # whoever ended the episode has not told of it yet, and this is the last moment
        engine.tell_followers(run)
    engine.ledger.index(run, int(record.fields["created_at"]))
    answer = engine.ledger.reopen(run, record.episode, reopening)
    if answer.verdict == "unknown":
        raise NotFoundError(f"run {run} is past its retention")
    if answer.verdict != "ok":
        raise InFlightError(f"run {run} is going on already: somebody was faster")
    engine.publish(run, answer.publish, plan=plan or record.plan)
    if with_children:
        _resume_children(engine, run, choice.waits)
    if waiting is not None:
        engine.publish(waiting["run"], [f"^await:{_slot(waiting)}"])  # it may have been cancelled meanwhile
    return record.episode + 1


def _failed(record: _Record, reopening: Mapping[str, Any]) -> Iterable[str]:
    """Return the slots that had failed and run again, or are hooks, or gone: they are dead letters no longer."""
    hooks = (step for step in record.plan.steps if step not in record.plan.main)
    for step in dict.fromkeys((*reopening["reset"], *reopening["gone"], *hooks)):
        slots = [step, *(f"{step}/{index}" for index in range(int(record.states.get(f"n:{step}", 0))))]
        yield from (slot for slot in slots if record.states.get(slot) == "failed")
    for step, how in reopening["items"].items():
        yield from (f"{step}/{index}" for index in how["items"] if record.states.get(f"{step}/{index}") == "failed")


def _shorter_ms(timeout_ms: int, engine: Engine, where: Mapping[str, Any]) -> int:
    """Return the timeout of a nested run: also the step that waits for it may have one."""
    step = engine.plan(engine.ledger.plan_of(where["run"])).steps[where["step"]]
    return min(filter(None, (timeout_ms, round((step.timeout_s or 0) * 1000))), default=0)


def _slot(where: Mapping[str, Any]) -> str:
    return str(where["step"]) if where["index"] < 0 else f"{where['step']}/{where['index']}"


def _waiting(engine: Engine, child: str, where: Mapping[str, Any]) -> _Record:
    """Return the run that waited for a nested one. Raises InputError if it has ended without it, by another attempt."""
    record, slot = _Record(engine, where["run"]), _slot(where)
    if where["step"] not in record.plan.main:  # an episode begins with the main steps, and its hooks anew
        raise InputError(f"run {child} is nested in a hook of run {record.run}; resume that one")
    if record.states.get(slot) in _AGAIN and record.child(slot) == child:
        return record
    words = f"run {record.run}, in which {child} is nested,"
    if record.state is RunState.SUCCEEDED:
        raise InputError(f"{words} has succeeded without it: nothing needs it any more; discard its dead letters")
    raise InputError(f"{words} has gone on without it; resume that one")


def _lift(engine: Engine, child: str, where: Mapping[str, Any]) -> str:
    """Have the run that waited for a nested one wait again; answers the `parent` of the nested one."""
    record, slot = _waiting(engine, child, where), _slot(where)
    choice = _Choice(record.plan)
    choice.waits[slot] = child
    _reopen(engine, record, choice, with_children=False)
    return json.dumps({**where, "attempt": engine.ledger.attempts_of(record.run, slot)[0]})


def _resume_children(engine: Engine, run: str, waits: Mapping[str, str]) -> None:
    """Resume the nested runs whose end slots wait for, before the rescuer takes their old end for the new one."""
    held_at = time.monotonic()
    for n, (slot, child) in enumerate(waits.items()):
        if time.monotonic() - held_at > _HOLD_BACK_S:
            engine.ledger.hold_back(run, [f"^await:{left}" for left in islice(waits, n, None)])
            held_at = time.monotonic()
        _resume_child(engine, run, slot, child)


def _resume_child(engine: Engine, run: str, slot: str, child: str) -> None:
    """Resume a nested run whose end a slot waits for; if it cannot be, the slot takes its end as it is."""
    step, _, index = slot.partition("/")
    attempt = engine.ledger.attempts_of(run, slot)[0]
    parent = {"run": run, "step": step, "index": int(index or -1), "attempt": attempt}
    try:
        record = _Record(engine, child)
        resuming = _Resuming(engine, record, keep_definition=False)
        _reopen(
            engine, record, resuming.choice, plan=resuming.plan, run_input=resuming.run_input, parent=json.dumps(parent)
        )
    except (InFlightError, InputError, NotFoundError):
        pass  # the chore below looks what has become of it
    engine.publish(run, [f"^await:{slot}"])
