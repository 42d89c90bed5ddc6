"""Surroundings: what a step changes of its process and leaves so is put back, for the step that comes next."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

#: Signals that a process gets from others, or from a clock that a step has set.
_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM, signal.SIGPIPE,
    signal.SIGCHLD,
)  # fmt: skip


class Surroundings:
    """The process as it is when this is made, in its main thread: what a script of one's own may well leave changed.

    The current directory, the umask, the limit of recursion, the standard streams, and how signals are dealt with. A
    clock that was set (`signal.alarm`) would go off in another step.
    """

    def __init__(self) -> None:
        self._folder = Path.cwd()
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._recursion = sys.getrecursionlimit()
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore(self) -> None:
        """Put everything back."""
        sys.setrecursionlimit(self._recursion)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        os.umask(self._umask)
        with suppress(OSError):  # it may be gone
            os.chdir(self._folder)
