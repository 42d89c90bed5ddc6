"""Children: the processes of a worker as their parent sees them: alive, held still, or ended, and how."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from celery.concurrency.asynpool import AsynPool, Worker
from celery.concurrency.prefork import TaskPool

from workers.slots import Exit, Slots

#: What whoever stops a worker may send to all its processes (a terminal, systemd), not to the parent alone.
_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OOM_KILLS = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)
#: A kill for want of memory and the end of a child belong together if no more than this lies between them.
_OOM_S = 2.0
#: How long to wait for a process to stop: it does so at once, unless it is deep in the kernel.
_STILL_S = 0.02


class OutOfMemory:
    """The machine's count of processes that it has killed for want of memory, if it tells (Linux)."""

    def __init__(self) -> None:
        self._count = _oom_kills()
        self._rose_at = float("-inf")

    def look(self, now: float) -> None:
        """Note whether there were more; called often, so that `is_likely` knows when."""
        count = _oom_kills()
        if count > self._count:
            self._count, self._rose_at = count, now

    def is_likely(self, now: float) -> bool:
        """Tell whether a process was killed for want of memory a moment ago."""
        self.look(now)
        return now - self._rose_at < _OOM_S


def _oom_kills() -> int:
    try:
        found = _OOM_KILLS.search(Path("/proc/vmstat").read_bytes())
    except OSError:
        return 0
    return 0 if found is None else int(found[1])


class _Child(Worker):  # type: ignore[misc]  # celery has no types
    """A child that its parent ends, and nobody else: billiard would raise SystemExit in the step, which then fails."""

    def on_loop_start(self, pid: int) -> None:
        def on_stop(number: int, _frame: object) -> None:
            if os.getpid() != pid:  # a process that a step has forked
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        for number in _STOPS:
            signal.signal(number, on_stop)
        hold, go_on = partial(_mask, signal.SIG_BLOCK), partial(_mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=hold, after_in_parent=go_on, after_in_child=_end_as_others_do)
        super().on_loop_start(pid)


def _mask(how: int) -> None:
    signal.pthread_sigmask(how, _STOPS)


def _end_as_others_do() -> None:
    """Let what a step has forked be ended by a signal at once, also by one that came while it was forked.

    A handler of Python's runs between two of its instructions, and forgets in a fork what it was told: who waits in C
    for a lock that nobody releases, as the workers of a multiprocessing.Pool do that is being terminated, would never
    come to it.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    _mask(signal.SIG_UNBLOCK)


def pool_of(slots: Slots, out_of_memory: OutOfMemory) -> type[Any]:
    """Return a prefork pool that notes in the slots how children have ended, before it replaces them."""

    class NotingPool(AsynPool):  # type: ignore[misc]  # celery has no types
        Worker = _Child

        def terminate_job(self, pid: int, _signal: int | None = None) -> None:
            super().terminate_job(pid, signal.SIGKILL)

        def process_flush_queues(self, proc: Any) -> None:
            # Called of each child that has ended, between its end being known and its replacement.
            code = proc.exitcode
            if code is not None:
                is_out_of_memory = code == -signal.SIGKILL and out_of_memory.is_likely(time.monotonic())
                slots.note_exit(proc.index, proc.pid, Exit(code, is_out_of_memory))
            super().process_flush_queues(proc)

    class NotingTaskPool(TaskPool):  # type: ignore[misc]  # celery has no types
        Pool = NotingPool

        def on_terminate(self) -> None:
            # Celery would send them SIGTERM, and wait.
            for child in [] if self._pool is None else self._pool._pool:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            super().on_terminate()

    return NotingTaskPool


def describe(exit_: Exit | None) -> str:
    """Say for a person how a child has ended."""
    if exit_ is None:
        return "its process is gone"
    if exit_.code >= 0:
        return f"exit code {exit_.code}"
    try:
        name = signal.Signals(-exit_.code).name
    except ValueError:
        name = f"signal {-exit_.code}"
    return f"killed by {name}" + (" (out of memory?)" if exit_.is_out_of_memory else "")


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and that its parent has not asked about yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return _state(pid) not in ("Z", "X")


def hold(pid: int) -> bool:
    """Stop a process (SIGSTOP); True if it stands still, False if that takes longer than a moment, or it is gone."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    until = time.monotonic() + _STILL_S
    while (state := _state(pid)) not in ("T", "t"):
        if state in ("Z", "X"):
            return False
        if time.monotonic() > until:
            return not state  # where it is not told, that moment has to do
        time.sleep(0.0005)
    return True


def let_go(pid: int) -> None:
    """Let a process that is held go on."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def _state(pid: int) -> str:
    """Return the letter of the state of a process, as ps has it; X if it is gone, empty where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X" if Path("/proc/self/stat").exists() else ""
