"""The Python face: calling tasks inside a `@workflow` function draws the graph; nothing runs.

    @task(pool="cpu")
    def total(chunk): ...

    @workflow(on=[on.file("inbox", "*.csv")])
    def invoices(event):
        return report(total.map(split(event.data["path"])))

Outside a workflow a task is the plain function. Inside, a call adds a step and returns an `Output` (outputs.py), which
stands for what the step will give. `total.map(xs)` is `foreach`: the function's first parameter gets each item; other
arguments are given by keyword. `total.options(id=..., if_=..., needs=[...], trigger_rule=..., pool=...,
max_parallel=..., description=...)(xs)` says the rest. A workflow that is called inside another one is a nested run.

Functions are traced when the project is loaded, not when they are decorated: what is wrong is collected. Only what is
wrong in a decorator itself (`@task(retry=3)`, `on.file(settle="soon")`) raises at once, a DefinitionError.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, overload

from pydantic import ValidationError

from orchestrator import schema
from orchestrator.definitions import Definition, Lines, pattern_faults
from orchestrator.errors import DefinitionError, ExpressionError, Fault, TracingError
from orchestrator.expressions import references
from orchestrator.outputs import Output, Outputs
from orchestrator.schema import FileTrigger, Place, later, nearest, shape_message
from orchestrator.signatures import CONTEXT, argument_faults, param_of, parameters_of
from orchestrator.workflows import DEFAULT_POOL, On, OnEvent, OnFile, Param, Step, TriggerRule, Workflow

#: Parameters of a workflow function that are not parameters of the workflow.
SPECIAL = ("event", "run")
_tracer: ContextVar[_Tracer | None] = ContextVar("tracer", default=None)

#: What `.options(...)` can say about one step.
_OPTIONS = ("id", "if_", "needs", "trigger_rule", "pool", "max_parallel", "description")
_NOT_MAPPED: Any = object()


class _Callable:
    """What a task and a workflow have in common inside a workflow function: they are called and mapped."""

    function: Callable[..., Any]
    __name__: str

    @property
    def reference(self) -> str:
        """What a step says to name this."""
        raise NotImplementedError

    def options(self, **options: Any) -> Configured:
        """Return the same thing to call, with options for that one step; see the module's text."""
        return Configured(self, options)

    def map(self, over: Output | Sequence[Any], /, **constants: Any) -> Any:
        """Add a step that runs once for each element of `over`; its output is the list of what they give."""
        return self._add({}, (), constants, over=over)

    def _add(
        self, options: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], over: Any = _NOT_MAPPED
    ) -> Output:
        tracer = _tracer.get()
        if tracer is None:
            raise TracingError(f"{self.__name__}: `.map` and `.options` have a meaning only in a @workflow function")
        return tracer.add(self, options, args, kwargs, over)


@dataclass(frozen=True, slots=True)
class Configured:
    """A task or workflow with options for one step."""

    target: _Callable
    settings: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target._add(self.settings, args, kwargs)

    def map(self, over: Output | Sequence[Any], /, **constants: Any) -> Any:
        """As `map` of the task."""
        return self.target._add(self.settings, (), constants, over=over)


class Task(_Callable):
    """A function that can be a step. `registered_name` is what YAML may call it instead of `module:function`."""

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, pool: str | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.registered_name = name
        self.pool = pool

    @property
    def reference(self) -> str:
        """`module:function`."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _tracer.get() is None:
            return self.function(*args, **kwargs)
        return self._add({}, args, kwargs)


class WorkflowFunction(_Callable):
    """A function that draws a workflow when it is traced."""

    def __init__(
        self, function: Callable[..., Any], *, on: Sequence[On] = (), name: str | None = None, description: str = ""
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.on: tuple[Any, ...] = tuple(on)
        self.name = name or function.__name__
        self.description = description or (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _tracer.get() is None:
            raise TracingError(
                f"{self.name!r} is a workflow and does not run by being called; "
                f"run it with `orchestrator run {self.name} --input '{{...}}'`, or call its tasks one by one"
            )
        return self._add({}, args, kwargs)

    @property
    def reference(self) -> str:
        """The workflow's name."""
        return self.name

    def trace(self) -> Definition:
        """Draw the graph; nothing is raised for what is wrong in it. Faults name the source file as Python does."""
        return _Tracer(self).trace()


@overload
def task(function: Callable[..., Any], /) -> Task: ...
@overload
def task(*, name: str | None = None, pool: str | None = None, **later: Any) -> Callable[[Callable[..., Any]], Task]: ...
def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function one that can be a step: `@task`, or `@task(name=..., pool=...)`."""
    _refuse("task", options, ("name", "pool"))
    return Task(function) if function is not None else lambda decorated: Task(decorated, **options)


@overload
def workflow(function: Callable[..., Any], /) -> WorkflowFunction: ...
@overload
def workflow(
    *, on: Sequence[On] = (), name: str | None = None, description: str = "", **later: Any
) -> Callable[[Callable[..., Any]], WorkflowFunction]: ...
def workflow(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a workflow: `@workflow`, or `@workflow(on=[...], name=..., description=...)`.

    Its parameters `event` and `run` stand for those; the others are the workflow's parameters, with their types and
    defaults. What it returns is the run's output; None: its only leaf's, or a mapping of the leaves'.
    """
    _refuse("workflow", options, ("on", "name", "description"))
    return (
        WorkflowFunction(function) if function is not None else lambda decorated: WorkflowFunction(decorated, **options)
    )


class _OnFactory:
    """`on.file(...)`, `on.event(...)`: what starts runs of a workflow."""

    def file(self, path: str | os.PathLike[str], glob: str = "*", **options: Any) -> OnFile:
        """Start for each file that arrives in a folder.

        The options are YAML's: recursive, settle, min_size, marker, polling.
        """
        try:
            return FileTrigger.model_validate({"path": os.fspath(path), "glob": glob, **options}).build()
        except ValidationError as exc:
            raise _definition_error(
                *(
                    (f"on.file.{e['loc'][0]}", shape_message(("on", "0", "file", str(e["loc"][0])), e))
                    for e in exc.errors()
                )
            ) from None

    def event(self, pattern: Mapping[str, Any]) -> OnEvent:
        """Start for each event that matches an EventBridge-style pattern."""
        faults = [(f"on.event.{path}".rstrip("."), message) for path, message in pattern_faults(pattern)]
        if faults:
            raise _definition_error(*faults)
        return OnEvent(pattern=pattern)

    def __getattr__(self, name: str) -> Any:
        message = later(name, trigger=True)
        if message is None:
            raise AttributeError(f"on: unknown trigger {name!r}; {nearest(name, ('file', 'event'))}")
        raise _definition_error((f"on.{name}", message))


on = _OnFactory()


def _definition_error(*faults: tuple[str, str]) -> DefinitionError:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    where = {"file": frame.f_code.co_filename, "line": frame.f_lineno}
    return DefinitionError(Fault(field=field, message=message, **where) for field, message in faults)  # type: ignore[arg-type]


def _refuse(what: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    faults = [
        (f"{what}.{key}", later(key) or f"unknown argument {key!r}; {nearest(key, known)}")
        for key in options
        if key not in known
    ]
    if faults:
        raise _definition_error(*faults)


class _Tracer:
    """One trace of one workflow function."""

    def __init__(self, target: WorkflowFunction) -> None:
        self._target = target
        self._code: types.CodeType = inspect.unwrap(target.function).__code__
        self._outputs = Outputs()
        self._steps: dict[str, Step] = {}
        self._faults: list[Fault] = []
        self._lines = Lines({(): self._code.co_firstlineno})

    def trace(self) -> Definition:
        function = self._target.function
        if any(
            is_(function)
            for is_ in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        ):
            self._fault((), "a workflow is drawn by a plain function; take `async` and `yield` away")
            return Definition(None, self._faults, self._lines)
        params, arguments = self._signature()
        output = None
        token = _tracer.set(self)
        try:
            with self._outputs:
                output = self._target.function(**arguments)
        except TracingError as exc:
            self._fault((), str(exc), self._line_of(exc))
        except Exception as exc:  # noqa: BLE001 - whatever a user's function raises is a fault of the definition
            self._fault((), f"raises {type(exc).__name__}: {exc}", self._line_of(exc))
        finally:
            _tracer.reset(token)
        drawn = Workflow(
            name=self._target.name,
            description=self._target.description,
            on=self._on(),
            params=params,
            steps=tuple(self._steps.values()),
            output=self._template(("output",), output),
            has_output=output is not None,
        )
        if not self._faults or self._steps:  # a trace that broke off early is not also without steps
            for place, message in drawn.faults():
                self._fault(place, message)
        return Definition(drawn, self._faults, self._lines)

    def add(
        self, target: _Callable, options: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], over: Any
    ) -> Output:
        """Add a step for one call, and return what stands for its output."""
        step_id = self._new_id(options.get("id"), target)
        place = ("steps", step_id)
        is_map = over is not _NOT_MAPPED
        if is_map and not isinstance(over, Output | list | tuple):
            self._fault((*place, "foreach"), f"`.map` takes a list or the output of a step, not {over!r}")
            over = []
        given = self._bind(target, place, args, kwargs, is_map=is_map)
        checked = self._check_options(place, options)
        is_task = isinstance(target, Task)
        pool = target.pool if isinstance(target, Task) and "pool" not in options else checked.pool
        with_ = {name: self._template((*place, "with", name), value) for name, value in given.items()}
        if is_map and not self._reads_item(with_):
            names = ", ".join(given) or "none"
            message = (
                f"`.map` gives its item to the first parameter, which is not free (given: {names}); use `item` in one"
            )
            self._fault((*place, "foreach"), message)
        self._steps[step_id] = Step(
            id=step_id,
            task=target.reference if is_task else None,
            workflow=None if is_task else target.reference,
            with_=with_,
            needs=tuple(checked.needs),
            foreach=self._template((*place, "foreach"), over) if is_map else None,
            max_parallel=checked.max_parallel,
            if_=self._template((*place, "if"), options.get("if_")),
            trigger_rule=TriggerRule(checked.trigger_rule),
            pool=pool or DEFAULT_POOL,
            description=checked.description,
        )
        return Output(step_id, step=step_id)

    @staticmethod
    def _reads_item(with_: Mapping[str, Any]) -> bool:
        try:
            return bool(references(dict(with_)).names & {"item", "index"})
        except ExpressionError:
            return True  # its fault is found with the workflow's others

    def _check_options(self, place: Place, options: Mapping[str, Any]) -> schema.Step:
        """Check options by the model that checks YAML; what does not fit is a fault and left out."""
        shape = {key: value for key, value in options.items() if key not in ("id", "if_")}
        for key in [key for key in shape if key not in _OPTIONS]:
            self._fault((*place, key), later(key) or f"unknown option {key!r}; {nearest(key, _OPTIONS)}")
            del shape[key]
        if "needs" in shape:
            needs = shape["needs"] if isinstance(shape["needs"], list | tuple) else [shape["needs"]]
            shape["needs"] = [need._step if isinstance(need, Output) else need for need in needs]
        if isinstance(shape.get("trigger_rule"), TriggerRule):
            shape["trigger_rule"] = str(shape["trigger_rule"])
        try:
            return schema.Step.model_validate(shape)
        except ValidationError as exc:
            for error in exc.errors(include_url=False):
                key = str(error["loc"][0])
                message = shape_message((*place, key), error)
                self._fault((*place, key), "must be steps, by id or output" if key == "needs" else message)
                shape.pop(key, None)
        return schema.Step.model_validate(shape)

    def _new_id(self, wanted: object, target: _Callable) -> str:
        name = target.__name__ if wanted is None else str(wanted)
        number, step_id = 1, name
        while step_id in self._steps:
            number += 1
            step_id = f"{name}_{number}"
        self._lines[("steps", step_id)] = self._line()
        if wanted is not None and step_id != wanted:
            self._fault(("steps", name), f"two steps have the id {wanted!r}", self._line())
        return step_id

    def _bind(
        self, target: _Callable, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_map: bool
    ) -> dict[str, Any]:
        """Return the arguments by name. What a nested workflow takes is checked with the project."""
        hidden = (CONTEXT,) if isinstance(target, Task) else SPECIAL
        names = [
            name
            for name, p in parameters_of(target.function).items()
            if name not in hidden and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if is_map and names and names[0] not in kwargs:
            args = (Output("item"),)
        if len(args) > len(names):
            self._fault(place, f"{len(args)} arguments are given by position, and {len(names)} can be")
        given = dict(zip(names, args, strict=False))
        for name in given.keys() & kwargs.keys():
            self._fault((*place, "with", name), f"argument {name!r} is given twice")
        given.update(kwargs)
        if isinstance(target, Task):
            for name, message in argument_faults(target.function, given):
                self._fault((*place, "with", *([name] if name else [])), message)
        return given

    def _template(self, place: Place, value: Any) -> Any:
        try:
            return self._outputs.template(value)
        except TracingError as exc:
            self._fault(place, str(exc))
            return None

    def _signature(self) -> tuple[dict[str, Param], dict[str, Any]]:
        """Return the workflow's parameters, and what the function is called with."""
        try:
            signature = inspect.signature(self._target.function, eval_str=True)
        except Exception as exc:  # noqa: BLE001 - annotations are expressions of the user's
            self._fault(("params",), f"an annotation cannot be read: {type(exc).__name__}: {exc}")
            signature = inspect.signature(self._target.function)
        params: dict[str, Param] = {}
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                self._fault(("params", name), "a workflow's parameters are given by name; take *, ** and / away")
            elif name not in SPECIAL:
                params[name] = self._param(name, parameter)
        outputs = {name: Output(f"params.{name}") for name in params}
        return params, outputs | {name: Output(name) for name in SPECIAL if name in signature.parameters}

    def _param(self, name: str, parameter: inspect.Parameter) -> Param:
        param = Param()
        try:
            param = param_of(parameter.annotation if not isinstance(parameter.annotation, str) else None)
        except TypeError as exc:
            self._fault(("params", name), str(exc))
        if parameter.default is parameter.empty:
            return param
        default = self._template(("params", name, "default"), parameter.default)
        return param.model_copy(update={"default": default})

    def _on(self) -> tuple[On, ...]:
        for number, entry in enumerate(self._target.on):
            if not isinstance(entry, OnFile | OnEvent):
                self._fault(("on", str(number)), f"must be on.file(...) or on.event(...), not {entry!r}")
        return tuple(entry for entry in self._target.on if isinstance(entry, OnFile | OnEvent))

    def _fault(self, place: Place, message: str, line: int | None = None) -> None:
        line = line or self._lines.at(place)
        self._faults.append(
            Fault(file=self._code.co_filename, line=line, field=".".join(place), message=" ".join(message.split()))
        )

    def _line(self) -> int:
        """Return the line in the workflow's function that is being traced."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        return frame.f_lineno if frame is not None else self._code.co_firstlineno

    def _line_of(self, exc: BaseException) -> int | None:
        lines = (line for frame, line in traceback.walk_tb(exc.__traceback__) if frame.f_code is self._code)
        return next(lines, None)
