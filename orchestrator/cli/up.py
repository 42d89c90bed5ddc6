"""`orchestrator up`: everything on this machine, as processes that are started, watched, restarted and stopped here.

    up ── valkey-server                the embedded server (unless broker_url is set)
       ├─ orchestrator control         dispatcher, rescuer, triggers, gateway, autoscaler
       ├─ orchestrator monitor         Flower, with --flower
       └─ orchestrator worker POOL     one for each pool that is used, without processes until there is work; more if
                                       the autoscaler wants them, and new ones for each generation of the code

The autoscaler tells what it wants through the ledger. The parts share nothing but the servers and the data directory;
any of them may be killed at any time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import redis

from orchestrator.cli.access import load, used_pools, warnings_of, with_servers
from orchestrator.cli.addresses import addresses, listen, listen_as_monitor, url_of
from orchestrator.cli.in_force import DEFINITIONS, read_definitions, write_definitions
from orchestrator.cli.launching import part_command, process_launcher
from orchestrator.cli.listening import listened_to
from orchestrator.cli.output import say
from orchestrator.embedded import EmbeddedServer
from orchestrator.errors import AlreadyRunningError, DefinitionError, OrchestratorError, UnavailableError
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import connect
from orchestrator.ledger.pools import PoolRecords
from orchestrator.plan import Plan
from orchestrator.releases import announce_release
from orchestrator.settings import Settings, mask_url
from orchestrator.tokens import Tokens, check_exposure
from workers.launchers import FaultNotes, Launched
from workers.launchers.parts import Part, wait_for
from workers.machine import Machine

_POLL_S = 0.2
_SERVER_START_S = 30.0
#: So many entries of `on:` are listed at the start; a project may have hundreds.
_MOST_GREETED = 30
#: How long a part that holds no steps may take to stop.
_STOP_S = 10.0
#: How often the ledger is asked how many workers there are to be, how often one that is away, and how long it may take.
_ASK_S, _ASK_AGAIN_S, _ASK_TIMEOUT_S = 1.0, 3.0, 0.5


class Up:
    """The supervisor. `run` blocks until Ctrl-C or SIGTERM and returns the exit code."""

    def __init__(self, settings: Settings, *, with_monitor: bool = False) -> None:
        self._settings = settings
        self._with_monitor = with_monitor
        self._monitor: Part | None = None
        self._monitor_url = ""
        self._server: Part | None = None
        self._server_lock: IO[str] | None = None
        self._control: Part | None = None
        self._workers = process_launcher(settings)
        self._launched: list[Launched] = []
        self._records: PoolRecords | None = None
        self._ask_at = 0.0
        #: The pools of the workflows in force.
        self._pools: set[str] = set()
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
        machine = Machine.look()
        for name in sorted(used_pools(project)):
            machine.ceiling(name, self._settings.pool(name), is_declared=name in self._settings.pools)  # or raises
        lock = self._lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            for warning in warnings_of(self._settings, project):
                say(f"warning: {warning}")
            write_definitions(self._settings.data_dir, project)
            self._start_server()
            self._claim_addresses()
            address = ("--host", self._settings.host, "--port", str(self._settings.port))
            self._control = Part("control", part_command(self._settings, "control", *address))
            self._control.start()
            if self._monitor is not None:
                self._monitor.start()
            ledger = Ledger(connect(with_servers(self._settings).ledger_url, timeout_s=_ASK_TIMEOUT_S))
            self._records = PoolRecords(ledger)
            self._faults = FaultNotes(self._records, self._workers.place)
            self._follow_definitions()
            self._greet(len(project.workflows))
            while not self._signals:
                self._look_after()
                time.sleep(_POLL_S)
            self._stop()
        finally:
            self._workers.kill()
            for part in self._parts():
                part.reap()
            lock.close()
            if self._server_lock is not None:
                self._server_lock.close()
        return 0

    def _on_signal(self, *_: object) -> None:
        self._signals += 1

    def _parts(self) -> list[Part]:
        return [part for part in (self._monitor, self._control, self._server) if part is not None]

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
        self._server = Part("server", command, output=output, dies_with_us=True, shares=self._server_lock)
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
        if self._with_monitor:
            with listen_as_monitor(self._settings) as listener:
                self._monitor_url = url_of(self._settings.monitor_host, listener)
                at = ("--host", self._settings.monitor_host, "--port", str(listener.getsockname()[1]))
            self._monitor = Part("monitor", part_command(self._settings, "monitor", *at))

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
        """Have workers of the code's generation for each pool; those of an older one finish what they have."""
        self._definitions_seen = (self._settings.data_dir / DEFINITIONS).stat().st_mtime_ns
        workflows, generation = read_definitions(self._settings.data_dir)
        self._pools = {pool for workflow in workflows for pool in Plan.of(workflow).pools}
        self._workers.renew(generation)
        for pool in self._pools - self._workers.pools:
            self._workers.scale(pool, 1)
        self._ask_at = 0.0

    def _follow_autoscaler(self, now: float) -> None:
        """Have as many workers as it wants, and one at least for each pool that is used; say which do not live.

        As long as nothing is heard of it, all stays as it is.
        """
        if self._records is None or now < self._ask_at:
            return
        try:
            states = self._records.current_states()
            self._faults.note(self._launched)
        except UnavailableError:
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
            return
        self._ask_at = now + _ASK_S
        if states is None:
            return
        for pool in self._workers.pools - states.keys() - self._pools:
            self._workers.scale(pool, 0)
        for pool, state in states.items():
            least = int(state.is_used or pool in self._pools)
            self._workers.scale(pool, max(least, state.desired_workers), state.leave)

    def _look_after(self) -> None:
        if (self._settings.data_dir / DEFINITIONS).stat().st_mtime_ns != self._definitions_seen:
            self._follow_definitions()
            say("new generation of workers for the changed code")
        now = time.monotonic()
        for part in self._parts():
            ended = part.tend(now)
            if ended:
                say(f"{ended}; it is started again")
        self._launched = self._workers.look()
        self._follow_autoscaler(now)

    def _stop(self) -> None:
        """Take nothing new, let steps in progress finish, and close the server last, so that all is written."""
        grace_s = self._settings.grace_s
        say(f"stopping; steps in progress have {grace_s} s (again Ctrl-C to stop at once)")
        asked = self._signals
        assert self._control is not None
        self._control.signal(signal.SIGTERM)
        if self._monitor is not None:
            self._monitor.signal(signal.SIGTERM)
        self._workers.close(lambda: self._signals > asked)
        wait_for([self._control], _STOP_S, lambda: self._signals > asked)
        self._control.signal(signal.SIGKILL)
        if self._server is not None:
            self._server.signal(signal.SIGTERM)
            wait_for([self._server], _STOP_S)
        say("stopped")

    def _greet(self, workflows: int) -> None:
        settings = self._settings
        url = EmbeddedServer.url_of(settings.data_dir) if settings.is_embedded else settings.broker_url
        say(f"project   {settings.project} ({workflows} workflow(s))")
        say(f"server    {mask_url(url or '')}{' (embedded)' if settings.is_embedded else ''}")
        say(f"data      {settings.data_dir}")
        at = addresses(settings.data_dir)
        say(f"gateway   {at['url']} (health {at['health_url']})")
        if self._monitor is not None:
            say(f"monitor   {self._monitor_url} (Flower)")
        for name in sorted(self._pools):
            pool = settings.pool(name)
            say(f"pool      {name}: {pool.minimum} to {pool.maximum} at a time, {pool.minimum or 'none'} at rest")
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
