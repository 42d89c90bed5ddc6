"""Usage: what an attempt took: time on the clock and of processors, the most memory that it had, its wait before.

Linux keeps the peak of a process's memory and lets it be set back (proc(5), clear_refs: 5), which makes it the peak of
an attempt. Elsewhere it is that of the process so far. Programs that a step has started and waited for count with their
processor time, not with their memory. In a pool of threads nobody can tell whose memory it is.

An attempt whose process is to be killed is measured by its parent, from what Linux tells of a process.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.counters import Counters
from orchestrator.counters import field as counter

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one attempt took; seconds, and bytes at the peak (None: not known)."""

    wall_s: float
    cpu_s: float
    memory: int | None
    queued_s: float

    @property
    def gb_s(self) -> float:
        """GB-seconds: the peak for as long as it took."""
        return (self.memory or 0) / 10**9 * self.wall_s

    def tail(self) -> str:
        """Return it as a JSON member for the record of the attempt, with a leading comma."""
        memory = "null" if self.memory is None else self.memory
        return (
            f',"usage":{{"wall_s":{self.wall_s:.4f},"cpu_s":{self.cpu_s:.4f},"memory":{memory},'
            f'"queued_s":{self.queued_s:.4f}}}'
        )

    def totals(self) -> tuple[int, int, int]:
        """Return what is added up: microseconds on the clock and of processors, and megabyte-milliseconds."""
        return round(self.wall_s * 1e6), round(self.cpu_s * 1e6), round(self.gb_s * 1e6)

    def count(self, counters: Counters, *, workflow: str, pool: str) -> None:
        """Add it to the metrics."""
        counters.observe("step_seconds", self.wall_s, pool=pool)
        counters.add(counter("cpu_seconds", workflow=workflow, pool=pool), self.cpu_s)
        counters.add(counter("gb_seconds", workflow=workflow, pool=pool), self.gb_s)


class Meter:
    """Measures one attempt after the other, in a process that runs one at a time, or in one thread of several."""

    def __init__(self) -> None:
        self._is_thread = threading.current_thread() is not threading.main_thread()
        self._clear = None if self._is_thread else _open_clear_refs()
        self._cpu_s, self._since, self._queued_s = 0.0, 0.0, 0.0

    def start(self, queued_s: float) -> float:
        """Begin, with what has waited for so long; returns the CPU seconds that were used before."""
        if self._clear is not None:
            with suppress(OSError):
                os.pwrite(self._clear, b"5", 0)
        self._queued_s = max(0.0, queued_s)
        self._cpu_s, self._since = self._cpu()[0], time.monotonic()
        return self._cpu_s

    def stop(self) -> Usage:
        """Return what was taken since the start."""
        cpu_s, peak = self._cpu()
        return Usage(
            wall_s=time.monotonic() - self._since,
            cpu_s=max(0.0, cpu_s - self._cpu_s),
            memory=None if self._is_thread else peak,
            queued_s=self._queued_s,
        )

    def _cpu(self) -> tuple[float, int]:
        if self._is_thread:
            return time.thread_time(), 0
        own = resource.getrusage(resource.RUSAGE_SELF)
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime, own.ru_maxrss * _RSS_UNIT


def usage_of(pid: int, since: float, base: tuple[float, float] | None) -> Usage:
    """Return what the attempt that the process `pid` runs has taken; `base` is as of Slots.base_of."""
    before_s, queued_s = base or (0.0, 0.0)
    cpu_s, memory = 0.0, None
    with suppress(OSError, ValueError, IndexError):  # it is gone, or this is not Linux
        # Behind the name, which may hold anything, comes field 3; 14 to 17 are its time, and that of its children.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        cpu_s = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        memory = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return Usage(
        wall_s=max(0.0, time.monotonic() - since),
        cpu_s=max(0.0, cpu_s - before_s) if base else 0.0,
        memory=memory,
        queued_s=queued_s,
    )


def _open_clear_refs() -> int | None:
    try:
        return os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # not Linux, or not allowed here
        return None
