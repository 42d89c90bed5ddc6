"""Surroundings: what a step changes of its process and leaves so is put back, for the step that comes next."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Signals that a process gets from others, or from a clock that a step has set.
_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM, signal.SIGPIPE, signal.SIGCHLD,
)  # fmt: skip


@contextmanager
def restored() -> Iterator[None]:
    """Put back, after this block, what a script of one's own may well leave changed. For the main thread.

    That is the current directory, the umask, the limit of recursion, the standard streams, and how signals are dealt
    with. A clock that was set (`signal.alarm`) would go off in another step.
    """
    folder: Path | None = None
    with suppress(OSError):  # it may be gone
        folder = Path.cwd()
    umask = os.umask(0o077)
    os.umask(umask)
    recursion = sys.getrecursionlimit()
    streams = sys.stdin, sys.stdout, sys.stderr
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        sys.setrecursionlimit(recursion)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.stdin, sys.stdout, sys.stderr = streams
        os.umask(umask)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)
