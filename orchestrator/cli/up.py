"""`orchestrator up`: everything on this machine, as processes that are started, watched, restarted and stopped here.

    up ── valkey-server                the embedded server (unless broker_url is set)
       ├─ orchestrator control         dispatcher, rescuer, triggers, gateway
       └─ orchestrator worker POOL     one for each pool that a step names; a new one for each generation of the code

The parts share nothing but the servers and the data directory; any of them may be killed at any time.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import redis

from orchestrator.cli.access import cli_command, load, warnings_of, with_servers
from orchestrator.cli.addresses import addresses, listen
from orchestrator.cli.in_force import DEFINITIONS, read_definitions, write_definitions
from orchestrator.cli.listening import listened_to
from orchestrator.cli.output import say
from orchestrator.embedded import EmbeddedServer
from orchestrator.errors import AlreadyRunningError, DefinitionError, OrchestratorError, UnavailableError
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import connect
from orchestrator.plan import Plan
from orchestrator.releases import announce_release
from orchestrator.settings import Settings, mask_url
from orchestrator.tokens import Tokens, check_exposure

_POLL_S = 0.2
#: Pause before a part that died is started again: the first, doubled each time that it dies young, and the longest.
_BACKOFF_S = (0.2, 10.0)
#: A part that has lived this long does not die of starting.
_STEADY_S = 5.0
_SERVER_START_S = 30.0
#: So many entries of `on:` are listed at the start; a project may have hundreds.
_MOST_GREETED = 30
#: How long a part that holds no steps may take to stop.
_STOP_S = 10.0


@dataclass(slots=True)
class _Part:
    """One process and how to start it again."""

    name: str
    command: Sequence[str]
    output: IO[bytes] | None = None
    dies_with_us: bool = False
    #: A file that is open in the process, too: a lock on it holds until both of us are gone.
    shares: IO[str] | None = None
    process: subprocess.Popen[bytes] | None = None
    is_draining: bool = False
    generation: str = ""
    backoff_s: float = field(default=_BACKOFF_S[0])
    started: float = 0.0
    start_at: float = 0.0

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            # A Ctrl-C in the terminal is for `up` alone, which then stops its parts in order.
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            pass_fds=() if self.shares is None else (self.shares.fileno(),),
            preexec_fn=_die_with_parent if self.dies_with_us else None,  # `up` has one thread
        )
        self.started = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def _die_with_parent() -> None:
    """Have the kernel end a process when `up` is killed (Linux); elsewhere the next `up` stops a server left over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Up:
    """The supervisor. `run` blocks until Ctrl-C or SIGTERM and returns the exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: _Part | None = None
        self._server_lock: IO[str] | None = None
        self._control: _Part | None = None
        self._workers: list[_Part] = []
        self._signals = 0
        self._definitions_seen = 0

    def run(self) -> int:
        project = load(self._settings)
        if project.faults:
            raise DefinitionError(project.faults)
        if not project.workflows:
            raise UnavailableError(
                f"{self._settings.project} has no workflows; make one with `orchestrator init DIR`, "
                "or write workflows/NAME.yaml"
            )
        lock = self._lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            for warning in warnings_of(self._settings, project):
                say(f"warning: {warning}")
            write_definitions(self._settings.data_dir, project)
            self._start_server()
            self._claim_addresses()
            place = ("--data-dir", str(self._settings.data_dir))
            address = ("--host", self._settings.host, "--port", str(self._settings.port))
            self._control = self._role("control", "control", *place, *address)
            self._control.start()
            self._follow_definitions()
            self._greet(len(project.workflows))
            while not self._signals:
                self._look_after()
                time.sleep(_POLL_S)
            self._stop()
        finally:
            for part in self._parts():
                part.signal(signal.SIGKILL)
            for part in self._parts():
                if part.process is not None:
                    part.process.wait()
            lock.close()
            if self._server_lock is not None:
                self._server_lock.close()
        return 0

    def _on_signal(self, *_: object) -> None:
        self._signals += 1

    def _parts(self) -> list[_Part]:
        return [part for part in (self._control, *self._workers, self._server) if part is not None]

    def _lock(self) -> IO[str]:
        data_dir = self._settings.data_dir
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            lock = (data_dir / "up.lock").open("a+")
        except OSError as exc:
            raise UnavailableError(
                f"cannot write to the data directory {data_dir}: {exc.strerror}; choose another with --data-dir"
            ) from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise AlreadyRunningError(
                f"the data directory {data_dir} is in use by `orchestrator up` (pid {holder}); "
                "stop that one, or choose another with --data-dir"
            ) from exc
        try:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        except OSError as exc:
            lock.detach().close()
            raise UnavailableError(
                f"cannot write to the data directory {data_dir}: {exc.strerror}; free space, "
                "or choose another with --data-dir"
            ) from exc
        return lock

    # The parts

    def _role(self, name: str, *arguments: str) -> _Part:
        ours = ("--up-pid", str(os.getpid()), "--project", str(self._settings.project))
        return _Part(name, cli_command(*arguments, *ours))

    def _start_server(self) -> None:
        if not self._settings.is_embedded:
            self._check_external()
            return
        data_dir = self._settings.data_dir
        self._server_lock = _stop_leftover(data_dir)
        server = EmbeddedServer(
            data_dir, host=self._settings.server_host, port=self._settings.server_port, fsync=self._settings.fsync
        )
        command = server.prepare()
        output = (data_dir / "server" / "valkey.log").open("ab")
        self._server = _Part("server", command, output=output, dies_with_us=True, shares=self._server_lock)
        self._server.start()
        url = EmbeddedServer.url_of(data_dir)
        assert url is not None
        client = redis.Redis.from_url(url, socket_timeout=2)
        until = time.monotonic() + _SERVER_START_S
        while not _answers(client) and not self._signals:
            if _is_loading(client):  # as long as there is data to read, however much it is
                until = time.monotonic() + _SERVER_START_S
            if not self._server.is_alive or time.monotonic() > until:
                raise UnavailableError(
                    f"the embedded server did not start; see {data_dir / 'server' / 'valkey.log'} for its reason"
                )
            time.sleep(0.02)
        client.close()

    def _claim_addresses(self) -> None:
        """See that the gateway can listen where it is to, and choose its ports; raises if it cannot."""
        ledger = Ledger(connect(with_servers(self._settings).ledger_url))
        try:
            check_exposure(self._settings, Tokens(ledger))
            announce_release(ledger)
        finally:
            ledger.client.close()
        listen(self._settings).close()

    def _check_external(self) -> None:
        from orchestrator.engine import Engine

        engine = Engine(self._settings, patience_s=0.0)
        try:
            if not engine.ledger.is_up():
                raise UnavailableError(
                    f"the ledger at {mask_url(self._settings.ledger_url)} does not answer; start it, or set ledger_url"
                )
            try:
                engine.app.connection_for_write().ensure_connection(max_retries=1, timeout=5)
            except Exception as exc:  # each transport raises its own
                raise UnavailableError(
                    f"the broker at {mask_url(self._settings.broker_url)} does not answer ({type(exc).__name__}); "
                    "start it, or set broker_url"
                ) from exc
        finally:
            engine.close()

    def _follow_definitions(self) -> None:
        """Have a worker of the code's generation for each pool; those of an older one finish what they have."""
        self._definitions_seen = (self._settings.data_dir / DEFINITIONS).stat().st_mtime_ns
        workflows, generation = read_definitions(self._settings.data_dir)
        pools = sorted({pool for workflow in workflows for pool in Plan.of(workflow).pools} | self._pools_in_flight())
        current = {part.name for part in self._workers if not part.is_draining and part.generation == generation}
        for pool in pools:
            name = f"worker {pool}"
            if name not in current:
                worker = self._role(name, "worker", "--pool", pool, "--data-dir", str(self._settings.data_dir))
                worker.generation = generation
                worker.start()
                self._workers.append(worker)
        for part in self._workers:
            if not part.is_draining and (part.generation != generation or part.name.split(" ", 1)[1] not in pools):
                part.is_draining = True
                part.signal(signal.SIGTERM)

    def _pools_in_flight(self) -> set[str]:
        """Return the pools of the runs in flight, which go on with the plans that they started with."""
        ledger = Ledger(connect(with_servers(self._settings).ledger_url))
        try:
            return {pool for plan in ledger.plans_in_flight() for pool in ledger.plan(plan).pools}
        except OrchestratorError:  # away, or unknown: keep what there is
            return {part.name.split(" ", 1)[1] for part in self._workers}
        finally:
            ledger.client.close()

    def _look_after(self) -> None:
        if (self._settings.data_dir / DEFINITIONS).stat().st_mtime_ns != self._definitions_seen:
            self._follow_definitions()
            say("new generation of workers for the changed code")
        now = time.monotonic()
        for part in self._parts():
            if part.is_alive:
                if now - part.started > _STEADY_S:
                    part.backoff_s = _BACKOFF_S[0]
                continue
            assert part.process is not None
            if part.is_draining:
                self._workers.remove(part)
            elif not part.start_at:
                say(f"{part.name} ended (exit code {part.process.returncode}); it is started again")
                part.start_at = now + part.backoff_s
                part.backoff_s = min(part.backoff_s * 2, _BACKOFF_S[1])
            elif now >= part.start_at:
                part.start_at = 0.0
                part.start()

    def _stop(self) -> None:
        """Take nothing new, let steps in progress finish, and close the server last, so that all is written."""
        grace_s = self._settings.grace_s
        say(f"stopping; steps in progress have {grace_s} s (again Ctrl-C to stop at once)")
        asked = self._signals
        assert self._control is not None
        for part in (self._control, *self._workers):
            part.signal(signal.SIGTERM)
        self._wait_for(self._workers, grace_s, lambda: self._signals > asked)
        for part in self._workers:
            if part.is_alive:
                say(f"{part.name} has steps that go on; they are taken up again at the next start")
                part.signal(signal.SIGKILL)
        self._wait_for([self._control], _STOP_S, lambda: self._signals > asked)
        self._control.signal(signal.SIGKILL)
        if self._server is not None:
            self._server.signal(signal.SIGTERM)
            self._wait_for([self._server], _STOP_S, lambda: False)
        say("stopped")

    @staticmethod
    def _wait_for(parts: Sequence[_Part], seconds: float, is_hurried: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while any(part.is_alive for part in parts) and time.monotonic() < until and not is_hurried():
            time.sleep(0.05)

    def _greet(self, workflows: int) -> None:
        settings = self._settings
        url = EmbeddedServer.url_of(settings.data_dir) if settings.is_embedded else settings.broker_url
        say(f"project   {settings.project} ({workflows} workflow(s))")
        say(f"server    {mask_url(url or '')}{' (embedded)' if settings.is_embedded else ''}")
        say(f"data      {settings.data_dir}")
        at = addresses(settings.data_dir)
        say(f"gateway   {at['url']} (health {at['health_url']})")
        for part in self._workers:
            pool = part.name.split(" ", 1)[1]
            say(f"worker    pool {pool}, {settings.pool(pool).concurrency} at a time")
        found = listened_to(
            read_definitions(settings.data_dir)[0], at["url"], datetime.now(UTC), self._paused_schedules()
        )
        for kind, about in found[:_MOST_GREETED]:
            say(f"{kind:<9} {about}")
        if found[_MOST_GREETED:]:
            say(f"          and {len(found) - _MOST_GREETED} more; see `orchestrator workflows list`")

    def _paused_schedules(self) -> Collection[str]:
        ledger = Ledger(connect(with_servers(self._settings).ledger_url))
        try:
            return set(ledger.client.hkeys(keys.PAUSED_SCHEDULES))
        except redis.RedisError:  # away: whoever needs it waits and says so
            return ()
        finally:
            ledger.client.close()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _is_loading(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.BusyLoadingError:
        return True
    except redis.RedisError:
        return False
    return False


def _stop_leftover(data_dir: Path) -> IO[str]:
    """Stop a server that an `up` which was killed has left on this data directory, whose lock we hold.

    Returns the server's own lock. One that does not answer may be there all the same (stopped, or waiting for its
    disk), and two servers on one append-only file would spoil it.
    """
    try:
        lock = (data_dir / "server.lock").open("a")
    except OSError as exc:
        raise UnavailableError(f"cannot write to the data directory {data_dir}: {exc.strerror}; free space") from exc
    until = time.monotonic() + _STOP_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if time.monotonic() > until:
                lock.close()
                raise OrchestratorError(
                    f"the server that was left running on {data_dir} does not stop; stop it by hand "
                    f"(its pid is in {data_dir / 'server' / 'valkey.log'})"
                ) from exc
        else:
            return lock
        _shut_down(data_dir)
        time.sleep(0.05)


def _shut_down(data_dir: Path) -> None:
    """Ask the server of a data directory to stop, if it can be asked."""
    url = EmbeddedServer.url_of(data_dir)
    if url is None:
        return
    client = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=1)
    try:
        client.shutdown(nosave=True)
    except redis.RedisError:
        pass
    finally:
        client.close()
