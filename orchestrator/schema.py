"""The shape of a YAML definition: its models, the JSON Schema of them, and words for what does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator.durations import parse_duration
from orchestrator.workflows import DEFAULT_POOL, OnFile, Param, shorten

#: Keys that belong to later versions: known, so that the answer is not "unknown key".
LATER_KEYS = frozenset({"retry", "timeout", "finally", "on_failure"})
LATER_TRIGGERS = frozenset({"s3", "webhook", "schedule", "queue", "run"})

Place = tuple[str, ...]

_SIZE = re.compile(r"(\d+)\s*(B|[KMG]i?B|)\Z", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(size: str | int) -> int:
    """Return a number of bytes: 10KB is 10 000, 10KiB is 10 240. Raises ValueError for anything else."""
    match = _SIZE.match(size) if isinstance(size, str) else None
    if match:
        return int(match[1]) * _SIZE_UNITS[match[2].lower()]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"must be a number of bytes, or text such as 10KB or 1MiB, not {size!r}")
    return size


def _long_param(value: object) -> object:
    """Turn the short form `name: string` into the long one."""
    if not isinstance(value, str):
        return value
    if value not in _TYPE_NAMES:
        raise PydanticCustomError("type_name", "{message}", {"message": one_of(_TYPE_NAMES, value)})
    return {"type": value}


_TYPE_NAMES: tuple[str, ...] = get_args(get_args(Param.model_fields["type"].annotation)[0])
_Seconds = Annotated[
    float | None,
    PlainValidator(lambda value: parse_duration(value).total_seconds()),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^[0-9.]+ *(ms|[smhd])?$"}]}
    ),
]
_Bytes = Annotated[
    int,
    PlainValidator(parse_size),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+ *([kKmMgG]i?)?[bB]?$"}]}
    ),
]
_Foreach = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "string"}]})]
_If = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "boolean"}]})]
_Param = Annotated[Param, BeforeValidator(_long_param, json_schema_input_type=Param | Literal[_TYPE_NAMES])]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _has_value(cls, value: object, info: Any) -> object:
        if value is None and info.field_name != "output":
            raise PydanticCustomError("no_value", "has no value; give it one, or take the key away")
        return value


class FileTrigger(_Model):
    """Start a run for each file that has arrived in a folder."""

    path: str = Field(min_length=1, description="Folder to watch; relative to the project. `~` is your home.")
    glob: str = Field(default="*", min_length=1, description="Which file names count, such as `*.csv`.")
    recursive: bool = Field(default=False, description="Whether folders within the folder are watched too.")
    settle: _Seconds = Field(default=None, description="How long a file must stay as it is: seconds, 500ms, 1s, 5m.")
    min_size: _Bytes = Field(default=0, description="Least size: bytes, or 10KB (10 000), 10KiB (10 240), 1MB, ...")
    marker: str | None = Field(
        default=None, min_length=1, description="With `.done`, x.csv counts once x.csv.done exists."
    )
    polling: bool = Field(default=False, description="List the folder instead of being told; for network drives.")

    def build(self) -> OnFile:
        """Return the domain's form of it."""
        return OnFile(**self.model_dump(exclude={"settle"}), settle_s=self.settle)


class On(_Model):
    """One thing that starts runs."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    file: FileTrigger | None = Field(default=None, description=(FileTrigger.__doc__ or ""))
    event: dict[str, Any] | None = Field(default=None, description="EventBridge-style pattern of events.")


class Step(_Model):
    """One step: a task to call, or a workflow to run."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["task"]}, {"required": ["workflow"]}]})

    task: str | None = Field(
        default=None, min_length=1, description="`module:function` in this project, or a registered name."
    )
    workflow: str | None = Field(default=None, min_length=1, description="Name of a workflow to run as this step.")
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
    pool: str = Field(default=DEFAULT_POOL, min_length=1, description="Worker pool that runs the step.")
    description: str = Field(default="", description="For people.")


class File(_Model):
    """A workflow."""

    workflow: str = Field(description="Name of the workflow; unique in the project.")
    description: str = Field(default="", description="For people.")
    on: list[On] = Field(default=[], description="What starts runs.")
    params: dict[str, _Param] = Field(default={}, description="Typed parameters; `name: string` for short.")
    steps: dict[str, Step] = Field(description="The steps, by id.", json_schema_extra={"minProperties": 1})
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


def take_out(data: Any, loc: tuple[int | str, ...]) -> None:
    """Take out of `data` what is at fault, so that the rest can be read; put in what cannot be absent."""
    *around, last = loc
    try:
        holders = [data]
        for part in around:
            holders.append(holders[-1][part])
    except (LookupError, TypeError):
        return  # it went with something around it
    while isinstance(holders[-1], list) and around[-1] != "on":  # a list of names goes as a whole
        holders.pop()
        last = around.pop()
    if loc in (("workflow",), ("steps",)):
        holders[-1][last] = "" if last == "workflow" else {}
    elif (loc[0] == "on" and loc[-2:] == ("file", "path")) or (len(loc) == 3 and last in ("task", "workflow")):
        holders[-1][last] = "?"
    elif isinstance(holders[-1], list) or (len(loc) == 2 and loc[0] == "steps"):
        holders[-1][last] = {}
    else:
        holders[-1].pop(last, None)


def later(key: str, *, trigger: bool = False) -> str | None:
    """Say that `key` belongs to a later version; None if it does not."""
    if trigger:
        return f"the {key} trigger is not yet in force" if key in LATER_TRIGGERS else None
    return f"`{key}` is not yet in force" if key in LATER_KEYS else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what would be right instead of `name`: the nearest of the known ones, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"


def one_of(allowed: Iterable[str], value: object) -> str:
    """Say that `value` is none of the words that are allowed, and which is nearest."""
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"must be one of {', '.join(names)}, not {shorten(value)}{hint}"


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


def shape_message(place: Place, error: ErrorDetails) -> str:
    """Say in our words what pydantic found wrong at `place`."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key, known = place[-1], _known_keys(place[:-1])
        return later(key, trigger=place[0] == "on") or f"unknown key {key!r}; {nearest(key, known)}"
    if kind == "missing":
        return "is required, and is missing"
    if kind in _SHAPES:
        wanted = _SHAPES[kind] if place[0] != "params" or len(place) != 2 else "a type's name or a mapping"
        return f"must be {wanted}, not {kind_of(error['input'])}"
    if kind == "literal_error":
        return one_of(context["expected"].split("'")[1::2], error["input"])
    if kind == "string_too_short":
        return "must not be empty"
    return str(context["error"]) if kind == "value_error" else error["msg"]


def _known_keys(place: Place) -> list[str]:
    model: type[BaseModel] = File
    if place:
        model = {"steps": Step, "on": On if len(place) == 2 else FileTrigger, "params": Param}[place[0]]
    return [field.alias or name for name, field in model.model_fields.items()]
