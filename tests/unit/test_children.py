"""Children: how they have ended, and holding one still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from workers import children
from workers.slots import Exit


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    assert made.stdout is not None
    made.stdout.readline()
    yield made
    made.kill()
    made.wait()
    made.stdout.close()


@pytest.mark.parametrize(
    ("exit_", "said"),
    [
        (Exit(3, is_out_of_memory=False), "exit code 3"),
        (Exit(0, is_out_of_memory=False), "exit code 0"),
        (Exit(-11, is_out_of_memory=False), "killed by SIGSEGV"),
        (Exit(-9, is_out_of_memory=False), "killed by SIGKILL"),
        (Exit(-9, is_out_of_memory=True), "killed by SIGKILL (out of memory?)"),
        (Exit(-40, is_out_of_memory=False), "killed by signal 40"),
        (None, "its process is gone"),
    ],
)
def test_how_a_child_has_ended(exit_: Exit | None, said: str) -> None:
    assert children.describe(exit_) == said


def test_a_child_that_is_held_stands_still_until_it_is_let_go(child: subprocess.Popen[bytes]) -> None:
    assert children.hold(child.pid)
    assert children.is_alive(child.pid)
    assert children.hold(child.pid)
    children.let_go(child.pid)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM


def test_a_child_that_has_ended_is_not_alive_and_cannot_be_held(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    wait_until(lambda: not children.is_alive(child.pid), "it is dead, though nobody has waited for it")
    assert not children.hold(child.pid)
    child.wait()
    assert not children.is_alive(child.pid)
    assert not children.hold(child.pid)
    children.let_go(child.pid)


def test_want_of_memory_is_likely_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 3
    monkeypatch.setattr(children, "_oom_kills", lambda: kills)
    out_of_memory = children.OutOfMemory()
    assert not out_of_memory.is_likely(10.0)
    kills = 4
    out_of_memory.look(20.0)
    assert out_of_memory.is_likely(20.5)
    assert not out_of_memory.is_likely(30.0)
