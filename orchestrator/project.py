"""A user's project: finds it, loads its workflows from YAML and Python, and checks what one file alone cannot tell.

A process has one project: modules of the user's, once imported, stay. The control process therefore never imports any:
it loads definitions in a process of their own (`load_in_subprocess`, which runs `python -m orchestrator.project ROOT`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from orchestrator.definitions import Definition, read_definition
from orchestrator.errors import DefinitionError, Fault, NotFoundError, SettingsError, TaskNotFoundError
from orchestrator.modules import (
    ImportFailedError,
    code_hash,
    import_module,
    is_inside,
    module_name,
    python_command,
    relative,
)
from orchestrator.modules import code_files as code_files
from orchestrator.modules import definition_files as definition_files
from orchestrator.modules import resolve_task as resolve_task
from orchestrator.pools import (
    DEFAULT_POOL,
    PoolKind,
    PoolSettings,
    Resources,
    pools_from_json,
    pools_to_json,
    smallest_fitting,
)
from orchestrator.recurrence import OnSchedule
from orchestrator.schema import nearest
from orchestrator.settings import FILE_NAME, read_secret
from orchestrator.signatures import argument_faults
from orchestrator.signatures import takes_context as takes_context
from orchestrator.subscriptions import On, OnFile, OnQueue, OnRun, OnWebhook, queue_source, schedule_name, secret_fault
from orchestrator.tracing import Task, WorkflowFunction, collecting
from orchestrator.workflows import Defaults, Step, Workflow, find_cycle

LOAD_TIMEOUT_S = 60.0

#: Names of modules that a project cannot have, because they are ours.
OUR_MODULES = ("orchestrator", "workers", "triggers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What was loaded. `workflows` has those of files without faults; none should run while there are `faults`."""

    root: Path
    workflows: Mapping[str, Workflow]
    faults: list[Fault]
    code_hash: str


# -- Finding. -------------------------------------------------------------------------------------------------


def find_project(start: Path) -> Path:
    """Return the nearest directory from `start` upwards with orchestrator.toml or workflows/, else NotFoundError."""
    start = start.resolve()
    for folder in (start, *start.parents):
        if (folder / "orchestrator.toml").is_file() or (folder / "workflows").is_dir():
            return folder
    raise NotFoundError(
        f"no project in {start} or above it: there is no orchestrator.toml and no workflows/; "
        "run `orchestrator init DIR`, or name the directory with --project"
    )


# -- Loading. -------------------------------------------------------------------------------------------------


_NO_DEFAULTS = Defaults()


def load_project(
    root: Path,
    *,
    pools: Mapping[str, PoolSettings] | None = None,
    defaults: Defaults = _NO_DEFAULTS,
    secrets: Mapping[str, str] | None = None,
) -> Project:
    """Load and check the whole project; imports its Python in this process. What is wrong is in `faults`.

    `pools` are the pools that steps may name; None: any. `defaults` are the project's: what a step's retry, timeout
    and memory are if neither the step says it nor its @task nor, for retry, its workflow. `secrets` are those of the
    settings, name -> reference; None: those that webhooks need are not looked for, as they are for the gateway alone.
    Raises NotFoundError if `root` is no directory.
    """
    root = root.resolve()
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory; name the project's directory with --project")
    return _Loading(root, pools, defaults, secrets).load()


class _Named(NamedTuple):
    workflow: Workflow
    file: str
    line: int | None


class _Loading:
    def __init__(
        self,
        root: Path,
        pools: Mapping[str, PoolSettings] | None,
        defaults: Defaults,
        secrets: Mapping[str, str] | None,
    ) -> None:
        self.root = root
        self.pools = pools
        self.defaults = defaults
        self.secrets = secrets
        self.webhooks: dict[str, tuple[str, int | None]] = {}
        self.queues: dict[str, tuple[OnQueue, str, int | None]] = {}
        self.faults: dict[Fault, None] = {}
        self.definitions: list[tuple[str, Definition]] = []
        self.registered: dict[str, Task] = {}
        self.failed: set[tuple[str, str]] = set()

    def load(self) -> Project:
        with collecting(self._fault):
            return self._load()

    def _load(self) -> Project:
        digest = code_hash(self.root)
        for name in OUR_MODULES:
            for file in (f"{name}.py", f"{name}/__init__.py"):
                if (self.root / file).exists():
                    self._fault(Fault(file=file, message=f"a project cannot have a module named {name!r}; rename it"))
        for path in definition_files(self.root):
            file = path.relative_to(self.root).as_posix()
            if path.suffix == ".py":
                self._read_python(file)
            else:
                try:
                    definition = read_definition(Path(file), path.read_bytes())
                except OSError as exc:
                    self._fault(Fault(file=file, message=f"cannot be read: {exc.strerror}"))
                else:
                    self.definitions.append((file, definition))
        self._find_registered()
        for _, definition in self.definitions:
            for fault in definition.faults:
                self._fault(fault)
        named = self._by_name()
        sound: dict[str, tuple[set[str], Workflow]] = {}
        for file, definition in self.definitions:
            if definition.workflow is not None:
                checked = self._check(file, definition, definition.workflow, named)
                files = {file, *(relative(self.root, other) for other in definition.lines.files.values())}
                sound.setdefault(checked.name, (files, checked))
        self._check_circles(named)
        self._check_schedules(named)
        faults = sorted(self.faults, key=lambda fault: (fault.file, fault.line or 0))
        at_fault = {fault.file for fault in faults}
        good = {name: workflow for name, (files, workflow) in sound.items() if not files & at_fault}
        return Project(root=self.root, workflows=good, faults=faults, code_hash=digest)

    def _fault(self, fault: Fault) -> None:
        self.faults[replace(fault, file=relative(self.root, fault.file))] = None

    def _read_python(self, file: str) -> None:
        if file.split("/")[0].removesuffix(".py") in OUR_MODULES:
            return
        try:
            module = import_module(self.root, module_name(Path(file)))
        except ImportFailedError as exc:
            if isinstance(exc.__cause__, DefinitionError):  # a decorator says itself where and what
                for fault in exc.__cause__.faults:
                    self._fault(fault)
            else:
                self._fault(Fault(file=exc.file or file, line=exc.line, message=exc.reason))
            return
        for value in {id(value): value for value in vars(module).values()}.values():
            if isinstance(value, WorkflowFunction) and value.function.__module__ == module.__name__:
                with contextlib.redirect_stdout(sys.stderr):
                    self.definitions.append((file, value.trace()))

    def _find_registered(self) -> None:
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if file is None or not is_inside(self.root, file):
                continue
            for value in list(vars(module).values()):
                if not isinstance(value, Task) or value.registered_name is None:
                    continue
                other = self.registered.setdefault(value.registered_name, value)
                if other is not value:
                    code = value.function.__code__
                    message = f"two tasks are registered as {value.registered_name!r}; the other is {other.reference}"
                    self._fault(Fault(file=code.co_filename, line=code.co_firstlineno, message=message))

    def _by_name(self) -> dict[str, _Named]:
        found: dict[str, _Named] = {}
        for file, definition in self.definitions:
            if definition.workflow is None or any(fault.field == "workflow" for fault in definition.faults):
                continue
            new = _Named(definition.workflow, file, definition.lines.at(("workflow",)))
            name = new.workflow.name
            other = found.setdefault(name, new)
            if other is not new:
                message = f"two workflows are named {name!r}; the other is in {other.file}:{other.line}"
                self._fault(Fault(file=file, line=new.line, field="workflow", message=message))
        return found

    def _check(self, file: str, definition: Definition, workflow: Workflow, named: Mapping[str, _Named]) -> Workflow:
        """Check one definition against the rest of the project; return it as it will be run."""
        at_fault = {fault.field for fault in definition.faults}

        def fault(message: str, *place: str) -> None:
            line = definition.lines.at(place)
            where = definition.lines.files.get(place[0], file)
            self._fault(Fault(file=where, line=line, field=".".join(place), message=message))

        steps = []
        for step in workflow.steps:
            name = ".".join(step.place)
            decorated = None
            if step.task is not None and f"{name}.task" not in at_fault:
                step = self._check_task(step, file, definition, fault)
                decorated = self._decorated(str(step.task))
            if step.workflow is not None and f"{name}.workflow" not in at_fault:
                self._check_nested(step, named, fault)
            of_task = decorated.defaults if decorated is not None else _NO_DEFAULTS
            step = self._with_pool(step.with_defaults(of_task, self._resources), fault, at_fault)
            project = self.defaults
            if self._pool(step).kind is PoolKind.THREADS:  # what the project says of all steps is for processes
                self._check_threads(step, fault)
                project = replace(project, timeout_s=None, memory=None)
            steps.append(step.with_defaults(Defaults(retry=workflow.retry), project))
        for number, entry in enumerate(workflow.on):
            if isinstance(entry, OnRun):
                for name in entry.workflow:
                    if name not in named:
                        message = f"unknown workflow {name!r}; {nearest(name, named)}"
                        fault(message, "on", str(number), "run", "workflow")
            if isinstance(entry, OnWebhook):
                self._check_webhook(entry, ("on", str(number), "webhook"), file, definition, fault)
            if isinstance(entry, OnQueue):
                self._check_queue(entry, ("on", str(number), "queue"), file, definition, fault)
        on = tuple(self._absolute(entry, number, fault) for number, entry in enumerate(workflow.on))
        return replace(workflow, steps=tuple(steps), on=on)

    @property
    def _resources(self) -> Defaults:
        return Defaults(resources=self.defaults.resources)

    def _pool(self, step: Step) -> PoolSettings:
        return (self.pools or {}).get(step.pool or DEFAULT_POOL, PoolSettings())

    def _with_pool(self, step: Step, fault: Callable[..., None], at_fault: Collection[str]) -> Step:
        """Return the step with its pool: the one that it names, else the smallest that has what it asks for."""
        name, known = ".".join(step.place), {DEFAULT_POOL: PoolSettings()} if self.pools is None else self.pools
        if not step.pool and step.resources is None:
            return step
        if not step.pool:
            pool = smallest_fitting(step.resources or Resources(), known)
            if pool is None:
                fault(f"no pool fits: {self._lacks(step, known)}", *step.place, "resources")
            return replace(step, pool=pool or "")
        if self.pools is not None and step.pool not in known and f"{name}.pool" not in at_fault:
            fault(f"unknown pool {step.pool!r}; {nearest(step.pool, sorted(known))}", *step.place, "pool")
        elif step.resources is not None and not step.resources.fits(self._pool(step)):
            fault(
                f"does not fit the pool that it names: {self._lacks(step, {step.pool: self._pool(step)})}",
                *step.place, "resources",
            )  # fmt: skip
        return step

    @staticmethod
    def _lacks(step: Step, pools: Mapping[str, PoolSettings]) -> str:
        """Say what the step asks for and what the pools have."""
        have = "; ".join(
            f"{name} has {Resources(memory=pool.memory, cpu=pool.cpu or 1, gpu=pool.gpu)}"
            for name, pool in sorted(pools.items())
        )
        return f"it asks for {step.resources}, and {have}; give [pools.NAME] of {FILE_NAME} more, or ask for less"

    @staticmethod
    def _check_threads(step: Step, fault: Callable[..., None]) -> None:
        for key, value in (("timeout", step.timeout_s), ("memory", step.memory)):
            if value is not None:
                message = f"cannot be kept in pool {step.pool or DEFAULT_POOL!r}, whose kind is threads"
                remedy = "take it away, or use a pool of kind prefork"
                fault(f"{message}: a thread cannot be ended; {remedy}", *step.place, key)

    def _check_webhook(
        self, on: OnWebhook, place: tuple[str, ...], file: str, definition: Definition, fault: Callable[..., None]
    ) -> None:
        here = (file, definition.lines.at((*place, "path")))
        there = self.webhooks.setdefault(on.path, here)
        if there is not here:
            fault(f"the path {on.path!r} is used twice; the other is in {there[0]}:{there[1]}", *place, "path")
        if on.schema is not None:
            from orchestrator.json_schemas import schema_fault  # and a library that most projects do not need

            found = schema_fault(on.schema)
            if found is not None:
                fault(f"is no JSON Schema: {found[1]}", *place, "schema", *found[0])
        if on.verify is not None and self.secrets is not None:
            for reference in on.verify.secrets:
                reason = self._secret_fault(on.verify.scheme, reference, self.secrets or {})
                if reason is not None:
                    fault(reason, *place, "verify", on.verify.scheme)

    def _check_queue(
        self, on: OnQueue, place: tuple[str, ...], file: str, definition: Definition, fault: Callable[..., None]
    ) -> None:
        """Entries that read a queue alike share its messages; two that do not would take them from each other."""
        line = definition.lines.at((*place, "queue"))
        other, its_file, its_line = self.queues.setdefault(queue_source(on), (on, file, line))
        for key in ("url", "format"):
            if getattr(other, key) != getattr(on, key):
                where = f"{its_file}:{its_line}"
                fault(f"must be as in {where}, which has this queue too: each message is taken once", *place, key)

    @staticmethod
    def _secret_fault(scheme: str, reference: str, named: Mapping[str, str]) -> str | None:
        if reference not in named and not reference.startswith(("env:", "file:")):
            # It may be the secret itself, which is not to be shown.
            return f"a secret is env:NAME, file:PATH or a name of [secrets], which has {', '.join(named) or 'none'}"
        reference = named.get(reference, reference)
        try:
            reason = secret_fault(scheme, read_secret(reference))
        except SettingsError as exc:
            return str(exc)
        except (ValueError, RuntimeError):  # no text, no path; the message would quote it
            return f"secret {reference}: is not text"
        return None if reason is None else f"secret {reference}: {reason}"

    def _check_task(self, step: Step, file: str, definition: Definition, fault: Callable[..., None]) -> Step:
        reference, place = str(step.task), step.place
        task = self.registered.get(reference)
        if task is not None:
            reference = task.reference
        elif ":" not in reference:
            hint = f"; {nearest(reference, self.registered)}" if self.registered else ""
            fault(f"{reference!r} is neither `module:function` nor the name of a registered task{hint}", *place, "task")
            return step
        try:
            function = resolve_task(self.root, reference)
        except TaskNotFoundError as exc:
            where = f" ({exc.file}:{exc.line})" if exc.file else ""
            if (
                exc.file is None or (file, exc.reason) not in self.failed
            ):  # one broken module is one fault a file, not one a step
                self.failed.add((file, exc.reason))
                fault(f"{exc.reason}{where}", *place, "task")
            return replace(step, task=reference)
        for name, message in argument_faults(function, step.with_):
            fault(message, *place, "with", *([name] if name else []))
        decorated = self._decorated(reference)
        if decorated is not None and decorated.pool is not None and not step.pool:
            # A pool that the decorator names holds for YAML as well, unless the step says another.
            step = replace(step, pool=decorated.pool)
        return replace(step, task=reference)

    def _decorated(self, reference: str) -> Task | None:
        module, _, path = reference.partition(":")
        found = getattr(sys.modules.get(module), path, None)
        return found if isinstance(found, Task) else None

    def _check_nested(self, step: Step, named: Mapping[str, _Named], fault: Callable[..., None]) -> None:
        name, place = str(step.workflow), step.place
        if name not in named:
            fault(f"unknown workflow {name!r}; {nearest(name, named)}", *place, "workflow")
            return
        params = named[name].workflow.params
        for key in step.with_:
            if key not in params:
                fault(f"unknown parameter {key!r} of {name!r}; {nearest(key, params)}", *place, "with", key)
        missing = [key for key, param in params.items() if param.is_required and key not in step.with_]
        if missing:
            fault(f"missing parameter{'s'[: len(missing) - 1]} of {name!r}: {', '.join(missing)}", *place, "with")

    def _check_circles(self, named: Mapping[str, _Named]) -> None:
        graph = {
            name: [step.workflow for step in entry.workflow.steps if step.workflow is not None]
            for name, entry in named.items()
        }
        while cycle := find_cycle(graph):
            message = f"the workflows run each other in a circle: {' -> '.join(cycle)}"
            first = named[cycle[0]]
            self._fault(Fault(file=first.file, line=first.line, field="steps", message=message))
            for name in cycle[1:]:
                graph.pop(name)

    def _check_schedules(self, named: Mapping[str, _Named]) -> None:
        """Two schedules of one name would have each other's ticks."""
        seen: dict[str, str] = {}
        for file, definition in self.definitions:
            workflow = definition.workflow
            if workflow is None or named.get(workflow.name, (None,))[0] is not workflow:
                continue
            for number, on in enumerate(workflow.on):
                if not isinstance(on, OnSchedule):
                    continue
                name, place = schedule_name(workflow.name, on), ("on", str(number), "schedule")
                line = definition.lines.at(place)
                if name in seen:
                    message = f"two schedules are named {name!r}, here and in {seen[name]}; give one a `name:`"
                    self._fault(Fault(file=file, line=line, field=".".join(place), message=message))
                seen.setdefault(name, f"{file}:{line}")

    def _absolute(self, on: On, number: int, fault: Callable[..., None]) -> On:
        if not isinstance(on, OnFile):
            return on
        try:
            return replace(on, path=str(self.root / Path(on.path).expanduser()))
        except RuntimeError as exc:  # ~nobody
            fault(f"{on.path!r}: {exc}", "on", str(number), "file", "path")
            return on


# -- In a process of its own. ---------------------------------------------------------------------------------


def load_in_subprocess(
    root: Path,
    pools: Mapping[str, PoolSettings] | None = None,
    *,
    defaults: Defaults = _NO_DEFAULTS,
    secrets: Mapping[str, str] | None = None,
    timeout_s: float = LOAD_TIMEOUT_S,
) -> Project:
    """As `load_project`, in a new process; a module that ends it, or hangs it for `timeout_s`, is a fault."""
    root = root.resolve()
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory; name the project's directory with --project")
    given = {"pools": None if pools is None else pools_to_json(pools), "defaults": defaults.to_json()}
    options = json.dumps(given | {"secrets": None if secrets is None else dict(secrets)})
    command = python_command("from orchestrator.project import main; main(sys.argv[1:])", str(root), options)
    command[1:1] = ["-X", "faulthandler"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
            reason = f"loading ended the process with exit code {process.returncode}; no module may do that on import"
        except subprocess.TimeoutExpired:
            reason = f"loading did not end in {timeout_s:g} s; no module may wait on import"
            out, err = _end(process)
    with contextlib.suppress(ValueError, LookupError, TypeError):
        body = json.loads(out)
        return Project(
            root=root,
            workflows={workflow["name"]: Workflow.from_json(workflow) for workflow in body["workflows"]},
            faults=[Fault(file=f[0], line=f[1], field=f[2], message=f[3]) for f in body["faults"]],
            code_hash=body["code_hash"],
        )
    return Project(root=root, workflows={}, faults=[_blame(root, reason, err)], code_hash=code_hash(root))


def _end(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """End a process that hangs, and what it started; with SIGABRT first, so that faulthandler says where it was."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    return b"", err or out


def _blame(root: Path, reason: str, err: bytes) -> Fault:
    text = err.decode("utf-8", "replace")
    for file, line in re.findall(r'File "(.+?)", line (\d+)', text):
        if is_inside(root, file):
            return Fault(file=relative(root, file), line=int(line), message=reason)
    last = (text.strip().splitlines() or [""])[-1]
    return Fault(file=".", message=f"{reason}: {last}" if last else reason)


def main(arguments: list[str]) -> None:
    """Load the project ROOT and print it as one JSON object; ends the process.

    OPTIONS, if given, is a JSON object: `pools` (a mapping or null), `defaults` and `secrets`, as `load_project` takes
    them.
    """
    options = json.loads(arguments[1]) if arguments[1:] else {}
    defaults = Defaults.from_json(options.get("defaults", {}))
    secrets = options.get("secrets")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # whatever else writes to stdout, in any language, writes to stderr
        given = options.get("pools")
        pools = None if given is None else pools_from_json(given)
        project = load_project(Path(arguments[0]), pools=pools, defaults=defaults, secrets=secrets)
        faults = [list(asdict(fault).values()) for fault in project.faults]
        workflows = [workflow.to_json() for workflow in project.workflows.values()]
        json.dump({"workflows": workflows, "faults": faults, "code_hash": project.code_hash}, answer)
    os._exit(0)  # threads of the user's modules must not keep this process


if __name__ == "__main__":
    main(sys.argv[1:])
