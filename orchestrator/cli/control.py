"""The control process: dispatcher, triggers, gateway, autoscaler ... in threads of their own, and what they follow."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import redis

from orchestrator.cli.access import load
from orchestrator.cli.in_force import read_definitions, write_definitions
from orchestrator.cli.output import say
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.errors import DefinitionError, OrchestratorError, UnavailableError
from orchestrator.events import Event
from orchestrator.health_file import HealthFile
from orchestrator.keeper import Keeper
from orchestrator.leading import LeadingService
from orchestrator.ledger import keys
from orchestrator.project import code_files, definition_files
from orchestrator.releases import announce_release
from orchestrator.remote_control import RemoteControl, revoke
from orchestrator.rescuer import Rescuer
from orchestrator.settings import Settings
from orchestrator.subscriptions import on_to_json
from orchestrator.telemetry import configure_logging, get_logger
from orchestrator.timers import Timers
from orchestrator.workflows import Workflow
from triggers.beat import Beat
from triggers.files import file_triggers
from triggers.queue import queue_triggers
from triggers.s3 import s3_triggers
from triggers.supervisor import Kind, TriggerSupervisor
from workers.autoscaler import Autoscaler
from workers.launchers import Launcher
from workers.launchers.none import NoLauncher

log = get_logger(__name__)

#: What the control process does; in production each may be a process of its own.
ROLES = ("dispatcher", "trigger", "beat", "gateway", "autoscaler")
_PERIOD_S = 1.0
_WALK_EVERY_S = 15.0
#: For so long triggers wait for a dispatcher that has their definitions; it may be down, and then it will find them.
_DISPATCHER_S = 20.0


class _Watched:
    """Tells when a file of the project has changed: looks at known files and their folders, walks now and then."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._walk_at = 0.0
        self._paths: list[Path] = []
        self._seen = self._look(time.monotonic())

    def has_changed(self) -> bool:
        seen = self._look(time.monotonic())
        changed = seen != self._seen
        self._seen = seen
        return changed

    def _look(self, now: float) -> dict[str, tuple[int, int]]:
        if now >= self._walk_at or self._folders_changed():
            self._paths = sorted({*code_files(self._root), *definition_files(self._root)})
            self._folders = {p: _mtime(p) for p in {self._root / "workflows", *(path.parent for path in self._paths)}}
            self._walk_at = now + _WALK_EVERY_S
        return {str(path): entry for path, entry in self._stats()}

    def _folders_changed(self) -> bool:
        return any(_mtime(path) != mtime for path, mtime in self._folders.items())

    def _stats(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            yield path, (stat.st_mtime_ns, stat.st_size)


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _care_of(engine: Engine) -> list[LeadingService]:
    """Return what looks after runs that were started; one of several processes does each."""
    care: list[LeadingService] = [Rescuer(engine), Timers(engine), Keeper(engine)]
    dsn = engine.settings.read_sentry_dsn()
    if dsn:
        from orchestrator.reports import Reporter, ReportLoop  # sentry-sdk, which most do not need

        care.append(ReportLoop(engine, Reporter(dsn)))
    return care


def _remote_control(engine: Engine) -> RemoteControl:
    """Return what carries out commands of Celery's tools also when no worker is up."""
    name = f"control@{socket.gethostname()}:{os.getpid()}"
    return RemoteControl(engine, name, {"revoke": partial(revoke, engine), "enable_events": partial(_watch, engine)})


def _watch(engine: Engine, **_: object) -> dict[str, str]:
    """Have workers tell of steps: a Flower that is not ours asks for that every few seconds, as long as it runs."""
    engine.pools.monitor()
    return {"ok": "task events enabled"}


def _kinds_of_trigger(engine: Engine) -> tuple[Kind, ...]:
    settings = engine.settings
    return (
        partial(file_triggers, marks=engine.ledger, emit=engine.bus.publish, rescan_s=settings.rescan_s),
        partial(s3_triggers, engine=engine, emit=engine.bus.publish),
        partial(queue_triggers, ledger=engine.ledger, emit=engine.bus.publish),
    )


class Follower(Protocol):
    """A part of the control process that follows the definitions; `start` and `stop` are idempotent."""

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force. Raises OrchestratorError if that is to be tried again."""

    def start(self) -> None:
        """Begin; returns at once."""

    def stop(self) -> None:
        """End; returns when what is in work is done."""


class Control:
    """The parts for some roles, until told to stop, or until `up`, if it has one, is gone."""

    def __init__(
        self,
        settings: Settings,
        *,
        roles: Collection[str] = ROLES,
        up_pid: int | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._settings = settings
        self._up_pid = up_pid
        self._stop = threading.Event()
        self._health = HealthFile(settings.health_file)
        engine = Engine(settings)
        self._engine = engine
        self._care: list[LeadingService] = _care_of(engine) if "dispatcher" in roles else []
        self._autoscaler = Autoscaler(engine, launcher or NoLauncher()) if "autoscaler" in roles else None
        if self._autoscaler is not None:
            self._care.append(self._autoscaler)
        self._remote = _remote_control(engine) if "dispatcher" in roles else None
        self._role = "control" if len(roles) > 1 else next(iter(roles))
        self._followers: list[Follower] = []
        self._serves = "gateway" in roles
        self._dispatches = "dispatcher" in roles
        if "dispatcher" in roles:
            self._followers.append(Dispatcher(engine, on_start=self._tell_start))
        if "trigger" in roles:
            self._followers.append(TriggerSupervisor(_kinds_of_trigger(engine)))
        if "beat" in roles:
            self._followers.append(Beat(engine, engine.bus))
        if self._serves:
            from orchestrator.cli.gateway import Gateway  # an HTTP server, which the other roles do not need

            self._followers.append(Gateway(engine))

    @property
    def _parts(self) -> list[Follower | LeadingService | RemoteControl]:
        return [*self._care, *self._followers, *([] if self._remote is None else [self._remote])]

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; returns the exit code. Raises DefinitionError if nothing can be loaded."""
        configure_logging(role=self._role)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        watched = _Watched(self._settings.project)
        if self._up_pid is not None:
            workflows, generation = read_definitions(self._settings.data_dir)
        else:
            project = load(self._settings, with_secrets=self._serves)
            if project.faults:
                raise DefinitionError(project.faults)
            workflows, generation = list(project.workflows.values()), project.code_hash
        teller = threading.Thread(target=self._tell_ends, name="teller", daemon=True)
        if self._dispatches:
            self._announce()
        try:
            self._apply(workflows)
            self._renew(generation)
            for part in self._parts:
                part.start()
            if self._dispatches:
                teller.start()
            while not self._stop.wait(_PERIOD_S):
                self._health.touch()
                if self._up_pid is not None and os.getppid() != self._up_pid:
                    log.warning("up_is_gone")
                    break
                if watched.has_changed():
                    self._reload()
        finally:
            self._stop.set()
            for part in reversed(self._parts):
                part.stop()
            if teller.is_alive():
                teller.join(timeout=5)
            self._engine.close()
        return 0

    def _announce(self) -> None:
        """Put our version in force; a ledger that is away is waited for, as everything here does."""
        while not self._stop.is_set():
            try:
                announce_release(self._engine.ledger)
                return
            except UnavailableError as exc:
                log.warning("version_waits", error=str(exc))
                self._stop.wait(1.0)

    def _apply(self, workflows: list[Workflow]) -> None:
        if self._followers and not self._dispatches:
            self._await_dispatcher(workflows)
        for follower in self._followers:
            while not self._stop.is_set():
                try:
                    follower.apply(workflows)
                    break
                except OrchestratorError as exc:
                    log.warning("definitions_wait", error=str(exc))
                    self._stop.wait(1.0)

    def _renew(self, generation: str) -> None:
        """Have workers that are launched here of this generation of the code."""
        if self._autoscaler is not None:
            self._autoscaler.renew(generation)

    def _await_dispatcher(self, workflows: list[Workflow]) -> None:
        """Wait until a dispatcher has these definitions: one with those before finds that an event matches nothing."""
        wanted = {one.name: json.loads(json.dumps([on_to_json(on) for on in one.on])) for one in workflows}
        until = time.monotonic() + _DISPATCHER_S
        while time.monotonic() < until:
            try:
                rows = self._engine.ledger.workflows()
                in_force = {name: row["workflow"].get("on", []) for name, row in rows.items()}
                # Where no dispatcher has been yet, events wait for it.
                if not in_force or all(in_force.get(name) == on for name, on in wanted.items()):
                    return
            except UnavailableError:
                pass
            if self._stop.wait(_PERIOD_S / 5):
                return
        log.warning("no_dispatcher_has_these_definitions", waited_s=_DISPATCHER_S)

    def _reload(self) -> None:
        """Put changed definitions in force; broken ones are shown, and what was in force stays."""
        project = load(self._settings, with_secrets=self._serves)
        if project.faults:
            say("definitions changed, with faults; those before stay in force:")
            for fault in project.faults:
                say(f"  {fault}")
            return
        self._apply(list(project.workflows.values()))
        self._renew(project.code_hash)
        if self._up_pid is not None:
            try:
                write_definitions(self._settings.data_dir, project)
            except UnavailableError as exc:
                say(f"definitions changed, but the workers stay with those before: {exc}")
                return
        say(f"definitions changed: {len(project.workflows)} workflow(s) in force")

    def _tell_start(self, run: str, workflow: str, event: Event) -> None:
        about = event.subject or event.id
        say(f"run {run} of {workflow} started by {event.type.removeprefix('orchestrator.')} {about}")

    def _tell_ends(self) -> None:
        """Say how runs end, as they do."""
        while not self._stop.is_set():
            try:
                with self._engine.ledger.client.pubsub(ignore_subscribe_messages=True) as listener:
                    listener.subscribe(keys.RUN_ENDED)
                    while not self._stop.is_set():
                        message: Any = listener.get_message(timeout=0.5)
                        if message is not None:
                            told = json.loads(message["data"])
                            say(f"run {told['run']} of {told['workflow']} {told['state']}{_reason(told['error'])}")
            except (redis.RedisError, OSError):
                self._stop.wait(1.0)  # the others say that the server is away


def _reason(error: str) -> str:
    if not error:
        return ""
    found = json.loads(error)
    where = f" in {found['step']}" if found.get("step") else ""
    return f"{where}: {found['type']}: {found['message'].splitlines()[0] if found['message'] else ''}"
