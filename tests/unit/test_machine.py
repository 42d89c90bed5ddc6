"""How many processes and workers of a pool a machine has room for."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from orchestrator.pools import PoolSettings
from workers.machine import Machine

MACHINE = Machine(cores=4.0, memory=10**10, memory_available=10**10, gpus=("0", "1"))


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({}, sys.maxsize),
        ({"memory": 10**9, "concurrency": 4}, 3),
        ({"memory": 10**9, "concurrency": 64}, 1),
        ({"memory": 6 * 10**9, "concurrency": 4}, 1),
        ({"memory": 10**9, "cpu": 1.0, "concurrency": 2}, 2),
        ({"gpu": 1, "concurrency": 1}, 2),
        ({"gpu": 3, "concurrency": 1}, 1),
    ],
)
def test_a_machine_has_room_for_as_many_workers_as_can_have_a_process(settings: dict[str, Any], workers: int) -> None:
    assert MACHINE.workers(PoolSettings(maximum=100, **settings)) == workers
