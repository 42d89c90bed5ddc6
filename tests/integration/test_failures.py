"""What fails is tried again, waits, is kept, cancelled, sent back, gone on with: by a real worker and commands."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.deadletters import Filter
from orchestrator.durations import parse_time
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.project import load_in_subprocess
from orchestrator.runs import Run, RunState, StepRun
from orchestrator.settings import Settings
from orchestrator.timers import Timers
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, WorkerProcess, command, on_servers, wait_until
from tests.integration.conftest import Place

TASKS = '''
import logging, os, time
from orchestrator import Fail, Retry, StepCancelled
import trouble

def count(record):
    """Say how often this was called with that record, this time included."""
    with open(record, "a") as file:
        file.write("x\\n")
    with open(record) as file:
        return len(file.readlines())

def flaky(record, good=2, error="ValueError"):
    tries = count(record)
    logging.getLogger("shop").info("try %d", tries)
    if tries < good:
        raise getattr(trouble, error, ValueError)(f"not yet, try {tries}")
    return tries

def flaky_item(item, records, bad):
    return flaky(f"{records}/{item}", 2 if item in bad else 1)

def later(record, after):
    tries = count(record)
    if tries < 2:
        raise Retry(after=after, reason="come back later")
    return tries

def fatal(record):
    count(record)
    raise Fail("this is no use")

def needs(path):
    with open(path) as file:
        return file.read()

def one_cause(what):
    raise ValueError(f"cannot take {what}")

def other_cause(what):
    raise ValueError(f"cannot take {what}")

def login(token, user, password="x"):
    if user == "nobody":
        raise PermissionError(f"{user} is not let in with {token}")
    return f"{user} is in"

def hold(record, gate):
    count(record)
    try:
        while not os.path.exists(gate):
            time.sleep(0.01)
    except StepCancelled:
        count(record + ".stopped")
        raise
    return "held"

def echo(value=None):
    return value
'''
TROUBLE = """
class ShopError(Exception): pass
class NoStock(ShopError, LookupError): pass
class NoMoney(ShopError): pass
"""
SECRET = "correct-horse-battery"
DEPLOY_WAIT_S = 1


class Shop(Place):
    """A place whose workflows are YAML, with the commands."""

    def define(self, text: str) -> Workflow:
        """Write a definition and put it in force."""
        name = text.split()[1]
        path = self.settings.project / "workflows" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        project = load_in_subprocess(self.settings.project, defaults=self.settings.defaults)
        assert not project.faults, project.faults
        self.engine.ledger.publish_workflows([Plan.of(one) for one in project.workflows.values()])
        return project.workflows[name]

    def cli(self, *arguments: str, code: int = 0) -> str:
        """Run a command in this process; its stdout, or its one line of stderr if it is refused."""
        out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(os, "environ", on_servers(self.settings))
            patch.setattr(sys, "argv", ["orchestrator", *arguments, "--project", str(self.settings.project)])
            with pytest.raises(SystemExit) as end:
                main()
        told, refused = (text.buffer.getvalue().decode() for text in (out, err))  # type: ignore[attr-defined]
        assert end.value.code == code, (end.value.code, told, refused)
        return told or refused

    def attempts(self, run: str, slot: str) -> list[dict[str, Any]]:
        """Return the records of the attempts of a step or item, the first one first."""
        found = self.engine.ledger.client.hgetall(keys.run_key(run, "attempts"))
        records = {int(f.partition("@")[2]): json.loads(v) for f, v in found.items() if f.startswith(f"{slot}@")}
        return [records[n] for n in sorted(records)]

    def due_in_s(self, run: str, slot: str) -> float | None:
        """Return in how many seconds what waits in a run is due."""
        at = self.engine.ledger.client.zscore(keys.run_key(run, "timers"), slot)
        return None if at is None else (at - self.engine.ledger.now_ms()) / 1000

    def wait_state(self, run: str, step: str, state: str) -> None:
        wait_until(lambda: str(self.queries.step(run, step).state) == state, f"{step} is {state}")


@pytest.fixture(scope="module")
def module_shop(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    project = tmp_path_factory.mktemp("shop") / "project"
    project.mkdir()
    (project / "tasks.py").write_text(TASKS)
    (project / "trouble.py").write_text(TROUBLE)
    (project / "secret.txt").write_text(SECRET)
    (project / "orchestrator.toml").write_text(
        f'[settings]\ndeploy_wait_s = {DEPLOY_WAIT_S}\n[secrets]\nTOKEN = "file:{project}/secret.txt"\n'
    )
    url = server.url.removesuffix("/0") + "/2"
    settings = Settings.load(project, environ={}, data_dir=project.parent / "data", broker_url=url, ledger_url=url)
    worker = WorkerProcess(settings).start()
    made = Shop(settings, worker.log)
    timers = Timers(made.engine)
    timers.start()
    yield made
    timers.stop()
    code = worker.stop()
    made.engine.close()
    assert code == 0, worker.log.read_text()


@pytest.fixture
def shop(module_shop: Shop) -> Shop:
    """A shop with no dead letters yet."""
    module_shop.engine.ledger.client.delete(keys.DEAD_LETTERS)
    return module_shop


def by_id(run: Run) -> Mapping[str, StepRun]:
    return {one.id: one for one in run.steps}


def states(run: Run) -> dict[str, str]:
    return {one.id: str(one.state) for one in run.steps}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# Retries -------------------------------------------------------------------------------------------------------------


def test_a_step_succeeds_at_its_third_attempt_after_the_pauses_of_its_policy(shop: Shop, tmp_path: Path) -> None:
    record = tmp_path / "record"
    flow = shop.define(f"""
workflow: third
steps:
  a:
    task: tasks:flaky
    with: {{record: {record}, good: 3}}
    retry: {{maximum_attempts: 3, initial_interval: 100ms, backoff_coefficient: 3, jitter: none}}
  b: {{task: tasks:echo, with: {{value: "{{{{ a }}}}"}}}}
""")
    run = shop.run(flow)
    assert (run.state, run.output, by_id(run)["a"].attempts) == (RunState.SUCCEEDED, 3, 3)
    first, second, third = shop.attempts(run.id, "a")
    assert [one["state"] for one in (first, second, third)] == ["failed", "failed", "succeeded"]
    assert first["error"]["message"] == "not yet, try 1"
    assert second["started_at"] - first["finished_at"] >= 100
    assert third["started_at"] - second["finished_at"] >= 300
    assert list(shop.engine.dead_letters.all()) == []


def test_each_line_of_the_log_says_of_which_attempt_it_is(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define(f"""
workflow: logged
steps:
  a: {{task: tasks:flaky, with: {{record: {tmp_path}/record}}, retry: {{initial_interval: 1ms}}}}
""")
    run = shop.run(flow)
    ours = [line for line in map(_parsed, shop.log.read_text().splitlines()) if line.get("run") == run.id]
    tries = {line["event"]: line for line in ours if str(line["event"]).startswith("try")}
    assert tries.keys() == {"try 1", "try 2"}
    for n in (1, 2):
        line = tries[f"try {n}"]
        assert (line["attempt"], line["step"], line["workflow"], line["pool"]) == (n, "a", "logged", "default")
        assert line["event_id"] == "e1"
    assert "a #1 | INFO shop: try 1" in shop.cli("runs", "logs", run.id)


def _parsed(line: str) -> dict[str, Any]:
    found = json.loads(line) if line.startswith("{") else {}
    return found if isinstance(found, dict) else {}


def test_a_step_says_itself_when_it_is_tried_again_and_that_it_is_not(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define(f"""
workflow: asked
steps:
  soon: {{task: tasks:later, with: {{record: {tmp_path}/soon, after: 200ms}}}}
  fatal: {{task: tasks:fatal, with: {{record: {tmp_path}/fatal}}, retry: 5}}
""")
    run = shop.run(flow)
    first, second = shop.attempts(run.id, "soon")
    assert second["started_at"] - first["finished_at"] >= 200
    assert first["error"]["message"] == "come back later"
    assert states(run) == {"soon": "succeeded", "fatal": "failed"}
    assert lines(tmp_path / "fatal") == by_id(run)["fatal"].attempts == 1
    (letter,) = shop.engine.dead_letters.all(Filter(run=run.id))
    assert (letter.step, letter.reason, letter.detail) == ("fatal", "error", "Fail: this is no use")


def test_names_of_errors_and_of_their_bases_decide_what_is_tried_again(shop: Shop, tmp_path: Path) -> None:
    cases = {
        "all": ("NoStock", "{}", 3),
        "not_by_name": ("NoStock", "{non_retryable_errors: [NoStock]}", 1),
        "not_by_module": ("NoStock", "{non_retryable_errors: [trouble.NoStock]}", 1),
        "not_by_base": ("NoStock", "{non_retryable_errors: [trouble.ShopError]}", 1),
        "not_by_builtin_base": ("NoStock", "{non_retryable_errors: [LookupError]}", 1),
        "another": ("NoMoney", "{non_retryable_errors: [LookupError]}", 3),
        "only": ("NoMoney", "{retryable_errors: [ShopError]}", 3),
        "only_another": ("NoMoney", "{retryable_errors: [OSError]}", 1),
        "non_wins": ("NoStock", "{retryable_errors: [ShopError], non_retryable_errors: [NoStock]}", 1),
    }
    steps = "".join(
        f"  {name}:\n    task: tasks:flaky\n    with: {{record: {tmp_path}/{name}, good: 99, error: {error}}}\n"
        f"    retry: {{initial_interval: 1ms, {policy[1:]}\n"
        for name, (error, policy, _) in cases.items()
    )
    run = shop.run(shop.define(f"workflow: named\nsteps:\n{steps}"))
    tries = {name: lines(tmp_path / name) for name in cases}
    assert tries == {name: expected for name, (_, _, expected) in cases.items()}
    assert {one.id: one.attempts for one in run.steps} == tries


def test_items_of_one_part_are_tried_again_each_for_itself(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define(f"""
workflow: items
steps:
  f:
    task: tasks:flaky_item
    foreach: "{{{{ range(60) | list }}}}"
    with: {{item: "{{{{ item }}}}", records: {tmp_path}, bad: [0, 7, 8, 59]}}
    retry: {{initial_interval: 20ms, jitter: none}}
""")
    run = shop.run(flow)
    bad = {0, 7, 8, 59}
    assert run.output == [2 if n in bad else 1 for n in range(60)]
    assert [lines(tmp_path / str(n)) for n in range(60)] == run.output
    items, _ = shop.queries.items(run.id, "f", limit=100)
    assert [one.attempts for one in items] == run.output


def test_another_attempt_of_a_nested_workflow_is_another_run(shop: Shop, tmp_path: Path) -> None:
    shop.define(f"""
workflow: inner
steps:
  a: {{task: tasks:flaky, with: {{record: {tmp_path}/record}}}}
""")
    flow = shop.define("""
workflow: outer
steps:
  n: {workflow: inner, retry: {maximum_attempts: 3, initial_interval: 50ms, jitter: none}}
""")
    run = shop.run(flow)
    assert (run.state, run.output) == (RunState.SUCCEEDED, 2)
    last = by_id(run)["n"]
    children = [record["run"] for record in shop.attempts(run.id, "n")]
    assert len(set(children)) == 2
    assert last.run == children[1]
    assert [str(shop.queries.run(child).state) for child in children] == ["failed", "succeeded"]
    assert [(shop.queries.run(child).parent or {})["run"] for child in children] == [run.id] * 2


# Waiting -------------------------------------------------------------------------------------------------------------


def test_waiting_takes_its_time_and_no_worker(shop: Shop) -> None:
    """A hundred wait at a time, with two processes to run steps; a time that is past is not waited for."""
    at = datetime.now(UTC) + timedelta(seconds=1)
    flow = shop.define(f"""
workflow: waits
steps:
  short: {{sleep: 300ms}}
  due: {{until: "{at.isoformat()}"}}
  past: {{until: "2001-01-01T00:00:00Z"}}
  many: {{foreach: "{{{{ range(100) | list }}}}", sleep: "{{{{ 0.2 + (item % 5) / 10 }}}}"}}
  end: {{task: tasks:echo, with: {{value: "{{{{ [short, due, past, many | length] }}}}"}}}}
""")
    run = shop.run(flow)
    assert run.output == [None, None, None, 100]
    found = by_id(run)
    assert _took_s(found["short"]) >= 0.29
    assert parse_time(found["due"].finished_at) >= at - timedelta(milliseconds=2)
    assert _took_s(found["past"]) < 0.3
    items, _ = shop.queries.items(run.id, "many", limit=100)
    assert all(_took_s(one) >= 0.2 + (one.index or 0) % 5 / 10 - 0.01 for one in items)
    assert _took_s(found["many"]) < 10


def _took_s(step: StepRun) -> float:
    return float((parse_time(step.finished_at) - parse_time(step.started_at)).total_seconds())


def test_what_waits_for_long_is_a_time_in_the_ledger_and_holds_nothing(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define(f"""
workflow: week
steps:
  s: {{sleep: 7d}}
  r: {{task: tasks:later, with: {{record: {tmp_path}/record, after: 3d}}}}
""")
    run = shop.start(flow)
    wait_until(lambda: shop.due_in_s(run, "~s") and shop.due_in_s(run, "r"), "both wait")
    shop.wait_state(run, "r", "retrying")
    assert 7 * 86400 - 30 < (shop.due_in_s(run, "~s") or 0) <= 7 * 86400
    assert 3 * 86400 - 30 < (shop.due_in_s(run, "r") or 0) <= 3 * 86400
    client = shop.engine.ledger.client
    wait_until(lambda: not client.zcard(keys.run_key(run, "leases")), "nothing is leased")
    wait_until(lambda: not client.hlen("orchestrator.unacked"), "no message is held")
    assert client.llen("orchestrator.default.normal") == 0
    assert shop.run(shop.define("workflow: other\nsteps:\n  a: {task: tasks:echo, with: {value: 1}}\n")).output == 1
    assert shop.engine.cancel(run)
    assert states(shop.end(run)) == {"s": "cancelled", "r": "cancelled"}


def test_a_run_past_its_timeout_fails_and_its_hooks_see_why(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define("""
workflow: slow
timeout: 400ms
steps:
  s: {sleep: 1h}
  after: {task: tasks:echo, needs: [s]}
on_failure:
  tell: {task: tasks:echo, with: {value: "{{ run.error.message }}"}}
finally:
  clean: {task: tasks:echo, with: {value: "{{ run.state }}"}}
""")
    run = shop.run(flow)
    assert run.state is RunState.FAILED
    assert run.error is not None
    assert "timeout" in run.error["message"]
    found = by_id(run)
    assert found["tell"].output == run.error["message"]
    assert found["clean"].output == "failed"
    assert str(found["after"].state) in ("cancelled", "upstream_failed")
    assert shop.due_in_s(run.id, "~s") is None


def test_hooks_get_what_failed_and_outputs_that_are_there(shop: Shop, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    flow = shop.define(f"""
workflow: hooked
steps:
  good: {{task: tasks:echo, with: {{value: 7}}}}
  items: {{task: tasks:needs, foreach: [/dev/null, "{missing}"], with: {{path: "{{{{ item }}}}"}}}}
  bad: {{task: tasks:one_cause, with: {{what: it}}}}
  never: {{task: tasks:echo, needs: [bad]}}
on_failure:
  tell: {{task: tasks:echo, with: {{value: "{{{{ [run.failures, good, never, run.error.step] }}}}"}}}}
  then: {{task: tasks:echo, with: {{value: "{{{{ tell }}}}"}}}}
finally:
  clean: {{task: tasks:echo, with: {{value: "{{{{ run.state }}}}"}}}}
""")
    run = shop.run(flow)
    assert run.state is RunState.FAILED
    failures, good, never, step = by_id(run)["then"].output
    assert (good, never) == (7, None)
    assert sorted((one["step"], one.get("index"), one["type"]) for one in failures) == [
        ("bad", None, "ValueError"),
        ("items", 1, "FileNotFoundError"),
    ]
    assert step in ("bad", "items")
    assert by_id(run)["clean"].output == "failed"
    # Once in each episode; where the run succeeds only `finally`.
    missing.write_text("here")
    (letter,) = shop.engine.dead_letters.all(Filter(run=run.id, step="items"))
    shop.cli("dead-letters", "redrive", letter.id)
    again = shop.end(run.id)
    assert (again.episode, by_id(again)["clean"].output) == (2, "failed")
    assert [one["step"] for one in by_id(again)["tell"].output[0]] == ["bad"]


# A function that is not there ----------------------------------------------------------------------------------------


def test_a_function_that_is_not_there_yet_is_waited_for(shop: Shop) -> None:
    path = shop.settings.project / "deployed_late.py"
    run = shop.start(Workflow(name="late", steps=(Step(id="a", task="deployed_late:work"),)))
    wait_until(lambda: shop.due_in_s(run, "a"), "it is waited for")
    path.write_text("def work():\n    return 'here'\n")
    found = shop.end(run)
    assert (found.output, by_id(found)["a"].attempts) == ("here", 1)


def test_a_function_that_does_not_come_is_a_dead_letter_and_can_be_redriven(shop: Shop) -> None:
    run = shop.run(Workflow(name="lost", steps=(Step(id="a", task="never_there:work"),)))
    assert run.state is RunState.FAILED
    (letter,) = shop.engine.dead_letters.all(Filter(run=run.id))
    assert (letter.reason, letter.attempts) == ("unknown_task", 1)
    assert "never_there" in letter.detail
    assert "never_there" in shop.cli("dead-letters", "list", "--reason", "unknown_task")
    (shop.settings.project / "never_there.py").write_text("def work():\n    return 'at last'\n")
    assert "sent 1" in shop.cli("dead-letters", "redrive", letter.id)
    assert shop.end(run.id).output == "at last"


# Dead letters --------------------------------------------------------------------------------------------------------


def test_what_has_one_cause_has_one_fingerprint(shop: Shop) -> None:
    flow = shop.define("""
workflow: causes
params: {what: string}
steps:
  a: {task: tasks:one_cause, with: {what: "{{ params.what }}"}, retry: {maximum_attempts: 2, initial_interval: 1ms}}
  b: {task: tasks:other_cause, with: {what: "{{ params.what }}"}}
""")
    event = {"specversion": "1.0", "id": "the-event", "source": "test", "type": "test", "data": None}
    runs = [shop.run(flow, params={"what": what}, event=event).id for what in ("this", "that 2")]
    groups = json.loads(shop.cli("dead-letters", "list", "--group", "--workflow", "causes", "--json"))["items"]
    assert sorted((one["step"], one["count"]) for one in groups) == [("a", 2), ("b", 2)]
    assert len({one["fingerprint"] for one in groups}) == 2
    (letter,) = shop.engine.dead_letters.all(Filter(run=runs[1], step="a"))
    shown = json.loads(shop.cli("dead-letters", "show", letter.id, "--json"))
    known = {name: shown[name] for name in ("kind", "reason", "workflow", "run", "step", "index", "event_id", "queue")}
    assert known == {
        "kind": "step", "reason": "error", "workflow": "causes", "run": runs[1], "step": "a", "index": None,
        "event_id": "the-event", "queue": "orchestrator.default.normal",
    }  # fmt: skip
    assert shown["error"] == {"type": "ValueError", "message": "cannot take that 2"}
    assert (shown["count"], shown["attempts"], shown["losses"], shown["episode"]) == (1, 2, 0, 1)
    assert shown["event"]["id"] == "the-event"
    assert shown["input"] == {"what": "that 2"}
    assert [one["attempt"] for one in shown["attempt_records"]] == [1, 2]
    for one in shown["attempt_records"]:
        assert one["error"]["traceback"].startswith("Traceback")
        assert 'tasks.py", line' in one["error"]["traceback"]
        assert "workers/step.py" not in one["error"]["traceback"]


def test_mended_input_is_laid_over_arguments_and_secrets_are_nowhere(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define("""
workflow: login
params: {user: string}
steps:
  a: {task: tasks:login, with: {token: "{{ secrets.TOKEN }}", user: "{{ params.user }}", password: y}}
  b: {task: tasks:echo, with: {value: "{{ a }}"}}
""")
    run = shop.run(flow, params={"user": "nobody"})
    assert run.error is not None
    assert run.error["message"] == "nobody is not let in with ***"
    (letter,) = shop.engine.dead_letters.all(Filter(run=run.id))
    shown = json.loads(shop.cli("dead-letters", "show", letter.id, "--json"))
    assert shown["input"] == {"token": "***", "user": "nobody", "password": "y"}
    assert "sent 1" in shop.cli("dead-letters", "redrive", letter.id, "--input", '{"user": "somebody"}')
    again = shop.end(run.id)
    assert (again.state, again.episode, again.output) == (RunState.SUCCEEDED, 2, "somebody is in")
    assert list(shop.engine.dead_letters.all(Filter(run=run.id))) == []
    client = shop.engine.ledger.client
    everything = [text for key in client.scan_iter(count=1000) for text in _texts(client, key)]
    assert any("somebody is in" in text for text in everything)
    assert [text for text in everything if SECRET in text] == []
    assert SECRET not in shop.log.read_text()
    data = [path for path in shop.settings.data_dir.rglob("*") if path.is_file()]
    assert [path for path in data if SECRET.encode() in path.read_bytes()] == []


def _texts(client: Any, key: str) -> list[str]:
    """Return the key and all that is in it."""
    kind = client.type(key)
    if kind == "hash":
        return [key, *(part for pair in client.hgetall(key).items() for part in pair)]
    if kind == "list":
        return [key, *client.lrange(key, 0, -1)]
    if kind == "set":
        return [key, *client.smembers(key)]
    if kind == "zset":
        return [key, *client.zrange(key, 0, -1)]
    return [key, client.get(key)]


# Cancelling ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_run_stops_whatever_its_steps_are_at(shop: Shop, tmp_path: Path) -> None:
    """Running, queued, retrying, sleeping, waiting for a nested run that does all this too."""
    record, gate = tmp_path / "record", tmp_path / "gate"
    inside = f"""
  pause: {{sleep: 300ms}}
  hold: {{task: tasks:hold, needs: [pause], with: {{record: {record}, gate: {gate}}}}}
  again: {{task: tasks:later, with: {{record: "{tmp_path}/again-{{{{ run.id }}}}", after: 1h}}}}
  sleep: {{sleep: 1h}}
  never: {{task: tasks:flaky, needs: [sleep], with: {{record: {tmp_path}/never}}}}
"""
    shop.define(f"workflow: below\nsteps:{inside}")
    clean = 'finally:\n  clean: {task: tasks:echo, with: {value: "{{ run.state }}"}}\n'
    flow = shop.define(f"workflow: above\nsteps:{inside}  nested: {{workflow: below}}\n{clean}")
    run = shop.start(flow)
    child = wait_until(lambda: shop.queries.step(run, "nested").run, "the nested run is there")
    wait_until(lambda: lines(record) == 2, "both hold")
    queued = [shop.start(flow) for _ in range(3)]  # the two processes are busy
    for one in (run, child):
        wait_until(lambda one=one: shop.due_in_s(one, "~sleep"), "it sleeps")
        wait_until(lambda one=one: shop.due_in_s(one, "again"), "it waits for its next attempt")
    told = shop.cli("runs", "cancel", run, *queued)
    assert f"{run}: is being cancelled" in told
    found = shop.queries.run(run)
    assert (found.cancel_requested, states(found)["sleep"]) == (True, "cancelled")
    assert str(shop.queries.run(child, with_steps=False).state) == "running"
    gate.touch()
    for one in (run, child):
        ended = shop.end(one)
        assert ended.state is RunState.CANCELLED
        expected = dict.fromkeys(("again", "sleep", "never"), "cancelled")
        assert {name: states(ended)[name] for name in expected} == expected
    assert by_id(shop.queries.run(run))["clean"].output == "cancelled"
    for one in queued:
        assert shop.end(one).state is RunState.CANCELLED
    assert lines(record) == 2
    assert not (tmp_path / "never").exists()
    assert "nothing to cancel; it is cancelled" in shop.cli("runs", "cancel", run)
    assert list(shop.engine.dead_letters.all()) == []
    assert "not known" in shop.cli("runs", "cancel", "nope", code=1)


# Going on ------------------------------------------------------------------------------------------------------------


def _two_steps(shop: Shop, tmp_path: Path, name: str) -> Workflow:
    return shop.define(f"""
workflow: {name}
steps:
  first: {{task: tasks:flaky, with: {{record: {tmp_path}/first, good: 1}}}}
  second: {{task: tasks:needs, needs: [first], with: {{path: {tmp_path}/needed}}}}
  third: {{task: tasks:flaky, needs: [second], with: {{record: {tmp_path}/third, good: 1}}}}
output: "{{{{ [first, second, third] }}}}"
""")


def test_a_resumed_run_keeps_what_is_there(shop: Shop, tmp_path: Path) -> None:
    run = shop.run(_two_steps(shop, tmp_path, "resumed"))
    assert states(run) == {"first": "succeeded", "second": "failed", "third": "upstream_failed"}
    (tmp_path / "needed").write_text("mended")
    check = shop.cli("runs", "resume", run.id, "--dry-run")
    assert [line.split()[:2] for line in check.splitlines()[1:]] == [
        ["first", "kept"],
        ["second", "runs"],
        ["third", "runs"],
    ]
    assert shop.queries.run(run.id).episode == 1
    assert "goes on in episode 2" in shop.cli("runs", "resume", run.id)
    again = shop.end(run.id)
    assert (again.state, again.output) == (RunState.SUCCEEDED, [1, "mended", 1])
    assert lines(tmp_path / "first") == lines(tmp_path / "third") == 1
    assert "has succeeded; start it anew with" in shop.cli("runs", "resume", run.id, code=1)
    assert list(shop.engine.dead_letters.all()) == []


def test_a_rerun_is_a_new_run_of_the_same_event(shop: Shop, tmp_path: Path) -> None:
    event = {"specversion": "1.0", "id": "once", "source": "test", "type": "test", "data": {"x": 1}}
    run = shop.run(_two_steps(shop, tmp_path, "rerun"), event=event)
    (tmp_path / "needed").write_text("mended")
    new = shop.cli("runs", "rerun", run.id).strip()
    assert new != run.id
    found = shop.end(new)
    assert (found.state, found.output, found.event_id) == (RunState.SUCCEEDED, [2, "mended", 1], "once")
    assert shop.queries.run(run.id).state is RunState.FAILED
    assert "is not known" in shop.cli("runs", "rerun", "nope", code=1)


@pytest.mark.parametrize("verb", ["resume", "redrive"])
def test_two_who_do_the_same_at_once_have_one_effect(shop: Shop, tmp_path: Path, verb: str) -> None:
    run = shop.run(_two_steps(shop, tmp_path, f"twice-{verb}")).id
    (tmp_path / "needed").write_text("mended")
    together = threading.Barrier(2)
    letters = [one.id for one in shop.engine.dead_letters.all(Filter(run=run))]
    arguments = ["runs", "resume", run] if verb == "resume" else ["dead-letters", "redrive", *letters]

    def do(_: int) -> tuple[int, str]:
        together.wait()
        done = subprocess.run(
            command(*arguments, "--project", str(shop.settings.project)), env=on_servers(shop.settings),
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(do, range(2)))
    assert [code for code, _ in told].count(0) == 1, told
    assert all("Traceback" not in text for _, text in told)
    found = shop.end(run)
    assert (found.state, found.episode) == (RunState.SUCCEEDED, 2)
    assert lines(tmp_path / "first") == lines(tmp_path / "third") == 1


def test_a_cancelled_run_is_resumed_where_it_was_stopped(shop: Shop, tmp_path: Path) -> None:
    flow = shop.define(f"""
workflow: stopped
steps:
  first: {{task: tasks:flaky, with: {{record: {tmp_path}/first, good: 1}}}}
  pause: {{needs: [first], sleep: 1h}}
  last: {{task: tasks:flaky, needs: [again], with: {{record: {tmp_path}/last, good: 1}}}}
  again: {{task: tasks:later, needs: [first], with: {{record: {tmp_path}/again, after: 1h}}}}
""")
    run = shop.start(flow)
    shop.wait_state(run, "again", "retrying")
    wait_until(lambda: shop.due_in_s(run, "~pause"), "it pauses")
    shop.cli("runs", "cancel", run)
    assert shop.end(run).state is RunState.CANCELLED
    assert "episode 2" in shop.cli("runs", "resume", run)
    wait_until(lambda: lines(tmp_path / "last") == 1, "the last step has run")
    assert lines(tmp_path / "first") == 1
    assert lines(tmp_path / "again") == 2
    assert 3500 < (wait_until(lambda: shop.due_in_s(run, "~pause"), "it pauses anew")) <= 3600
    assert "is going on" in shop.cli("runs", "resume", run, code=1)
    shop.cli("runs", "cancel", run)
    shop.end(run)


def test_what_cannot_be_redriven_says_why_in_one_line(shop: Shop, tmp_path: Path) -> None:
    run = shop.run(_two_steps(shop, tmp_path, "cannot"))
    (letter,) = shop.engine.dead_letters.all(Filter(run=run.id))
    refusals = {
        ("redrive", letter.id, "--input", "[1]"): "--input must be a JSON object",
        ("redrive", letter.id, "--input", "{"): "--input is not JSON",
        ("redrive", letter.id, "--rate", "fast"): "--rate must be a number of letters a second",
        ("redrive", letter.id, "--timeout", "soon"): "--timeout",
        ("redrive", "ffffffff"): "dead letter 'ffffffff' is not known",
        ("redrive", "--step", "a", "--reason", "eror"): "did you mean 'error'?",
    }
    for arguments, message in refusals.items():
        told = shop.cli("dead-letters", *arguments, code=1)
        assert message in told
        assert len(told.splitlines()) == 1, told
    assert list(shop.engine.dead_letters.all(Filter(run=run.id))) == [letter]
    shop.engine.ledger.client.delete(*keys.run_keys(run.id))
    told = shop.cli("dead-letters", "redrive", letter.id, code=1)
    assert f"skipped {letter.id}: run {run.id} is gone, past its retention; discard the letter\n" in told
    assert "sent 0, skipped 1, left 0" in told
