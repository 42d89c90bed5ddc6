"""What a step does to its process, or brings in its errors, harms neither its own outcome nor the steps that follow."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.runs import Run
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import WorkerProcess, wait_until

TASKS = """
import io, multiprocessing, os, pathlib, signal, sys, threading, time
from orchestrator import Retry
from orchestrator.signals import StepCancelled

def look():
    print("seen")
    return [os.getpid(), os.getcwd(), os.umask(0o022)]

def nap(seconds):
    time.sleep(seconds)
    return "slept"

# What leaves the process changed

def go_elsewhere(folder):
    os.chdir(folder)
    os.rmdir(folder)
    os.umask(0o777)

def take_streams():
    sys.stdout = io.StringIO()
    sys.stderr = open(os.devnull, "w")
    sys.stderr.close()

def set_alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.3)

def take_signals():
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)

def block_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

def lower_recursion():
    sys.setrecursionlimit(100)

# What forks

def start_and_stop():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join()
    return process.exitcode

def fork(how):
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        time.sleep(0.5)
        return os.waitstatus_to_exitcode(status)
    if how == "exit":
        sys.exit(5)
    if how == "raise":
        raise ValueError("in the copy")
    return "copy"

class Slow(pathlib.PurePosixPath):
    def __str__(self):
        time.sleep(60)

def slow_result():
    return Slow("a")

# What is hard to record

class Mute(Exception):
    def __str__(self):
        raise SystemExit(1)
    __repr__ = __str__

def mute():
    raise Mute

def change_input(data):
    data["set"] = {1}
    data["self"] = data
    raise ValueError("the cause")

class Own(Retry):
    def __init__(self):
        pass

def own_retry():
    raise Own

def odd_syntax():
    error = SyntaxError("odd")
    error.text, error.offset, error.lineno, error.filename = 5, "z", "k", "f"
    raise error

def stop_itself():
    raise StepCancelled("of its own")

def spill(secret, before):
    raise ValueError("x" * before + secret)

def write_later(secret):
    threading.Timer(0.5, lambda: print("late:", secret)).start()

def fail(**_):
    raise ValueError("the cause")
"""


class Place:
    """One child: what a step leaves is what the next one finds."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.engine = engine
        self.queries = Queries(engine.ledger, engine.payloads)
        (settings.project / "tasks.py").write_text(TASKS)
        (settings.project / "orchestrator.toml").write_text(
            '[settings]\nstop_grace_s = 5.0\n[secrets]\nPIN = "env:PIN"\n'
        )
        self.worker = WorkerProcess(settings, concurrency=1, PIN="31415926535")

    def start(self, *steps: Step) -> None:
        plan = Plan.of(Workflow(name="w", steps=steps))
        self.engine.ledger.put_plan(plan)
        assert self.engine.start("r", plan, event={}, params={})

    def end(self) -> Run:
        wait_until(lambda: self.queries.run("r", with_steps=False).state.is_end, "the run ends", 40.0)
        return self.queries.run("r")

    def run(self, *steps: Step) -> Run:
        self.start(*steps)
        return self.end()


@pytest.fixture
def place(settings: Settings, engine: Engine) -> Iterator[Place]:
    made = Place(settings, engine)
    made.worker.start()
    yield made
    assert made.worker.stop() == 0, made.worker.log.read_text()


def step(step_id: str, task: str, *needs: str, with_: dict[str, Any] | None = None, **options: Any) -> Step:
    given = {name: parse(value) if isinstance(value, str) else value for name, value in (with_ or {}).items()}
    return Step(id=step_id, task=f"tasks:{task}", with_=given, needs=needs, **options)


def record(place: Place, slot: str = "a@1") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.engine.ledger.client.hget("orchestrator:{r}:attempts", slot) or "{}")
    return found


# What leaves the process changed -----------------------------------------------------------------------------------


def test_the_next_step_finds_the_process_as_it_was(place: Place, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    run = place.run(
        step("before", "look"),
        step("a", "go_elsewhere", "before", with_={"folder": str(tmp_path / "folder")}),
        step("b", "take_streams", "a"),
        step("c", "lower_recursion", "b"),
        step("after", "look", "c"),
    )
    seen = {one.id: one.output for one in run.steps}
    assert str(run.state) == "succeeded"
    assert seen["before"] == seen["after"]
    assert place.engine.ledger.client.hget("orchestrator:{r}:logs", "after@1") == "seen\n"


def test_a_clock_that_was_set_does_not_go_off_in_the_next_step(place: Place) -> None:
    run = place.run(step("a", "set_alarm"), step("b", "nap", "a", with_={"seconds": 1}))
    assert [(str(one.state), one.losses) for one in run.steps] == [("succeeded", 0)] * 2


@pytest.mark.parametrize("task", ["take_signals", "block_signals"])
def test_the_next_step_is_stopped_softly_all_the_same(place: Place, task: str) -> None:
    run = place.run(step("a", task), step("b", "nap", "a", with_={"seconds": 30}, timeout_s=0.5))
    assert [(str(one.state), one.losses) for one in run.steps] == [("succeeded", 0), ("failed", 0)]
    assert "step_killed" not in place.worker.log.read_text()


# What is sent to the process -----------------------------------------------------------------------------------------


def child(place: Place) -> psutil.Process:
    assert place.worker.process is not None
    (found,) = psutil.Process(place.worker.process.pid).children()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_step_goes_on_when_all_processes_of_its_worker_are_told_to_stop(place: Place, number: int) -> None:
    place.start(step("a", "nap", with_={"seconds": 1}))
    wait_until(lambda: place.engine.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
    child(place).send_signal(number)
    assert [(str(one.state), one.losses) for one in place.end().steps] == [("succeeded", 0)]


def test_a_process_that_a_step_starts_can_be_told_to_stop(place: Place) -> None:
    run = place.run(step("a", "start_and_stop"))
    assert run.output == -signal.SIGTERM


def test_a_worker_that_is_to_end_at_once_leaves_its_steps_without_an_outcome(
    settings: Settings, engine: Engine
) -> None:
    place = Place(settings, engine)
    process = place.worker.start().process
    assert process is not None
    place.start(step("a", "nap", with_={"seconds": 60}))
    wait_until(lambda: place.engine.ledger.client.zcard("orchestrator:{r}:leases"), "the step has begun")
    process.send_signal(signal.SIGQUIT)
    process.wait(30)
    assert str(place.queries.run("r").steps[0].state) == "running"


# What forks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 5), ("raise", 1)])
def test_a_copy_that_comes_back_from_the_step_is_no_child_of_the_worker(place: Place, how: str, code: int) -> None:
    run = place.run(step("a", "fork", with_={"how": how}), step("b", "look", "a"))
    assert [(str(one.state), one.losses) for one in run.steps] == [("succeeded", 0)] * 2
    assert run.steps[0].output == code
    assert "refused" not in place.worker.log.read_text()


# What is the user's code besides the function -----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["slow:nap", "tasks:slow_result"])
def test_an_import_or_a_result_that_takes_for_ever_is_stopped(place: Place, settings: Settings, task: str) -> None:
    (settings.project / "slow.py").write_text("import time\ntime.sleep(60)\ndef nap(): ...\n")
    run = place.run(
        Step(id="a", task=task, timeout_s=0.5), step("b", "nap", "a", with_={"seconds": 0}, trigger_rule="all_done")
    )
    error = run.steps[0].error
    assert error is not None
    assert error["reason"] == "timeout"
    assert [str(one.state) for one in run.steps] == ["failed", "succeeded"]


def test_an_expression_that_takes_for_ever_is_stopped(place: Place) -> None:
    # A number so long that no signal is looked at while it is made.
    step_ = step("a", "fail", with_={"n": "{{ (run.episode + 8) ** (9 ** 9) }}"}, timeout_s=0.5)
    run = place.run(step_, step("b", "nap", "a", with_={"seconds": 0}, trigger_rule="all_done"))
    assert [(str(one.state), one.losses) for one in run.steps] == [("failed", 0), ("succeeded", 0)]
    assert (run.steps[0].error or {})["reason"] == "timeout"


# What is hard to record --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "with_", "kind"),
    [
        ("mute", {}, "tasks.Mute"),
        ("change_input", {"data": {"n": 1}}, "ValueError"),
        ("own_retry", {}, "Own"),
        ("odd_syntax", {}, "SyntaxError"),
        ("fail", {"value": "{{ [1, 2] | batch(1) }}"}, "ValueError"),
        ("stop_itself", {}, "StepCancelled"),
    ],
)
def test_whatever_a_step_raises_is_its_outcome(place: Place, task: str, with_: dict[str, Any], kind: str) -> None:
    place.start(step("a", task, with_=with_))
    wait_until(lambda: "error" in record(place), "the first attempt has failed")
    assert record(place)["error"]["type"] == kind
    assert place.queries.run("r").steps[0].losses == 0
    if task == "own_retry":
        place.engine.cancel("r")
    assert str(place.end().state) == ("cancelled" if task == "own_retry" else "failed")
    if task == "change_input":
        assert record(place)["input"] == {"data": {"n": 1}}


def test_no_part_of_a_secret_is_left_where_a_message_is_cut(place: Place) -> None:
    place.run(step("a", "spill", with_={"secret": "{{ secrets.PIN }}", "before": 3995}))
    assert "314" not in json.dumps(record(place)["error"])


def test_a_secret_is_masked_in_what_a_thread_writes_after_its_step(place: Place) -> None:
    place.run(
        step("a", "write_later", with_={"secret": "{{ secrets.PIN }}"}), step("b", "nap", "a", with_={"seconds": 1.5})
    )
    assert place.engine.ledger.client.hget("orchestrator:{r}:logs", "b@1") == "late: ***\n"


def test_a_secret_that_is_a_number_or_in_a_tuple_is_masked_in_the_input(place: Place) -> None:
    with_ = {"number": "{{ secrets.PIN | int }}", "pair": "{{ (secrets.PIN, 1) }}"}
    place.run(step("a", "fail", with_=with_))
    assert record(place)["input"] == {"number": "***", "pair": ["***", 1]}
