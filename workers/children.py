"""Children: the processes of a worker as their parent sees them: alive, held still, or ended, and how."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool

from workers.slots import Exit, Slots

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


def pool_of(slots: Slots, out_of_memory: OutOfMemory) -> type[Any]:
    """Return a prefork pool that notes in the slots how children have ended, before it replaces them."""

    class NotingPool(AsynPool):  # type: ignore[misc]  # celery has no types
        def process_flush_queues(self, proc: Any) -> None:
            # Called of each child that has ended, between its end being known and its replacement.
            code = proc.exitcode
            if code is not None:
                is_out_of_memory = code == -signal.SIGKILL and out_of_memory.is_likely(time.monotonic())
                slots.note_exit(proc.index, proc.pid, Exit(code, is_out_of_memory))
            super().process_flush_queues(proc)

    class NotingTaskPool(TaskPool):  # type: ignore[misc]  # celery has no types
        Pool = NotingPool

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
