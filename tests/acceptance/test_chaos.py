"""The chaos harness in short: two minutes of random kills, and a kill at each named point (tests/chaos)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.workload import TRIGGERED
from tests.conftest import ROOT, environment


def _chaos(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.chaos", *arguments, "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1700)
    print(done.stdout)  # the figures, and how to repeat it
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    body: dict[str, Any] = json.loads(report.read_text())
    return body


def test_everything_ends_although_anything_is_killed(tmp_path: Path) -> None:
    report = _chaos(tmp_path, "--kills", "60", "--seed", "7", "--minutes", "4")
    assert sum(report["kills"].values()) == 60
    assert {"child", "worker", "server"} <= report["kills"].keys()
    assert sum(report["runs"].values()) > 200
    assert {"cancel", "resume", "redrive"} <= report["acts"].keys()
    assert set(TRIGGERED) <= report["runs"].keys()


@pytest.mark.timeout(1800)
def test_a_kill_at_each_named_point_is_repaired(tmp_path: Path) -> None:
    report = _chaos(tmp_path, "points", "--parallel", "4")
    assert all(point["ok"] for point in report["points"])
