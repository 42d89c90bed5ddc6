"""The gate: who may ask for what; and every change in the audit log.

Without tokens the API is open to this machine alone, and then what a page in somebody's browser may ask for is kept
out: a name that was made to point here (DNS rebinding) by the Host, another site's requests by their Origin. With
tokens every request needs one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio.to_thread import current_default_thread_limiter
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.api.answers import Refusal, problem_of, status_of
from orchestrator.audit import Audit
from orchestrator.engine import Engine, now_ms
from orchestrator.errors import UnavailableError
from orchestrator.telemetry import get_logger
from orchestrator.tokens import Scope as TokenScope
from orchestrator.tokens import Tokens, is_loopback, stranger_of

log = get_logger(__name__)

#: Who asks without a token.
LOOPBACK = "loopback"
_KEPT_OUT = {
    "host": "without tokens only requests to localhost are answered, and not those that name another host; make a "
    "token with `orchestrator tokens create`",
    "proxy": "without tokens no requests by a proxy are answered; make a token with `orchestrator tokens create`",
    "site": "without tokens no requests of other sites are answered",
}
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_ABOUT_CHARACTERS = 500
_ABOUT_ELEMENTS = 100
#: More requests than this do not wait for a thread: a ledger that hangs is not to let them pile up.
_WAITING = 200

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: the name of a token, or `loopback`; and for what that is good."""

    name: str
    scope: TokenScope
    address: str


class Gate:
    """ASGI middleware that lets pass who may ask at all; `scope["state"]["caller"]` says then who it is."""

    def __init__(self, app: ASGIApp, *, engine: Engine) -> None:
        self._app = app
        self._tokens = Tokens(engine.ledger)
        self._is_local = is_loopback(engine.settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def sending(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            if current_default_thread_limiter().statistics().tasks_waiting > _WAITING:
                raise Refusal(
                    503, "there are more requests than can be answered; try again", headers={"Retry-After": "1"}
                )
            caller = await run_in_threadpool(self._caller, Headers(scope=scope), scope.get("client"))
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, sending)
        except Exception as exc:
            if has_begun:
                raise
            await problem_of(exc)(scope, receive, send)

    def _caller(self, headers: Headers, client: Any) -> Caller:
        address = str(client[0]) if client else ""
        kind, _, token = headers.get("authorization", "").partition(" ")
        has_tokens, found = self._tokens.check(token.strip() if kind.lower() == "bearer" else "", now_ms())
        if found is not None:
            return Caller(name=found.name, scope=found.scope, address=address)
        if has_tokens or not self._is_local or not is_loopback(address) or "authorization" in headers:
            raise Refusal(
                401,
                "give a token that is valid, as `Authorization: Bearer TOKEN`; `orchestrator tokens create` makes one",
                headers={"WWW-Authenticate": 'Bearer realm="orchestrator"'},
            )
        self._keep_browsers_out(headers)
        return Caller(name=LOOPBACK, scope=TokenScope.ADMIN, address=address)

    @staticmethod
    def _keep_browsers_out(headers: Headers) -> None:
        fetch_site = headers.get("sec-fetch-site", "none")
        kind = stranger_of(headers.getlist("host"), headers.getlist("origin"), fetch_site, headers)
        if kind:
            raise Refusal(403, _KEPT_OUT[kind])


def needs(scope: TokenScope) -> Callable[[_Function], _Function]:
    """Say which scope an endpoint asks for. Without it: `read` for what only reads, `admin` for all else."""

    def mark(function: _Function) -> _Function:
        function.scope = scope  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(slots=True)
class Entry:
    """What the audit log says of a request that changes something."""

    audit: Audit
    fields: dict[str, Any]
    id: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def note(self, **about: Any) -> None:
        """Write down what is asked for, before it is done. No inputs and no data of events: ids, names, numbers."""
        self.about |= {name: _short(value) for name, value in about.items() if value not in (None, [], "")}
        self.audit.complete(self.id, self.fields | {"about": self.about})

    def add(self, **about: Any) -> None:
        """Have it say more when the outcome is written down."""
        self.about |= {name: _short(value) for name, value in about.items()}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(element) for element in value[:_ABOUT_ELEMENTS]]
    return value[:_ABOUT_CHARACTERS] if isinstance(value, str) else value


class Route(APIRoute):
    """A route that asks for its scope, and puts what may change something into the audit log."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()
        is_read = set(self.methods or ()) <= _READS
        default = TokenScope.READ if is_read else TokenScope.ADMIN
        wanted: TokenScope = getattr(self.endpoint, "scope", default)

        async def handle(request: Request) -> Response:
            caller: Caller = request.scope["state"]["caller"]
            if not caller.scope.covers(wanted):
                raise Refusal(
                    403,
                    f"the token {caller.name!r} has the scope {caller.scope}, and this needs {wanted}",
                    headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{wanted}"'},
                )
            if is_read:
                return await handler(request)
            fields = {
                "who": caller.name,
                "address": caller.address,
                "action": self.name,
                "target": _short("/".join(request.path_params.values())) or None,
                "status": None,
            }
            audit: Audit = request.app.state.audit
            entry = Entry(audit, fields)
            # What cannot be written down is not done.
            entry.id = await run_in_threadpool(audit.begin, fields | {"about": {}}, now_ms())
            request.state.entry = entry
            try:
                response = await handler(request)
            except Exception as exc:
                await run_in_threadpool(_complete, entry, status_of(exc))
                raise
            await run_in_threadpool(_complete, entry, response.status_code)
            return response

        return handle


def _complete(entry: Entry, status: int) -> None:
    try:
        entry.audit.complete(entry.id, entry.fields | {"status": status, "about": entry.about})
    except UnavailableError as exc:  # it is there, without an outcome; what was done was done
        log.warning("audit_not_completed", entry=entry.id, error=str(exc))
