"""Interrupts: a signal stops the user's function, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from billiard import get_context

from orchestrator.signals import StepCancelled, StepTimeout
from tests.conftest import wait_until
from workers import capture
from workers.capture import Captured
from workers.interrupts import SIGNAL, Interrupts
from workers.slots import Slots, Stop, Work

fork_context = get_context("fork")  # as Celery starts its children

Call = Callable[..., Any]


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(1)
    yield made
    made.close()


class Child:
    """A process that runs `body` with a pipe to here and a `call` that notes and calls a function, as workers do."""

    def __init__(self, slots: Slots, body: Callable[[Any, Call], None]) -> None:
        self.slots = slots
        self.pipe, theirs = fork_context.Pipe()
        self.process = fork_context.Process(target=_run, args=(slots, theirs, body))
        self.process.start()

    def said(self, timeout_s: float = 10.0) -> Any:
        assert self.pipe.poll(timeout_s), "the child says nothing"
        return self.pipe.recv()

    def called(self) -> Work:
        def work() -> Work | None:
            found = self.slots.read(0)
            return found if found is not None and found.deadline else None

        found: Work = wait_until(work, "the function is called")
        return found

    def stop(self, reason: Stop = Stop.TIMEOUT) -> None:
        self.slots.interrupt(0, self.called().sequence, reason)
        os.kill(self.process.pid, SIGNAL)


def _run(slots: Slots, pipe: Any, body: Callable[[Any, Call], None]) -> None:
    interrupts = Interrupts(slots, 0)

    def call(function: Callable[..., Any], index: int = 0, **arguments: Any) -> Any:
        slots.write(0, fence=1, attempt=1, tries=1, index=index, run="r", unit="a/0-9", unit_since=0.0)
        try:
            return function and interrupts.call(function, arguments, 60.0)
        except (StepTimeout, StepCancelled) as exc:
            return f"{type(exc).__name__}: {exc}"

    body(pipe, call)


@contextmanager
def child(slots: Slots, body: Callable[[Any, Call], None]) -> Iterator[Child]:
    made = Child(slots, body)
    yield made
    made.process.join(10)
    if made.process.is_alive():
        os.kill(made.process.pid, signal.SIGKILL)
        made.process.join()
    assert made.process.exitcode == 0


def sleep() -> None:
    time.sleep(30)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Stop.TIMEOUT, "StepTimeout: it ran for longer than its timeout of 60 s"),
        (Stop.CANCEL, "StepCancelled: it was cancelled, or its run"),
    ],
)
def test_a_function_that_runs_is_stopped(slots: Slots, reason: Stop, said: str) -> None:
    with child(slots, lambda pipe, call: pipe.send(call(sleep))) as made:
        made.stop(reason)
        assert made.said() == said
        assert not slots.read(0).deadline  # type: ignore[union-attr]


def test_an_except_of_every_exception_does_not_swallow_it(slots: Slots) -> None:
    def careless() -> None:
        while True:
            try:
                time.sleep(30)
            except Exception:  # noqa: BLE001
                continue

    with child(slots, lambda pipe, call: pipe.send(call(careless))) as made:
        made.stop()
        assert made.said().startswith("StepTimeout")


def test_a_function_may_clean_up_and_is_told_once(slots: Slots) -> None:
    with child(slots, lambda pipe, call: pipe.send(call(lambda: _clean_up(pipe)))) as made:
        made.stop()
        assert made.said() == "cleaning up"
        assert made.called().is_heeded
        for _ in range(5):
            made.stop()
        made.pipe.send("go on")
        assert made.said() == "cleaned up"


def _clean_up(pipe: Any) -> str:
    try:
        time.sleep(30)
    except StepTimeout:
        pipe.send("cleaning up")
        assert pipe.recv() == "go on"
    return "cleaned up"


def test_an_error_of_the_cleaning_up_does_not_hide_why_it_ended(slots: Slots) -> None:
    def fail() -> None:
        try:
            time.sleep(30)
        finally:
            raise ValueError("cannot clean up")

    with child(slots, lambda pipe, call: pipe.send(call(fail))) as made:
        made.stop()
        assert made.said().startswith("StepTimeout")


def test_what_runs_next_is_not_stopped_for_what_ran_before(slots: Slots) -> None:
    def body(pipe: Any, call: Call) -> None:
        for index in range(2):
            pipe.send(call(lambda: pipe.recv(), index=index))

    with child(slots, body) as made:
        first = made.called()
        made.pipe.send("one")
        assert made.said() == "one"
        assert wait_until(lambda: made.called().index == 1, "the next is called")
        slots.interrupt(0, first.sequence, Stop.TIMEOUT)  # too late
        os.kill(made.process.pid, SIGNAL)
        made.pipe.send("two")
        assert made.said() == "two"


def test_a_process_that_runs_nothing_is_not_disturbed(slots: Slots) -> None:
    def body(pipe: Any, call: Call) -> None:
        call(lambda: None)  # from now on the signal is ours
        pipe.send("idle")
        pipe.send(pipe.recv())

    with child(slots, body) as made:
        assert made.said() == "idle"
        slots.interrupt(0, slots.read(0).sequence, Stop.TIMEOUT)  # type: ignore[union-attr]
        os.kill(made.process.pid, SIGNAL)
        made.pipe.send("lives")
        assert made.said() == "lives"


def test_a_process_that_the_function_has_forked_is_not_disturbed(slots: Slots) -> None:
    def fork(pipe: Any) -> int:
        pid = os.fork()
        if pid == 0:
            pipe.send(os.getpid())
            time.sleep(0.5)
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with child(slots, lambda pipe, call: pipe.send(call(lambda: fork(pipe)))) as made:
        grandchild = made.said()
        slots.interrupt(0, made.called().sequence, Stop.TIMEOUT)
        os.kill(grandchild, SIGNAL)
        assert made.said() == 7


class _Slow:
    """Takes its time while a lock of ours is held, or where exceptions are swallowed."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __str__(self) -> str:
        self.wait()
        return ""

    def wait(self) -> None:
        self.pipe.send("there")
        self.pipe.recv()
        time.sleep(0.2)

    def __del__(self) -> None:
        if self.pipe is not None:
            self.wait()


def _write(pipe: Any) -> None:
    slow = _Slow(pipe)
    captured = Captured(100)
    captured.mask = lambda text: str(slow)  # type: ignore[method-assign]
    captured.write("x")
    captured.text()
    slow.pipe = None
    pipe.send("unharmed")
    time.sleep(30)


def _delete(pipe: Any) -> None:
    slow = _Slow(pipe)
    del slow
    pipe.send("unharmed")
    time.sleep(30)


@pytest.mark.parametrize("function", [_write, _delete])
def test_it_is_put_off_where_it_would_do_harm_or_be_lost(slots: Slots, function: Callable[[Any], None]) -> None:
    assert capture.__file__
    with child(slots, lambda pipe, call: pipe.send(call(lambda: function(pipe)))) as made:
        assert made.said() == "there"
        made.pipe.send("go on")
        made.stop()
        assert made.said() == "unharmed"
        assert not made.called().is_heeded
        made.stop()
        assert made.said().startswith("StepTimeout")


def test_a_signal_at_any_moment_stops_a_call_or_nothing(slots: Slots) -> None:
    """Calls that take about as long as what is around them, under fire: none ends otherwise than it may."""

    def body(pipe: Any, call: Call) -> None:
        call(lambda: None)
        pipe.send("ready")
        ends: dict[str, int] = {}
        until = time.monotonic() + 2
        while time.monotonic() < until:
            end = call(lambda: sum(range(2000)))
            ends[str(end)[:11]] = ends.get(str(end)[:11], 0) + 1
        pipe.send(ends)

    with child(slots, body) as made:
        made.said()
        while not made.pipe.poll(0.001):
            work = slots.read(0)
            if work is not None and work.deadline:
                slots.interrupt(0, work.sequence, Stop.TIMEOUT)
                os.kill(made.process.pid, SIGNAL)
        ends = made.said()
    assert set(ends) == {"1999000", "StepTimeout"}, ends
