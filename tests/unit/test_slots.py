"""Slots: what a parent sees of its children."""

from __future__ import annotations

import os
import threading

from workers.slots import Slots


def test_what_a_child_writes_the_parent_reads() -> None:
    parent = Slots.create(2)
    child = Slots(parent.path, 2)
    assert parent.read(1) is None
    child.write(1, fence=7, attempt=2, index=-1, run="r", unit="ünit", unit_since=1.5)
    work = parent.read(1)
    assert work is not None
    assert (work.pid, work.fence, work.attempt, work.index, work.run, work.unit) == (os.getpid(), 7, 2, -1, "r", "ünit")
    child.clear(1)
    assert parent.read(1) is None
    assert not child.is_draining
    parent.drain()
    assert child.is_draining
    parent.close()
    assert not parent.path.exists()


def test_a_reader_never_sees_half_of_a_write() -> None:
    slots = Slots.create(1)
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
