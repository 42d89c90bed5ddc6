"""RabbitMQ for tests: Debian's server, in a directory and on ports of its own, without systemd."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import wait_until

_SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_CTL = "/usr/lib/rabbitmq/bin/rabbitmqctl"


def is_missing() -> bool:
    """Tell whether this machine has no RabbitMQ."""
    return not Path(_SERVER).exists() or shutil.which("epmd") is None


def is_required() -> bool:
    """Tell whether tests on RabbitMQ must run here, and not be skipped."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("CI", "REQUIRE_RABBITMQ"))


class RabbitMQ:
    """A node, with a port mapper (epmd) of its own, which it does not share with other tests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._node = f"test-{uuid.uuid4().hex[:12]}@localhost"
        self._processes: list[subprocess.Popen[bytes]] = []
        with contextlib.ExitStack() as stack:
            ports = [_port(stack) for _ in range(3)]
        self.port, distribution, self._epmd_port = ports
        (directory / "rabbitmq.conf").write_text(f"listeners.tcp.default = 127.0.0.1:{self.port}\n")
        (directory / "enabled_plugins").write_text("[].\n")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")} | {
            "HOME": str(directory),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            # The script becomes the server, and is not its parent.
            "RUNNING_UNDER_SYSTEMD": "1",
            # What schedulers do when there is nothing to do: not spin on a machine that others use too.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        self._run(["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"])
        wait_until(lambda: _listens(self._epmd_port), "epmd listens")
        self._run([_SERVER])
        wait_until(self._is_up, f"RabbitMQ listens: {self._text()}", 60)

    def stop(self) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                # Nothing that it keeps is read again: it need not be gentle.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def depth(self, queue: str) -> tuple[int, int]:
        """Return how many messages of a queue are ready, and how many are taken and not acknowledged."""
        told = self._ctl("--formatter", "json", "list_queues", "name", "messages_ready", "messages_unacknowledged")
        rows = {row["name"]: (row["messages_ready"], row["messages_unacknowledged"]) for row in json.loads(told)}
        return rows.get(queue, (0, 0))

    @contextlib.contextmanager
    def consumer_timeout(self, milliseconds: int) -> Iterator[None]:
        """Close channels, of those opened meanwhile, on which a message is not acknowledged for so long."""
        names = ("consumer_timeout", "channel_tick_interval")
        before = [self._ctl("eval", f"element(2, application:get_env(rabbit, {name})).").strip() for name in names]
        for name, value in zip(names, (milliseconds, 500), strict=True):
            self._ctl("eval", f"application:set_env(rabbit, {name}, {value}).")
        try:
            yield
        finally:
            for name, was in zip(names, before, strict=True):
                self._ctl("eval", f"application:set_env(rabbit, {name}, {was}).")

    def _ctl(self, *arguments: str) -> str:
        done = subprocess.run(
            [_CTL, "-q", *arguments], env=self._environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def _run(self, command: list[str]) -> None:
        with (self._directory / "output.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _is_up(self) -> bool:
        assert self._processes[-1].poll() is None, self._text()
        return _listens(self.port) and "Starting broker... completed" in self._text()

    def _text(self) -> str:
        log = self._directory / "output.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def _port(stack: contextlib.ExitStack) -> int:
    """Return a free port; all of one stack are different."""
    probe = stack.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
