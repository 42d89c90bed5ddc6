"""The server of the gateway under peers who are slow, large, many, or mean harm: real sockets, a real server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest

from orchestrator.asgi import Receive, Scope, Send, answer, reply
from orchestrator.cli import http_server
from orchestrator.cli.http_server import Connection, HttpServer
from tests.conftest import wait_until


class Served:
    """A server whose application answers with how much it was sent."""

    def __init__(self) -> None:
        self.requests = 0
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self.server = HttpServer("test", self._app, listener)
        self.server.start()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        if scope["path"] == "/refuse":
            await reply(send, answer(413, b"{}"))
        elif scope["path"] == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await send({"type": "http.response.body"})
        elif scope["path"] == "/broken":
            raise RuntimeError("of the application")
        else:
            count, more = 0, True
            while more:
                message = await receive()
                count += len(message.get("body", b""))
                more = message.get("more_body", False)
            await reply(send, answer(200, json.dumps({"bytes": count, "headers": len(scope["headers"])}).encode()))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def ask(self, request: bytes) -> bytes:
        """Send bytes on a connection of its own, and return all that comes until the server closes it."""
        with self.connect() as peer:
            peer.sendall(request)
            return read_all(peer)


def read_all(peer: socket.socket) -> bytes:
    found = b""
    while chunk := peer.recv(65536):
        found += chunk
    return found


def read_one(peer: socket.socket) -> bytes:
    """Read one response of a known length."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += peer.recv(65536)
    head, _, body = found.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += peer.recv(65536)
    return head + body


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with limits that a test can wait for."""
    monkeypatch.setattr(http_server, "HEADERS_S", 0.4)
    monkeypatch.setattr(http_server, "BODY_S", 0.4)
    monkeypatch.setattr(http_server, "_LINGER_S", 0.4)
    monkeypatch.setattr(http_server, "_UNREAD_S", 0.4)
    made = Served()
    yield made
    made.server.stop()


CLOSE = b"Connection: close\r\n\r\n"


def test_requests_are_answered_and_connections_kept(served: Served) -> None:
    with served.connect() as peer:
        for _ in range(3):
            peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            assert b'{"bytes": 3' in read_one(peer)


@pytest.mark.parametrize("begin", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n"])
def test_headers_that_do_not_come_are_not_waited_for(served: Served, begin: bytes) -> None:
    response = served.ask(begin)
    assert status(response) == 408
    assert served.requests == 0


def test_headers_that_trickle_are_not_waited_for_either(served: Served) -> None:
    with served.connect() as peer:
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.02):
                try:
                    peer.sendall(b"X: y\r\n")
                except OSError:
                    return

        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert status(peer.recv(65536)) == 408
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("before", [b"", b"5\r\nhello\r\n"])
def test_a_body_that_does_not_come_is_not_waited_for(served: Served, before: bytes) -> None:
    response = served.ask(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + before)
    assert status(response) == 408
    assert b"connection: close" in response


def test_a_body_that_comes_steadily_may_take_longer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BODY_BYTES_PER_S", 10_000)
    with served.connect() as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n" + CLOSE)
        for _ in range(20):
            peer.sendall(b"x" * 1000)
            time.sleep(0.05)  # the pace of the peer, 20 kB a second: longer than BODY_S in all
        assert b'{"bytes": 20000' in read_all(peer)


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"h%d: x\r\n" % n for n in range(101)),
        b"h: " + b"x" * 40_000 + b"\r\n",
        b"".join(b"h%d: %s\r\n" % (n, b"x" * 900) for n in range(40)),
    ],
)
def test_a_flood_of_headers_is_refused(served: Served, headers: bytes) -> None:
    response = served.ask(b"POST / HTTP/1.1\r\nHost: x\r\n" + headers + CLOSE)
    assert status(response) == 431
    assert served.requests == 0


def test_who_has_no_more_to_send_is_still_answered(served: Served) -> None:
    with served.connect() as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        peer.shutdown(socket.SHUT_WR)
        assert b'{"bytes": 3' in read_all(peer)
    with served.connect() as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab")
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer) == b""


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;ext=",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
)
def test_headers_extensions_and_trailers_without_end_are_not_kept(served: Served, start: bytes) -> None:
    before = psutil.Process().memory_info().rss
    with served.connect() as peer:
        peer.sendall(start)
        with suppress(OSError):
            for _ in range(5_000):  # 300 MB
                peer.sendall(b"x" * 65536)
        assert psutil.Process().memory_info().rss - before < 50_000_000
    connections = served.server._server.server_state.connections
    wait_until(lambda: not connections, "the connection is given up")


def test_a_peer_who_floods_can_read_why_it_was_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_LINGER_S", 5.0)
    with served.connect() as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(100):
            peer.sendall(b"x" * 65536)
        assert status(read_all(peer)) == 431


def test_trailers_are_not_headers(served: Served) -> None:
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    trailers = b"3\r\nabc\r\n0\r\n" + b"X-A: 1\r\n" * 50 + b"\r\n"
    assert b'{"bytes": 3, "headers": 3}' in served.ask(chunked + CLOSE + trailers)


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET  HTTP\r\n\r\n", b"\xff" * 100]
)
def test_what_is_not_http_is_refused(served: Served, junk: bytes) -> None:
    assert status(served.ask(junk)) == 400


def test_an_early_answer_reaches_who_is_still_sending(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is closed with bytes unread is reset, and the answer may be lost with it."""
    monkeypatch.setattr(http_server, "_LINGER_S", 20.0)
    for _ in range(5):
        with served.connect() as peer:
            peer.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n")
            for _ in range(200):
                peer.sendall(b"x" * 100_000)
            response = read_all(peer)
            assert status(response) == 413
            assert b"connection: close" in response


def test_who_asks_before_sending_is_answered_at_once(served: Served) -> None:
    began = time.monotonic()
    response = served.ask(
        b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\nExpect: 100-continue\r\n\r\n"
    )
    assert status(response) == 413
    assert time.monotonic() - began < http_server._LINGER_S


def test_the_connection_is_kept_if_little_was_left_unread(served: Served) -> None:
    with served.connect() as peer:
        for _ in range(2):
            peer.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            response = read_one(peer)
            assert status(response) == 413
            assert b"connection: close" not in response


def test_who_reads_nothing_is_let_go(served: Served) -> None:
    with served.connect() as peer:
        peer.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        connections = served.server._server.server_state.connections
        wait_until(lambda: connections, "the connection is there")
        wait_until(lambda: not connections, "the connection is given up")


def test_connections_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEADERS_S", 20.0)
    monkeypatch.setattr(Connection, "_maximum", 5)
    idle = [served.connect() for _ in range(5)]
    connections = served.server._server.server_state.connections
    wait_until(lambda: len(connections) == 5, "all are there")
    response = served.ask(b"")
    assert status(response) == 503
    assert b"retry-after: 1" in response
    for peer in idle:
        peer.close()
    wait_until(lambda: not connections, "all have gone")
    assert status(served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + CLOSE)) == 200


def test_slow_clients_do_not_hold_up_others(served: Served) -> None:
    idle = [served.connect() for _ in range(100)]
    for peer in idle:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    assert status(served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + CLOSE)) == 200
    for peer in idle:
        peer.close()


def test_a_fault_of_the_application_is_an_answer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    assert status(served.ask(b"GET /broken HTTP/1.1\r\nHost: x\r\n" + CLOSE)) == 500
    assert status(served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + CLOSE)) == 200


def test_an_upgrade_is_not_followed(served: Served) -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    assert status(served.ask(upgrade + b"Sec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n")) in (200, 400)


def test_requests_that_do_not_wait_for_answers_are_few(served: Served) -> None:
    """Each that waits takes memory."""
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with served.connect() as peer:
        peer.sendall(request * 5)
        found = b""
        while found.count(b"HTTP/1.1 200") < 5:
            found += peer.recv(65536)
    served.requests = 0
    with served.connect() as peer, suppress(OSError):
        peer.sendall(request * 5000)
        read_all(peer)
    assert served.requests < 50
    assert status(served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + CLOSE)) == 200


def test_stop_lets_what_is_in_work_be_answered() -> None:
    release: list[Callable[[], object]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        held = asyncio.Event()
        release.append(lambda: loop.call_soon_threadsafe(held.set))
        loop = asyncio.get_running_loop()
        await held.wait()
        await reply(send, answer(200, b"{}"))

    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer("test", app, listener)
    server.start()
    with socket.create_connection(listener.getsockname(), timeout=20) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: release, "the request is in work")
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        release[0]()
        assert status(read_all(peer)) == 200
        stopper.join(timeout=10)
    server.stop()
