"""Capture: what a step prints and logs, kept per attempt, bounded, with secrets masked.

Each thread that runs a step has its own text (a context variable); threads that a step starts, which have none, write
to that of the one step which runs in this process. In a pool of threads, where several do, nobody can tell whose they
are. What is written outside a step goes where it always went, and so does the output of programs that a step starts.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

from orchestrator.telemetry import MACHINERY, get_logger, message_of

log = get_logger(__name__)

_current: ContextVar[Captured | None] = ContextVar("captured", default=None)
_latest: list[Captured] = []
#: Whether this thread has written to a captured stream; what tells of a handler that does so.
_thread = threading.local()

_FORMATTER = logging.Formatter("%(levelname)s %(name)s: %(message)s")
#: A line of a secret that is shorter than this is masked with the others of it only.
_LINE_CHARACTERS = 8
#: Secrets that steps of this process have read: a thread that one has left may write to the text of the next. Not the
#: short ones, which are in many texts by chance.
_of_process: set[str] = set()


def _captured() -> Captured | None:
    found = _current.get()
    if found is None and len(_latest) == 1:
        with suppress(IndexError):  # it has just ended, in its thread
            found = _latest[0]
    return found


class Captured:
    """The text of one attempt. `limit` bounds its length in characters; what comes later is counted and left out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[str] = []
        self._length = 0
        self._left_out = 0
        self._lock = threading.Lock()
        self._secrets = _longest_first(_of_process)
        self.is_dirty = False

    def hide(self, secret: str) -> None:
        """Mask a secret that the step has read, from now on; also as it stands in JSON, in a repr and in a URL."""
        lines = [line for line in secret.splitlines() if len(line.strip()) >= _LINE_CHARACTERS]
        forms = {form for text in (secret, *lines) for form in _forms(text)}
        self._secrets = _longest_first({*self._secrets, *forms} - {""})
        _of_process.update(form for form in forms if len(form) >= _LINE_CHARACTERS)

    def write(self, text: str) -> None:
        with self._lock:
            room = self._limit - self._length
            if room > 0:
                self._parts.append(text[:room])
            self._length += min(len(text), max(room, 0))
            self._left_out += len(text) - min(len(text), max(room, 0))
            self.is_dirty = True

    def text(self) -> str:
        """Return the text so far, masked, with a last line that says how much was left out, if any."""
        with self._lock:
            self.is_dirty = False
            if not self._parts and not self._left_out:
                return ""
            text = "".join(self._parts)
            left_out = self._left_out
        text = self.mask(text)
        if left_out:  # the limit may have cut a secret in two
            cut = (text.endswith(secret[:n]) and n for secret in self._secrets for n in range(len(secret) - 1, 0, -1))
            text = text[: len(text) - max((n for n in cut if n), default=0)]
        if left_out:
            text += f"\n[{left_out} more characters were not kept]\n"
        return text.encode("utf-8", "replace").decode()

    def mask(self, text: str) -> str:
        """Return `text` without the secrets that the step has read."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def __enter__(self) -> Captured:
        self._token = _current.set(self)
        _latest.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        _latest.remove(self)


def _longest_first(texts: set[str]) -> list[str]:
    return sorted(texts, key=len, reverse=True)


def _forms(text: str) -> Iterator[str]:
    yield text
    yield repr(text)[1:-1]
    for is_ascii in (True, False):
        yield json.dumps(text, ensure_ascii=is_ascii)[1:-1]
    for safe in ("/", ""):
        yield quote(text, safe=safe, errors="replace")
    yield quote_plus(text, errors="replace")


class _Stream(io.TextIOBase):
    def __init__(self, outside: TextIO) -> None:
        self._outside = outside

    def write(self, text: str) -> int:
        captured = _captured()
        if captured is None:
            return self._outside.write(text)
        captured.write(text)
        _thread.has_written = True
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


def _hook(hand_on: Callable[[logging.Logger, logging.LogRecord], None]) -> Any:
    """Capture each record that is handed to the handlers, unless one of them has written it to a captured stream."""

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        captured = _captured()
        if captured is None or record.name.partition(".")[0] in MACHINERY:
            hand_on(logger, record)
            return
        before, _thread.has_written = getattr(_thread, "has_written", False), False
        try:
            hand_on(logger, record)
        finally:
            if not _thread.has_written:
                captured.write(_format(record))
            _thread.has_written = before

    return call_handlers


def _format(record: logging.LogRecord) -> str:
    # Not the record itself: a formatter keeps what it has made of it there, for others to find.
    text = logging.makeLogRecord({**vars(record), "msg": message_of(record), "args": None})
    return _FORMATTER.format(text) + "\n"


def install() -> None:
    """Send stdout, stderr and log records through here; once per process, and before a user's module is imported.

    What that module makes of them when it is imported, such as a handler that keeps `sys.stderr`, then leads here too.
    """
    sys.stdout = _Stream(sys.stdout)
    sys.stderr = _Stream(sys.stderr)
    logging.Logger.callHandlers = _hook(logging.Logger.callHandlers)  # type: ignore[method-assign]
    logging.getLogger().setLevel(logging.INFO)


class Flusher:
    """Keeps the text of an attempt that goes on for longer than a moment, once a second, so that it can be watched."""

    def __init__(self) -> None:
        self._watched: tuple[Captured, Callable[[str], None], float] | None = None
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, captured: Captured, keep: Callable[[str], None]) -> None:
        """Look after this text from now on: give it to `keep` when there is more of it."""
        self._watched = (captured, keep, time.monotonic())
        if self._thread is None or not self._thread.is_alive():  # a step may have left it no memory
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
