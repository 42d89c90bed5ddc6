"""Slots: what each child of a worker is running, in memory that it shares with its parent.

The parent maps the memory before it forks its children; child number i writes slot i, the parent reads all. A sequence
number that is odd while a slot is written keeps the parent from reading half of it. When a child has died its slot
still says what it ran.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

_HEADER = 64
_SLOT = 1024
#: sequence, pid, fence, attempt, index, when the unit began, when the item began (monotonic), lengths of run and unit
_FORMAT = struct.Struct("<QqqqqddHH")
_SEQUENCE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Work:
    """What a child is running. `index` is -1 for a link; times are of `time.monotonic`.

    An empty unit: the child asks the ledger for what to run in this run, and may have been given something already.
    """

    sequence: int
    pid: int
    fence: int
    attempt: int
    index: int
    unit_since: float
    since: float
    run: str
    unit: str


class Slots:
    """The memory for `count` children; anonymous, so that nothing is left of it when the processes are gone."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, _HEADER + _SLOT * count)  # shared with what is forked from here

    def close(self) -> None:
        """Unmap it; the parent's last act."""
        self._memory.close()

    @property
    def is_draining(self) -> bool:
        """Whether the children shall begin nothing further."""
        return self._memory[0] == 1

    def drain(self) -> None:
        """Tell the children to begin nothing further."""
        self._memory[0] = 1

    def write(self, slot: int, *, fence: int, attempt: int, index: int, run: str, unit: str, unit_since: float) -> None:
        """Note what this process runs from now on."""
        base = _HEADER + slot * _SLOT
        memory = self._memory
        (sequence,) = _SEQUENCE.unpack_from(memory, base)
        run_bytes, unit_bytes = run.encode(), unit.encode()
        _SEQUENCE.pack_into(memory, base, sequence | 1)
        end = base + _FORMAT.size + len(run_bytes) + len(unit_bytes)
        memory[base + _FORMAT.size : end] = run_bytes + unit_bytes
        _FORMAT.pack_into(
            memory, base, sequence | 1, os.getpid(), fence, attempt, index, unit_since, time.monotonic(),
            len(run_bytes), len(unit_bytes),
        )  # fmt: skip
        _SEQUENCE.pack_into(memory, base, (sequence | 1) + 1)

    def clear(self, slot: int) -> None:
        """Note that nothing runs in this slot."""
        base = _HEADER + slot * _SLOT
        (sequence,) = _SEQUENCE.unpack_from(self._memory, base)
        _FORMAT.pack_into(self._memory, base, (sequence | 1) + 1, 0, 0, 0, 0, 0.0, 0.0, 0, 0)

    def read(self, slot: int) -> Work | None:
        """Return what a child runs; None if nothing, or if it is being written right now."""
        base = _HEADER + slot * _SLOT
        sequence, pid, fence, attempt, index, unit_since, since, run_length, unit_length = _FORMAT.unpack_from(
            self._memory, base
        )
        start = base + _FORMAT.size
        text = bytes(self._memory[start : start + run_length + unit_length])
        (again,) = _SEQUENCE.unpack_from(self._memory, base)
        if sequence & 1 or again != sequence or pid == 0:
            return None
        return Work(
            sequence, pid, fence, attempt, index, unit_since, since,
            text[:run_length].decode(), text[run_length:].decode(),
        )  # fmt: skip
