"""What the parent of a worker does beside its children."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import pytest

from orchestrator.engine import Engine
from workers import watch


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_child_is_forked_while_something_is_published() -> None:
    """It would find the locks held that publishing needs."""
    begun, go = threading.Event(), threading.Event()
    published: list[str] = []

    class Slow:
        def publish(self, run: str, _units: Any) -> None:
            begun.set()
            go.wait(10)
            published.append(run)

    publisher = threading.Thread(target=watch._publish, args=(cast(Engine, Slow()), "r", ["a"]))
    publisher.start()
    assert begun.wait(10)
    threading.Timer(0.1, go.set).start()
    child = os.fork()
    if child == 0:
        os._exit(0 if published == ["r"] and watch.forking.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    publisher.join()
