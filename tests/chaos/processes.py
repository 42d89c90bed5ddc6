"""The system under test: its processes, which are started again when they die, as a platform would."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis

from orchestrator.embedded import EmbeddedServer
from orchestrator.ledger import keys

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.1
_RESTART_S = 0.3


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of what is started: without settings of whoever runs this."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "CELERY_"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | extra


def orchestrator(*arguments: str) -> list[str]:
    """Return the command line of `orchestrator ...`."""
    return [sys.executable, "-P", "-m", "orchestrator", *arguments]


def wait_for(predicate: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Poll until `predicate` gives something true and return it. Raises TimeoutError."""
    until = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(0.05)
    return value


@dataclass(slots=True)
class Role:
    """One process that is kept alive."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    #: Told the pid each time that the role was started.
    started: Callable[[int], object] | None = None
    process: subprocess.Popen[bytes] | None = None
    restart_at: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None


class System:
    """Keeps its roles alive from `start` to `stop`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.roles: dict[str, Role] = {}
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._lock = threading.Lock()

    def start(self, role: Role) -> None:
        """Start a role; from now on it is started again when it dies."""
        with self._lock:
            self._launch(role)
            self.roles[role.name] = role
        if not self._keeper.is_alive() and not self._stopping.is_set():
            self._keeper.start()

    def _launch(self, role: Role) -> None:
        with (self.work / f"{role.name}.log").open("ab") as log:
            role.process = subprocess.Popen(
                role.command, cwd=self.work, env=environment(**role.env), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        if role.started is not None:
            role.started(role.process.pid)

    def _keep(self) -> None:
        while not self._stopping.wait(_POLL_S):
            with self._lock:
                for role in self.roles.values():
                    if role.pid is not None:
                        role.restart_at = 0.0
                    elif not role.restart_at:
                        role.restart_at = time.monotonic() + _RESTART_S
                    elif time.monotonic() >= role.restart_at:
                        self._launch(role)

    def stop(self, timeout_s: float = 40.0) -> dict[str, int]:
        """Stop all roles with SIGTERM, the first that was started last; returns their exit codes."""
        self._stopping.set()
        if self._keeper.is_alive():
            self._keeper.join()
        family = [child for role in self.roles.values() for child in children(role.pid)]
        codes = {}
        for role in reversed(self.roles.values()):
            assert role.process is not None
            if role.process.poll() is None:
                role.process.terminate()
            try:
                codes[role.name] = role.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                role.process.kill()
                codes[role.name] = role.process.wait()
        for process in psutil.wait_procs(family, timeout=3)[1]:
            process.kill()
        return codes


def children(pid: int | None) -> list[psutil.Process]:
    """Return the processes below a process that live; none if it is gone. A child that was not reaped yet is dead."""
    try:
        below = psutil.Process(pid).children(recursive=True) if pid is not None else []
    except psutil.NoSuchProcess:
        return []
    return [child for child in below if _lives(child)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def part_of_up(up_pid: int | None, sign: str) -> int | None:
    """Return the pid of a part of `up`: `valkey-server`, `control` or a `worker`."""
    return next(iter(parts_of_up(up_pid, sign)), None)


def parts_of_up(up_pid: int | None, sign: str) -> list[int]:
    """Return the pids of all its parts of a kind, of which workers come and go."""
    found = []
    try:
        for child in psutil.Process(up_pid).children() if up_pid is not None else []:
            try:
                if sign in {Path(word).name for word in " ".join(child.cmdline()).split()}:
                    found.append(child.pid)
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        pass
    return found


def server_url(data_dir: Path) -> str | None:
    return EmbeddedServer.url_of(data_dir)


def is_ready(data_dir: Path) -> bool:
    """Tell whether the server answers and definitions are in force."""
    url = server_url(data_dir)
    if url is None:
        return False
    client = redis.Redis.from_url(url, socket_timeout=2)
    try:
        return bool(client.exists(keys.WORKFLOWS))
    except redis.RedisError:
        return False
    finally:
        client.close()
