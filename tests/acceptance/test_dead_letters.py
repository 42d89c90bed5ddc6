"""What fails is kept, mended, and sent back in measure; runs are cancelled and gone on with: `up` and the commands."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.bus import EventBus
from orchestrator.dispatcher import manual_event
from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.runs import run_id
from orchestrator.settings import Settings
from tests.acceptance.conftest import Up
from tests.conftest import command, environment, wait_until

MakeUp = Callable[[dict[str, str]], Up]

#: Step 12 of 20 fails as the run says until its code is mended.
_WORK = """
import os, time

def write(record, word):
    with open(record, "a") as file:
        file.write(word + "\\n")

def step(record, name, how="well"):
    write(record, name)
    if how == "raise":
        raise ValueError(f"cannot do {record}")
    if how == "exit":
        os._exit(3)
    if how == "hang":
        while True:
            time.sleep(0.05)
    return name
"""
_MENDED = _WORK.replace('if how == "', 'if how == "no longer ')


def _twenty() -> str:
    rows = [
        "workflow: twenty",
        "params: {record: string, how: string}",
        "steps:",
    ]
    for n in range(1, 21):
        needs = f", needs: [s{n - 1}]" if n > 1 else ""
        how = ', how: "{{ params.how }}"' if n == 12 else ""
        more = ", timeout: 1s" if n == 12 else ""
        rows.append(
            f'  s{n}: {{task: "work:step", with: {{record: "{{{{ params.record }}}}", name: s{n}{how}}}{needs}{more}}}'
        )
    return "\n".join(rows) + "\n"


_ITEMS = """
import time

def numbers(n):
    return list(range(n))

def take(item, record):
    with open(record, "a") as file:
        file.write(f"{item}\\n")
    if item is None or item % 100 == 7:
        raise ValueError(f"item {item} is bad")
    return item * 2

def joined(values):
    return [len(values), values]
"""
FILES = {
    "orchestrator.toml": "[settings]\nmaximum_losses = 2\ngrace_s = 2\n[pools.default]\nconcurrency = 2\n",
    "work.py": _WORK,
    "items.py": _ITEMS,
    "workflows/twenty.yaml": _twenty(),
    "workflows/items.yaml": """
workflow: items
params: {record: string}
steps:
  n: {task: "items:numbers", with: {n: 1000}}
  f: {task: "items:take", foreach: "{{ n }}", with: {item: "{{ item }}", record: "{{ params.record }}"}}
  j: {task: "items:joined", with: {values: "{{ f }}"}}
output: "{{ j }}"
""",
    "workflows/held.yaml": """
workflow: held
params: {record: string}
steps:
  first: {task: "work:step", with: {record: "{{ params.record }}", name: first}}
  wait: {sleep: 1h, needs: [first]}
  last: {task: "work:step", needs: [wait], with: {record: "{{ params.record }}", name: last}}
""",
    "workflows/nests.yaml": """
workflow: nests
params: {record: string}
steps:
  inner: {workflow: held, with: {record: "{{ params.record }}"}}
  items: {workflow: held, foreach: [1, 2], with: {record: "{{ params.record }}"}}
  after: {task: "work:step", needs: [inner], with: {record: "{{ params.record }}", name: after}}
""",
    "workflows/three.yaml": """
workflow: three
params: {record: string, how: {type: string, default: raise}}
steps:
  a: {task: "work:step", with: {record: "{{ params.record }}", name: a}}
  b: {task: "work:step", needs: [a], with: {record: "{{ params.record }}", name: b}}
  old: {task: "work:step", needs: [a], with: {record: "{{ params.record }}", name: old}}
  c: {task: "work:step", needs: [b], with: {record: "{{ params.record }}", name: c, how: "{{ params.how }}"}}
""",
}


@pytest.fixture
def up(make_up: MakeUp) -> Up:
    made = make_up(FILES)
    made.start()
    made.wait_ready()
    return made


def start(up: Up, workflow: str, **given: Any) -> str:
    return up.ask("run", workflow, "--input", json.dumps(given)).strip()


def start_many(up: Up, workflow: str, given: list[dict[str, Any]]) -> list[str]:
    """Start runs as the command does, without a process for each."""
    url = EmbeddedServer.url_of(up.data_dir)
    settings = Settings.load(up.project, environ={}, data_dir=up.data_dir, broker_url=url, ledger_url=url)
    engine = Engine(settings)
    events = [manual_event(workflow, one, event_id=str(n)) for n, one in enumerate(given)]
    EventBus(engine.app).publish(events)
    engine.close()
    return [run_id(workflow, event.source, event.id) for event in events]


def ended(up: Up, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(up.ask("runs", "wait", run, "--timeout", "60s", "--json", code=None))
    return found


def shown(up: Up, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(up.ask("runs", "show", run, "--json"))
    return found


def states(run: dict[str, Any]) -> dict[str, str]:
    return {step["id"]: step["state"] for step in run["steps"]}


def letters(up: Up, *arguments: str) -> list[dict[str, Any]]:
    text = up.ask("dead-letters", "list", "--json", "--limit", "1000", *arguments)
    items: list[dict[str, Any]] = json.loads(text)["items"]
    return items


def words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def refused(up: Up, *arguments: str) -> str:
    """Run a command that is refused; what it says in its one line."""
    done = subprocess.run(
        command(*arguments, "--project", str(up.project)), capture_output=True, text=True, env=environment(),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def wait_for_new_code(up: Up, before: int | None) -> None:
    wait_until(lambda: up.pid_of("worker") not in (None, before), "a new generation of workers is there", 60)


# The main story ------------------------------------------------------------------------------------------------------

WAYS = {"raise": "error", "exit": "worker_lost", "hang": "timeout"}


def test_step_12_of_20_fails_in_three_ways_is_mended_and_all_go_on(up: Up, tmp_path: Path) -> None:
    each = 3
    given = [{"record": str(tmp_path / f"{how}-{n}"), "how": how} for n in range(each) for how in WAYS]
    runs = start_many(up, "twenty", given)
    wait_until(lambda: len(letters(up)) == len(runs), "each run has its letter", 120)
    groups = json.loads(up.ask("dead-letters", "list", "--group", "--json"))["items"]
    assert sorted((one["reason"], one["step"], one["count"]) for one in groups) == sorted(
        (reason, "s12", each) for reason in WAYS.values()
    )
    by_reason = {one["reason"]: one["fingerprint"] for one in groups}
    assert len(set(by_reason.values())) == len(WAYS)
    table = up.ask("dead-letters", "list", "--group")
    assert all(fingerprint in table for fingerprint in by_reason.values())
    for run in runs:
        assert states(ended(up, run)) == {f"s{n}": "succeeded" if n < 12 else "failed" if n == 12 else "upstream_failed"
                                          for n in range(1, 21)}  # fmt: skip

    # A canary whose code was not mended stops the rest.
    place = ("--project", str(up.project))
    done = subprocess.run(
        command("dead-letters", "redrive", "--fingerprint", by_reason["error"], "--canary", "1", *place),
        capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"failed as before: fingerprint {by_reason['error']} came back" in done.stderr
    assert f"sent 1 (0 canaries succeeded), skipped 0, left {each - 1}" in done.stdout
    again = letters(up, "--reason", "error")
    assert sorted(one["count"] for one in again) == [1] * (each - 1) + [2]

    before = up.pid_of("worker")
    (up.project / "work.py").write_text(_MENDED)
    wait_for_new_code(up, before)
    for fingerprint in by_reason.values():
        told = up.ask("dead-letters", "redrive", "--fingerprint", fingerprint, "--canary", "1", "--rate", "50/s")
        assert f"sent {each} (1 canaries succeeded), skipped 0, left 0" in told
    for run, one in zip(runs, given, strict=True):
        assert ended(up, run)["state"] == "succeeded"
        done_steps = words(Path(one["record"]))
        tries = {"raise": 2, "exit": 3, "hang": 2}[one["how"]]
        assert [word for word in done_steps if word != "s12"] == [f"s{n}" for n in range(1, 21) if n != 12]
        # The one that was the canary in vain has had another.
        assert done_steps.count("s12") in (tries, tries + (one["how"] == "raise"))
    assert letters(up) == []


def test_ten_bad_items_of_a_thousand_are_mended_and_the_join_sees_all(up: Up, tmp_path: Path) -> None:
    record = tmp_path / "record"
    run = start(up, "items", record=str(record))
    found = ended(up, run)
    assert states(found) == {"n": "succeeded", "f": "failed", "j": "upstream_failed"}
    assert next(step for step in found["steps"] if step["id"] == "f")["items"] == {"failed": 10, "succeeded": 990}
    bad = letters(up)
    assert sorted(one["index"] for one in bad) == [n * 100 + 7 for n in range(10)]
    assert len({one["fingerprint"] for one in bad}) == 1
    told = up.ask("dead-letters", "redrive", "--run", run, "--input", '{"item": 500}', "--canary", "2")
    assert "sent 10 (2 canaries succeeded), skipped 0, left 0" in told
    again = ended(up, run)
    assert again["state"] == "succeeded"
    assert again["output"] == [1000, [1000 if n % 100 == 7 else n * 2 for n in range(1000)]]
    assert sorted(words(record), key=int) == sorted([*map(str, range(1000)), *["500"] * 10], key=int)
    assert letters(up) == []


# Cancelling ----------------------------------------------------------------------------------------------------------


def test_nested_runs_are_cancelled_and_stay_so_although_all_is_killed(up: Up, tmp_path: Path) -> None:
    record = tmp_path / "record"
    run = start(up, "nests", record=str(record))
    children = wait_until(lambda: _nested(up, run, 3), "the nested runs are there")
    wait_until(lambda: words(record).count("first") == 3, "all three wait")
    client = up.client()
    wait_until(
        lambda: all(client.zscore(f"orchestrator:{{{child}}}:timers", "~wait") for child in children), "they sleep"
    )
    client.close()
    assert up.process is not None
    family = [*psutil.Process(up.process.pid).children(recursive=True), psutil.Process(up.process.pid)]
    told = up.ask("runs", "cancel", run)
    for process in family:
        os.kill(process.pid, signal.SIGKILL)
    up.process.wait()
    assert run in told
    up.start()
    up.wait_ready()
    for one in (run, *children):
        wait_until(lambda one=one: shown(up, one)["state"] == "cancelled", f"{one} is cancelled", 60)
    assert states(shown(up, run))["after"] == "cancelled"
    assert words(record) == ["first"] * 3
    assert letters(up) == []


def _nested(up: Up, run: str, count: int) -> list[str]:
    inner = json.loads(up.ask("runs", "show", run, "--step", "inner", "--json"))
    items = json.loads(up.ask("runs", "show", run, "--step", "items", "--json"))
    found = [inner.get("run"), *(one.get("run") for one in items.get("items") or [])]
    return [one for one in found if one] if len([one for one in found if one]) == count else []


def test_a_worker_that_was_offline_does_not_begin_what_was_cancelled(up: Up, tmp_path: Path) -> None:
    """It is stopped with what it had taken and what waits for it."""
    worker = up.pid_of("worker")
    assert worker is not None
    stopped = [psutil.Process(worker), *psutil.Process(worker).children(recursive=True)]
    for process in stopped:
        process.suspend()
    records = [tmp_path / f"record{n}" for n in range(4)]
    runs = start_many(up, "three", [{"record": str(record), "how": "well"} for record in records])
    wait_until(lambda: len(up.runs(state="running")) + len(up.runs(state="queued")) == len(runs), "the runs are there")
    up.ask("runs", "cancel", *runs[1:])
    for process in stopped:
        process.resume()
    assert ended(up, runs[0])["state"] == "succeeded"
    for run, record in zip(runs[1:], records[1:], strict=True):
        found = ended(up, run)
        assert (found["state"], set(states(found).values())) == ("cancelled", {"cancelled"})
        assert words(record) == []


def test_steps_at_work_get_a_soft_stop_and_then_a_hard_one(make_up: MakeUp, tmp_path: Path) -> None:
    work = """
import time
from orchestrator import StepCancelled
def write(record, word):
    with open(record, "a") as file:
        file.write(word + "\\n")
def polite(record):
    write(record, "began")
    try:
        while True:
            time.sleep(0.05)
    except StepCancelled:
        write(record, "cleaned")
        raise
def stubborn(record):
    write(record, "began")
    while True:
        try:
            while True:
                time.sleep(0.05)
        except BaseException:
            write(record, "no")
"""
    flow = (
        "workflow: {0}\nparams: {{record: string}}\nsteps:\n"
        "  a: {{task: 'work:{0}', with: {{record: '{{{{ params.record }}}}'}}}}\n"
    )
    flows = {f"workflows/{name}.yaml": flow.format(name) for name in ("polite", "stubborn")}
    up = make_up({"orchestrator.toml": FILES["orchestrator.toml"], "work.py": work} | flows)
    up.start()
    up.wait_ready()
    records = {name: tmp_path / name for name in ("polite", "stubborn")}
    runs = {name: start(up, name, record=str(record)) for name, record in records.items()}
    for record in records.values():
        wait_until(lambda record=record: words(record) == ["began"], "it has begun")
    up.ask("runs", "cancel", *runs.values())
    for run in runs.values():
        found = ended(up, run)
        assert (found["state"], states(found)) == ("cancelled", {"a": "cancelled"})
    assert words(records["polite"]) == ["began", "cleaned"]
    assert words(records["stubborn"])[:2] == ["began", "no"]
    assert words(records["stubborn"]).count("began") == 1


# Resuming with another definition ------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_a_mended_definition(up: Up, tmp_path: Path) -> None:
    record = tmp_path / "record"
    run = start(up, "three", record=str(record))
    assert states(ended(up, run)) == {"a": "succeeded", "b": "succeeded", "old": "succeeded", "c": "failed"}
    path = up.project / "workflows" / "three.yaml"
    text = FILES["workflows/three.yaml"].replace("name: b}", "name: b2}").replace("raise", "well")
    text = "".join(line for line in text.splitlines(keepends=True) if "old:" not in line)
    path.write_text(text + '  d: {task: "work:step", needs: [c], with: {record: "{{ params.record }}", name: d}}\n')
    wait_until(lambda: "definitions changed" in up.text(), "the definition is in force")

    told = [line.split(maxsplit=1) for line in up.ask("runs", "resume", run, "--dry-run").splitlines()]
    assert ["a", "kept"] in [[word.strip() for word in row] for row in told]
    plan = {row[0]: row[1] for row in told if len(row) == 2}
    assert plan["b"].split("  ")[0] == "runs again"
    assert "its definition changed (with)" in plan["b"]
    assert "runs after b" in plan["c"]
    assert "gone" in plan["old"]
    assert "runs again" in plan["d"]
    as_json = json.loads(up.ask("runs", "resume", run, "--dry-run", "--json"))
    assert (as_json["definition_changed"], as_json["keeps"], as_json["gone"]) == (True, ["a"], ["old"])
    assert set(as_json["again"]) == {"b", "c", "d"}
    assert shown(up, run)["episode"] == 1

    # Nobody is there to be asked.
    said = refused(up, "runs", "resume", run)
    assert "the definition has changed" in said
    assert "--yes" in said
    assert "--keep-definition" in said
    assert shown(up, run)["episode"] == 1
    # Somebody is, and says no.
    assert _answer(up, "n", "runs", "resume", run) != 0
    assert shown(up, run)["episode"] == 1

    assert "goes on in episode 2" in up.ask("runs", "resume", run, "--yes")
    found = ended(up, run)
    assert (found["state"], found["episode"]) == ("failed", 2)  # its parameter was resolved when it began
    assert [word for word in words(record) if word != "old"] == ["a", "b", "c", "b2", "c"]


def _answer(up: Up, answer: str, *arguments: str) -> int:
    """Run a command on a terminal where somebody answers."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments, "--project", str(up.project)), stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while b"go on with the one in force?" not in text:
        text += os.read(ours, 4096)
    os.write(ours, answer.encode() + b"\n")
    try:
        while os.read(ours, 4096):
            pass
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=60)


def test_two_people_at_once_have_one_effect(up: Up, tmp_path: Path) -> None:
    record = tmp_path / "record"
    run = start(up, "three", record=str(record))
    ended(up, run)
    before = up.pid_of("worker")
    (up.project / "work.py").write_text(_MENDED)
    wait_for_new_code(up, before)

    def do(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments, "--project", str(up.project)), capture_output=True, text=True, env=environment(),
            stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(do, [("runs", "resume", run), ("dead-letters", "redrive", "--run", run)]))
    assert "Traceback" not in "".join(one.stdout + one.stderr for one in done)
    found = ended(up, run)
    assert (found["state"], found["episode"]) == ("succeeded", 2)
    assert words(record).count("c") == 2
    assert words(record).count("a") == 1
    assert letters(up) == []
