"""Slots: what a parent sees of its children."""

from __future__ import annotations

import os
import threading

import pytest
from billiard import get_context

from orchestrator.pools import MESSAGE_BOUNDS
from workers.slots import Exit, Slots, Stop, Work

fork_context = get_context("fork")  # as Celery starts its children


def test_what_a_child_writes_the_parent_reads() -> None:
    slots = Slots(2)
    assert slots.read(1) is None
    assert not slots.is_draining
    slots.drain()
    child = fork_context.Process(target=_write_and_die, args=(slots,))
    child.start()
    child.join()
    assert child.exitcode == 0
    work = slots.read(1)
    assert work is not None
    assert (work.pid, work.fence, work.attempt, work.tries, work.index) == (child.pid, 7, 2, 1, -1)
    assert (work.run, work.unit, work.step, work.slot) == ("r", "ünit", "ünit", "ünit")
    slots.clear(1)
    assert slots.read(1) is None
    slots.close()


def _write_and_die(slots: Slots) -> None:
    assert slots.is_draining
    slots.write(1, fence=7, attempt=2, tries=1, index=-1, run="r", unit="ünit", unit_since=1.5)


def note(slots: Slots, index: int = -1, unit: str = "a") -> None:
    slots.write(0, fence=1, attempt=1, tries=1, index=index, run="r", unit=unit, unit_since=0.0)


def read(slots: Slots) -> Work:
    work = slots.read(0)
    assert work is not None
    return work


def test_a_deadline_is_there_while_the_function_is_called_and_only_for_it() -> None:
    slots = Slots(1)
    note(slots)
    assert read(slots).deadline == 0.0
    number = slots.enter(0, 12.5)
    assert (read(slots).deadline, read(slots).sequence) == (12.5, number)
    slots.leave(0)
    assert read(slots).deadline == 0.0
    slots.enter(0, 12.5)
    note(slots)  # what comes next, should the child not get to leave
    assert read(slots).deadline == 0.0
    slots.close()


def test_an_interrupt_is_for_one_item_of_one_run() -> None:
    slots = Slots(1)
    note(slots, 0, "f/0-2")
    first = slots.enter(0, 1.0)
    slots.interrupt(0, first, Stop.TIMEOUT)
    assert slots.interrupt_of(0, first) is Stop.TIMEOUT
    assert not read(slots).is_heeded
    slots.heed(0, first)
    assert read(slots).is_heeded
    slots.leave(0)
    note(slots, 1, "f/0-2")
    second = slots.enter(0, 1.0)
    assert slots.interrupt_of(0, second) is None
    assert not read(slots).is_heeded
    # Another run may have the same fence, the same step and the same process; its number is its own.
    slots.clear(0)
    note(slots, 1, "f/0-2")
    assert slots.interrupt_of(0, slots.enter(0, 1.0)) is None
    slots.interrupt(0, second, Stop.CANCEL)
    assert slots.interrupt_of(0, second) is Stop.CANCEL
    assert slots.interrupt_of(0, first) is None
    slots.close()


def test_how_a_child_has_ended_is_said_of_that_child() -> None:
    slots = Slots(2)
    slots.note_exit(1, 4711, Exit(-9, is_out_of_memory=True))
    assert slots.exit_of(1, 4711) == Exit(-9, is_out_of_memory=True)
    assert slots.exit_of(1, 4712) is None
    assert slots.exit_of(0, 4711) is None
    slots.close()


def test_ids_that_are_too_long_are_not_written_over_what_another_child_runs() -> None:
    slots = Slots(3)
    slots.write(1, fence=1, attempt=1, tries=1, index=-1, run="r", unit="a", unit_since=0.0)
    before = slots.read(1)
    with pytest.raises(ValueError, match="too long"):
        slots.write(0, fence=0, attempt=0, tries=0, index=-1, run="b" * 1000, unit="", unit_since=0.0)
    assert slots.read(1) == before
    slots.close()


def test_a_reader_never_sees_half_of_a_write() -> None:
    slots = Slots(1)
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            n = n % 50 + 1
            slots.write(0, fence=n, attempt=n, tries=n, index=n, run="r" * n, unit="u" * n, unit_since=0.0)
            slots.enter(0, float(n))
            slots.leave(0)

    writer = threading.Thread(target=write)
    writer.start()
    seen = called = 0
    while seen < 3000 or not called:
        work = slots.read(0)
        if work is not None:
            seen += 1
            assert work.fence == work.attempt == work.tries == work.index == len(work.run) == len(work.unit)
            assert work.deadline in (0.0, work.fence)
            called += work.deadline != 0.0
    stop.set()
    writer.join()
    slots.close()


def test_a_parent_reads_how_long_messages_took_also_those_of_a_child_that_has_died() -> None:
    slots = Slots(2)
    slots.begin_message(1)
    assert slots.message_since(1) > 0.0
    slots.end_message(1)
    busy_s, served = slots.served(1)
    assert (slots.message_since(1), sum(served), len(served)) == (0.0, 1, len(MESSAGE_BOUNDS) + 1)
    assert served[0] == 1  # it took less than a millisecond
    slots.begin_message(1)
    slots.forget_message(1)
    assert slots.message_since(1) == 0.0
    assert slots.served(1)[0] > busy_s
    assert slots.served(1)[1] == served
    assert slots.served(0) == (0.0, [0] * len(served))
    slots.close()


def test_who_is_to_leave_is_said_of_one_child_and_not_of_the_next() -> None:
    slots = Slots(1)
    slots.set_leaving(0, 4711)
    assert (slots.is_leaving(0, 4711), slots.is_leaving(0, 4712)) == (True, False)
    slots.set_leaving(0, 0)
    assert not slots.is_leaving(0, 4711)
    slots.spend(0)
    assert slots.is_leaving(0, os.getpid())
    assert slots.is_spent(0, os.getpid())
    assert not slots.is_leaving(0, 4711)
    slots.close()


def test_whether_somebody_watches_is_told_to_all_children() -> None:
    slots = Slots(1)
    assert not slots.is_monitored
    slots.is_monitored = True
    assert slots.is_monitored
    assert not slots.is_draining
    slots.close()


def test_from_where_on_is_measured_is_known_of_what_was_written_last_alone() -> None:
    slots = Slots(1)
    note(slots)
    first = read(slots).sequence
    assert slots.base_of(0, first) is None
    slots.note_base(0, 1.5, 0.25)
    assert slots.base_of(0, first) == (1.5, 0.25)
    note(slots)
    assert slots.base_of(0, read(slots).sequence) is None
    slots.close()
