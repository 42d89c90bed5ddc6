"""2,000 files at once, a third of them written slowly, while `up` is stopped and started twice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

from tests.acceptance.conftest import Up, settle
from tests.conftest import wait_until

COUNT = 2000

#: Writes COUNT files; every third is held open and written in pieces over some seconds, many of them at a time.
DROPPER = """
import sys, time
from pathlib import Path
inbox, count = Path(sys.argv[1]), int(sys.argv[2])
lines = 20
def body(n): return [f"{n},{lines},{i}\\n" for i in range(lines)]
slow = []
for n in range(count):
    if n % 3:
        (inbox / f"{n}.csv").write_text("".join(body(n)))
    else:
        file = (inbox / f"{n}.csv").open("w")
        file.write("".join(body(n)[:7])); file.flush()
        slow.append((n, file))
    if len(slow) == 200 or n == count - 1:
        for half in (slice(7, 14), slice(14, lines)):
            time.sleep(2.2)  # longer than the time after which a quiet file counts as settled
            for m, file in slow:
                file.write("".join(body(m)[half])); file.flush()
        for _, file in slow: file.close()
        slow = []
"""

FILES = {
    "tasks.py": '''
import os
def take(path, record):
    """Write down what was in the file: one line per call, on disk before the step ends."""
    with open(path) as file:
        lines = file.read().splitlines()
    number, wanted, _ = lines[0].split(",")
    descriptor = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, f"{number} {wanted} {len(lines)}\\n".encode())
    os.fsync(descriptor)
    os.close(descriptor)
    return int(number)
def check(number):
    return number
''',
    "workflows/take.yaml": """
workflow: take
on: [{file: {path: inbox, glob: "*.csv"}}]
steps:
  take: {task: "tasks:take", with: {path: "{{ event.data.path }}", record: RECORD}}
  check: {task: "tasks:check", with: {number: "{{ take }}"}}
""",
}


def test_every_file_becomes_one_run_and_none_is_taken_half_written(make_up: Callable[[dict[str, str]], Up]) -> None:
    up = make_up({"inbox/.gitkeep": ""})
    record = up.project.parent / "record"
    record.touch()
    up = make_up(FILES | {"workflows/take.yaml": FILES["workflows/take.yaml"].replace("RECORD", str(record))})
    up.start()
    up.wait_ready()
    dropper = subprocess.Popen([sys.executable, "-c", DROPPER, str(up.project / "inbox"), str(COUNT)])
    for _ in range(2):
        settle(4)  # in the middle of it
        assert up.stop() == 0
        settle(1)
        up.start()
    assert dropper.wait(timeout=120) == 0

    def lines() -> list[str]:
        return record.read_text().splitlines()

    wait_until(lambda: len({line.split()[0] for line in lines()}) == COUNT, f"all {COUNT} files were taken", 180)
    up.wait_ready()
    wait_until(lambda: not up.client().zcard("orchestrator:active"), "every run has ended", 60)
    half = [line for line in lines() if line.split()[1] != line.split()[2]]
    assert half == []
    runs = up.runs()
    assert Counter(run["state"] for run in runs) == {"succeeded": COUNT}
    # A step may have run again where `up` was stopped in it; a run never.
    assert len({run["id"] for run in runs}) == COUNT
    assert sorted(run["output"] for run in runs) == list(range(COUNT))
    assert up.client().llen("orchestrator.events") == 0
    assert up.client().hlen("orchestrator.unacked") == 0
