"""Capture: what a step prints and logs, kept per attempt, bounded, with secrets masked.

Each thread that runs a step has its own text (a context variable); threads that a step starts, which have none, write
to that of the step which began last in this process. What is written outside a step goes where it always went, and so
does the output of programs that a step starts.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TextIO

import structlog

log = structlog.get_logger(__name__)

_current: ContextVar[Captured | None] = ContextVar("captured", default=None)
_latest: list[Captured] = []


def _captured() -> Captured | None:
    return _current.get() or (_latest[-1] if _latest else None)


#: Loggers whose lines are about the worker and not about the step.
_OURS = ("celery", "kombu", "amqp", "billiard", "orchestrator", "workers", "redis", "asyncio")


class Captured:
    """The text of one attempt. `limit` bounds its length in characters; what comes later is counted and left out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[str] = []
        self._length = 0
        self._left_out = 0
        self._lock = threading.Lock()
        self.secrets: set[str] = set()
        self.is_dirty = False

    def write(self, text: str) -> None:
        with self._lock:
            room = self._limit - self._length
            self._parts.append(text[:room] if room > 0 else "")
            self._length += min(len(text), max(room, 0))
            self._left_out += len(text) - min(len(text), max(room, 0))
            self.is_dirty = True

    def text(self) -> str:
        """Return the text so far, masked, with a last line that says how much was left out, if any."""
        with self._lock:
            self.is_dirty = False
            if not self._parts:
                return ""
            text = "".join(self._parts)
            left_out = self._left_out
        text = self.mask(text)
        if left_out:
            text += f"\n[{left_out} more characters were not kept]\n"
        return text.encode("utf-8", "replace").decode()

    def mask(self, text: str) -> str:
        """Return `text` without the secrets that the step has read."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def __enter__(self) -> Captured:
        self._token = _current.set(self)
        _latest.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        _latest.remove(self)


class _Stream(io.TextIOBase):
    def __init__(self, outside: TextIO) -> None:
        self._outside = outside

    def write(self, text: str) -> int:
        captured = _captured()
        if captured is None:
            return self._outside.write(text)
        captured.write(text)
        return len(text)

    def flush(self) -> None:
        if _captured() is None:
            self._outside.flush()

    def fileno(self) -> int:
        return self._outside.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    encoding = "utf-8"

    @property
    def buffer(self) -> _Bytes:
        """What writes bytes (`sys.stdout.buffer`) is captured as text too."""
        return _Bytes(self)


class _Bytes(io.RawIOBase):
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        text = bytes(content)
        self._stream.write(text.decode("utf-8", "replace"))
        return len(text)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        captured = _captured()
        if captured is None or record.name.split(".", 1)[0] in _OURS:
            return
        try:
            captured.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 -- as logging.Handler.emit: a bad log call does not fail the step
            self.handleError(record)


def install() -> None:
    """Send this process's stdout, stderr and log lines through here; once per process."""
    if isinstance(sys.stdout, _Stream):
        return
    sys.stdout = _Stream(sys.stdout)
    sys.stderr = _Stream(sys.stderr)
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)


class Flusher:
    """Keeps the text of an attempt that goes on for longer than a moment, once a second, so that it can be watched."""

    def __init__(self) -> None:
        self._watched: tuple[Captured, Callable[[str], None], float] | None = None
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, captured: Captured, keep: Callable[[str], None]) -> None:
        """Look after this text from now on: give it to `keep` when there is more of it."""
        self._watched = (captured, keep, time.monotonic())
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="log-flusher", daemon=True)
            self._thread.start()

    def forget(self) -> None:
        """Look after no text."""
        self._watched = None

    def _loop(self) -> None:
        while not self._changed.wait(1.0):
            watched = self._watched
            if watched is None:
                continue
            captured, keep, since = watched
            if captured.is_dirty and time.monotonic() - since >= 1.0:
                try:
                    keep(captured.text())
                except Exception:  # this loop owns the thread: the text comes with the outcome
                    log.warning("log_not_kept", exc_info=True)
