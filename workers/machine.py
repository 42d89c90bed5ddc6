"""The machine that a worker runs on: its cores, memory and GPUs, and how many processes of a pool it has room for.

In a container that is what the container is given (cgroup limits), not what is built in.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import SettingsError
from orchestrator.pools import PoolSettings, size_text

#: No limit of memory is written as a number near 2**63 by the first version of cgroups.
_NO_LIMIT = 2**60
_MEMORY = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there; bytes of memory, names of GPUs as CUDA_VISIBLE_DEVICES has them."""

    cores: float
    memory: int
    memory_available: int
    gpus: tuple[str, ...]

    @classmethod
    def look(cls) -> Machine:
        """Look at this machine."""
        memory, available = _memory()
        return cls(_cores(), memory, available, visible_gpus(os.environ))

    def ceiling(self, name: str, pool: PoolSettings, concurrency: int | None = None, *, is_declared: bool) -> int:
        """Return how many processes one worker of a pool may have here at most.

        A `concurrency` that was asked for goes before what a pool that nobody declared has by default. Raises
        SettingsError, which says what there is too little of, if there is no room for one.
        """
        asked = min(concurrency or pool.concurrency, pool.maximum) if is_declared or not concurrency else concurrency
        room, what = min([(asked, ""), *self._bounds(pool)], key=lambda bound: bound[0])
        if room < 1:
            raise SettingsError(
                f"pool {name}: {what}; start its workers on a larger machine, or lower {what.partition(':')[0]} in "
                f"[pools.{name}]"
            )
        return room

    def workers(self, pool: PoolSettings) -> int:
        """Return for how many workers of a pool there is room; one at least, which can say what there is too little of.

        More of them would have no process.
        """
        room = min((room for room, _ in self._bounds(pool)), default=None)
        return sys.maxsize if room is None else max(1, math.ceil(room / min(pool.concurrency, pool.maximum)))

    def _bounds(self, pool: PoolSettings) -> list[tuple[int, str]]:
        """Return for how many processes of a pool there is enough of each thing, and what there is too little of."""
        bounds = []
        if pool.memory:
            has, wants = f"{size_text(self.memory // 10**6 * 10**6)} of memory", size_text(pool.memory)
            bounds.append(
                (self.memory // pool.memory, f"memory: each process wants {wants}, and this machine has {has}")
            )
        if pool.cpu:
            has = f"{self.cores:g} core{'s' * (self.cores != 1)}"
            bounds.append(
                (
                    math.floor(self.cores / pool.cpu + 1e-9),
                    f"cpu: each process wants {pool.cpu:g} cores, and this machine has {has}",
                )
            )
        if pool.gpu:
            has, s = str(len(self.gpus) or "none"), "s" * (pool.gpu != 1)
            bounds.append(
                (len(self.gpus) // pool.gpu, f"gpu: each process wants {pool.gpu} GPU{s}, and this machine has {has}")
            )
        return bounds


def gpus_of(slot: int, count: int, gpus: tuple[str, ...]) -> str:
    """Return the CUDA_VISIBLE_DEVICES of the process in a slot that is given `count` GPUs."""
    return ",".join(gpus[slot * count : (slot + 1) * count])


def visible_gpus(environ: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """Return the GPUs that a process here may use."""
    said = environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        try:
            return tuple(map(str, range(sum(1 for _ in driver.iterdir()))))
        except OSError:
            return ()
    names = [name.strip() for name in said.split(",")]
    # CUDA takes those before the first that is none.
    none = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return tuple(names[:none])


def _memory() -> tuple[int, int]:
    """Return the bytes of memory that there are and that are free to be used."""
    try:
        found = {name: int(kilobytes) * 1024 for name, kilobytes in _MEMORY.findall(Path("/proc/meminfo").read_text())}
        total, available = found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total
    for folder, limit, used in (
        *((folder, "memory.max", "memory.current") for folder in _cgroups("")),
        *((folder, "memory.limit_in_bytes", "memory.usage_in_bytes") for folder in _cgroups("memory")),
    ):
        most = _number(folder / limit)
        if most is not None and most < _NO_LIMIT:
            total = min(total, most)
            available = min(available, max(0, most - (_number(folder / used) or 0)))
    return total, available


def _cores() -> float:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroups(""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, int(quota) / int(period))
    for folder in _cgroups("cpu"):
        microseconds, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if microseconds is not None and microseconds > 0 and period_us:
            cores = min(cores, microseconds / period_us)
    return cores


def _cgroups(controller: str) -> Iterator[Path]:
    """Go through the groups that this process is in, from the innermost; "" stands for the second version's."""
    root = Path("/sys/fs/cgroup") / controller
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = root / path.lstrip("/")
            while folder != root:
                yield folder
                folder = folder.parent
    yield root  # in a container, whose own group that is


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
