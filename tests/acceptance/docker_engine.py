"""A Docker Engine of the tests' own, and docker-compose on it; the machine's own, if it has one, is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, wait_until

_NEEDED = ("dockerd", "docker", "docker-compose", "debootstrap", "apt-get")
_START_S = 60.0


def is_impossible() -> str:
    """Say what keeps an engine from running here, whatever is installed; empty if nothing does."""
    if sys.platform != "linux":
        return "containers need Linux"
    return "" if os.geteuid() == 0 else "dockerd and debootstrap need root"


def is_missing() -> str:
    """Say what is to be installed first; empty if nothing is."""
    lacking = [name for name in _NEEDED if shutil.which(name, path=_path()) is None]
    packages = "docker.io docker-compose debootstrap"
    return f"{', '.join(lacking)}: not installed; apt-get install {packages}" if lacking else ""


def is_required() -> bool:
    """Tell whether tests on containers must run here where the machine can, and not be skipped."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("CI", "REQUIRE_DOCKER"))


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class EngineCannotRunError(Exception):
    """dockerd does not start on this machine (an old kernel, no cgroups, a container without privileges)."""


class DockerEngine:
    """A dockerd in a directory of its own.

    It changes neither the firewall nor the bridge of the machine: containers reach each other and are reached by their
    published ports, and nothing else.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="engine-"))  # short, because the path of a socket is bounded
        self._socket = f"unix://{self.directory}/s"
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_", "ORC"))
            },
            "PATH": _path(),
            "DOCKER_HOST": self._socket,
            "DOCKER_BUILDKIT": "0",
            "PYTHON": sys.executable,
        }

    def start(self) -> None:
        """Raises EngineCannotRunError, with what dockerd says."""
        log = self.directory / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    "dockerd", "--storage-driver", "overlay2", "--data-root", str(self.directory / "data"),
                    "--exec-root", str(self.directory / "exec"), "--pidfile", str(self.directory / "pid"),
                    "--host", self._socket, "--bridge", "none", "--iptables=false", "--ip-forward=false",
                ],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until:
            if subprocess.run(["docker", "version"], env=self.environment, capture_output=True).returncode == 0:
                return
            time.sleep(0.2)
        raise EngineCannotRunError("\n".join(log.read_text(errors="replace").splitlines()[-5:]))

    def run(self, *command: str, timeout_s: float = 300, cwd: Path = ROOT, **env: str) -> str:
        """Run a command of docker's and return its stdout."""
        done = subprocess.run(
            command, env=self.environment | env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def inspect(self, *names: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("docker", "inspect", *names))
        return found

    def stop(self) -> None:
        """End it and all that runs on it; nothing stays, neither processes nor mounts nor files."""
        if self._process is not None:
            if self._process.poll() is None:
                left = subprocess.run(["docker", "ps", "-aq"], env=self.environment, capture_output=True, text=True)
                if left.stdout.split():
                    subprocess.run(["docker", "rm", "-fv", *left.stdout.split()], env=self.environment, check=False)
                subprocess.run(["docker", "network", "prune", "-f"], env=self.environment, check=False)
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):  # its containerd, if it was killed
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for mount in sorted(_mounts_below(self.directory), reverse=True):
            subprocess.run(["umount", "--lazy", mount], env=self.environment, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def _mounts_below(directory: Path) -> Iterable[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{directory}/")]


class Compose:
    """The repository's docker-compose.yml, brought up from a copy of the tree."""

    def __init__(self, engine: DockerEngine, tree: Path, **variables: str) -> None:
        self.engine = engine
        self.tree = tree
        self._variables = variables

    def __call__(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run docker-compose and return its stdout."""
        return self.engine.run(
            "docker-compose", "--ansi", "never", *arguments, cwd=self.tree, timeout_s=timeout_s, **self._variables
        )

    def ask(self, *arguments: str, service: str = "dispatcher") -> Any:
        """Run `orchestrator ... --json` in a service and return what it answers."""
        return json.loads(self("exec", "-T", service, "orchestrator", *arguments, "--json"))

    def containers(self, *services: str) -> list[dict[str, Any]]:
        """Return what is known of the containers of services, of all if none is named, running or not."""
        ids = self("ps", "-aq", *services).split()
        return self.engine.inspect(*ids) if ids else []

    def container(self, service: str) -> dict[str, Any]:
        (found,) = self.containers(service)
        return found

    def wait_healthy(self, *services: str, timeout_s: float = 180) -> None:
        """Wait until the health checks of services are content; a container that is done has none."""

        def states() -> list[str]:
            found = self.containers(*services)
            return [f"{one['Name']}: {_health(one)}" for one in found if _health(one) not in ("healthy", "done")]

        wait_until(lambda: not states(), f"all is healthy: {states()}\n{self.logs()}", timeout_s)

    def logs(self) -> str:
        return self("logs", "--no-color", "--tail", "15")[-6000:]


def _health(container: dict[str, Any]) -> str:
    state = container["State"]
    if state["Status"] == "exited" and state["ExitCode"] == 0:
        return "done"
    return str(state.get("Health", {}).get("Status", state["Status"]))
