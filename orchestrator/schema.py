"""The shape of a YAML definition: its models, the JSON Schema of them, and words for what does not fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator import pools, workflows
from orchestrator.errors import nearest as nearest
from orchestrator.errors import one_of, shorten
from orchestrator.on_schema import KINDS, OnEntry, on_model
from orchestrator.pools import PoolKind, PoolSettings
from orchestrator.retries import MOST_ATTEMPTS, Jitter, RetryPolicy, read_policy
from orchestrator.shapes import DURATION_SCHEMA, SIZE_SCHEMA, Model, Timeout, parse_size
from orchestrator.workflows import Param

Place = tuple[str, ...]

_LEAST_MEMORY, _MOST_MEMORY = 10**6, 10**15
#: How many threads a pool of threads has at most if it does not say.
_THREADS = 16
_MOST_PROCESSES, _MOST_CONCURRENCY, _MOST_CORES = 100_000, 1_000, 10_000


def parse_memory(value: str | int) -> int:
    """Return the bytes of a limit of memory. Raises ValueError for what no process can live with, or can have."""
    size = parse_size(value)
    if not _LEAST_MEMORY <= size <= _MOST_MEMORY:
        raise ValueError(f"must be from 1MB to 1000000GB, such as 512MB, not {value!r}")
    return size


def _policy(value: object) -> RetryPolicy | None:
    policy, faults = read_policy(value)
    if faults:
        raise PydanticCustomError("retry_policy", "is no retry policy", {"faults": faults})
    return policy


def _long_param(value: object) -> object:
    """Turn the short form `name: string` into the long one."""
    if not isinstance(value, str):
        return value
    if value not in _TYPE_NAMES:
        raise PydanticCustomError("type_name", "{message}", {"message": one_of(_TYPE_NAMES, value)})
    return {"type": value}


_TYPE_NAMES: tuple[str, ...] = get_args(get_args(Param.model_fields["type"].annotation)[0])
_ATTEMPTS = {"type": "integer", "minimum": 1, "maximum": MOST_ATTEMPTS}
_ERRORS = {"type": "array", "items": {"type": "string"}}
_RETRY_FIELDS: dict[str, dict[str, Any]] = {
    "maximum_attempts": {"description": "How many attempts, the first one included.", "default": 3, **_ATTEMPTS},
    "initial_interval": {"description": "Pause after the first attempt.", "default": "1s", **DURATION_SCHEMA},
    "backoff_coefficient": {
        "description": "What the pause grows by with each attempt.", "default": 2, "type": "number", "minimum": 1
    },
    "maximum_interval": {"description": "What the pause does not grow beyond.", "default": "5m", **DURATION_SCHEMA},
    "jitter": {
        "description": "What of a pause is left to chance: all of it, its second half, nothing.",
        "default": "full",
        "enum": [str(jitter) for jitter in Jitter],
    },
    "non_retryable_errors": {"description": "Errors, by class or base class, that are not tried again.", **_ERRORS},
    "retryable_errors": {"description": "The only errors that are tried again; else all are.", **_ERRORS},
}  # fmt: skip
_Retry = Annotated[
    RetryPolicy | None,
    PlainValidator(_policy),
    WithJsonSchema(
        {"anyOf": [_ATTEMPTS, {"type": "object", "additionalProperties": False, "properties": _RETRY_FIELDS}]}
    ),
]
_Memory = Annotated[int | None, PlainValidator(parse_memory), WithJsonSchema(SIZE_SCHEMA)]
_Cores = Annotated[float | None, Field(gt=0, le=_MOST_CORES)]
_Sleep = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})]
_Until = Annotated[Any, WithJsonSchema({"type": "string"})]
_Foreach = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "string"}]})]
_If = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "boolean"}]})]
_Param = Annotated[Param, BeforeValidator(_long_param, json_schema_input_type=Param | Literal[_TYPE_NAMES])]


class Resources(Model):
    """What a process that runs a step must have at least."""

    memory: _Memory = Field(default=None, description="Memory: bytes, 512MB, 2GiB.")
    cpu: _Cores = Field(default=None, description="Cores.")
    gpu: int = Field(default=0, ge=0, le=_MOST_CORES, description="GPUs.")

    def build(self) -> pools.Resources:
        """Return the domain's form of it."""
        return pools.Resources(memory=self.memory, cpu=self.cpu, gpu=self.gpu)


class Defaults(Model):
    """What `[defaults]` of a project and `@task` can say of steps."""

    retry: _Retry = None
    timeout: Timeout = None
    memory: _Memory = None
    resources: Resources | None = None

    def build(self) -> workflows.Defaults:
        """Return the domain's form of it."""
        resources = None if self.resources is None else self.resources.build()
        return workflows.Defaults(retry=self.retry, timeout_s=self.timeout, memory=self.memory, resources=resources)


class Target(Model):
    """What a pool aims at."""

    start_within: Timeout = None


def _target(value: object) -> object:
    """Turn the short form `target = "5s"` into the long one."""
    return {"start_within": value} if isinstance(value, str | int | float) else value


class Pool(Model):
    """`[pools.NAME]` of orchestrator.toml."""

    min: int | None = Field(default=None, ge=0, le=_MOST_PROCESSES)
    max: int | None = Field(default=None, ge=1, le=_MOST_PROCESSES)
    concurrency: int | None = Field(default=None, ge=1, le=_MOST_CONCURRENCY)
    kind: Literal["prefork", "threads"] = "prefork"
    memory: _Memory = None
    cpu: _Cores = None
    gpu: int = Field(default=0, ge=0)
    max_tasks_per_process: int | None = Field(default=None, ge=1)
    idle_after: Timeout = None
    target: Annotated[Target | None, BeforeValidator(_target)] = None

    def faults(self) -> list[tuple[str, str]]:
        """Return (key, message) for each contradiction."""
        found = []
        pool = self.build()
        if pool.minimum > pool.maximum:
            what = "" if self.max is not None else f" (which is {'concurrency' if self.concurrency else 'the cores'})"
            found.append(("min", f"{pool.minimum} is above max {pool.maximum}{what}"))
        if pool.kind is PoolKind.THREADS and self.max_tasks_per_process is not None:
            found.append(("max_tasks_per_process", "belongs to a pool of kind prefork: threads have no process to end"))
        return found

    def build(self) -> PoolSettings:
        """Return the domain's form of it. `concurrency` alone bounds the pool, too; one worker has all threads."""
        maximum = self.max or self.concurrency
        concurrency = self.concurrency
        if self.kind == "threads":
            maximum = maximum or _THREADS
            concurrency = concurrency or min(maximum, _MOST_CONCURRENCY)
        given = {
            "maximum": maximum,
            "concurrency": concurrency,
            "idle_after_s": self.idle_after,
            "start_within_s": None if self.target is None else self.target.start_within,
            "minimum": self.min,
        }
        return PoolSettings(
            kind=PoolKind(self.kind),
            memory=self.memory,
            cpu=self.cpu,
            gpu=self.gpu,
            max_tasks_per_process=self.max_tasks_per_process,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class Step(Model):
    """One step: a task to call, a workflow to run, or a time to wait for."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [kind]} for kind in ("task", "workflow", "sleep", "until")]}
    )

    task: str | None = Field(
        default=None, min_length=1, description="`module:function` in this project, or a registered name."
    )
    workflow: str | None = Field(default=None, min_length=1, description="Name of a workflow to run as this step.")
    sleep: _Sleep = Field(default=None, description="Wait that long: a duration, or an expression for one.")
    until: _Until = Field(
        default=None, description="Wait for a time: RFC 3339 with its zone, or an expression for one."
    )
    with_: dict[str, Any] = Field(default={}, alias="with", description="Arguments by name; may hold expressions.")
    needs: list[str] = Field(default=[], description="Steps that must end first, besides those in expressions.")
    foreach: _Foreach = Field(default=None, description="List, or expression for one: the step runs per `item`.")
    max_parallel: int | None = Field(
        default=None, description="How many items of `foreach` may be in work.", json_schema_extra={"minimum": 1}
    )
    if_: _If = Field(default=None, alias="if", description="Expression; when it is false the step is skipped.")
    trigger_rule: Literal["all_success", "all_done", "one_failed", "none_failed"] = Field(
        default="all_success", description="When the step may start, given how the steps before it ended."
    )
    retry: _Retry = Field(default=None, description="How often a failed attempt is tried again; a number for short.")
    timeout: Timeout = Field(default=None, description="How long one attempt may take: seconds, 500ms, 1s, 5m.")
    memory: _Memory = Field(default=None, description="How much memory an attempt may use: bytes, 512MB, 2GiB.")
    resources: Resources | None = Field(
        default=None, description="What a process that runs it must have: picks the smallest pool that fits."
    )
    pool: str | None = Field(
        default=None, min_length=1, description="Worker pool that runs the step; `default` if it says nothing."
    )
    description: str = Field(default="", description="For people.")

    def build_resources(self) -> pools.Resources | None:
        """Return the domain's form of its resources."""
        return None if self.resources is None else self.resources.build()


class File(Model):
    """A workflow."""

    workflow: str = Field(description="Name of the workflow; unique in the project.")
    description: str = Field(default="", description="For people.")
    on: list[OnEntry] = Field(default=[], description="What starts runs.")
    params: dict[str, _Param] = Field(default={}, description="Typed parameters; `name: string` for short.")
    retry: _Retry = Field(default=None, description="What steps without a `retry` of their own take.")
    timeout: Timeout = Field(default=None, description="How long a run may take: seconds, 500ms, 1s, 5m.")
    steps: dict[str, Step] = Field(description="The steps, by id.", json_schema_extra={"minProperties": 1})
    on_failure: dict[str, Step] = Field(
        default={}, min_length=1, description="Steps that run when the run has failed; may read `run.failures`."
    )
    finally_: dict[str, Step] = Field(
        default={}, alias="finally", min_length=1, description="Steps that run last, whatever came of the run."
    )
    output: Any = Field(
        default=None, description="What a run gives; else its only last step's output, or a mapping of theirs."
    )


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) of a definition file, for editors."""
    schema = File.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "orchestrator workflow",
        **_tidy({key: value for key, value in schema.items() if key != "title"}),
    }


def _tidy(schema: Any) -> Any:
    """Take out what pydantic says about Python: titles, and the null that stands for an absent key."""
    if isinstance(schema, list):
        return [_tidy(element) for element in schema]
    if not isinstance(schema, dict):
        return schema
    tidied = {key: _tidy(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    choices = [choice for choice in tidied.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del tidied["anyOf"]
        tidied = {**choices[0], **tidied}
    elif choices:
        tidied["anyOf"] = choices
    if "default" in tidied and tidied["default"] is None:
        del tidied["default"]
    return tidied


_PHASES = tuple(workflows.Phase)


def take_out(data: Any, loc: tuple[int | str, ...]) -> None:
    """Take out of `data` what is at fault, so that the rest can be read; put in what cannot be absent."""
    *around, last = loc
    try:
        holders = [data]
        for part in around:
            holders.append(holders[-1][part])
    except (LookupError, TypeError):
        return  # it went with something around it
    while isinstance(holders[-1], list | str) and around[-1] != "on":  # a list of names goes as a whole
        holders.pop()
        last = around.pop()
    if loc in (("workflow",), ("steps",)):
        holders[-1][last] = "" if last == "workflow" else {}
    elif loc[0] == "on" and len(loc) > 2 and (len(loc) == 3 or last not in holders[-1]):  # it cannot be without
        data["on"][loc[1]] = {}
    elif len(loc) == 3 and loc[0] in _PHASES and last in ("task", "workflow", "sleep", "until"):
        holders[-1][last] = "?"
    elif isinstance(holders[-1], list) or (len(loc) == 2 and loc[0] in _PHASES):
        holders[-1][last] = {}
    else:
        holders[-1].pop(last, None)


_SHAPES = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "float_type": "a number",
    "float_parsing": "a number",
}


def kind_of(value: object) -> str:
    """Name the kind of a value, or show it."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), shorten(value))


def shape_faults(place: Place, error: ErrorDetails) -> list[tuple[Place, str]]:
    """Return what pydantic found wrong at `place`, in our words, and where; several things for a retry policy."""
    if error["type"] == "retry_policy":
        return [((*place, key) if key else place, message) for key, message in error["ctx"]["faults"]]
    return [(place, _shape_message(place, error))]


def _shape_message(place: Place, error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key, known = place[-1], _known_keys(place[:-1])
        owners = [f"`{name}:`" for name, model in KINDS.items() if key in model.model_fields]
        if known == list(OnEntry.model_fields) and len(owners) == 1:
            return f"unknown key {key!r}; it is a key of {owners[0]}"
        return f"unknown key {key!r}; {nearest(key, known)}"
    if kind == "missing":
        return "is required, and is missing"
    if kind in _SHAPES:
        wanted = _SHAPES[kind] if place[0] != "params" or len(place) != 2 else "a type's name or a mapping"
        if "verify" in place[3:4]:  # where the secret itself may stand
            return f"must be {wanted}"
        return f"must be {wanted}, not {kind_of(error['input'])}"
    if kind == "literal_error":
        return one_of(context["expected"].split("'")[1::2], error["input"])
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound, word = (context["ge"], "least") if kind == "greater_than_equal" else (context["le"], "most")
        return f"must be at {word} {bound:g}, not {kind_of(error['input'])}"
    if kind == "greater_than":
        return f"must be more than {context['gt']:g}, not {kind_of(error['input'])}"
    return str(context["error"]) if kind == "value_error" else error["msg"]


def _known_keys(place: Place) -> list[str]:
    model: type[BaseModel] = File
    if place:
        models: dict[str, type[BaseModel]] = {"params": Param, "defaults": Defaults, "pools": Pool}
        model = on_model(place) if place[0] == "on" else models.get(place[0], Step)
        if place[0] == "pools" and place[2:] == ("target",):
            model = Target
        if place[-1] == "resources" and len(place) in (2, 3):
            model = Resources
    return [field.alias or name for name, field in model.model_fields.items()]
