"""Slots: what each child of a worker is running, in memory that it shares with its parent.

The parent maps the memory before it forks its children; child number i writes slot i, the parent reads all. A sequence
number that is odd while a slot is written keeps the parent from reading half of it. When a child has died its slot
still says what it ran.

The sequence number also names what a child runs: no two links or items in a slot ever have the same. What else is said
about one ends with its number, is written front to back and read back to front: what is there by half, or about what
ran before, is not taken for it. Child and parent write to different places.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_HEADER = 64
_SLOT = 1024
_NUMBER = struct.Struct("<Q")
#: sequence, pid, fence, attempt, tries, index, when the unit began, when the item began (monotonic), lengths of run
#: and unit
_WORK = struct.Struct("<QqqqqqddHH")
#: By the child, while the user's function is called: its deadline, and what is called.
_CALL, _CALL_AT = struct.Struct("<dQ"), 72
#: By the child: what an interrupt has reached.
_HEEDED_AT = 88
#: By the parent: why something is to stop, and what.
_INTERRUPT, _INTERRUPT_AT = struct.Struct("<QQ"), 96
#: By the parent: exit code (negative: the signal), whether memory was short, and the pid of the child that has ended.
_EXIT, _EXIT_AT = struct.Struct("<qQQ"), 112
_TEXT_AT = 136


class Stop(IntEnum):
    """Why a step is stopped."""

    TIMEOUT = 1
    CANCEL = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What a child is running. `index` is -1 for a link; times are of `time.monotonic`.

    `deadline` is when the user's function is to be stopped, 0.0 while none is called; `is_heeded`: it was interrupted.
    An empty unit: the child asks the ledger for what to run in this run, and may have been given something already.
    """

    sequence: int
    pid: int
    fence: int
    attempt: int
    tries: int
    index: int
    unit_since: float
    since: float
    run: str
    unit: str
    deadline: float
    is_heeded: bool

    @property
    def step(self) -> str:
        return self.unit.partition("/")[0]

    @property
    def slot(self) -> str:
        return self.step if self.index < 0 else f"{self.step}/{self.index}"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child has ended: its exit code, or the number of the signal that killed it as a negative one."""

    code: int
    is_out_of_memory: bool


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

    @property
    def is_monitored(self) -> bool:
        """Whether somebody watches what the children do (task_events.py)."""
        return self._memory[1] == 1

    @is_monitored.setter
    def is_monitored(self, value: bool) -> None:
        self._memory[1] = value

    # What the child writes

    def write(
        self, slot: int, *, fence: int, attempt: int, tries: int, index: int, run: str, unit: str, unit_since: float
    ) -> None:
        """Note what this process runs from now on. Raises ValueError if a slot has no room for such ids."""
        base = _HEADER + slot * _SLOT
        memory = self._memory
        (sequence,) = _NUMBER.unpack_from(memory, base)
        run_bytes, unit_bytes = run.encode(), unit.encode()
        if _TEXT_AT + len(run_bytes) + len(unit_bytes) > _SLOT:  # behind it is what another child runs
            raise ValueError(f"ids of {len(run_bytes)} and {len(unit_bytes)} bytes are too long")
        _NUMBER.pack_into(memory, base, sequence | 1)
        end = base + _TEXT_AT + len(run_bytes) + len(unit_bytes)
        memory[base + _TEXT_AT : end] = run_bytes + unit_bytes
        _WORK.pack_into(
            memory, base, sequence | 1, os.getpid(), fence, attempt, tries, index, unit_since, time.monotonic(),
            len(run_bytes), len(unit_bytes),
        )  # fmt: skip
        _NUMBER.pack_into(memory, base, (sequence | 1) + 1)

    def clear(self, slot: int) -> None:
        """Note that nothing runs in this slot."""
        base = _HEADER + slot * _SLOT
        (sequence,) = _NUMBER.unpack_from(self._memory, base)
        _WORK.pack_into(self._memory, base, (sequence | 1) + 1, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0)

    def enter(self, slot: int, deadline: float) -> int:
        """Note that the user's function is called for what was written last; returns the number of that."""
        base = _HEADER + slot * _SLOT
        number: int = _NUMBER.unpack_from(self._memory, base)[0]
        _CALL.pack_into(self._memory, base + _CALL_AT, deadline, number)
        return number

    def leave(self, slot: int) -> None:
        """Note that the user's function has returned."""
        _CALL.pack_into(self._memory, _HEADER + slot * _SLOT + _CALL_AT, 0.0, 0)

    def interrupt_of(self, slot: int, number: int) -> Stop | None:
        """Return why the parent wants what has this number to stop; None if it does not."""
        said = self._said(slot, _INTERRUPT, _INTERRUPT_AT, number)
        return None if said is None else Stop(said[0])

    def heed(self, slot: int, number: int) -> None:
        """Note that an interrupt has reached what has this number: no further signal is wanted."""
        _NUMBER.pack_into(self._memory, _HEADER + slot * _SLOT + _HEEDED_AT, number)

    # What the parent writes

    def interrupt(self, slot: int, number: int, reason: Stop) -> None:
        """Have what has this number stopped; a signal then makes the child look."""
        _INTERRUPT.pack_into(self._memory, _HEADER + slot * _SLOT + _INTERRUPT_AT, reason, number)

    def note_exit(self, slot: int, pid: int, exit_: Exit) -> None:
        """Note how the child `pid`, which ran in this slot, has ended."""
        _EXIT.pack_into(self._memory, _HEADER + slot * _SLOT + _EXIT_AT, exit_.code, exit_.is_out_of_memory, pid)

    # What both read

    def exit_of(self, slot: int, pid: int) -> Exit | None:
        """Return how the child `pid`, which ran in this slot, has ended; None if that is not known (yet)."""
        said = self._said(slot, _EXIT, _EXIT_AT, pid)
        return None if said is None else Exit(said[0], bool(said[1]))

    def read(self, slot: int) -> Work | None:
        """Return what a child runs; None if nothing, or if it is being written right now."""
        base = _HEADER + slot * _SLOT
        memory = self._memory
        sequence, pid, fence, attempt, tries, index, unit_since, since, run_length, unit_length = _WORK.unpack_from(
            memory, base
        )
        start = base + _TEXT_AT
        text = bytes(memory[start : start + run_length + unit_length])
        call = self._said(slot, _CALL, _CALL_AT, sequence)
        (heeded,) = _NUMBER.unpack_from(memory, base + _HEEDED_AT)
        (again,) = _NUMBER.unpack_from(memory, base)
        if sequence & 1 or again != sequence or pid == 0:
            return None
        return Work(
            sequence, pid, fence, attempt, tries, index, unit_since, since,
            text[:run_length].decode(), text[run_length:].decode(),
            0.0 if call is None else call[0], heeded == sequence,
        )  # fmt: skip

    def _said(self, slot: int, form: struct.Struct, at: int, number: int) -> tuple[Any, ...] | None:
        """Return what is said in one place about what has this number; None if that is about something else."""
        at += _HEADER + slot * _SLOT
        (named,) = _NUMBER.unpack_from(self._memory, at + form.size - _NUMBER.size)
        said = form.unpack_from(self._memory, at)
        return said if named == said[-1] == number else None
