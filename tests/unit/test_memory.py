"""Memory: what a step may allocate."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from collections.abc import Callable

import pytest

from workers.memory import limited

MB = 1_000_000
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")


def anonymous() -> None:
    """Allocate as NumPy and other native code does: straight from the system."""
    mmap.mmap(-1, 300 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def at_once() -> None:
    bytearray(300 * MB)


def bit_by_bit() -> None:
    [bytearray(100_000) for _ in range(3000)]


@pytest.mark.parametrize("allocate", [at_once, bit_by_bit, anonymous])
def test_more_than_the_limit_is_an_error_and_the_limit_goes_with_the_step(allocate: Callable[[], None]) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises((MemoryError, OSError)), limited(100 * MB):
        allocate()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with limited(600 * MB):
        allocate()


def test_what_the_process_has_already_does_not_count() -> None:
    kept = bytearray(300 * MB)
    with limited(50 * MB):
        bytearray(10 * MB)
    assert len(kept) == 300 * MB


def test_a_process_that_is_forked_has_the_limit_too() -> None:
    with limited(100 * MB):
        pid = os.fork()
        if pid == 0:
            try:
                at_once()
            except MemoryError:
                os._exit(7)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_limit_from_outside_stays() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4_000 * MB, hard))
    try:
        with limited(10**15):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 4_000 * MB
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 4_000 * MB
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
