"""HttpServer: an ASGI application on uvicorn, in a thread of its own, with bounds on what a peer may cost.

uvicorn trusts its peers: it waits without end for headers and bodies, and keeps headers of any size. So:

    Connection   how many there are (503), how long and how large headers may be (408, 431), how long nobody reads
    _Bounded     how slowly a body may come (408), and an answer to who has not yet sent all of it is not lost
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.asgi import Asgi, Message, Receive, Scope, Send, problem, reply
from orchestrator.errors import UnavailableError
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

#: Of a request, before its body.
HEADER_BYTES = 32 * 1024
HEADER_COUNT = 100
HEADERS_S = 10.0
#: A body may take this long, and longer as long as it comes at this rate.
BODY_S = 10.0
BODY_BYTES_PER_S = 16 * 1024
#: Connections at a time, unless the process may not have that many files.
CONNECTIONS = 1000
#: Requests that may come on a connection before the first is answered.
_PIPELINED = 16
#: How long a peer may leave what we have sent unread.
_UNREAD_S = 30.0
#: What is still read of a body that nobody wants, for its sender to get the answer: else the connection is reset.
_LINGER_S = 10.0
_LINGER_BYTES = 64 * 1024 * 1024
_SMALL_BYTES = 64 * 1024
_START_S = 10.0
_STOP_S = 5


_CLOSE = (b"connection", b"close")


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    detail = f"the headers are larger than {HEADER_BYTES} bytes, or more than {HEADER_COUNT}"
    await reply(send, problem(431, detail, _CLOSE))


def _connection_limit() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, max(8, files // 2))


class Connection(HttpToolsProtocol):
    """One connection of a peer who may be slow, or mean harm."""

    _maximum = _connection_limit()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._ends = False
        self._awaits_headers = True
        self._since_progress = 0
        self._header_bytes = 0
        self._unread: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = self.loop.call_later(HEADERS_S, self._give_up)
        if len(self.connections) > self._maximum:
            self._end(503, "there are too many connections; try again", b"retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self._unset_keepalive_if_required()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a peer who has sent a request, and nothing more to come, until it is answered."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        if self._ends or self.transport.is_closing():
            return
        if self._awaits_headers and self._slow is None:
            self._slow = self.loop.call_later(HEADERS_S, self._give_up)
        self._since_progress += len(data)
        super().data_received(data)
        if self._since_progress > 2 * HEADER_BYTES:
            # Of headers, of chunks' extensions, of trailers: no callback tells of these before they are whole.
            self._end(431, f"the headers are larger than {HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if not self._awaits_headers:
            return  # a trailer
        if len(self.headers) <= HEADER_COUNT and self._header_bytes <= HEADER_BYTES:
            super().on_header(name, value)
        else:
            self._header_bytes = HEADER_BYTES + 1

    def on_headers_complete(self) -> None:
        self._awaits_headers = False
        self._since_progress = 0
        self._in_time()
        app = self.app
        if self._header_bytes > HEADER_BYTES:
            self.app = _too_large
        try:
            super().on_headers_complete()
        finally:
            self.app = app
        if len(self.pipeline) > _PIPELINED:
            raise ValueError("requests before answers")  # which the parser makes a 400 of

    def on_body(self, body: bytes) -> None:
        self._since_progress = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._awaits_headers = True
        self._since_progress = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _in_time(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self._end(408, f"the headers did not come within {HEADERS_S:g} s")

    def send_400_response(self, msg: str) -> None:
        self._end(400, "this is not HTTP as it is spoken here")

    def _end(self, status: int, detail: str, more: bytes = b"") -> None:
        """Answer, unless an answer is under way, and close; a peer who is still sending may read the answer first."""
        if self._ends or self.transport.is_closing():
            return
        self._ends = True
        self._in_time()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
            return
        _, message = problem(status, detail)
        phrase = HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/problem+json\r\n" % (status, phrase)
        length = b"content-length: %d\r\nconnection: close\r\n" % len(message["body"])
        self.transport.write(b"".join([head, length, more, b"\r\n", message["body"]]))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


class _SlowBodyError(Exception):
    """The body of a request does not come."""


class _Bounded:
    """An application whose requests come in time, and whose answers arrive also before a request has come whole."""

    def __init__(self, app: Asgi, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nobody serves WebSockets here
            return
        body = _Body(scope, receive, self._clock)
        has_started = False

        async def respond(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if not body.is_read and not await body.discard_small():
                    message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
                await send(message)
            elif body.is_read or message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await body.discard()
                await send({"type": "http.response.body", "body": b""})

        try:
            await self._app(scope, body.receive, respond)
        except _SlowBodyError:
            if not has_started:
                detail = f"the body did not come at {BODY_BYTES_PER_S} bytes a second"
                await reply(send, problem(408, detail, _CLOSE))


class _Body:
    """The body of one request."""

    def __init__(self, scope: Scope, receive: Receive, clock: Callable[[], float]) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        self.is_read = b"transfer-encoding" not in headers and (length is None or length == b"0")
        self._length = int(length) if length is not None and length.isdigit() else None
        self._asks_first = headers.get(b"expect", b"").lower() == b"100-continue"
        self._receive = receive
        self._clock = clock
        self._began = clock()
        self._bytes = 0

    async def receive(self) -> Message:
        if self.is_read:
            return await self._receive()
        until = self._began + BODY_S + self._bytes / BODY_BYTES_PER_S
        try:
            async with asyncio.timeout(max(0.0, until - self._clock())):
                message = await self._receive()
        except TimeoutError:
            raise _SlowBodyError from None
        self._bytes += len(message.get("body", b""))
        self.is_read = not message.get("more_body", False)
        self._asks_first = False
        return message

    async def discard_small(self) -> bool:
        """Read on, so that the connection can be kept, if there is not much; answers whether all has been read."""
        if self._asks_first or self._length is None or self._length > _SMALL_BYTES:
            return False
        await self._drain(_LINGER_S)
        return self.is_read

    async def discard(self) -> None:
        """Read on for a while, for a peer who reads only when all is sent, or would lose the answer to a reset."""
        if not self._asks_first:  # else the peer waits for the answer before it sends anything
            await self._drain(_LINGER_S)

    async def _drain(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not self.is_read and self._bytes < _LINGER_BYTES:
                    await self.receive()
        except (TimeoutError, _SlowBodyError):
            return


class HttpServer:
    """Serves an application on a socket that listens, from `start` to `stop`; both are idempotent."""

    def __init__(self, name: str, app: Asgi, listener: socket.socket) -> None:
        self._name = name
        self._listener = listener
        self._thread: threading.Thread | None = None
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else any stranger writes lines of our log
        self._server = uvicorn.Server(
            uvicorn.Config(
                _Bounded(app),
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_STOP_S,
            )
        )

    def start(self) -> None:
        """Begin; returns when requests are answered. Raises UnavailableError."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        until = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise UnavailableError(f"the {self._name} server did not start; see the log for its reason")
            time.sleep(0.005)

    def stop(self) -> None:
        """End; returns when what is in work is answered, or after a while."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=_STOP_S + 2)
            self._thread = None
        self._listener.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except Exception:
            log.exception("server_ended", server=self._name)
