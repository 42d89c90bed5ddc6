"""How many processes a machine has room for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SettingsError
from orchestrator.pools import PoolSettings
from workers.machine import Machine, gpus_of, visible_gpus

GB = 10**9
MACHINE = Machine(cores=4.0, memory=16 * GB, memory_available=8 * GB, gpus=("0", "1", "2"))


@pytest.mark.parametrize(
    ("pool", "ceiling"),
    [
        ({}, 8),
        ({"maximum": 3}, 3),
        ({"concurrency": 2}, 2),
        ({"memory": 4 * GB}, 4),
        ({"memory": 5 * GB}, 3),
        ({"cpu": 0.5}, 8),
        ({"cpu": 1.5}, 2),
        ({"cpu": 4.0}, 1),
        ({"gpu": 1}, 3),
        ({"gpu": 2}, 1),
        ({"memory": 4 * GB, "cpu": 0.1, "gpu": 1}, 3),
    ],
)
def test_the_least_of_what_there_is_bounds_the_processes(pool: dict[str, Any], ceiling: int) -> None:
    settings = PoolSettings(**{"maximum": 8, "concurrency": 8} | pool)
    assert MACHINE.ceiling("p", settings, is_declared=True) == ceiling


def test_a_concurrency_that_was_asked_for_goes_before_defaults_and_not_before_a_declared_maximum() -> None:
    pool = PoolSettings(maximum=2, concurrency=2)
    assert MACHINE.ceiling("p", pool, 6, is_declared=False) == 6
    assert MACHINE.ceiling("p", pool, 6, is_declared=True) == 2
    assert MACHINE.ceiling("p", pool, 1, is_declared=True) == 1


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"memory": 17 * GB}, "pool p: memory: each process wants 17GB, and this machine has 16GB of memory"),
        ({"cpu": 4.5}, "pool p: cpu: each process wants 4.5 cores, and this machine has 4 cores"),
        ({"gpu": 4}, "pool p: gpu: each process wants 4 GPUs, and this machine has 3"),
    ],
)
def test_a_machine_without_room_for_one_is_refused(pool: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        MACHINE.ceiling("p", PoolSettings(**pool), is_declared=True)
    assert str(error.value).startswith(said)
    assert "[pools.p]" in str(error.value)


def test_what_a_machine_is_given_is_found() -> None:
    found = Machine.look()
    assert found.cores > 0
    assert 0 < found.memory_available <= found.memory


@pytest.mark.parametrize(
    ("said", "gpus"),
    [("", ()), ("-1", ()), ("0", ("0",)), ("2, 5", ("2", "5")), ("0,-1,1", ("0",)), ("GPU-a", ("GPU-a",))],
)
def test_visible_gpus_are_those_that_cuda_would_take(said: str, gpus: tuple[str, ...], tmp_path: Path) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": said}, tmp_path) == gpus


def test_without_a_word_the_driver_tells_the_gpus(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path / "none") == ()
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert visible_gpus({}, tmp_path) == ("0", "1")


def test_no_two_processes_are_given_the_same_gpu() -> None:
    assert [gpus_of(slot, 2, ("4", "5", "6", "7")) for slot in range(2)] == ["4,5", "6,7"]


SMALL = Machine(cores=4.0, memory=10 * GB, memory_available=10 * GB, gpus=("0", "1"))


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({}, sys.maxsize),
        ({"memory": GB, "concurrency": 4}, 3),
        ({"memory": GB, "concurrency": 64}, 1),
        ({"memory": 6 * GB, "concurrency": 4}, 1),
        ({"memory": GB, "cpu": 1.0, "concurrency": 2}, 2),
        ({"gpu": 1, "concurrency": 1}, 2),
        ({"gpu": 3, "concurrency": 1}, 1),
    ],
)
def test_a_machine_has_room_for_as_many_workers_as_can_have_a_process(settings: dict[str, Any], workers: int) -> None:
    assert SMALL.workers(PoolSettings(maximum=100, **settings)) == workers
