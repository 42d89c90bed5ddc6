"""The YAML face: the text of a definition -> Workflow, with every fault in it and the line of each field.

A file goes through three sieves, and each reports all that it finds before the next one looks at the rest:
the YAML itself (syntax, duplicate keys, size), the shape (pydantic models; what does not fit is reported, taken
out, and the remainder checked again), and the meaning (`Workflow.faults`, event patterns). What cannot be told
from one file alone (tasks, nested workflows, pools) is checked by project.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from orchestrator import schema
from orchestrator.durations import parse_duration as parse_duration
from orchestrator.errors import ExpressionError, Fault, shorten
from orchestrator.expressions import parse
from orchestrator.on_schema import OnEntry
from orchestrator.patterns import EventPattern, PatternError
from orchestrator.schema import File, Place, kind_of, shape_faults, take_out
from orchestrator.schema import json_schema as json_schema
from orchestrator.subscriptions import UNREADABLE, On, OnEvent, kind_of_on
from orchestrator.workflows import Param, Phase, Step, TriggerRule, Workflow

MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # counted after aliases are written out, so that few bytes cannot become many values
MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"


class Lines(dict[Place, int]):
    """Line of each field, by its path (`("steps", "split", "with")`); `()` is the definition as such.

    `files` names the file of those parts, by the first name of the path, that stand in another one: hooks in Python.
    """

    def __init__(self, lines: Mapping[Place, int] | None = None) -> None:
        super().__init__(lines or {})
        self.files: dict[str, str] = {}

    def at(self, place: Place) -> int | None:
        """Return the line of `place`, or of the nearest thing around it."""
        while place not in self:
            if not place:
                return None
            place = place[:-1]
        return self[place]


class Definition(NamedTuple):
    """What was read of one definition.

    `workflow` may be run only if there are no `faults`; with faults it is what could be made out in spite of
    them, for further checks only (its name is "" if that is what could not be read), or None.
    """

    workflow: Workflow | None
    faults: list[Fault]
    lines: Lines


def read_definition(path: Path, text: str | bytes) -> Definition:
    """Read one definition; nothing is raised for what is wrong with it. Faults name `path` as it is given."""
    return _Reading(path.as_posix()).read(text)


class _TooBigError(Exception):
    pass


class _Reading:
    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.lines = Lines()
        self.at_fault: set[Place] = set()
        self.nodes = 0

    def fault(self, place: Place, message: str, line: int | None = None) -> None:
        self.at_fault.add(place)
        line = self.lines.at(place) if line is None else line
        self.faults.append(Fault(file=self.file, line=line, field=".".join(place), message=message))

    def read(self, text: str | bytes) -> Definition:
        data = self._load(text)
        if not isinstance(data, dict):
            if not self.faults:
                self.fault((), f"must be a mapping with `workflow:` and `steps:`, not {kind_of(data)}")
            return Definition(None, self.faults, self.lines)
        workflow = self._workflow(self._shape(data))
        taken_out = set(self.at_fault)
        for place, message in workflow.faults():
            if not _is_missed(place, taken_out):
                self.fault(place, message)
        self.faults.sort(key=lambda fault: fault.line or 0)
        return Definition(workflow, self.faults, self.lines)

    # The YAML.

    def _load(self, text: str | bytes) -> Any:
        if len(text) > MAX_BYTES:
            self.fault((), f"is larger than {MAX_BYTES} bytes; data belongs in files that the steps read")
            return None
        try:
            text = text if isinstance(text, str) else text.decode("utf-8-sig")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # YAML allows that an anchor is given anew
                node = YAML(typ="safe", pure=True).compose(text)
            if node is not None:
                return self._value(node, ())
            self.fault((), "is empty; write at least `workflow: NAME` and `steps:`", 1)
        except UnicodeDecodeError as exc:
            line = exc.object[: exc.start].count(b"\n") + 1
            self.fault((), f"is not UTF-8: byte 0x{exc.object[exc.start]:02x} in this line; save it as UTF-8", line)
        except ReaderError as exc:
            line = str(text)[: exc.position].count("\n") + 1
            self.fault((), f"not YAML: the character U+{int(exc.character):04X} is not allowed", line)
        except MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            self.fault((), _syntax_message(exc), mark.line + 1 if mark else None)
        except (RecursionError, _TooBigError):
            self.fault((), f"has more than {MAX_NODES} values (aliases written out), or nests deeper than {MAX_DEPTH}")
        except (YAMLError, ValueError) as exc:
            self.fault((), f"not YAML: {_one_line(exc)}")
        return None

    def _value(self, node: Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.nodes += 1
        if self.nodes > MAX_NODES or len(place) > MAX_DEPTH:
            raise _TooBigError
        kind = str(node.tag)
        if isinstance(node, MappingNode) and kind == _TAG + "map":
            return self._mapping(node, place)
        if isinstance(node, SequenceNode) and kind == _TAG + "seq":
            return [self._value(element, (*place, str(number))) for number, element in enumerate(node.value)]
        try:
            return _scalar(node)
        except (ValueError, KeyError):
            what = node.value if kind.removeprefix(_TAG) in ("int", "float", "bool") else kind.replace(_TAG, "!!")
            self.fault(place, f"{shorten(what)} is not a JSON value; quote it if it is text", node.start_mark.line + 1)
            return None

    def _mapping(self, node: MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.fault(place, "a key must be text", line)
            elif str(key_node.tag).endswith(":merge"):
                self.fault((*place, "<<"), "merge keys are not part of YAML 1.2; write the keys out", line)
            elif key_node.value in found:
                first = self.lines[(*place, key_node.value)]
                self.fault((*place, key_node.value), f"duplicate key; it is given in line {first} already", line)
            else:
                self.lines[(*place, key_node.value)] = line
                found[key_node.value] = self._value(value_node, (*place, key_node.value))
        return found

    # The shape.

    def _shape(self, data: dict[str, Any]) -> File:
        for _ in range(20):  # two rounds do, unless a field was wrong in several ways
            taken_out = set(self.at_fault)
            try:
                return File.model_validate(data)
            except ValidationError as exc:
                for error in exc.errors(include_url=False):
                    for place, message in shape_faults(tuple(map(str, error["loc"])), error):
                        if not _is_missed(place, taken_out):
                            self.fault(place, message)
                    take_out(data, error["loc"])
        return File(workflow="", steps={})

    # The meaning.

    def _workflow(self, file: File) -> Workflow:
        given = file.model_fields_set
        return Workflow(
            name=file.workflow,
            description=file.description,
            on=tuple(self._on(on, ("on", str(number))) for number, on in enumerate(file.on)),
            params={name: self._param(param, ("params", name)) for name, param in file.params.items()},
            steps=(
                *self._steps(Phase.STEPS, file.steps),
                *self._steps(Phase.ON_FAILURE, file.on_failure),
                *self._steps(Phase.FINALLY, file.finally_),
            ),
            retry=file.retry,
            timeout_s=file.timeout,
            output=self._template(file.output, ("output",)),
            has_output="output" in given,
        )

    def _on(self, on: OnEntry, place: Place) -> On:
        found = on.build()
        if found is None:
            if not any(known[: len(place)] == place for known in self.at_fault):
                kinds = ", ".join(f"`{kind}`" for kind in OnEntry.model_fields)
                self.fault(place, f"must have one of the keys {kinds}; write one entry for each")
            return UNREADABLE
        pattern = getattr(found, "pattern", None)
        if pattern is not None:
            where = (kind_of_on(found),) if isinstance(found, OnEvent) else (kind_of_on(found), "pattern")
            for path, message in pattern_faults(pattern):
                self.fault((*place, *where, *filter(None, path.split("."))), message)
        return found

    def _param(self, param: Param, place: Place) -> Param:
        if param.is_required:
            return param
        return param.model_copy(update={"default": self._template(param.default, (*place, "default"))})

    def _steps(self, phase: Phase, steps: Mapping[str, schema.Step]) -> Iterable[Step]:
        return [self._step(step, phase, step_id) for step_id, step in steps.items()]

    def _step(self, step: schema.Step, phase: Phase, step_id: str) -> Step:
        place = (str(phase), step_id)
        return Step(
            id=step_id,
            phase=phase,
            task=step.task,
            workflow=step.workflow,
            sleep=self._template(step.sleep, (*place, "sleep"), instead="?"),
            until=self._template(step.until, (*place, "until"), instead="?"),
            with_={key: self._template(value, (*place, "with", key)) for key, value in step.with_.items()},
            needs=tuple(step.needs),
            foreach=self._template(step.foreach, (*place, "foreach"), instead=[]),
            max_parallel=step.max_parallel,
            if_=self._template(step.if_, (*place, "if")),
            trigger_rule=TriggerRule(step.trigger_rule),
            retry=step.retry,
            timeout_s=step.timeout,
            memory=step.memory,
            resources=step.build_resources(),
            pool=step.pool or "",
            description=step.description,
        )

    def _template(self, value: Any, place: Place, instead: Any = None) -> Any:
        try:
            return parse(value)
        except ExpressionError as exc:
            self.fault(place, str(exc))
            return instead


def pattern_faults(pattern: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Return (dotted path, message) for everything that is wrong with an event pattern."""
    try:
        EventPattern.compile(pattern)
    except PatternError as exc:
        return exc.faults
    return ()


def _is_missed(place: Place, taken_out: set[Place]) -> bool:
    """Tell whether what is wrong at `place` was found already, or is only that something at fault was taken out."""
    around = place == ("steps",) or place[:1] == ("on",)
    return place in taken_out or (around and any(known[: len(place)] == place for known in taken_out))


def _scalar(node: Node) -> object:
    """Return the JSON value of a scalar. Raises ValueError or KeyError for what is none."""
    text, kind = node.value, str(node.tag).removeprefix(_TAG)
    if kind == "float":
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise ValueError
        return number
    if kind == "int":
        sign, digits = (-1 if text.startswith("-") else 1), text.replace("_", "").lstrip("+-")
        return sign * (int(digits, 0) if digits[:2].lower() in ("0x", "0o", "0b") else int(digits))
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    return {"str": text, "timestamp": text, "null": None}[kind]


def _one_line(exc: object) -> str:
    return " ".join(str(exc).split())


def _syntax_message(exc: MarkedYAMLError) -> str:
    problem = _one_line(exc.problem or exc.context)
    if "\\t" in problem:
        return "not YAML: a tab indents this line; use spaces"
    if "found another document" in problem:
        return "holds several documents; write one workflow per file"
    return f"not YAML: {problem}"
