"""Workflow and Step: what a user defines, in YAML or in Python; pure data with its checks.

Both faces (definitions.py for YAML, tracing.py for Python) make the same objects, and these know nothing of
where they came from. `faults()` returns everything that is wrong with a workflow at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from orchestrator import expressions
from orchestrator.durations import parse_duration, parse_time
from orchestrator.errors import ExpressionError, InputError, shorten
from orchestrator.errors import unknown as unknown
from orchestrator.expressions import References, evaluate, references
from orchestrator.pools import DEFAULT_POOL as DEFAULT_POOL
from orchestrator.pools import Resources
from orchestrator.retries import RetryPolicy
from orchestrator.subscriptions import On, on_faults, on_from_json, on_to_json

#: What expressions may read of `run`: everywhere, and besides in the steps of hooks, when the run has an outcome.
RUN_FACTS = ("id", "workflow", "created_at", "episode")
HOOK_FACTS = ("state", "failures", "error")
#: The node that ends a run; not a step of the user's. It cannot be a step id.
END = "$end"

_WORKFLOW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")


class TriggerRule(StrEnum):
    """When a step may start, given how its upstream steps ended (as in Airflow)."""

    ALL_SUCCESS = "all_success"
    ALL_DONE = "all_done"
    ONE_FAILED = "one_failed"
    NONE_FAILED = "none_failed"

    @property
    def takes_up_failure(self) -> bool:
        """Whether a step with this rule runs because of, or in spite of, a failed upstream step."""
        return self in (TriggerRule.ALL_DONE, TriggerRule.ONE_FAILED)


class Phase(StrEnum):
    """The part of a workflow that a step stands in: the graph itself, or a hook that runs when that has ended.

    `on_failure` runs once per episode when the run has failed, `finally` once per episode whatever came of it.
    """

    STEPS = "steps"
    ON_FAILURE = "on_failure"
    FINALLY = "finally"

    @property
    def is_hook(self) -> bool:
        return self is not Phase.STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a step takes from around it where it says nothing itself: from its @task, its workflow, its project."""

    retry: RetryPolicy | None = None
    timeout_s: float | None = None
    memory: int | None = None
    resources: Resources | None = None

    def to_json(self) -> dict[str, Any]:
        """Return them as plain JSON, without what is not given."""
        return _attempt_to_json(self.retry, self.timeout_s, self.memory, self.resources)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Defaults:
        """Read what `to_json` wrote."""
        return cls(
            retry=_retry_from_json(body),
            timeout_s=body.get("timeout"),
            memory=body.get("memory"),
            resources=_resources_from_json(body),
        )


def _attempt_to_json(
    retry: RetryPolicy | None, timeout_s: float | None, memory: int | None = None, resources: Resources | None = None
) -> dict[str, Any]:
    given = {
        "retry": None if retry is None else retry.to_json(),
        "timeout": timeout_s,
        "memory": memory,
        "resources": None if resources is None else resources.to_json(),
    }
    return {key: value for key, value in given.items() if value is not None}


def _resources_from_json(body: Mapping[str, Any]) -> Resources | None:
    return Resources.from_json(body["resources"]) if "resources" in body else None


def _retry_from_json(body: Mapping[str, Any]) -> RetryPolicy | None:
    return RetryPolicy.from_json(body["retry"]) if "retry" in body else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node of a workflow: a task to call, a workflow to run, or a time to wait for.

    `with_`, `if_`, `foreach`, `sleep` and `until` are template data (expressions.py). `task` is `module:function` or a
    registered name. Exactly one of `task`, `workflow`, `sleep` (a duration, durations.py) and `until` (a time,
    RFC 3339) is given. `max_parallel` bounds the items of `foreach` in work. `timeout_s` and `memory` (bytes) are
    limits of one attempt; without `retry` there is one. `pool` is the one that it names, or that project.py has
    found it by its `resources`; empty: DEFAULT_POOL.
    """

    id: str
    phase: Phase = Phase.STEPS
    task: str | None = None
    workflow: str | None = None
    sleep: Any = None
    until: Any = None
    with_: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    foreach: Any = None
    max_parallel: int | None = None
    if_: Any = None
    trigger_rule: TriggerRule = TriggerRule.ALL_SUCCESS
    retry: RetryPolicy | None = None
    timeout_s: float | None = None
    memory: int | None = None
    resources: Resources | None = None
    pool: str = ""
    description: str = ""

    @property
    def is_fan_out(self) -> bool:
        return self.foreach is not None

    @property
    def is_wait(self) -> bool:
        """Whether the step only waits: it has nothing that could be tried again, and no worker runs it."""
        return self.sleep is not None or self.until is not None

    @property
    def place(self) -> tuple[str, str]:
        """Path of the step in its definition."""
        return (str(self.phase), self.id)

    def reads(self) -> References:
        """What the step's expressions read. Raises ExpressionError for one that is malformed."""
        return references([dict(self.with_), self.if_, self.foreach, self.sleep, self.until])

    def upstream(self) -> tuple[str, ...]:
        """Ids of the steps that its expressions name, and `needs`; `Workflow.upstream_of` says which are edges."""
        return tuple(dict.fromkeys([*self.needs, *sorted(self.reads().step_ids)]))

    def with_defaults(self, *around: Defaults) -> Step:
        """Return the step with what the first of `around` gives that gives it, where it says nothing itself.

        Only for a task: a nested workflow has steps that take their own, and a wait has no attempts.
        """
        if self.task is None:
            return self
        return replace(
            self,
            retry=_first(self.retry, *(defaults.retry for defaults in around)),
            timeout_s=_first(self.timeout_s, *(defaults.timeout_s for defaults in around)),
            memory=_first(self.memory, *(defaults.memory for defaults in around)),
            resources=_first(self.resources, *(defaults.resources for defaults in around)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the step as plain JSON, without what is at its default."""
        body: dict[str, Any] = {"id": self.id}
        for name, value, default in (
            ("phase", str(self.phase), "steps"),
            ("task", self.task, None),
            ("workflow", self.workflow, None),
            ("sleep", self.sleep, None),
            ("until", self.until, None),
            ("with", dict(self.with_), {}),
            ("needs", list(self.needs), []),
            ("foreach", self.foreach, None),
            ("max_parallel", self.max_parallel, None),
            ("if", self.if_, None),
            ("trigger_rule", str(self.trigger_rule), "all_success"),
            ("pool", self.pool, ""),
            ("description", self.description, ""),
        ):
            if value != default:
                body[name] = value
        return body | _attempt_to_json(self.retry, self.timeout_s, self.memory, self.resources)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Step:
        """Read what `to_json` wrote."""
        return cls(
            id=body["id"],
            phase=Phase(body.get("phase", "steps")),
            task=body.get("task"),
            workflow=body.get("workflow"),
            sleep=body.get("sleep"),
            until=body.get("until"),
            with_=body.get("with", {}),
            needs=tuple(body.get("needs", ())),
            foreach=body.get("foreach"),
            max_parallel=body.get("max_parallel"),
            if_=body.get("if"),
            trigger_rule=TriggerRule(body.get("trigger_rule", "all_success")),
            retry=_retry_from_json(body),
            timeout_s=body.get("timeout"),
            memory=body.get("memory"),
            resources=_resources_from_json(body),
            pool=body.get("pool", ""),
            description=body.get("description", ""),
        )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


class Param(BaseModel):
    """One typed parameter of a workflow: a small part of JSON Schema, checked strictly ("1" is not an integer)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["string", "integer", "number", "boolean", "array", "object", "null"] | None = Field(
        default=None, description="JSON Schema type; any value when absent."
    )
    description: str = ""
    default: Any = Field(
        default=None, description="Value or expression over `event`; without one the parameter is required."
    )
    enum: list[Any] | None = Field(default=None, description="The only values allowed.")
    items: Param | None = Field(default=None, description="What the elements of an array are.")
    minimum: float | None = Field(default=None, description="Least number allowed.")
    maximum: float | None = Field(default=None, description="Greatest number allowed.")
    pattern: str | None = Field(default=None, description="Regular expression that a string must contain a match of.")

    @property
    def is_required(self) -> bool:
        return "default" not in self.model_fields_set

    def faults(self) -> list[tuple[str, str]]:
        """Return (field, message) for each contradiction in this schema; an empty list when it is sound."""
        found: list[tuple[str, str]] = []
        if self.items is not None:
            if self.type != "array":
                found.append(("items", "belongs to a parameter of type: array"))
            if not self.items.is_required:
                found.append(("items.default", "elements of an array have no default"))
            else:
                found += [(f"items.{key}", message) for key, message in self.items.faults()]
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as exc:
                found.append(("pattern", f"not a regular expression: {exc}"))
            if self.type != "string":
                found.append(("pattern", "belongs to a parameter of type: string"))
        for limit in ("minimum", "maximum"):
            if getattr(self, limit) is not None and self.type not in ("integer", "number"):
                found.append((limit, "belongs to a parameter of type: integer or number"))
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            found.append(("minimum", f"{self.minimum} is above maximum {self.maximum}"))
        if not found and not self.is_required and not references(self.default).names:
            try:
                default = evaluate(self.default, {})
            except ExpressionError as exc:
                return [("default", str(exc))]
            found += [("default", problem) for problem in self.problems(default)]
        return found

    def problems(self, value: Any) -> list[str]:
        """Return what is wrong with `value`, one phrase each; an empty list when it fits."""
        try:
            # Python's own regular expressions: `faults` has checked the pattern as one of those.
            TypeAdapter(self._python_type(), config=ConfigDict(regex_engine="python-re")).validate_python(
                value, strict=True
            )
        except ValidationError as exc:
            found = []
            for error in exc.errors(include_url=False, include_context=False):
                place = "".join(f"[{part!r}]" for part in error["loc"] if isinstance(part, int))
                message = f"{place} {error['msg']}".strip()
                found.append(f"{message} (got {shorten(error['input'])})")
            return found
        return []

    def _python_type(self) -> Any:
        element: Any = self.items._python_type() if self.items is not None else Any
        base: Any = {
            None: Any,
            "string": str,
            "integer": int,
            "number": float,
            "boolean": bool,
            "array": list[element],
            "object": dict[str, Any],
            "null": None,
        }[self.type]
        limits: dict[str, Any] = {}
        if self.type in ("integer", "number"):
            limits = {"ge": self.minimum, "le": self.maximum}
        if self.type == "string":
            limits = {"pattern": self.pattern}
        if any(limit is not None for limit in limits.values()):
            base = Annotated[base, Field(**limits)]
        return base if self.enum is None else Annotated[base, AfterValidator(self._check_enum)]

    def _check_enum(self, value: Any) -> Any:
        # To Python true is 1; to JSON it is not.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.enum or ()):
            raise PydanticCustomError("enum", "must be one of {allowed}", {"allowed": str(self.enum)})
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    """A definition: a graph of steps, the events that start it, its parameters and its output.

    `steps` holds those of hooks too, each with its `phase`; ids are unique over all. `retry` is what its steps take,
    `timeout_s` bounds one episode of a run. `output` is template data; None means: the only leaf's output, else a
    mapping of the leaves'.
    """

    name: str
    steps: tuple[Step, ...]
    on: tuple[On, ...] = ()
    params: Mapping[str, Param] = field(default_factory=dict)
    retry: RetryPolicy | None = None
    timeout_s: float | None = None
    output: Any = None
    has_output: bool = False
    description: str = ""

    def step(self, step_id: str) -> Step:
        """Return the step with that id; KeyError if there is none."""
        for step in self.steps:
            if step.id == step_id:
                return step
        raise KeyError(step_id)

    def upstream_of(self, step: Step) -> tuple[str, ...]:
        """Ids of the steps that must end before this one. What a hook's step reads of `steps:` makes no edge."""
        above = step.upstream()
        if not step.phase.is_hook:
            return above
        same = {other.id for other in self.steps if other.phase is step.phase}
        return tuple(step_id for step_id in above if step_id in same)

    def resolve_params(self, given: Mapping[str, Any], event: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the parameters of a run: what was given, else the defaults (which may read `event`).

        Raises InputError with everything that is wrong, in one line.
        """
        problems = []
        for name in given:
            if name not in self.params:
                problems.append(f"{name}: {unknown('parameter', name, self.params)}")
        resolved: dict[str, Any] = {}
        for name, param in self.params.items():
            if name in given:
                value = given[name]
            elif param.is_required:
                problems.append(f"{name}: is required")
                continue
            else:
                try:
                    value = evaluate(param.default, {} if event is None else {"event": event})
                except ExpressionError as exc:
                    problems.append(f"{name}: was not given, and its default cannot be evaluated: {exc}")
                    continue
            problems += [f"{name}: {problem}" for problem in param.problems(value)]
            resolved[name] = value
        if problems:
            raise InputError(f"input of workflow {self.name!r}: " + "; ".join(problems))
        return resolved

    def to_json(self) -> dict[str, Any]:
        """Return the workflow as plain JSON; `from_json` reads it back."""
        body: dict[str, Any] = {"name": self.name, "steps": [step.to_json() for step in self.steps]}
        if self.on:
            body["on"] = [on_to_json(on) for on in self.on]
        if self.params:
            body["params"] = {name: param.model_dump(exclude_unset=True) for name, param in self.params.items()}
        body |= _attempt_to_json(self.retry, self.timeout_s)
        if self.has_output:
            body["output"] = self.output
        if self.description:
            body["description"] = self.description
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Workflow:
        """Read what `to_json` wrote."""
        return cls(
            name=body["name"],
            steps=tuple(Step.from_json(step) for step in body["steps"]),
            on=tuple(on_from_json(on) for on in body.get("on", ())),
            params={name: Param(**param) for name, param in body.get("params", {}).items()},
            retry=_retry_from_json(body),
            timeout_s=body.get("timeout"),
            output=body.get("output"),
            has_output="output" in body,
            description=body.get("description", ""),
        )

    def faults(self) -> list[tuple[tuple[str, ...], str]]:
        """Return (path of the field, message) for everything that is wrong with this workflow by itself."""
        found: list[tuple[tuple[str, ...], str]] = []
        if not _WORKFLOW_NAME.match(self.name):
            found.append(
                (("workflow",), f"{self.name!r} cannot be a name; use letters, digits, '_', '-' and '.', at most 100")
            )
        if not any(step.phase is Phase.STEPS for step in self.steps):
            found.append((("steps",), "a workflow needs at least one step"))
        found += self._param_faults()
        for number, on in enumerate(self.on):
            found += [(("on", str(number), *place), message) for place, message in on_faults(on)]
        phases: dict[str, Phase] = {}
        graph: dict[str, tuple[str, ...]] = {}
        for step in self.steps:
            other = phases.setdefault(step.id, step.phase)
            if other is not step.phase:
                message = f"{step.id!r} is a step of `{other}:` already; ids are unique over all steps of a workflow"
                found.append((step.place, message))
        scopes = {phase: self._scope(phase, phases) for phase in Phase}
        for step in self.steps:
            found += _step_faults(step, scopes[step.phase])
            try:
                above = step.upstream()
            except ExpressionError:
                above = step.needs  # its fault is listed already
            graph.setdefault(step.id, tuple(up for up in above if phases.get(up) is step.phase))
        while cycle := find_cycle(graph):
            message = f"the steps need each other in a circle: {' -> '.join(cycle)}"
            found.append(((str(phases[cycle[0]]), cycle[0]), message))
            for step_id in cycle[1:]:
                graph.pop(step_id)
        if self.has_output:
            allowed = {"event", "params", "run"}
            found += scopes[Phase.STEPS].faults(("output",), self.output, allowed=allowed)
        return found

    def _scope(self, phase: Phase, phases: Mapping[str, Phase]) -> _Scope:
        readable = frozenset(step_id for step_id, other in phases.items() if other in (phase, Phase.STEPS))
        return _Scope(phase=phase, phases=phases, readable=readable, params=self.params)

    def _param_faults(self) -> list[tuple[tuple[str, ...], str]]:
        found: list[tuple[tuple[str, ...], str]] = []
        for name, param in self.params.items():
            place = ("params", name)
            if not name.isidentifier():
                found.append((place, f"{name!r} cannot be a parameter's name; use letters, digits and '_'"))
            bad_default = (
                [] if param.is_required else _Scope().faults((*place, "default"), param.default, allowed={"event"})
            )
            found += bad_default
            if not bad_default:
                found += [((*place, key), message) for key, message in param.faults()]
        return found


_Faults = list[tuple[tuple[str, ...], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scope:
    """What the steps of one phase may name: steps, parameters and facts of the run.

    `phases` has every step, `readable` those whose outcome may be read: its own, and in a hook those of `steps:`.
    """

    phase: Phase = Phase.STEPS
    phases: Mapping[str, Phase] = field(default_factory=dict)
    readable: frozenset[str] = frozenset()
    params: Iterable[str] = ()

    def faults(self, place: tuple[str, ...], template: Any, *, allowed: set[str], has_item: bool = True) -> _Faults:
        """Return what is wrong with the names that a template reads; `allowed` are the reserved ones that it may."""
        try:
            read = references(template)
        except ExpressionError as exc:
            return [(place, str(exc))]
        found = []
        for name in sorted(read.names):
            if name in ("item", "index") and not has_item:
                found.append((place, f"`{name}` has a meaning only in a step with `foreach:`"))
            elif name in expressions.RESERVED_NAMES and name not in allowed:
                found.append((place, f"`{name}` cannot be used here"))
            elif name not in expressions.RESERVED_NAMES and name not in self.readable:
                found.append((place, self.no_step("step or name", name, [*self.readable, *sorted(allowed)])))
        wrong = sorted(read.steps - self.readable)
        found += [(place, self.no_step("step", name, self.readable)) for name in wrong]
        if "params" in allowed:
            wrong = [name for name in sorted(read.params) if name not in self.params]
            found += [(place, unknown("parameter", name, self.params)) for name in wrong]
        if "run" in allowed:
            found += [(place, message) for name in sorted(read.run) if (message := self._no_fact(name))]
        return found

    def no_step(self, kind: str, name: str, known: Iterable[str]) -> str:
        """Say why a step of that name cannot be read or needed here."""
        if name in self.phases:
            return (
                f"{name!r} is a step of `{self.phases[name]}:`; only other steps of `{self.phases[name]}:` can need it"
            )
        return unknown(kind, name, known)

    def _no_fact(self, name: str) -> str | None:
        facts = (*RUN_FACTS, *HOOK_FACTS) if self.phase.is_hook else RUN_FACTS
        if name in facts:
            return None
        if name in HOOK_FACTS:
            return f"`run.{name}` is known only to the steps of `on_failure:` and `finally:`"
        return unknown("name", f"run.{name}", [f"run.{fact}" for fact in facts])


def _step_faults(step: Step, scope: _Scope) -> _Faults:
    place = step.place
    found: _Faults = []
    if not expressions.is_step_id(step.id):
        reserved = ", ".join(sorted(expressions.RESERVED_NAMES))
        message = f"{step.id!r} cannot be a step's id: use letters, digits and '_', and none of the names {reserved}"
        found.append((place, message))
    for needed in step.needs:
        if scope.phases.get(needed) is not step.phase:
            found.append(((*place, "needs"), scope.no_step("step", needed, scope.readable)))
    outer = {"event", "params", "run"}
    item = {"item", "index"} if step.is_fan_out else set()
    check = partial(scope.faults, has_item=step.is_fan_out)
    for key, value in step.with_.items():
        found += check((*place, "with", key), value, allowed=outer | item | {"secrets"})
    if step.if_ is not None:
        found += check((*place, "if"), step.if_, allowed=outer | item | {"secrets"})
        if not isinstance(step.if_, bool) and not (isinstance(step.if_, dict) and "$expr" in step.if_):
            found.append(((*place, "if"), 'must be one expression, such as "{{ total > 0 }}", or true or false'))
    if step.foreach is not None:
        # What foreach evaluates to is stored with the run, so no secret may go into it.
        found += scope.faults((*place, "foreach"), step.foreach, allowed=outer)
        if not isinstance(step.foreach, list) and not (
            isinstance(step.foreach, dict) and ("$expr" in step.foreach or "$data" in step.foreach)
        ):
            found.append(
                ((*place, "foreach"), 'must be a list, or one expression that gives a list, such as "{{ split }}"')
            )
    if step.max_parallel is not None:
        if step.foreach is None:
            found.append(((*place, "max_parallel"), "belongs to a step with `foreach:`"))
        if step.max_parallel < 1:
            found.append(((*place, "max_parallel"), "must be at least 1"))
    for key, value, parse in (("sleep", step.sleep, parse_duration), ("until", step.until, parse_time)):
        if isinstance(value, dict) and ("$expr" in value or "$text" in value):
            found += check((*place, key), value, allowed=outer | item)
        elif value is not None:
            try:
                parse(value)
            except ValueError as exc:
                found.append(((*place, key), str(exc)))
    return found + _kind_faults(step)


def _kind_faults(step: Step) -> _Faults:
    """Return what does not go together: a step does one thing, and only what it does can be tried again or limited."""
    if sum(kind is not None for kind in (step.task, step.workflow, step.sleep, step.until)) != 1:
        return [(step.place, "a step has exactly one of `task:`, `workflow:`, `sleep:` and `until:`")]
    found: _Faults = []
    if step.task is None and step.memory is not None:
        found.append(((*step.place, "memory"), "belongs to a step with `task:`"))
    if step.is_wait:
        given = {
            "with": bool(step.with_),
            "retry": step.retry is not None,
            "timeout": step.timeout_s is not None,
            "pool": step.pool not in ("", DEFAULT_POOL),
            "resources": step.resources is not None,
        }
        for key in (key for key, is_given in given.items() if is_given):
            found.append(((*step.place, key), "belongs to a step with `task:` or `workflow:`; this one only waits"))
    return found


def find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str] | None:
    """Return one cycle of `graph` (node -> nodes it needs) as a path that ends where it began, or None."""
    done: set[str] = set()
    for root in graph:
        path: list[str] = []
        stack = [(root, iter(graph.get(root, ())))] if root not in done else []
        on_path = {root}
        path.append(root)
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n in graph and n not in done), None)
            if following is None:
                stack.pop()
                on_path.discard(path.pop())
                done.add(node)
            elif following in on_path:
                return [*path[path.index(following) :], following]
            else:
                stack.append((following, iter(graph[following])))
                on_path.add(following)
                path.append(following)
    return None
