"""The gateway: webhooks and the API on one address, health and metrics on another.

    host:port                 /hooks/{path}  triggers/webhook.py
                              all else       orchestrator.api
    health_host:health_port   orchestrator.api (health)

Two processes share nothing, so that there may be several of the gateway behind a balancer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import redis

from orchestrator.api import make_app, make_health
from orchestrator.asgi import Asgi, Receive, Scope, Send
from orchestrator.cli.addresses import listen
from orchestrator.cli.http_server import HttpServer
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.telemetry import get_logger
from orchestrator.tokens import Tokens, check_exposure
from orchestrator.workflows import Workflow
from triggers.run_ends import RunEnds
from triggers.webhook import HOOKS, Hooks

log = get_logger(__name__)

_ASK_AGAIN_S = 5.0


class Gateway:
    """Webhooks, API, health and metrics, as a part of the control process that follows the definitions.

    Making one binds its addresses: raises as `listen` does, and SettingsError if what would be open is not protected.
    """

    def __init__(self, engine: Engine) -> None:
        check_exposure(engine.settings, Tokens(engine.ledger))
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
            HttpServer("health", make_health(engine), listeners.health),
            HttpServer("gateway", _by_path({HOOKS: self._hooks}, make_app(engine)), listeners.gateway),
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
        self._hooks.release()
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
