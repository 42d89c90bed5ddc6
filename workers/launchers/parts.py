"""A process that is started, watched, started again and stopped; what `up` and the process launcher are made of."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from orchestrator.errors import OrchestratorError, one_line

#: Pause before a part that died is started again: the first, doubled each time that it dies young, and the longest.
_BACKOFF_S = (0.2, 10.0)
#: A part that has lived this long does not die of starting.
STEADY_S = 5.0
_POLL_S = 0.05


@dataclass(slots=True)
class Part:
    """One process and how to start it again."""

    name: str
    command: Sequence[str]
    output: IO[bytes] | None = None
    dies_with_us: bool = False
    #: A file that is open in the process, too: a lock on it holds until both of us are gone.
    shares: IO[str] | None = None
    #: A file that is open in the process, too, and in which it writes why it ends (`last_words`).
    words: IO[bytes] | None = None
    process: subprocess.Popen[bytes] | None = None
    is_draining: bool = False
    backoff_s: float = field(default=_BACKOFF_S[0])
    started: float = 0.0
    start_at: float = 0.0
    #: Why it ended when it was young; empty: it did not, or has lived for a while since.
    fault: str = ""

    def start(self) -> None:
        """Start it; its environment, and unless `output` is given its output, are ours."""
        if self.words is not None:
            os.ftruncate(self.words.fileno(), 0)
            os.lseek(self.words.fileno(), 0, os.SEEK_SET)
        self.process = subprocess.Popen(
            self.command,
            # A Ctrl-C in the terminal is for us alone, who then stop the parts in order.
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            pass_fds=[file.fileno() for file in (self.shares, self.words) if file is not None],
            preexec_fn=_die_with_parent if self.dies_with_us else None,  # who asks for that has one thread
        )
        self.started = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send it a signal, if it is alive."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def tend(self, now: float) -> str:
        """Start it again if it has died, after a pause; answers in one line how it ended when that is news."""
        if self.is_alive:
            if now - self.started > STEADY_S:
                self.backoff_s = _BACKOFF_S[0]
                self.fault = ""
            return ""
        if self.start_at:
            return self.try_start(now) if now >= self.start_at else ""
        assert self.process is not None
        how = f"{self.name} ended ({describe_exit(self.process.returncode)})"
        if now - self.started <= STEADY_S:
            words = last_words(self.words)
            self.fault = f"{how}: {words}" if words else how
        self._pause(now)
        return how

    def try_start(self, now: float) -> str:
        """Start it; where the system has no room for it, later, and answers so in one line."""
        self.start_at = 0.0
        try:
            self.start()
        except OSError as exc:
            self.fault = f"{self.name} cannot be started ({exc.strerror or exc})"
            self._pause(now)
            return self.fault
        return ""

    def _pause(self, now: float) -> None:
        self.start_at = now + self.backoff_s
        self.backoff_s = min(self.backoff_s * 2, _BACKOFF_S[1])

    def reap(self) -> None:
        """Kill it, if it is still there, and let go of what is open for it."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        if self.words is not None:
            self.words.close()


def _die_with_parent() -> None:
    """Have the kernel end a process when its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def describe_exit(code: int) -> str:
    """Return how a process has ended: its exit code, or the signal that killed it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def make_words() -> IO[bytes]:
    """Return a file for the last words of a process; it has no name, and is gone with the processes that hold it."""
    if hasattr(os, "memfd_create"):  # no disk is needed, which may be full
        return os.fdopen(os.memfd_create("last-words"), "w+b")
    return tempfile.TemporaryFile()


@contextmanager
def leave_words(number: int | None) -> Iterator[None]:
    """Have what ends this block said to whoever holds the file with that number, if there is one; and raise it."""
    try:
        yield
    except Exception as exc:
        if number is not None:
            with suppress(OSError):
                text = str(exc) if isinstance(exc, OrchestratorError) else f"{type(exc).__name__}: {exc}"
                os.write(number, text.encode(errors="replace")[:4000])
        raise


def last_words(words: IO[bytes] | None) -> str:
    """Return what a process has said of its end, in one line."""
    if words is None:
        return ""
    return one_line(os.pread(words.fileno(), 4000, 0).decode(errors="replace"))


def wait_for(parts: Sequence[Part], seconds: float, is_hurried: Callable[[], bool] = lambda: False) -> None:
    """Wait until parts have ended, or the time is over, or somebody is in a hurry."""
    until = time.monotonic() + seconds
    while any(part.is_alive for part in parts) and time.monotonic() < until and not is_hurried():
        time.sleep(_POLL_S)
