"""Where the gateway listens: claimed before anything else, and written down for others to find.

Ports that are 0 are taken free and kept over restarts in `gateway.json` of the data directory, with the addresses of
the gateway that was started last. The first that was taken is kept: a second gateway leaves it to the first.
"""

from __future__ import annotations

import errno
import json
import socket
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import AlreadyRunningError, SettingsError, UnavailableError
from orchestrator.settings import Settings
from orchestrator.tokens import is_loopback

#: In the data directory: where the gateway listens.
STATE = "gateway.json"
_BACKLOG = 1024
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- not bound to here


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """The sockets of a gateway, and their addresses as another process on this machine uses them."""

    gateway: socket.socket
    health: socket.socket
    url: str
    health_url: str

    def close(self) -> None:
        self.gateway.close()
        self.health.close()


def listen(settings: Settings) -> Listeners:
    """Listen on the addresses of the settings, and write them down.

    Raises AlreadyRunningError if a port that was asked for is in use, SettingsError for an address that is not of this
    machine, UnavailableError if the data directory cannot be written.
    """
    kept = addresses(settings.data_dir)
    gateway = listen_on("", settings.host, settings.port, kept.get("port", ""))
    try:
        health = listen_on("health_", settings.health_host, settings.health_port, kept.get("health_port", ""))
    except BaseException:
        gateway.close()
        raise
    found = Listeners(
        gateway=gateway,
        health=health,
        url=url_of(settings.host, gateway),
        health_url=url_of(settings.health_host, health),
    )
    draft = settings.data_dir / f"{STATE}.tmp"
    state = {"url": found.url, "health_url": found.health_url}
    for name, port, listener in (("port", settings.port, gateway), ("health_port", settings.health_port, health)):
        if name in kept or not port:
            state[name] = kept.get(name) or str(listener.getsockname()[1])
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(state))
        draft.replace(settings.data_dir / STATE)
    except OSError as exc:
        found.close()
        raise UnavailableError(
            f"cannot write to the data directory {settings.data_dir}: {exc.strerror}; "
            "free space, fix its permissions, or choose another with --data-dir"
        ) from exc
    return found


def listen_as_monitor(settings: Settings) -> socket.socket:
    """Listen on the address of the monitor; raises as `listen`, and SettingsError if others could use it unasked."""
    if not settings.read_monitor_auth() and not is_loopback(settings.monitor_host):
        raise SettingsError(
            f"monitor_host {settings.monitor_host} is not this machine alone, and there is no password: anybody could "
            "cancel steps; set monitor_auth to env:NAME or file:PATH of `user:password`"
        )
    return listen_on("monitor_", settings.monitor_host, settings.monitor_port)


def addresses(data_dir: Path) -> dict[str, str]:
    """Return `url` and `health_url` of the gateway of a data directory, running or not; empty if it never had one.

    And `port` and `health_port`, as text, if they were taken free.
    """
    try:
        state = json.loads((data_dir / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return {name: str(url) for name, url in state.items()} if isinstance(state, dict) else {}


def listen_on(which: str, host: str, port: int, kept: str = "") -> socket.socket:
    """Listen on an address, whose settings are `{which}host` and `{which}port`; raises as `listen`.

    Port 0 is that of `kept`, the one before, or a free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tries = [port] if port else [int(kept) if kept.isdigit() and int(kept) < 65536 else 0, 0]
    for number in tries:
        try:
            return socket.create_server((host, number), family=family, backlog=_BACKLOG)
        except (OSError, UnicodeError) as exc:
            if not port and number:
                continue
            if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
                raise AlreadyRunningError(
                    f"port {port} on {host} is in use; stop what listens there, or set {which}port to another"
                ) from exc
            why = exc.strerror if isinstance(exc, OSError) else "it is no address"
            raise SettingsError(
                f"cannot listen on {host} port {port}: {why}; set {which}host and {which}port to others"
            ) from exc
    raise AssertionError  # port 0 is always tried


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL of what listens there, as another process on this machine uses it."""
    reachable = _ANYWHERE.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{listener.getsockname()[1]}"
