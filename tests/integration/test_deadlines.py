"""Deadlines, memory and losses with a real worker: what is stopped, what is killed, and what is charged with it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard import get_context

from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger.ledger import How
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.runs import Run
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, WorkerProcess, wait_until
from workers.deadlines import Deadlines
from workers.interrupts import Interrupts
from workers.slots import Slots, Stop, Work
from workers.step import Identity

HOW = How('{"worker":"w"')
fork_context = get_context("fork")  # as Celery starts its children

TASKS = '''
import ctypes, datetime, os, pathlib, signal, time

def echo(value=None, **rest):
    return value

def nap(seconds, **_):
    time.sleep(seconds)
    return seconds

def nap_once(mark, seconds):
    """Sleep at the first try alone."""
    if not os.path.exists(mark):
        pathlib.Path(mark).touch()
        time.sleep(seconds)
    return "done"

def tidy(mark):
    try:
        time.sleep(60)
    finally:
        pathlib.Path(mark).touch()

def partial_result():
    try:
        time.sleep(60)
    except BaseException:
        return "what there was"

def stubborn(mark):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pathlib.Path(mark).touch()

def deaf():
    """Out of reach of the soft stop, as a long call into C is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    time.sleep(60)

def spin(cpu_s):
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass

def weigh(megabytes, cpu_s, **_):
    held = bytearray(megabytes * 1_000_000)
    held[::4096] = b"x" * len(held[::4096])
    spin(cpu_s)
    deaf()

def backtrack():
    import re
    return bool(re.match("(a*)*b", "a" * 40))

def grind():
    """A call into C that takes for ever and looks at no signal."""
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)

def deadline(context):
    return context.deadline.isoformat(), (context.deadline - datetime.datetime.now(datetime.UTC)).total_seconds()

def hog(megabytes):
    return len(bytearray(megabytes * 1_000_000))

def in_turn(number, mark, slow):
    """Note that an item was begun; one of them is too slow."""
    with open(mark, "a") as file:
        file.write(f"{number}\\n")
    if number == slow:
        time.sleep(60)
    return number

def leave_once(mark):
    if not os.path.exists(mark):
        pathlib.Path(mark).touch()
        os._exit(3)
    return "lived"

def crash_once(mark):
    if not os.path.exists(mark):
        pathlib.Path(mark).touch()
        ctypes.string_at(0)
    return "lived"

def killed_once(mark):
    if not os.path.exists(mark):
        pathlib.Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"

'''


class Place:
    """A worker that gives a step that was told to stop a second."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings = settings
        self.engine = engine
        self.queries = Queries(engine.ledger, engine.payloads)
        (settings.project / "tasks.py").write_text(TASKS)
        (settings.project / "orchestrator.toml").write_text("[settings]\nstop_grace_s = 1.0\n")
        self.worker = WorkerProcess(settings)

    def start(self, *steps: Step) -> str:
        plan = Plan.of(Workflow(name="w", steps=steps))
        self.engine.ledger.put_plan(plan)
        assert self.engine.start("r", plan, event={}, params={})
        return "r"

    def end(self, timeout_s: float = 20.0) -> Run:
        wait_until(lambda: self.queries.run("r", with_steps=False).state.is_end, "the run ends", timeout_s)
        return self.queries.run("r")

    def run(self, *steps: Step) -> Run:
        self.start(*steps)
        return self.end()

    def losses(self, slot: str) -> list[dict[str, Any]]:
        text = self.engine.ledger.client.hget("orchestrator:{r}:attempts", f"{slot}#x") or ""
        return list(json.loads(f"[{text}]"))

    def log(self) -> str:
        return self.worker.log.read_text()


@pytest.fixture
def place(settings: Settings, engine: Engine) -> Iterator[Place]:
    made = Place(settings, engine)
    made.worker.start()
    yield made
    assert made.worker.stop() == 0, made.log()


def step(step_id: str, task: str, *needs: str, with_: dict[str, Any] | None = None, **options: Any) -> Step:
    given = {name: parse(value) if isinstance(value, str) else value for name, value in (with_ or {}).items()}
    return Step(id=step_id, task=f"tasks:{task}", with_=given, needs=needs, **options)


def states(run: Run) -> dict[str, str]:
    return {one.id: str(one.state) for one in run.steps}


def error_of(run: Run) -> dict[str, Any]:
    (error,) = [one.error for one in run.steps if one.error is not None]
    return dict(error)


# Softly ----------------------------------------------------------------------------------------------------------


def test_a_step_is_stopped_at_its_timeout_and_cleans_up(place: Place, tmp_path: Path) -> None:
    run = place.run(step("a", "tidy", with_={"mark": str(tmp_path / "tidied")}, timeout_s=0.5))
    assert states(run) == {"a": "failed"}
    assert "timeout of 0.5 s" in error_of(run)["message"]
    assert "StepTimeout" in error_of(run)["type"]
    assert (tmp_path / "tidied").exists()
    assert run.steps[0].losses == 0
    assert "step_killed" not in place.log()


def test_a_regular_expression_that_takes_for_ever_is_stopped(place: Place) -> None:
    run = place.run(step("a", "backtrack", timeout_s=0.5))
    assert "StepTimeout" in error_of(run)["type"]
    assert "step_killed" not in place.log()


def test_a_step_may_make_something_of_its_timeout(place: Place) -> None:
    run = place.run(step("a", "partial_result", timeout_s=0.5))
    assert run.output == "what there was"


def test_a_deadline_is_that_of_one_link(place: Place) -> None:
    """Links that run one after the other in one process: each has its own time."""
    run = place.run(
        step("a", "nap", with_={"seconds": 0.1}, timeout_s=0.6),
        step("b", "nap", "a", with_={"seconds": 1.2}),
        step("c", "nap", "b", with_={"seconds": 30}, timeout_s=0.5),
        step("d", "echo", "c"),
    )
    assert states(run) == {"a": "succeeded", "b": "succeeded", "c": "failed", "d": "upstream_failed"}
    (pid,) = {one.worker for one in run.steps if one.worker is not None}
    assert pid


def test_only_the_item_that_is_too_slow_is_stopped(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    run = place.run(
        step(
            "f", "in_turn", foreach=list(range(20)), timeout_s=0.7,
            with_={"number": "{{ item }}", "mark": str(mark), "slow": 4},
        )
    )  # fmt: skip
    (fan_out,) = run.steps
    assert fan_out.items is not None
    assert {state: n for state, n in fan_out.items.items() if n} == {"succeeded": 19, "failed": 1}
    assert sorted(map(int, mark.read_text().split())) == list(range(20))


def test_a_step_knows_its_deadline(place: Place) -> None:
    run = place.run(
        step("a", "deadline", timeout_s=90.0), step("b", "deadline", "a")
    )  # fmt: skip
    when, left = next(one.output for one in place.queries.run("r").steps if one.id == "a")
    assert when.endswith("+00:00")
    assert 80 < left <= 90
    assert 86_000 < run.output[1] <= 86_400


# Hard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["deaf", "grind", "freeze"])
def test_a_step_that_cannot_be_told_is_killed_and_has_timed_out(place: Place, task: str) -> None:
    run = place.run(step("a", task, timeout_s=0.5))
    assert states(run) == {"a": "failed"}
    assert error_of(run)["type"] == "StepTimeout"
    assert "timeout of 0.5 s" in error_of(run)["message"]
    assert "killed" in error_of(run)["message"]
    assert (run.steps[0].attempts, run.steps[0].losses) == (1, 0)


def test_a_step_that_does_not_listen_is_killed_and_the_rest_goes_on(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "told"
    run = place.run(
        step("a", "stubborn", with_={"mark": str(mark)}, timeout_s=0.5),
        step("b", "echo", "a", with_={"value": 1}, trigger_rule="all_done"),
    )
    assert mark.exists()
    assert states(run) == {"a": "failed", "b": "succeeded"}
    assert (run.steps[0].attempts, run.steps[0].losses) == (1, 0)
    assert "child_lost" not in place.log()


def test_a_step_that_is_killed_costs_what_it_took_until_then(place: Place) -> None:
    """Its parent measures it: not what the process has used before."""
    run = place.run(
        step("before", "spin", with_={"cpu_s": 0.6}),
        step("a", "weigh", "before", with_={"megabytes": 200, "cpu_s": 0.3}, timeout_s=1.5),
    )
    assert "killed" in error_of(run)["message"]
    usage, cost = run.steps[1].usage, run.steps[1].cost
    assert usage is not None
    assert cost is not None
    assert 2.5 <= usage["wall_s"] < 20
    assert 0.25 <= usage["cpu_s"] < 0.85
    assert 200e6 <= usage["memory"] < 1e9
    assert cost["wall_s"] == pytest.approx(usage["wall_s"], abs=0.001)
    assert cost["gb_s"] == pytest.approx(usage["memory"] * usage["wall_s"] / 1e9, abs=0.001)


def test_of_a_part_only_the_item_that_was_killed_has_failed(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    (place.settings.project / "tasks.py").write_text(
        TASKS.replace("        time.sleep(60)\n    return number", "        deaf()\n    return number")
    )
    place.worker.stop()
    place.worker.start()
    run = place.run(
        step(
            "f", "in_turn", foreach=list(range(20)), timeout_s=0.7,
            with_={"number": "{{ item }}", "mark": str(mark), "slow": 4},
        )
    )  # fmt: skip
    (fan_out,) = run.steps
    assert fan_out.items is not None
    assert {state: n for state, n in fan_out.items.items() if n} == {"succeeded": 19, "failed": 1}
    assert sorted(map(int, mark.read_text().split())) == list(range(20))
    assert fan_out.losses == 0


def test_a_killed_step_is_recorded_when_the_ledger_is_back(settings: Settings, own_server: Server) -> None:
    apart = Engine(settings.evolve(ledger_url=own_server.url), patience_s=2.0)
    place = Place(apart.settings, apart)
    place.worker.start()
    try:
        place.start(step("a", "deaf", timeout_s=1.5), step("b", "echo", "a", trigger_rule="all_done"))
        wait_until(lambda: apart.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
        assert own_server.process is not None
        os.kill(own_server.process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: "step_killed" in place.log(), "it is killed meanwhile")
        finally:
            os.kill(own_server.process.pid, signal.SIGCONT)
        run = place.end(30)
        assert states(run) == {"a": "failed", "b": "succeeded"}
        assert error_of(run)["type"] == "StepTimeout"
    finally:
        assert place.worker.stop() == 0, place.log()
        apart.close()


# Cancel ----------------------------------------------------------------------------------------------------------


def test_a_step_in_work_is_stopped_when_its_run_is_cancelled(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "tidied"
    place.start(step("a", "tidy", with_={"mark": str(mark)}), step("b", "echo", "a"))
    wait_until(lambda: place.engine.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
    place.engine.cancel("r")
    run = place.end()
    assert str(run.state) == "cancelled"
    assert states(run) == {"a": "cancelled", "b": "cancelled"}
    assert mark.exists()


def test_a_step_that_does_not_stop_when_its_run_is_cancelled_is_killed(place: Place) -> None:
    place.start(step("a", "deaf"))
    wait_until(lambda: place.engine.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
    place.engine.cancel("r")
    run = place.end()
    assert states(run) == {"a": "cancelled"}
    assert run.steps[0].losses == 0
    assert "step_killed" in place.log()


@pytest.fixture
def held(settings: Settings, engine: Engine) -> Iterator[tuple[Slots, Deadlines, Any]]:
    """A child that calls one function after the other, each until it is told to go on, and listens to no signal."""
    engine.ledger.put_plan(plan := Plan.of(Workflow(name="w", steps=(step("a", "echo"),))))
    assert engine.start("r", plan, event={}, params={})
    taken = engine.ledger.begin("r", ["a"], HOW).taken
    assert taken is not None
    slots = Slots(1)
    hasty = Engine(settings.evolve(stop_grace_s=0.0), app=engine.app)
    published: list[Any] = []
    deadlines = Deadlines(hasty, slots, Identity("w", ""), lambda run, units: published.append((run, units)))
    ours, theirs = fork_context.Pipe()
    process = fork_context.Process(target=_call_on, args=(slots, theirs, taken.fence))
    process.start()
    process.pipe = ours
    yield slots, deadlines, process
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    slots.close()


def _call_on(slots: Slots, pipe: Any, fence: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    interrupts = Interrupts(slots, 0)
    while True:
        slots.write(0, fence=fence, attempt=1, tries=1, index=-1, run="r", unit="a", unit_since=0.0)
        interrupts.call(pipe.recv, {}, 60.0)


def called(slots: Slots) -> Work:
    found: Work = wait_until(lambda: (work := slots.read(0)) is not None and work.deadline and work, "it is called")
    return found


def test_what_was_killed_is_gone_from_its_slot_and_recorded_later(
    held: tuple[Slots, Deadlines, Any], engine: Engine
) -> None:
    slots, deadlines, process = held
    work = called(slots)
    deadlines.look(time.monotonic())
    deadlines.stop(0, work, Stop.CANCEL)
    deadlines.stop(0, work, Stop.TIMEOUT)  # the first counts
    deadlines.look(time.monotonic())
    process.join(10)
    assert process.exitcode == -9
    assert slots.read(0) is None
    assert [one.unit for one in deadlines.unrecorded()] == ["a"]
    deadlines.record()
    assert deadlines.unrecorded() == []
    assert engine.ledger.client.hget("orchestrator:{r}:states", "a") == "cancelled"


def test_who_has_gone_on_at_the_last_moment_is_not_killed(held: tuple[Slots, Deadlines, Any]) -> None:
    slots, deadlines, process = held
    work = called(slots)
    deadlines.stop(0, work, Stop.TIMEOUT)
    process.pipe.send(None)
    wait_until(lambda: called(slots).sequence != work.sequence, "the next is called")
    deadlines._kill(0, work, Stop.TIMEOUT)
    deadlines.look(time.monotonic())
    following = called(slots)
    process.pipe.send(None)
    wait_until(lambda: called(slots).sequence != following.sequence, "it goes on")
    assert deadlines.unrecorded() == []


# Memory ----------------------------------------------------------------------------------------------------------


def test_a_step_that_takes_too_much_memory_fails_and_the_next_may_take_it(place: Place) -> None:
    run = place.run(
        step("a", "hog", with_={"megabytes": 400}, memory=200_000_000),
        step("b", "hog", "a", with_={"megabytes": 400}, trigger_rule="all_done"),
    )
    assert states(run) == {"a": "failed", "b": "succeeded"}
    assert error_of(run)["type"] == "MemoryError"
    assert run.steps[0].losses == 0


# Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "reason"),
    [("leave_once", "exit code 3"), ("crash_once", "killed by SIGSEGV"), ("killed_once", "killed by SIGKILL")],
)
def test_a_loss_says_how_the_process_ended(place: Place, tmp_path: Path, task: str, reason: str) -> None:
    run = place.run(step("a", task, with_={"mark": str(tmp_path / "died")}), step("b", "echo", "a"))
    assert run.steps[0].losses == 1
    assert run.steps[0].attempts == 1
    lost = [line for line in place.log().splitlines() if "child_lost" in line]
    assert len(lost) == 1
    assert reason in lost[0]
    assert [loss["reason"] for loss in place.losses("a")] == [reason]
