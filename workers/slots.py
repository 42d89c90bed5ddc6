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
from bisect import bisect_left
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from orchestrator.pools import MESSAGE_BOUNDS

_HEADER = 64
_SLOT = 1280
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
#: By the child: seconds of processors that it had used when it began what runs, and for how long that had waited.
_BASE, _BASE_AT = struct.Struct("<ddQ"), 136
#: The ids of what runs.
_TEXT_AT, _TEXT_END = 160, 1024
#: By the child: when its message began (monotonic; 0.0: it has none), and the pid of one that has done its number of
#: steps. Over all children that this slot has had: seconds for which messages were in work, and how many ended in each
#: bucket of MESSAGE_BOUNDS, and one beyond.
_SINCE, _SINCE_AT = struct.Struct("<d"), 1024
_SPENT_AT = 1032
_SERVED, _SERVED_AT = struct.Struct(f"<d{len(MESSAGE_BOUNDS) + 1}Q"), 1040
#: By the parent: the pid of a child that is to leave.
_LEAVING_AT = 1272


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
        """Whether somebody watches, and the children shall send events of what they do."""
        return self._memory[1] == 1

    @is_monitored.setter
    def is_monitored(self, value: bool) -> None:
        self._memory[1] = int(value)

    # What the child writes

    def write(
        self, slot: int, *, fence: int, attempt: int, tries: int, index: int, run: str, unit: str, unit_since: float
    ) -> None:
        """Note what this process runs from now on. Raises ValueError if a slot has no room for such ids."""
        base = _HEADER + slot * _SLOT
        memory = self._memory
        (sequence,) = _NUMBER.unpack_from(memory, base)
        run_bytes, unit_bytes = run.encode(), unit.encode()
        if _TEXT_AT + len(run_bytes) + len(unit_bytes) > _TEXT_END:  # behind it is something else
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

    def note_base(self, slot: int, cpu_s: float, queued_s: float) -> None:
        """Note from where on what was written last is measured (usage.py)."""
        base = _HEADER + slot * _SLOT
        _BASE.pack_into(self._memory, base + _BASE_AT, cpu_s, queued_s, _NUMBER.unpack_from(self._memory, base)[0])

    def interrupt_of(self, slot: int, number: int) -> Stop | None:
        """Return why the parent wants what has this number to stop; None if it does not."""
        said = self._said(slot, _INTERRUPT, _INTERRUPT_AT, number)
        return None if said is None else Stop(said[0])

    def heed(self, slot: int, number: int) -> None:
        """Note that an interrupt has reached what has this number: no further signal is wanted."""
        _NUMBER.pack_into(self._memory, _HEADER + slot * _SLOT + _HEEDED_AT, number)

    def begin_message(self, slot: int) -> None:
        """Note that this process has a message from now on."""
        _SINCE.pack_into(self._memory, _HEADER + slot * _SLOT + _SINCE_AT, time.monotonic())

    def end_message(self, slot: int) -> None:
        """Note that this process is done with its message, and how long that took."""
        base = _HEADER + slot * _SLOT
        seconds = time.monotonic() - _SINCE.unpack_from(self._memory, base + _SINCE_AT)[0]
        busy_s, *served = _SERVED.unpack_from(self._memory, base + _SERVED_AT)
        served[bisect_left(MESSAGE_BOUNDS, seconds)] += 1
        _SERVED.pack_into(self._memory, base + _SERVED_AT, busy_s + seconds, *served)
        _SINCE.pack_into(self._memory, base + _SINCE_AT, 0.0)

    def spend(self, slot: int) -> None:
        """Note that this process has done its number of steps, and is to be replaced."""
        _NUMBER.pack_into(self._memory, _HEADER + slot * _SLOT + _SPENT_AT, os.getpid())

    # What the parent writes

    def set_leaving(self, slot: int, pid: int) -> None:
        """Have the child `pid` begin nothing further after what it runs; 0: nobody (any more)."""
        _NUMBER.pack_into(self._memory, _HEADER + slot * _SLOT + _LEAVING_AT, pid)

    def forget_message(self, slot: int) -> None:
        """Note that nobody has a message in this slot any more, done or not. The time that it took is kept."""
        base = _HEADER + slot * _SLOT
        (since,) = _SINCE.unpack_from(self._memory, base + _SINCE_AT)
        if since:
            (busy_s,) = _SINCE.unpack_from(self._memory, base + _SERVED_AT)
            _SINCE.pack_into(self._memory, base + _SERVED_AT, busy_s + time.monotonic() - since)
            _SINCE.pack_into(self._memory, base + _SINCE_AT, 0.0)

    def interrupt(self, slot: int, number: int, reason: Stop) -> None:
        """Have what has this number stopped; a signal then makes the child look."""
        _INTERRUPT.pack_into(self._memory, _HEADER + slot * _SLOT + _INTERRUPT_AT, reason, number)

    def note_exit(self, slot: int, pid: int, exit_: Exit) -> None:
        """Note how the child `pid`, which ran in this slot, has ended."""
        _EXIT.pack_into(self._memory, _HEADER + slot * _SLOT + _EXIT_AT, exit_.code, exit_.is_out_of_memory, pid)

    # What both read

    def is_leaving(self, slot: int, pid: int) -> bool:
        """Whether the child `pid` is to begin nothing further."""
        base = _HEADER + slot * _SLOT
        leaving, spent = (_NUMBER.unpack_from(self._memory, base + at)[0] for at in (_LEAVING_AT, _SPENT_AT))
        return pid in (leaving, spent)

    def is_spent(self, slot: int, pid: int) -> bool:
        """Whether the child `pid` has done its number of steps."""
        return bool(_NUMBER.unpack_from(self._memory, _HEADER + slot * _SLOT + _SPENT_AT)[0] == pid)

    def message_since(self, slot: int) -> float:
        """Return when the message that is in work in this slot began (monotonic); 0.0 if there is none."""
        return float(_SINCE.unpack_from(self._memory, _HEADER + slot * _SLOT + _SINCE_AT)[0])

    def served(self, slot: int) -> tuple[float, list[int]]:
        """Return for how many seconds messages were in work here, and how many ended in each bucket, ever."""
        busy_s, *served = _SERVED.unpack_from(self._memory, _HEADER + slot * _SLOT + _SERVED_AT)
        return busy_s, served

    def exit_of(self, slot: int, pid: int) -> Exit | None:
        """Return how the child `pid`, which ran in this slot, has ended; None if that is not known (yet)."""
        said = self._said(slot, _EXIT, _EXIT_AT, pid)
        return None if said is None else Exit(said[0], bool(said[1]))

    def base_of(self, slot: int, number: int) -> tuple[float, float] | None:
        """Return from where on what has this number is measured: (CPU seconds until then, its wait); None: unknown."""
        said = self._said(slot, _BASE, _BASE_AT, number)
        return None if said is None else (said[0], said[1])

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
