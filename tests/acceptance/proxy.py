"""A TCP proxy that a test puts before a server, to take the network away from whoever goes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Forwards connections to the server of `url`; its own `url` differs in the port alone."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        login, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{self._listener.getsockname()[1]}"))
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._start(self._accept)

    def cut(self) -> None:
        """Let nothing through: nobody is told, what is sent stays on the way, new connections are never answered."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Let everything through again, what was on the way first."""
        self._is_whole.set()

    def break_connections(self) -> None:
        """Close every connection; new ones are forwarded."""
        with self._lock:
            for end in self._sockets:
                _shut(end)
            self._sockets.clear()

    def stop(self) -> None:
        """Close everything."""
        _shut(self._listener)
        self._listener.close()
        self.break_connections()
        self.mend()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._forward, near)

    def _forward(self, near: socket.socket) -> None:
        self._is_whole.wait()
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        with self._lock:
            self._sockets |= {near, far}
        back = self._start(self._pump, far, near)
        self._pump(near, far)
        back.join()
        with self._lock:
            self._sockets -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                self._is_whole.wait()
                sink.sendall(content)
        self._is_whole.wait()
        _shut(source)
        _shut(sink)

    @staticmethod
    def _start(target: object, *arguments: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name="proxy", daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
