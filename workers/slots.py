"""Slots: what each child of a worker is running, in memory that its parent shares.

A file is mapped by the parent before it starts children, and by each child; child number i writes slot i, the parent
reads all. A sequence number that is odd while a slot is written keeps the parent from reading half of it. When a child
has died its slot still says what it ran.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_HEADER = 64
_SLOT = 1024
#: sequence, pid, fence, attempt, index, when the unit began, when the item began (monotonic), lengths of run and unit
_FORMAT = struct.Struct("<QqqqqddHH")
_SEQUENCE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Work:
    """What a child is running. `index` is -1 for a link; times are of `time.monotonic`."""

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
    """The mapped file. The parent makes it (`create`) and unlinks it (`close`); children open it (`open`)."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _HEADER + _SLOT * count)

    @classmethod
    def create(cls, count: int) -> Slots:
        """Make the file for `count` children."""
        descriptor, name = tempfile.mkstemp(prefix="orchestrator-slots-")
        os.ftruncate(descriptor, _HEADER + _SLOT * count)
        os.close(descriptor)
        return cls(Path(name), count)

    def close(self) -> None:
        """Unmap and remove the file; the parent's last act."""
        self._memory.close()
        self.path.unlink(missing_ok=True)

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
