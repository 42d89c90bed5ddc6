"""The contract of launchers (workers/launchers), over all of them; and what the process launcher does besides."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from orchestrator.engine import Engine
from tests.conftest import wait_until
from workers.launchers import FaultNotes, Launched, Launcher, Phase
from workers.launchers.none import NoLauncher
from workers.launchers.parts import STEADY_S
from workers.launchers.process import ProcessLauncher

#: A worker: notes its beginning, and its end once it is told to stop and its step, a file, is done.
WORKER = """
import os, pathlib, signal, sys, time
pool, words, place = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
if (place / f"{pool}.broken").exists():
    os.write(words, b"the module is broken")
    sys.exit(3)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(place / f"{pool}.{os.getpid()}.began").touch()
while not told or (place / f"{pool}.step").exists():
    time.sleep(0.01)
(place / f"{pool}.{os.getpid()}.ended").touch()
"""


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def process(tmp_path: Path, said: list[str]) -> Iterator[ProcessLauncher]:
    def command(pool: str, words: int) -> Sequence[str]:
        return [sys.executable, "-c", WORKER, pool, str(words), str(tmp_path)]

    made = ProcessLauncher(command, grace_s=1, say=said.append)
    yield made
    made.kill()


@pytest.fixture(params=["process", "none"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    made: Launcher = request.getfixturevalue("process") if request.param == "process" else NoLauncher()
    return made


def phases(launcher: Launcher, pool: str = "p") -> Counter[str]:
    return Counter(str(one.phase) for one in launcher.look() if one.pool == pool)


def began(place: Path, pool: str = "p") -> list[int]:
    return sorted(int(path.name.split(".")[1]) for path in place.glob(f"{pool}.*.began"))


def ended(place: Path, pool: str = "p") -> list[int]:
    return sorted(int(path.name.split(".")[1]) for path in place.glob(f"{pool}.*.ended"))


# All of them


def test_what_is_to_be_may_be_said_as_often_as_one_likes(launcher: Launcher) -> None:
    for _ in range(3):
        launcher.scale("p", 2)
    assert len(launcher.look()) in (0, 2)  # those that it has started, if it starts any
    for _ in range(3):
        launcher.scale("p", 1, leave=["nobody"])
    assert phases(launcher)["draining"] in (0, 1)
    for _ in range(3):
        launcher.scale("p", 0)
    wait_until(lambda: not launcher.look(), "those that drain have gone")


def test_pools_are_sized_each_by_itself(launcher: Launcher) -> None:
    launcher.scale("p", 2)
    launcher.scale("q", 1)
    launcher.scale("p", 0)
    assert phases(launcher, "q")["draining"] == 0
    assert phases(launcher, "p")["starting"] == 0


def test_a_generation_that_is_the_current_one_already_changes_nothing(launcher: Launcher) -> None:
    launcher.renew("a")
    launcher.scale("p", 1)
    before = [one.worker for one in launcher.look()]
    launcher.renew("a")
    assert [one.worker for one in launcher.look()] == before


def test_it_can_be_closed_twice_and_before_it_was_used(launcher: Launcher) -> None:
    launcher.close()
    launcher.scale("p", 1)
    launcher.close()
    launcher.close()
    assert launcher.look() == []


def test_each_names_itself_and_no_two_alike(process: ProcessLauncher) -> None:
    assert len({process.place, NoLauncher.place}) == 2


# Processes


def test_a_worker_that_drains_finishes_its_step_and_another_takes_its_place_meanwhile(
    process: ProcessLauncher, tmp_path: Path
) -> None:
    (tmp_path / "p.step").touch()
    process.scale("p", 1)
    [old] = wait_until(lambda: began(tmp_path), "it is there")
    process.scale("p", 0)
    process.scale("p", 1)
    wait_until(lambda: len(began(tmp_path)) == 2, "another one is there")
    assert phases(process)["draining"] == 1
    assert psutil.pid_exists(old)
    (tmp_path / "p.step").unlink()
    wait_until(lambda: ended(tmp_path) == [old] and phases(process)["draining"] == 0, "it is gone")
    assert sum(phases(process).values()) == 1


def test_those_that_are_named_leave_first_else_the_youngest(process: ProcessLauncher, tmp_path: Path) -> None:
    (tmp_path / "p.step").touch()
    process.scale("p", 1)
    wait_until(lambda: began(tmp_path), "one is there")
    process.scale("p", 3)
    wait_until(lambda: len(began(tmp_path)) == 3, "three are there")
    first, *_ = (one.worker for one in process.look())
    process.scale("p", 2, leave=[first])
    assert [one.worker for one in process.look() if one.phase is Phase.DRAINING] == [first]
    second = next(one.worker for one in process.look() if one.phase is not Phase.DRAINING)
    process.scale("p", 1)
    assert [one.worker for one in process.look() if one.phase is not Phase.DRAINING] == [second]
    (tmp_path / "p.step").unlink()
    wait_until(lambda: len(ended(tmp_path)) == 2, "two have ended in order")


def test_workers_of_changed_code_start_and_those_before_drain(process: ProcessLauncher, tmp_path: Path) -> None:
    (tmp_path / "p.step").touch()
    process.renew("a")
    process.scale("p", 2)
    old = wait_until(lambda: len(began(tmp_path)) == 2 and began(tmp_path), "two are there")
    process.renew("b")
    assert phases(process)["draining"] == 2
    wait_until(lambda: len(began(tmp_path)) == 4, "two of the new code are there")
    (tmp_path / "p.step").unlink()
    wait_until(lambda: ended(tmp_path) == old, "those before have ended")
    wait_until(lambda: sum(phases(process).values()) == 2, "only the new ones are left")


def test_a_worker_is_known_by_the_name_under_which_it_reports(process: ProcessLauncher, tmp_path: Path) -> None:
    process.scale("p", 1)
    [pid] = wait_until(lambda: began(tmp_path), "it is there")
    [one] = process.look()
    assert one.worker.startswith("p@")
    assert one.worker.endswith(f":{pid}")


def test_one_that_is_killed_is_started_again(process: ProcessLauncher, tmp_path: Path, said: list[str]) -> None:
    process.scale("p", 1)
    [pid] = wait_until(lambda: began(tmp_path), "it is there")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process.look() and len(began(tmp_path)) == 2, "another one is there")
    assert said == ["worker p ended (killed by SIGKILL); it is started again"]


def test_a_worker_that_dies_at_start_is_tried_again_ever_more_rarely_and_says_why(
    process: ProcessLauncher, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "p.broken").touch()
    process.scale("p", 1)
    [one] = wait_until(lambda: [one for one in process.look() if one.phase is Phase.FAILED], "it has failed")
    assert one.fault == "worker p ended (exit code 3): the module is broken"
    process.scale("p", 5)
    assert len(process.look()) == 1, "no more are started of what dies at once"
    wait_until(lambda: process.look() and len(said) == 4, "it was tried some times")
    (tmp_path / "p.broken").unlink()
    wait_until(lambda: process.look() and began(tmp_path), "it lives")
    assert [one.phase for one in process.look()] == [Phase.FAILED], "which may not be for long"
    wait_until(lambda: [one.fault for one in process.look()] == [""], "it has lived for a while", STEADY_S + 10)
    assert phases(process) == {"running": 1}


def test_what_the_system_has_no_room_to_start_is_a_fault_and_tried_again(tmp_path: Path, said: list[str]) -> None:
    program = tmp_path / "python"
    launcher = ProcessLauncher(
        lambda pool, words: [str(program), "-c", WORKER, pool, str(words), str(tmp_path)], grace_s=1, say=said.append
    )
    launcher.scale("p", 2)
    launcher.look()
    assert phases(launcher) == {"failed": 1}
    [fault] = {one.fault for one in launcher.look()}
    assert fault == "worker p cannot be started (No such file or directory)"
    program.symlink_to(sys.executable)
    wait_until(lambda: launcher.look() and began(tmp_path), "it lives")
    launcher.kill()


def test_no_more_are_started_than_the_machine_has_room_for(tmp_path: Path, said: list[str]) -> None:
    launcher = ProcessLauncher(
        lambda pool, words: [sys.executable, "-c", WORKER, pool, str(words), str(tmp_path)],
        grace_s=1,
        say=said.append,
        most=lambda pool: 1 if pool == "p" else 2,
    )
    launcher.scale("p", 50)
    launcher.scale("q", 50)
    assert (sum(phases(launcher).values()), sum(phases(launcher, "q").values())) == (1, 2)
    launcher.kill()


def test_one_that_fails_does_not_keep_a_pool_from_going(process: ProcessLauncher, tmp_path: Path) -> None:
    (tmp_path / "p.broken").touch()
    process.scale("p", 1)
    wait_until(lambda: phases(process)["failed"], "it has failed")
    process.scale("p", 0)
    wait_until(lambda: process.look() == [], "it is gone")


def test_closing_ends_what_is_at_rest_in_order_and_what_goes_on_after_the_grace(
    process: ProcessLauncher, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "p.step").touch()
    process.scale("p", 1)
    process.scale("q", 1)
    [p], [q] = wait_until(
        lambda: began(tmp_path) and began(tmp_path, "q") and (began(tmp_path), began(tmp_path, "q")), "both are there"
    )
    process.close()
    assert ended(tmp_path, "q") == [q]
    assert ended(tmp_path) == []
    assert not psutil.pid_exists(p)
    assert said == ["worker p has steps that go on; they are taken up again at the next start"]


def test_who_is_in_a_hurry_does_not_wait_for_the_grace(tmp_path: Path, process: ProcessLauncher) -> None:
    (tmp_path / "p.step").touch()
    process.scale("p", 1)
    [pid] = wait_until(lambda: began(tmp_path), "it is there")
    process.close(lambda: True)
    assert not psutil.pid_exists(pid)


# What is said of them


def test_faults_are_noted_and_cleared_as_they_change(engine: Engine) -> None:
    def one(fault: str) -> Launched:
        return Launched(pool="p", worker="", phase=Phase.FAILED, since=0.0, fault=fault)

    engine.pools.note_fault("p", "here", "left by somebody who was killed")
    engine.pools.note_fault("p", "elsewhere", "not ours")
    notes = FaultNotes(engine.pools, "here")
    notes.note([one("")])
    assert engine.pools.faults() == {"p": ["not ours"]}
    notes.note([one(""), one("it dies"), one("")])
    assert engine.pools.faults() == {"p": ["not ours", "it dies"]}
    notes.note([])
    assert engine.pools.faults() == {"p": ["not ours"]}


def test_what_is_known_already_is_not_said_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    note: Callable[..., None] = engine.pools.note_fault
    monkeypatch.setattr(engine.pools, "note_fault", lambda *args: (said.append(args[2]), note(*args)))
    notes = FaultNotes(engine.pools, "here")
    for fault in ("", "", "it dies", "it dies", ""):
        notes.note([Launched(pool="p", worker="", phase=Phase.RUNNING, since=0.0, fault=fault)])
    assert said == ["", "it dies", ""]
