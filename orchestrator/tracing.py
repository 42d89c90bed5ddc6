"""The Python face: calling tasks inside a `@workflow` function draws the graph; nothing runs.

    @task(pool="cpu")
    def total(chunk): ...

    @workflow(on=[on.file("inbox", "*.csv")])
    def invoices(event):
        return report(total.map(split(event.data["path"])))

Outside a workflow a task is the plain function. Inside, a call adds a step and returns an `Output` (outputs.py), which
stands for what the step will give. `total.map(xs)` is `foreach`: the function's first parameter gets each item; other
arguments are given by keyword. `total.options(id=..., if_=..., needs=[...], trigger_rule=..., retry=..., timeout=...,
memory=..., resources=..., pool=..., max_parallel=..., description=...)(xs)` says the rest. A workflow that is called
inside another one is a nested run. `sleep("1h")` and `until(event.data["due"])` add steps that wait.

`@workflow(on_failure=tell, finally_=clean)` names plain functions that draw the steps of those hooks. Their parameters
are given by name: `event`, `run`, the workflow's parameters, and the ids of its steps, which stand for their outputs.

Functions are traced when the project is loaded, not when they are decorated: what is wrong is collected. What is wrong
in a decorator itself (`@task(timeout=0)`) raises at once, a DefinitionError; so does `on.file(settle="soon")`, but for
while a project is loaded (`collecting`).
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

from pydantic import ValidationError

from orchestrator import schema
from orchestrator.definitions import Definition, Lines, pattern_faults
from orchestrator.errors import DefinitionError, ExpressionError, Fault, TracingError, definition_error, place_of_call
from orchestrator.expressions import references
from orchestrator.on_schema import OnEntry
from orchestrator.outputs import Output, Outputs
from orchestrator.retries import RetryPolicy
from orchestrator.schema import Place, nearest, shape_faults
from orchestrator.signatures import CONTEXT, argument_faults, param_of, parameters_of
from orchestrator.subscriptions import UNREADABLE, On, OnEvent
from orchestrator.workflows import Defaults, Param, Phase, Step, TriggerRule, Workflow

#: Parameters of a workflow function that are not parameters of the workflow.
SPECIAL = ("event", "run")
_tracer: ContextVar[_Tracer | None] = ContextVar("tracer", default=None)

#: Where faults of `on.file(...)` and the like go; None: they are raised.
_collect: ContextVar[Callable[[Fault], None] | None] = ContextVar("collect", default=None)
#: Entries of `on` by identity, with the file and the line of the call that made each.
_called: dict[int, tuple[On, str, int]] = {}

#: What `.options(...)` can say about one step.
_OPTIONS = (
    "id", "if_", "needs", "trigger_rule", "retry", "timeout", "memory", "resources", "pool", "max_parallel",
    "description",
)  # fmt: skip
_NOT_MAPPED: Any = object()
#: What stands for a wait whose value cannot be read: that is a fault already.
_SOUND = {"sleep": 0, "until": "1970-01-01T00:00:00Z"}


class _Callable:
    """What tasks, workflows and waits have in common inside a workflow function: they are called and mapped."""

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
    """A task, workflow or wait with options for one step."""

    target: _Callable
    settings: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target._add(self.settings, args, kwargs)

    def map(self, over: Output | Sequence[Any], /, **constants: Any) -> Any:
        """As `map` of the task."""
        return self.target._add(self.settings, (), constants, over=over)


class Task(_Callable):
    """A function that can be a step. `registered_name` is what YAML may call it instead of `module:function`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        pool: str | None = None,
        defaults: Defaults = Defaults(),  # noqa: B008 -- it is frozen
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.registered_name = name
        self.pool = pool
        self.defaults = defaults

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
        self,
        function: Callable[..., Any],
        *,
        on: Sequence[On] = (),
        name: str | None = None,
        description: str = "",
        hooks: Mapping[Phase, Any] = MappingProxyType({}),
        defaults: Defaults = Defaults(),  # noqa: B008 -- it is frozen
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.on: tuple[Any, ...] = tuple(on)
        self.hooks = hooks
        self.defaults = defaults
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


class Wait(_Callable):
    """`sleep` or `until`: called in a workflow function it adds a step that waits, and whose output is null.

    `sleep` takes a duration (seconds, or text such as `1h`), `until` a time (RFC 3339 with its zone); both take an
    output for one. Waiting holds no worker. `.options` and `.map` are as a task's; there is nothing to try again.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, when: Output | str | float, /) -> Output:
        if _tracer.get() is None:
            raise TracingError(f"`{self.__name__}(...)` is a step, and has a meaning only in a @workflow function")
        return self._add({}, (when,), {})


sleep = Wait("sleep")
until = Wait("until")


@overload
def task(function: Callable[..., Any], /) -> Task: ...
@overload
def task(
    *,
    name: str | None = None,
    pool: str | None = None,
    retry: RetryPolicy | int | None = None,
    timeout: str | float | None = None,
    memory: str | int | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], Task]: ...
def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function one that can be a step: `@task`, or `@task(name=..., pool=..., retry=..., timeout=...)`.

    What it says holds for every step of this task that does not say otherwise itself, in YAML too.
    """
    defaults = _defaults("task", options, ("name", "pool", "retry", "timeout", "memory", "resources"))
    if function is not None:
        return Task(function)
    name, pool = options.get("name"), options.get("pool")
    return lambda decorated: Task(decorated, name=name, pool=pool, defaults=defaults)


@overload
def workflow(function: Callable[..., Any], /) -> WorkflowFunction: ...
@overload
def workflow(
    *,
    on: Sequence[On] = (),
    name: str | None = None,
    description: str = "",
    retry: RetryPolicy | int | None = None,
    timeout: str | float | None = None,
    on_failure: Callable[..., Any] | None = None,
    finally_: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], WorkflowFunction]: ...
def workflow(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a workflow: `@workflow`, or `@workflow(on=[...], name=..., description=..., ...)`.

    Its parameters `event` and `run` stand for those; the others are the workflow's parameters, with their types and
    defaults. What it returns is the run's output; None: its only leaf's, or a mapping of the leaves'.
    `retry` is for steps that have none of their own, `timeout` for a run. `on_failure` and `finally_` are functions
    that draw the steps of those hooks.
    """
    known = ("on", "name", "description", "retry", "timeout", "on_failure", "finally_")
    defaults = _defaults("workflow", options, known)
    if function is not None:
        return WorkflowFunction(function)
    given = {key: options[key] for key in ("on", "name", "description") if key in options}
    hooks = {
        phase: options[key]
        for phase, key in ((Phase.ON_FAILURE, "on_failure"), (Phase.FINALLY, "finally_"))
        if options.get(key) is not None
    }
    return lambda decorated: WorkflowFunction(decorated, **given, hooks=hooks, defaults=defaults)


def _defaults(what: str, options: Mapping[str, Any], known: tuple[str, ...]) -> Defaults:
    """Return what a decorator says of attempts. Raises DefinitionError, also for arguments that it does not know."""
    faults = [
        (f"{what}.{key}", f"unknown argument {key!r}; {nearest(key, known)}") for key in options if key not in known
    ]
    given = {
        key: options[key]
        for key in ("retry", "timeout", "memory", "resources")
        if key in known and options.get(key) is not None
    }
    defaults = Defaults()
    try:
        defaults = schema.Defaults.model_validate(given).build()
    except ValidationError as exc:
        faults += _faults_of(exc, what)
    if faults:
        raise definition_error(*faults)
    return defaults


def _faults_of(exc: ValidationError, what: str, around: Place = (), within: str = "") -> list[tuple[str, str]]:
    """Return (field, message) for what pydantic found wrong in a call of `what`; `within`: what it was given in."""
    skip = len(around) + bool(within)
    return [
        (f"{what}.{'.'.join(place[skip:])}".rstrip("."), message)
        for error in exc.errors(include_url=False)
        for place, message in shape_faults((*around, *map(str, error["loc"])), error)
    ]


class _OnFactory:
    """`on.file(...)`, `on.event(...)` and so on: what starts runs of a workflow. The options are those of YAML."""

    def file(self, path: str | os.PathLike[str], glob: str = "*", **options: Any) -> On:
        """Start for each file that arrives in a folder."""
        return _subscription("file", {"path": os.fspath(path), "glob": glob, **options})

    def event(self, pattern: Mapping[str, Any]) -> On:
        """Start for each event that matches an EventBridge-style pattern."""
        return _entry(OnEvent(pattern=pattern), _pattern_faults("on.event", pattern))

    def s3(self, bucket: str, **options: Any) -> On:
        """Start for each object that is made in a bucket, or removed from it."""
        return _subscription("s3", {"bucket": bucket, **options})

    def webhook(self, path: str, **options: Any) -> On:
        """Start for each delivery to /hooks/{path}."""
        return _subscription("webhook", {"path": path, **options})

    def schedule(self, **options: Any) -> On:
        """Start at due times."""
        return _subscription("schedule", options)

    def queue(self, url: str, queue: str, **options: Any) -> On:
        """Start for each message of a queue that somebody else fills."""
        return _subscription("queue", {"url": url, "queue": queue, **options})

    def run(self, workflow: str | Sequence[str], **options: Any) -> On:
        """Start when a run of another workflow has ended."""
        names = workflow if isinstance(workflow, str) else list(workflow)
        return _subscription("run", {"workflow": names, **options})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"on: unknown trigger {name!r}; {nearest(name, OnEntry.model_fields)}")


def _subscription(kind: str, given: Mapping[str, Any]) -> On:
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    try:
        found = OnEntry.model_validate({kind: options}).build()
    except ValidationError as exc:
        return _entry(UNREADABLE, _faults_of(exc, f"on.{kind}", ("on", "0"), kind))
    assert found is not None
    pattern = getattr(found, "pattern", None)
    return _entry(found, [] if pattern is None else _pattern_faults(f"on.{kind}.pattern", pattern))


def _pattern_faults(what: str, pattern: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"{what}.{path}".rstrip("."), message) for path, message in pattern_faults(pattern)]


def _entry(found: On, faults: Sequence[tuple[str, str]]) -> On:
    """Return an entry of `on` with the place of its call noted; what is wrong with it is raised, or collected."""
    if faults:
        error, collect = definition_error(*faults), _collect.get()
        if collect is None:
            raise error
        for fault in error.faults:
            collect(fault)
        return UNREADABLE
    _called[id(found)] = (found, *place_of_call())
    return found


@contextmanager
def collecting(collect: Callable[[Fault], None]) -> Iterator[None]:
    """Have what is wrong with entries of `on` told to `collect` while this lasts, not raised."""
    token = _collect.set(collect)
    try:
        yield
    finally:
        _collect.reset(token)


on = _OnFactory()


class _Tracer:
    """One trace of one workflow function."""

    def __init__(self, target: WorkflowFunction) -> None:
        self._target = target
        self._code: types.CodeType = inspect.unwrap(target.function).__code__
        self._file = self._code.co_filename
        self._phase = Phase.STEPS
        self._outputs = Outputs()
        self._steps: dict[str, Step] = {}
        self._faults: list[Fault] = []
        self._lines = Lines({(): self._code.co_firstlineno})

    def trace(self) -> Definition:
        if not _is_plain(self._target.function):
            self._fault((), "a workflow is drawn by a plain function; take `async` and `yield` away")
            return Definition(None, self._faults, self._lines)
        params, arguments = self._signature()
        is_whole, output = self._draw(self._target.function, arguments)
        if is_whole:
            for phase, function in self._target.hooks.items():
                self._hook(phase, function, params)
        drawn = Workflow(
            name=self._target.name,
            description=self._target.description,
            on=self._on(),
            params=params,
            steps=tuple(self._steps.values()),
            retry=self._target.defaults.retry,
            timeout_s=self._target.defaults.timeout_s,
            output=self._template(("output",), output),
            has_output=output is not None,
        )
        if not self._faults or self._steps:  # a trace that broke off early is not also without steps
            for place, message in drawn.faults():
                self._fault(place, message)
        return Definition(drawn, self._faults, self._lines)

    def _draw(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[bool, Any]:
        """Call a function that draws steps; return whether it came to its end, and what it returned."""
        place = (str(self._phase),) if self._phase.is_hook else ()
        token = _tracer.set(self)
        try:
            with self._outputs:
                return True, function(**arguments)
        except TracingError as exc:
            self._fault(place, str(exc), self._line_of(exc))
        except DefinitionError as exc:  # such as of a RetryPolicy that is made here
            for fault in exc.faults:
                self._fault(place, f"{fault.field}: {fault.message}", self._line_of(exc))
        except Exception as exc:  # noqa: BLE001 - whatever a user's function raises is a fault of the definition
            self._fault(place, f"raises {type(exc).__name__}: {exc}", self._line_of(exc))
        finally:
            _tracer.reset(token)
        return False, None

    def _hook(self, phase: Phase, function: Any, params: Mapping[str, Param]) -> None:
        """Draw the steps of a hook, after those of the workflow itself."""
        place = (str(phase),)
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if code is None or not _is_plain(function):
            self._fault(place, f"must be a plain function that draws steps, not {function!r}")
            return
        self._phase, self._code = phase, code
        self._lines[place] = code.co_firstlineno
        self._lines.files[str(phase)] = code.co_filename
        known = {step.id: Output(step.id, step=step.id) for step in self._steps.values() if not step.phase.is_hook}
        known |= {name: Output(f"params.{name}") for name in params} | {name: Output(name) for name in SPECIAL}
        wanted = parameters_of(function)
        before = len(self._steps)
        unknown = [name for name, p in wanted.items() if name not in known and p.default is p.empty]
        for name in unknown:
            self._fault(place, f"unknown parameter {name!r}; {nearest(name, known)}")
        if unknown:
            return
        is_whole, _ = self._draw(function, {name: known[name] for name in wanted if name in known})
        if is_whole and len(self._steps) == before:
            self._fault(place, "draws no step; call a task in it")

    def add(
        self, target: _Callable, options: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], over: Any
    ) -> Output:
        """Add a step for one call, and return what stands for its output."""
        step_id = self._new_id(options.get("id"), target)
        place = (str(self._phase), step_id)
        is_map = over is not _NOT_MAPPED
        if is_map and not isinstance(over, Output | list | tuple):
            self._fault((*place, "foreach"), f"`.map` takes a list or the output of a step, not {over!r}")
            over = []
        checked = self._check_options(place, options)
        what = (
            self._wait(target, place, args, kwargs, is_map=is_map)
            if isinstance(target, Wait)
            else self._call(target, place, args, kwargs, is_map=is_map)
        )
        pool = target.pool if isinstance(target, Task) and "pool" not in options else checked.pool
        self._steps[step_id] = Step(
            id=step_id,
            phase=self._phase,
            **what,
            needs=tuple(checked.needs),
            foreach=self._template((*place, "foreach"), over) if is_map else None,
            max_parallel=checked.max_parallel,
            if_=self._template((*place, "if"), options.get("if_")),
            trigger_rule=TriggerRule(checked.trigger_rule),
            retry=checked.retry,
            timeout_s=checked.timeout,
            memory=checked.memory,
            resources=checked.build_resources(),
            pool=pool or "",
            description=checked.description,
        )
        return Output(step_id, step=step_id)

    def _call(
        self, target: _Callable, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_map: bool
    ) -> dict[str, Any]:
        """Return the fields of a step that calls a task or a workflow."""
        given = self._bind(target, place, args, kwargs, is_map=is_map)
        with_ = {name: self._template((*place, "with", name), value) for name, value in given.items()}
        if is_map and not self._reads_item(with_):
            names = ", ".join(given) or "none"
            message = (
                f"`.map` gives its item to the first parameter, which is not free (given: {names}); use `item` in one"
            )
            self._fault((*place, "foreach"), message)
        return {"task" if isinstance(target, Task) else "workflow": target.reference, "with_": with_}

    def _wait(
        self, target: Wait, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_map: bool
    ) -> dict[str, Any]:
        """Return the fields of a step that waits; for what is given wrongly, a fault and one that is sound."""
        given = (*((Output("item"),) if is_map else ()), *args, *kwargs.values())
        if len(given) != 1:
            self._fault(place, f"`{target.__name__}` takes one value, and nothing by keyword")
        key = target.__name__
        value = self._template((*place, key), given[0] if given else None)
        return {key: _SOUND[key] if value is None else value}

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
            self._fault((*place, key), f"unknown option {key!r}; {nearest(key, _OPTIONS)}")
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
                for where, message in shape_faults((*place, key), error):
                    self._fault(where, "must be steps, by id or output" if key == "needs" else message)
                shape.pop(key, None)
        return schema.Step.model_validate(shape)

    def _new_id(self, wanted: object, target: _Callable) -> str:
        name = target.__name__ if wanted is None else str(wanted)
        number, step_id = 1, name
        while step_id in self._steps:
            number += 1
            step_id = f"{name}_{number}"
        self._lines[(str(self._phase), step_id)] = self._line()
        if wanted is not None and step_id != wanted:
            self._fault((str(self._phase), name), f"two steps have the id {wanted!r}", self._line())
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
            _, file, line = _called.get(id(entry), (None, "", 0))
            if file == self._file:
                self._lines[("on", str(number))] = line
            if not isinstance(entry, On):
                self._fault(("on", str(number)), f"must be on.file(...), on.event(...) or the like, not {entry!r}")
        return tuple(entry if isinstance(entry, On) else UNREADABLE for entry in self._target.on)

    def _fault(self, place: Place, message: str, line: int | None = None) -> None:
        line = line or self._lines.at(place)
        file = self._lines.files.get(place[0], self._file) if place else self._file
        self._faults.append(Fault(file=file, line=line, field=".".join(place), message=" ".join(message.split())))

    def _line(self) -> int:
        """Return the line in the function that is being traced."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        return frame.f_lineno if frame is not None else self._code.co_firstlineno

    def _line_of(self, exc: BaseException) -> int | None:
        lines = (line for frame, line in traceback.walk_tb(exc.__traceback__) if frame.f_code is self._code)
        return next(lines, None)


def _is_plain(function: Callable[..., Any]) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return not any(is_(function) for is_ in kinds)
