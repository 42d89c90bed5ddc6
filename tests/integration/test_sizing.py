"""Workers that begin with no process, and get more and fewer of them: by a target, or by what comes."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.pools import STANDBY
from orchestrator.settings import Settings
from tests.conftest import Server, WorkerProcess, wait_until
from tests.sizing import POOLS, Place, attempts, has, make, pids, stamped, step

#: Such a module lets no process of a pool live, from when the file is there.
FORK_KILLER = """
import os
def _die():
    if os.path.exists({mark!r}):
        os._exit(7)
os.register_at_fork(after_in_child=_die)
"""
#: A workflow in Python: its module is imported by the worker itself, before it starts a process.
FLOWS = """
import killer
from orchestrator import task, workflow

@task
def one():
    return 1

@workflow
def w():
    return one()
"""


@pytest.fixture
def place(settings: Settings) -> Iterator[Place]:
    made = make(settings)
    yield made
    made.close()


# On demand -----------------------------------------------------------------------------------------------------------


def test_a_worker_starts_with_no_process_and_one_comes_when_a_message_does(place: Place) -> None:
    worker = place.worker()
    assert pids(worker) == []
    took = []
    for _ in range(3):
        wait_until(has(worker, 0), "the worker is at rest")
        before = time.time()
        run = place.run(step("a", "began"))
        took.append(run.output - before)
    assert statistics.median(took) < 2.0  # on a machine that has much else to do; docs/performance.md has the figures
    wait_until(has(worker, 0), "it goes when it has had nothing to do for idle_after", 10)


def test_it_grows_as_messages_come_and_shrinks_when_none_do(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    runs = [place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(6)]
    wait_until(lambda: (place.told(worker).size, len(place.told(worker).in_work)) == (4, 4), "four steps run")
    assert len(pids(worker)) == 4
    (tmp_path / "go").touch()
    for run in runs:
        place.end(run)
    wait_until(has(worker, 0), "all have gone", 10)
    told = wait_until(lambda: place.told(worker) if not place.told(worker).size else None, "it says so")
    assert (sum(told.served), told.in_work, told.fault) == (6, [], "")
    assert 0.0 < told.busy_s < told.process_s


def test_a_process_that_has_work_now_and_then_stays_and_the_others_go(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    runs = [place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(3)]
    wait_until(has(worker, 3), "there are three")
    (tmp_path / "go").touch()
    for run in runs:
        place.end(run)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        place.run(step("a", "noop"))
        assert pids(worker)
    wait_until(lambda: len(pids(worker)) < 3, "not all of them stay")


def test_a_pool_keeps_its_minimum(settings: Settings) -> None:
    place = make(settings, POOLS + "min = 2\n")
    worker = place.worker()
    wait_until(has(worker, 2), "two are there")
    place.run(step("a", "noop"))
    os.kill(pids(worker)[0], signal.SIGKILL)
    wait_until(lambda: place.told(worker).size == 2 and len(pids(worker)) == 2, "the one that died is replaced")
    place.close()


# By target -----------------------------------------------------------------------------------------------------------


def test_targets_are_followed_up_and_down_while_steps_run(place: Place) -> None:
    worker = place.worker()
    runs = [place.start(*[stamped(place, f"s{n}_{k}", seconds=0.05) for k in range(20)]) for n in range(4)]
    for size in (1, 4, 2, 0, 3, 1):
        place.target((worker, size))
        wait_until(lambda size=size: place.told(worker).size == max(size, 0) or not size, f"there are {size}", 20)
    place.target((worker, 4))
    for run in runs:
        assert set(attempts(place.end(run)).values()) == {(1, 0)}
    assert sorted(Counter(name for name, _ in place.stamps()).values()) == [1] * 80


def test_a_message_wakes_a_worker_whose_target_is_zero_and_is_not_interrupted_by_it(place: Place) -> None:
    worker = place.worker()
    place.target((worker, 0))
    run = place.run(*[stamped(place, f"s{n}", *[f"s{n - 1}"][:n], seconds=0.3) for n in range(6)])
    assert set(attempts(run).values()) == {(1, 0)}
    assert len({pid for _, pid in place.stamps()}) == 1  # one process has run all of the chain
    wait_until(has(worker, 0), "then the target counts", 20)


def test_what_leaves_gives_back_the_items_that_it_has_not_begun(place: Place, tmp_path: Path) -> None:
    first, second = place.worker(), place.worker(pool="default")
    place.tell((first, 1), (second, STANDBY))
    items = step(
        "b",
        "wait_for",
        foreach=parse("{{ a }}"),
        with_={"path": str(tmp_path / "go"), "i": "{{ item }}"},
        max_parallel=None,
    )
    run = place.start(step("a", "numbers", with_={"n": 50}), items)
    wait_until(lambda: place.told(first).in_work, "it is at work")
    place.target((first, 0), (second, 4))
    wait_until(lambda: len(place.told(second).in_work) == 4, "others have its items", 20)
    (tmp_path / "go").touch()
    found = place.end(run)
    assert attempts(found)["b"][1] == 0
    assert len(found.output) == 50
    wait_until(has(first, 0), "it has gone")
    assert len(set(found.output)) > 1


def test_links_further_on_in_a_chain_are_left_to_others_and_each_is_run_once(place: Place, tmp_path: Path) -> None:
    first, second = place.worker(), place.worker()
    place.tell((first, 1), (second, STANDBY))
    chain = [step("s0", "wait_for", with_={"path": str(tmp_path / "go"), "mark": str(tmp_path / "begun")})]
    chain += [stamped(place, f"s{n}", f"s{n - 1}") for n in range(1, 10)]
    run = place.start(*chain)
    wait_until((tmp_path / "begun").exists, "the first link has begun")
    (child,) = pids(first)
    place.tell((first, STANDBY), (second, 1))  # with 0 it may be woken by what its own child leaves
    assert pids(first) == [child]
    (tmp_path / "go").touch()
    assert set(attempts(place.end(run)).values()) == {(1, 0)}
    assert [name for name, _ in place.stamps()] == [f"s{n}" for n in range(1, 10)]
    assert child not in {pid for _, pid in place.stamps()}
    wait_until(has(first, 0), "it has gone")


def test_what_leaves_stays_when_more_are_wanted_after_all(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    place.target((worker, 2))
    runs = [place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(2)]
    wait_until(lambda: len(place.told(worker).in_work) == 2, "two are at work")
    before = pids(worker)
    place.tell((worker, 0))
    place.tell((worker, 2))
    (tmp_path / "go").touch()
    for run in runs:
        place.end(run)
    assert sorted(pids(worker)) == sorted(before)


def test_a_worker_that_stands_by_takes_nothing_and_goes_on_later(place: Place) -> None:
    worker = place.worker()
    place.tell((worker, STANDBY))
    runs = [place.start(step("a", "noop")) for _ in range(3)]
    place.let_report(worker, 2.5)
    assert pids(worker) == []
    assert not any(place.told(worker).served)
    place.target((worker, 1))
    for run in runs:
        place.end(run)


def test_without_its_autoscaler_a_worker_goes_by_what_comes(place: Place) -> None:
    worker = place.worker()
    place.tell((worker, STANDBY))
    run = place.start(step("a", "noop"))
    place.engine.ledger.client.delete(keys.leader_key("autoscaler"))
    place.end(run)


def test_standing_by_outlives_a_broker_that_comes_back(place: Place, own_server: Server) -> None:
    place.settings = place.settings.evolve(broker_url=own_server.url)
    place.engine = Engine(place.settings)
    worker = place.worker()
    place.tell((worker, STANDBY))
    own_server.stop()
    wait_until(lambda: "consumer" in worker.log.read_text(), "it sees that the broker is away")
    own_server.start()
    run = place.start(step("a", "noop"))
    place.let_report(worker, 5.0)
    assert not any(place.told(worker).served)
    place.target((worker, 2))
    place.end(run)
    wait_until(has(worker, 2), "there are two")


def test_a_new_worker_takes_nothing_before_the_autoscaler_that_leads_has_told_it_to(place: Place) -> None:
    place.engine.ledger.client.set(keys.leader_key("autoscaler"), "a test")
    run = place.start(step("a", "pid"))
    worker = place.worker()
    place.let_report(worker, 1.0)
    assert (pids(worker), place.told(worker).size) == ([], 0)
    assert place.engine.pools.wait(0.1), "it has rung for it"
    place.target((worker, 1))
    place.end(run)


def test_an_autoscaler_that_leads_and_says_nothing_does_not_keep_a_worker_from_its_work(place: Place) -> None:
    place.engine.ledger.client.set(keys.leader_key("autoscaler"), "a test")
    place.worker()
    place.run(step("a", "pid"))


# Ends ----------------------------------------------------------------------------------------------------------------


def test_a_process_is_replaced_after_its_number_of_steps(settings: Settings) -> None:
    place = make(settings, POOLS + "max_tasks_per_process = 5\n")
    worker = place.worker()
    chains = [[stamped(place, f"s{c}_{n}", *[f"s{c}_{n - 1}"][:n]) for n in range(12)] for c in range(3)]
    runs = [place.start(*chain) for chain in chains]
    items = step("b", "pid", foreach=parse("{{ a }}"), with_={"i": "{{ item }}"})
    runs.append(place.start(step("a", "numbers", with_={"n": 40}), items))
    found = [place.end(run) for run in runs]
    for run in found:
        assert all(losses == 0 for _, losses in attempts(run).values())
    assert sorted(Counter(name for name, _ in place.stamps()).values()) == [1] * 36
    by_pid = Counter([pid for _, pid in place.stamps()] + found[-1].output)
    assert max(by_pid.values()) <= 5, by_pid
    assert "child_lost" not in worker.log.read_text()
    place.close()


def test_a_child_that_is_killed_while_others_leave_costs_one_loss_and_no_step(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    place.target((worker, 4))
    wait_until(has(worker, 4), "there are four")
    runs = [
        place.start(*[stamped(place, f"s{n}_{k}", *[f"s{n}_{k - 1}"][:k], seconds=0.3) for k in range(20)])
        for n in range(8)
    ]
    for _ in range(3):
        wait_until(lambda: len(place.told(worker).in_work) > 1, "some are at work", 20)
        place.target((worker, 1))
        place.let_report(worker)
        for pid in pids(worker)[:1]:
            os.kill(pid, signal.SIGKILL)
        place.target((worker, 4))
        wait_until(lambda: place.told(worker).size == 4, "there are four again", 20)
    losses = sum(lost for run in runs for _, lost in attempts(place.end(run)).values())
    counts = Counter(name for name, _ in place.stamps())
    assert len(counts) == 160
    assert sum(counts.values()) - 160 <= losses <= 3  # it may have been killed after its last write


def test_processes_that_die_at_their_start_are_a_fault_that_is_tried_again_ever_more_rarely(settings: Settings) -> None:
    mark = settings.project.parent / "kill"
    place = make(settings, killer=FORK_KILLER.format(mark=str(mark)))
    (settings.project / "flows.py").write_text(FLOWS)
    worker = place.worker()
    mark.touch()
    run = place.start(step("a", "pid"))
    told = wait_until(lambda: place.told(worker) if place.told(worker).fault else None, "it says so")
    assert "its processes die at their start (exit code 7)" in told.fault
    place.let_report(worker, 4.0)
    assert worker.log.read_text().count("process_failed_to_start") < 8
    mark.unlink()
    place.end(run)
    wait_until(lambda: not place.told(worker).fault, "the fault is gone")
    place.close()


def test_a_process_that_takes_long_to_start_is_given_time_to(place: Place) -> None:
    worker = place.worker()
    assert worker.process is not None
    run = place.start(step("a", "pid"))
    wait_until(has(worker, 1), "it starts")
    [child] = pids(worker)
    os.kill(child, signal.SIGSTOP)
    place.let_report(worker, 6.0)
    assert pids(worker) == [child]
    os.kill(child, signal.SIGCONT)
    assert place.end(run).output == child


def test_steps_that_kill_their_process_do_not_end_the_worker(place: Place) -> None:
    worker = place.worker()
    run = place.start(step("a", "die"))
    wait_until(lambda: place.queries.run(run, with_steps=False).state.is_end, "it is given up", 60)
    assert place.queries.run(run).steps[0].losses == place.settings.maximum_losses
    assert place.run(step("a", "noop")).state == "succeeded"
    assert place.told(worker).fault == ""


def test_a_worker_that_is_told_to_stop_says_so_finishes_and_withdraws(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    run = place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go"), "mark": str(tmp_path / "begun")}))
    wait_until((tmp_path / "begun").exists, "it is at work")
    assert worker.process is not None
    worker.process.terminate()
    wait_until(lambda: place.told(worker).is_draining, "it says that it drains")
    (tmp_path / "go").touch()
    assert worker.process.wait(timeout=20) == 0
    assert place.engine.pools.reports() == []
    assert str(place.queries.run(run).steps[0].state) == "succeeded"


# Limits --------------------------------------------------------------------------------------------------------------


def test_each_process_has_devices_of_its_own(settings: Settings, tmp_path: Path) -> None:
    place = make(settings, "[pools.default]\ngpu = 2\nmax = 8\nconcurrency = 8\n")
    worker = place.worker(concurrency=8, CUDA_VISIBLE_DEVICES="4,5,6,7,8")
    assert (place.told(worker).ceiling, place.told(worker).gpus) == (2, 5)
    place.target((worker, 2))
    wait_until(has(worker, 2), "there are two")
    items = step("b", "devices", foreach=parse("{{ a }}"))
    seen = {place.run(step("a", "devices")).output for _ in range(20)}
    assert seen <= {"4,5", "6,7"}
    assert items.is_fan_out
    place.close()


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ("gpu = 3", "pool default: gpu: each process wants 3 GPUs, and this machine has 2"),
        ("cpu = 4096", "pool default: cpu: each process wants 4096 cores"),
        ("memory = '9000 GB'", "pool default: memory: each process wants 9"),
    ],
)
def test_a_machine_without_room_for_one_process_is_refused_in_one_line(
    settings: Settings, pool: str, said: str
) -> None:
    place = make(settings, f"[pools.default]\n{pool}\n")
    worker = WorkerProcess(place.settings, CUDA_VISIBLE_DEVICES="0,1").start()
    assert worker.process is not None
    assert worker.process.wait(timeout=30) != 0
    text = worker.log.read_text()
    assert said in text
    assert "Traceback" not in text
    place.close()


# Threads -------------------------------------------------------------------------------------------------------------

THREADS = "[pools.default]\nkind = 'threads'\nmax = 20\nconcurrency = 20\nidle_after = '1s'\n"


@pytest.fixture
def threads(settings: Settings) -> Iterator[Place]:
    made = make(settings, THREADS)
    yield made
    made.close()


def test_twenty_steps_that_wait_run_at_once_in_threads(threads: Place, tmp_path: Path) -> None:
    worker = threads.worker(20)
    marks = [tmp_path / f"begun-{n}" for n in range(20)]
    given = [{"path": str(tmp_path / "go"), "mark": str(mark)} for mark in marks]
    runs = [threads.start(step("a", "wait_for", with_=one)) for one in given]
    wait_until(lambda: all(mark.exists() for mark in marks), "all of them run")
    wait_until(lambda: (threads.told(worker).size, len(threads.told(worker).in_work)) == (20, 20), "it says so")
    assert pids(worker) == []
    (tmp_path / "go").touch()
    assert worker.process is not None
    assert {threads.end(run).output for run in runs} == {worker.process.pid}
    wait_until(lambda: threads.told(worker).size == 0, "they are at rest")


def test_a_thread_that_has_ended_takes_the_next_message_at_once(settings: Settings) -> None:
    threads = make(settings, THREADS.replace("20", "1"))
    threads.worker(1)
    threads.run(step("a", "noop"))
    began = time.monotonic()
    for run in [threads.start(step("a", "noop")) for _ in range(60)]:
        threads.end(run)
    assert time.monotonic() - began < 4.0, "each was noticed by a timer, 0.1 s later"
    threads.close()


def test_what_threads_print_is_kept_apart(threads: Place) -> None:
    threads.worker(20)
    runs = [threads.start(step("a", "talk", with_={"name": f"t{n}"})) for n in range(8)]
    for n, run in enumerate(runs):
        threads.end(run)
        text = threads.engine.ledger.client.hget(f"orchestrator:{{{run}}}:logs", "a@1")
        assert [line.split()[0] for line in text.splitlines()] == [f"t{n}"] * 3


def test_a_fault_in_one_thread_does_not_end_the_others(threads: Place, tmp_path: Path) -> None:
    threads.worker(20)
    run = threads.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")}))
    bad = threads.start(step("a", "leave"))
    wait_until(lambda: threads.queries.run(bad, with_steps=False).state.is_end, "it has failed")
    assert (
        json.loads(threads.engine.ledger.client.hget(f"orchestrator:{{{bad}}}:attempts", "a@1"))["error"]["type"]
        == "SystemExit"
    )
    (tmp_path / "go").touch()
    assert attempts(threads.end(run)) == {"a": (1, 0)}


def test_threads_that_are_told_to_stop_finish_what_they_have(threads: Place, tmp_path: Path) -> None:
    worker = threads.worker(20)
    marks = [tmp_path / f"begun-{n}" for n in range(5)]
    given = [{"path": str(tmp_path / "go"), "mark": str(mark)} for mark in marks]
    runs = [threads.start(step("a", "wait_for", with_=one), stamped(threads, "b", "a")) for one in given]
    wait_until(lambda: all(mark.exists() for mark in marks), "they are at work")
    assert worker.process is not None
    worker.process.terminate()
    wait_until(lambda: threads.told(worker).is_draining, "it says that it drains")
    (tmp_path / "go").touch()
    assert worker.process.wait(timeout=20) == 0
    assert threads.stamps() == []
    second = threads.worker(20)
    for run in runs:
        assert set(attempts(threads.end(run)).values()) == {(1, 0)}
    assert len(threads.stamps()) == 5
    wait_until(lambda: sum(threads.told(second).served) >= 5, "it has served them")


def test_threads_follow_targets_and_stand_by(threads: Place, tmp_path: Path) -> None:
    worker = threads.worker(20)
    threads.target((worker, 3))
    wait_until(lambda: threads.told(worker).size == 3, "it has been told")
    runs = [threads.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(10)]
    wait_until(lambda: len(threads.told(worker).in_work) == 3, "three run")
    threads.tell((worker, STANDBY))
    (tmp_path / "go").touch()
    wait_until(lambda: (threads.told(worker).size, sum(threads.told(worker).served)) == (0, 3), "it takes no more")
    threads.target((worker, 5))
    for run in runs:
        threads.end(run)


# All at once ---------------------------------------------------------------------------------------------------------

#: A worker that hears of its target many times a second, and believes it.
HASTY = """
import workers.reporting, workers.sizing, workers.watch
workers.reporting.REPORT_S = workers.watch.PERIOD_S = 0.05
workers.sizing.WOKEN_S = 0.2
from orchestrator import task, workflow

@task
def one():
    return 1

@workflow
def w():
    return one()
"""


def test_each_of_two_thousand_steps_is_run_once_while_processes_come_and_go(settings: Settings) -> None:
    place = make(settings, flows=HASTY)
    workers = [place.worker(), place.worker()]
    chains = [[stamped(place, f"c{c}_{n}", *[f"c{c}_{n - 1}"][:n]) for n in range(10)] for c in range(100)]
    given = {"record": str(place.record), "name": "{{ 'f%s_%s' % (run.id, item) }}"}
    fan_out = [step("a", "numbers", with_={"n": 40}), step("b", "stamp", foreach=parse("{{ a }}"), with_=given)]
    runs = [
        place.start(*steps) for steps in (*chains, *[fan_out] * 20, *[[stamped(place, f"x{n}")] for n in range(200)])
    ]
    chance = random.Random(6)
    sizes: Counter[int] = Counter()
    left = set(runs)

    def look() -> bool:
        place.target(*[(worker, chance.choice((STANDBY, 0, 0, 1, 2, 3, 4))) for worker in workers])
        sizes[sum(len(pids(worker)) for worker in workers)] += 1
        left.difference_update([r for r in sorted(left)[:50] if place.queries.run(r, with_steps=False).state.is_end])
        time.sleep(0.1)
        return not left

    wait_until(look, "all runs end", 240)
    counts = Counter(name for name, _ in place.stamps())
    assert (len(counts), set(counts.values())) == (2000, {1})
    for run in runs:
        assert set(attempts(place.end(run)).values()) == {(1, 0)}
    assert len(sizes) > 3, sizes
    for worker in workers:
        for trouble in ("child_lost", "process_failed_to_start", "Timed out waiting", "step_was_taken_over"):
            assert trouble not in worker.log.read_text()
    place.close()
