"""The gateway: webhooks and the API on one address, health and metrics on another.

    host:port                 /hooks/{path}  triggers/webhook.py
                              all else       orchestrator.api
    health_host:health_port   orchestrator.api (health)

Ports that are 0 are taken free and kept over restarts in `gateway.json` of the data directory, where others find the
addresses. Two processes share nothing, so that there may be several of the gateway behind a balancer.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from orchestrator.asgi import Asgi, Receive, Scope, Send, problem, reply
from orchestrator.cli.http_server import HttpServer
from orchestrator.engine import Engine
from orchestrator.errors import AlreadyRunningError, SettingsError, UnavailableError
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from orchestrator.telemetry import get_logger
from orchestrator.workflows import Workflow
from triggers.run_ends import RunEnds
from triggers.webhook import HOOKS, Hooks

log = get_logger(__name__)

#: In the data directory: where the gateway listens.
STATE = "gateway.json"
_BACKLOG = 1024
_ASK_AGAIN_S = 5.0
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
    gateway = _listen("", settings.host, settings.port, kept.get("url", ""))
    try:
        health = _listen("health_", settings.health_host, settings.health_port, kept.get("health_url", ""))
    except BaseException:
        gateway.close()
        raise
    found = Listeners(
        gateway=gateway,
        health=health,
        url=_url(settings.host, gateway),
        health_url=_url(settings.health_host, health),
    )
    draft = settings.data_dir / f"{STATE}.tmp"
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"url": found.url, "health_url": found.health_url}))
        draft.replace(settings.data_dir / STATE)
    except OSError as exc:
        found.close()
        raise UnavailableError(
            f"cannot write to the data directory {settings.data_dir}: {exc.strerror}; "
            "free space, fix its permissions, or choose another with --data-dir"
        ) from exc
    return found


def addresses(data_dir: Path) -> dict[str, str]:
    """Return `url` and `health_url` of the gateway of a data directory, running or not; empty if it never had one."""
    try:
        state = json.loads((data_dir / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _listen(which: str, host: str, port: int, kept: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tries = [port] if port else [urlsplit(kept).port or 0, 0]
    for number in tries:
        try:
            return socket.create_server((host, number), family=family, backlog=_BACKLOG)
        except OSError as exc:
            if not port and number:
                continue
            if exc.errno == errno.EADDRINUSE:
                raise AlreadyRunningError(
                    f"port {port} on {host} is in use; stop what listens there, or set {which}port to another"
                ) from exc
            raise SettingsError(
                f"cannot listen on {host} port {port}: {exc.strerror}; set {which}host and {which}port to others"
            ) from exc
    raise AssertionError  # port 0 is always tried


def _url(host: str, listener: socket.socket) -> str:
    reachable = _ANYWHERE.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{listener.getsockname()[1]}"


class Gateway:
    """Webhooks, API, health and metrics, as a part of the control process that follows the definitions.

    Making one binds its addresses: raises as `listen` does, and SettingsError if what would be open is not protected.
    """

    def __init__(self, engine: Engine) -> None:
        check_exposure(engine)
        listeners = listen(engine.settings)
        self.url = listeners.url
        self.health_url = listeners.health_url
        # One that waits for no server: who delivers would wait as long.
        self._impatient = Engine(engine.settings, app=engine.app, patience_s=0.0, timeout_s=1.0)
        self._hooks = Hooks(
            publish=engine.bus.publish,
            known=_Known(self._impatient),
            ends=RunEnds(self._impatient.ledger),
            payloads=engine.payloads,
            secrets=engine.settings.secrets,
        )
        self._servers = (
            HttpServer("health", _health(engine), listeners.health),
            HttpServer("gateway", _by_path({HOOKS: self._hooks}, _api(engine)), listeners.gateway),
        )

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force for the requests that come from now on."""
        self._hooks.apply(workflows)

    def start(self) -> None:
        """Begin; returns when requests are answered."""
        self._hooks.start()
        for server in self._servers:
            server.start()
        log.info("gateway_listens", url=self.url, health_url=self.health_url)

    def stop(self) -> None:
        """End; returns when what is in work is answered."""
        for server in reversed(self._servers):
            server.stop()
        self._hooks.stop()
        self._impatient.ledger.client.close()


class _Known:
    """Asks the ledger which events it has dealt with; of a ledger that is away nothing is known, for a while."""

    def __init__(self, engine: Engine) -> None:
        self._client = engine.ledger.client
        self._ask_at = 0.0

    def __call__(self, events: Sequence[Event]) -> list[bool]:
        if time.monotonic() < self._ask_at:
            return [False] * len(events)
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for event in events:
                    pipe.exists(keys.seen_key(event.key))
                return [bool(found) for found in pipe.execute()]
        except (redis.RedisError, OSError):
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
            return [False] * len(events)


def _by_path(apps: dict[str, Asgi], otherwise: Asgi) -> Asgi:
    """Return the application that hands requests to others by the beginning of their path."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        found = next((app for start, app in apps.items() if path.startswith(start)), otherwise)
        await found(scope, receive, send)

    return app


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await reply(send, problem(404, "there is nothing at this address"))


def check_exposure(engine: Engine) -> None:
    """Raise SettingsError if the API would be open to others than this machine without a token."""
    check, tokens = _found("orchestrator.api", "check_exposure"), _found("orchestrator.tokens", "Tokens")
    if check is not None and tokens is not None:
        check(engine.settings, tokens(engine.ledger))


def _api(engine: Engine) -> Asgi:
    make_app = _found("orchestrator.api", "make_app")
    return _nothing if make_app is None else make_app(engine)


def _health(engine: Engine) -> Asgi:
    make_health = _found("orchestrator.api", "make_health")
    return _nothing if make_health is None else make_health(engine)


def _found(module: str, name: str) -> Any:
    """Return what a module has by a name; None as long as there is no such module."""
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError as exc:
        if exc.name != module:
            raise
        return None
