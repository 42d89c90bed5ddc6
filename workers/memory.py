"""Memory: a limit to what a step allocates, as far as the system has one (Linux)."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DATA = re.compile(rb"^VmData:\s+(\d+) kB$", re.MULTILINE)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let this process allocate `size` bytes more than it has now; what goes beyond raises MemoryError.

    Counted is what it asks for (private memory that can be written, RLIMIT_DATA), used or not, with the stacks of its
    threads; memory that is shared or maps a file is not. A process that it starts has the limit too, each for itself.
    On systems that do not tell what a process has (all but Linux) there is no limit.
    """
    has = _allocated()
    if has is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = has + size
    for other in (soft, hard):
        limit = limit if other == resource.RLIM_INFINITY else min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _allocated() -> int | None:
    """Return the bytes that RLIMIT_DATA counts for this process; None where that cannot be known."""
    try:
        found = _DATA.search(Path("/proc/self/status").read_bytes())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
