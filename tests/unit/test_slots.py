"""Slots: what a parent sees of its children."""

from __future__ import annotations

import threading

from billiard import get_context

from workers.slots import Slots

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
    assert (work.pid, work.fence, work.attempt, work.index, work.run, work.unit) == (child.pid, 7, 2, -1, "r", "ünit")
    slots.clear(1)
    assert slots.read(1) is None
    slots.close()


def _write_and_die(slots: Slots) -> None:
    assert slots.is_draining
    slots.write(1, fence=7, attempt=2, index=-1, run="r", unit="ünit", unit_since=1.5)


def test_a_reader_never_sees_half_of_a_write() -> None:
    slots = Slots(1)
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            n = n % 50 + 1
            slots.write(0, fence=n, attempt=n, index=n, run="r" * n, unit="u" * n, unit_since=0.0)

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while seen < 3000:
        work = slots.read(0)
        if work is not None:
            seen += 1
            assert work.fence == work.attempt == work.index == len(work.run) == len(work.unit)
    stop.set()
    writer.join()
    slots.close()
