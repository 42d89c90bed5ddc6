"""The monitor: Flower on our Celery application, in this process; and workers tell of steps as long as it runs.

Without a password it is open to this machine alone, and what a page in somebody's browser may ask for is kept out, as
the gateway does. What Flower can ask of workers and does not fit ours is refused, with a word on what to do instead.
"""

from __future__ import annotations

import hmac
import logging
import os
import signal
import socket
import threading
from base64 import b64decode
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.web import RequestHandler

from orchestrator.cli.addresses import listen_as_monitor, url_of
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.health_file import HealthFile
from orchestrator.remote_control import REFUSED
from orchestrator.service import Service
from orchestrator.settings import Settings, mask_url
from orchestrator.telemetry import Outage, configure_logging, get_logger
from orchestrator.tokens import stranger_of

log = get_logger(__name__)

#: How often it says that somebody watches.
_SAY_S = 5.0
#: How many steps Flower keeps in memory (about 7 KB each), and how long it shows workers that are gone.
_STEPS = 20_000
_GONE_WORKERS_S = 300
_READS = ("GET", "HEAD", "OPTIONS")
#: What is asked for by POST and answered: a revoke, and the list of steps, which changes nothing.
_POSTS = ("/api/task/revoke/", "/tasks/datatable")
_START = "steps are started by their runs; start one with `orchestrator run`"
#: Addresses of Flower's that would change something, by their beginning, and why that is refused.
_REFUSED = {
    "/api/worker/shutdown/": REFUSED["shutdown"],
    "/api/worker/pool/restart/": REFUSED["pool_restart"],
    "/api/worker/pool/autoscale/": REFUSED["autoscale"],
    "/api/worker/pool/": REFUSED["pool_grow"],
    "/api/worker/queue/": REFUSED["add_consumer"],
    "/api/task/timeout/": REFUSED["time_limit"],
    "/api/task/rate-limit/": REFUSED["rate_limit"],
    "/api/task/apply/": _START,
    "/api/task/async-apply/": _START,
    "/api/task/send-task/": _START,
    "/api/task/abort/": "revoke it instead",
}
_KEPT_OUT = {
    "host": "without a password only requests to localhost are answered; set monitor_auth",
    "proxy": "without a password no requests by a proxy are answered; set monitor_auth",
    "site": "without a password no requests of other sites are answered",
}


def run_monitor(settings: Settings, *, up_pid: int | None = None) -> int:
    """Run Flower until SIGTERM or SIGINT, or until `up`, if it has one, is gone; returns the exit code.

    Raises SettingsError for an address or a password that will not do, AlreadyRunningError for a port in use.
    """
    listener, password = listen_as_monitor(settings), settings.read_monitor_auth()
    configure_logging(role="monitor")
    # Of each request that is refused; and Flower's of each worker that does not answer.
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
    engine = Engine(settings, patience_s=0.0)
    presence = Service("presence", _Presence(engine).loop)
    try:
        flower = _flower(engine, password, listener)
        log.info("monitor_listens", url=url_of(settings.monitor_host, listener))
        presence.start()
        _serve(flower, up_pid, HealthFile(settings.health_file))
    finally:
        presence.stop()
        engine.close()
        listener.close()
    return 0


class _Presence:
    """Says that somebody watches, so that workers tell of steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outage = Outage(log, "monitor")

    def loop(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self._engine.pools.monitor()
                self._outage.ends()
            except UnavailableError as exc:
                self._outage.begins(exc)
            stopping.wait(_SAY_S)


def _flower(engine: Engine, password: str, listener: socket.socket) -> Any:
    """Return Flower, listening. It reads the options of a module of its, and one variable of the environment."""
    os.environ["FLOWER_UNAUTHENTICATED_API"] = "false" if password else "true"
    from flower.app import Flower
    from flower.options import options
    from flower.urls import settings as flower_settings

    class Guarded(Flower):  # type: ignore[misc]  # flower has no types
        """Flower behind the guard. It knows kinds of brokers by their URL, and not that of our transport."""

        broker_uri = mask_url(engine.settings.broker_url)
        broker_uri_with_password = engine.settings.broker_url

        def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
            refused = refusal(request, password)
            if refused is None:
                return super().find_handler(request, **kwargs)
            status, why = refused
            return self.get_handler_delegate(request, _Refused, {"status": status, "why": why})

    options.basic_auth = [password] if password else []
    # Workers learn from the ledger that somebody watches.
    options.enable_events = False
    options.max_tasks = _STEPS
    options.purge_offline_workers = _GONE_WORKERS_S
    flower = Guarded(options=options, capp=engine.app, **flower_settings)
    listener.setblocking(False)
    HTTPServer(flower).add_socket(listener)
    return flower


class _Refused(RequestHandler):  # type: ignore[misc]  # tornado is left out of the types
    """Answers a request that does not come to Flower."""

    def initialize(self, status: int, why: str) -> None:
        self._why = why
        self.set_status(status)
        if status == 401:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')

    def prepare(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(self._why + "\n")

    def check_xsrf_cookie(self) -> None:
        """Nothing: it is refused anyhow."""


def refusal(request: HTTPServerRequest, password: str) -> tuple[int, str] | None:
    """Return (status, reason) if a request is not for Flower to answer."""
    headers = request.headers
    if password:
        # Flower asks for it, but not where it tells of all workers and steps by name.
        if request.path == "/metrics" and not _is_known(headers.get("Authorization", ""), password):
            return 401, "give the user and the password of monitor_auth"
    else:
        named = {name.lower() for name in headers}
        kind = stranger_of(
            headers.get_list("Host"), headers.get_list("Origin"), headers.get("Sec-Fetch-Site", "none"), named
        )
        if kind:
            return 403, _KEPT_OUT[kind]
    if request.method not in _READS and not request.path.startswith(_POSTS):
        why = next((why for start, why in _REFUSED.items() if request.path.startswith(start)), "nothing to change here")
        return 403, f"not in Flower: {why}"
    return None


def _is_known(authorization: str, password: str) -> bool:
    kind, _, text = authorization.partition(" ")
    try:
        given = b64decode(text, validate=True)
    except ValueError:
        return False
    return kind == "Basic" and hmac.compare_digest(given, password.encode())


def _serve(flower: Any, up_pid: int | None, health: HealthFile) -> None:
    loop = IOLoop.current()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(flower.stop))

    def look() -> None:
        health.touch()
        if up_pid is not None and os.getppid() != up_pid:
            log.warning("up_is_gone")
            flower.stop()

    PeriodicCallback(look, 1000).start()
    flower.start()
