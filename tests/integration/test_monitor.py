"""Flower on real runs: what it shows, what its revoke does, what it refuses; and what workers answer to Celery."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery.events import EventReceiver
from redis import Redis

from orchestrator.audit import Audit
from orchestrator.errors import SettingsError
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.retries import RetryPolicy
from orchestrator.runs import task_id
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, WorkerProcess, command, on_servers, wait_until
from tests.integration.conftest import TASKS, Place

MORE_TASKS = '''
def hold(item, gate, held):
    """All items but one return at once."""
    if item == held:
        pathlib.Path(gate).touch()
        time.sleep(120)
    return item

def fail_once(mark):
    if not os.path.exists(mark):
        open(mark, "w").close()
        raise ValueError("not yet")
    return "now"
'''


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MonitorProcess:
    """A real monitor, and a client of its HTTP API."""

    def __init__(self, settings: Settings, *arguments: str, **env: str) -> None:
        self.port = free_port()
        self.log = settings.data_dir.parent / f"monitor-{self.port}.log"
        self._command = command("monitor", "--project", str(settings.project), "--port", str(self.port), *arguments)
        self._env = on_servers(settings, **env)
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def start(self) -> MonitorProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)
        wait_until(self._answers, f"the monitor answers: {self.log.read_text()}")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/healthcheck").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        self.client.close()
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def tasks(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.client.get("/api/tasks").json()
        return found

    def states(self, run: str) -> dict[str, str]:
        """Return what it shows of a run: `step` or `step:index` -> (name, state), of each attempt the last event."""
        tasks = self.tasks().items()
        return {one.removeprefix(f"{run}:"): task["state"] for one, task in tasks if one.startswith(run)}


@pytest.fixture
def shop(settings: Settings) -> Iterator[Place]:
    (settings.project / "tasks.py").write_text(TASKS + MORE_TASKS)
    made = Place(settings, settings.project / "log")
    yield made
    made.engine.close()


@pytest.fixture
def monitor(settings: Settings, shop: Place) -> Iterator[MonitorProcess]:
    made = MonitorProcess(settings).start()
    yield made
    assert made.stop() == 0, made.log.read_text()


@pytest.fixture
def worker(start_worker: Callable[..., WorkerProcess], monitor: MonitorProcess) -> WorkerProcess:
    """A worker that knows that somebody watches."""
    made = start_worker(concurrency=2)
    wait_until(lambda: monitor.client.get("/workers?json=1").json()["data"], "it shows the worker")
    return made


def test_steps_are_shown_by_workflow_and_step_and_the_carrier_never(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess, tmp_path: Path
) -> None:
    once_more = RetryPolicy(maximum_attempts=2, initial_interval=0.01, maximum_interval=0.01)
    run = shop.run(
        Workflow(
            name="orders",
            steps=(
                Step(id="read", task="tasks:echo", with_={"value": 1}),
                Step(id="inline", task="tasks:noop", needs=("read",)),
                Step(id="each", task="tasks:square", foreach=[3, 4], with_={"number": parse("{{ item }}")}),
                Step(id="bad", task="tasks:fail", with_={"message": "no\nsuch luck"}),
                Step(id="below", task="tasks:noop", needs=("bad",)),
                Step(id="not_wanted", task="tasks:noop", if_=parse("{{ 1 == 2 }}")),
            ),
        )
    ).id
    expected = {
        "read:1": "SUCCESS", "inline:1": "SUCCESS", "each:1": "SUCCESS", "each:0:1": "SUCCESS", "each:1:1": "SUCCESS",
        "bad:1": "FAILURE", "not_wanted:1": "SKIPPED",
    }  # fmt: skip
    wait_until(lambda: monitor.states(run) == expected, "all that ran is shown")
    again = shop.start(
        Workflow(
            name="again",
            steps=(Step(id="a", task="tasks:fail_once", with_={"mark": f"{tmp_path}/mark"}, retry=once_more),),
        )
    )
    wait_until(lambda: monitor.states(again).get("a:1") == "RETRY", "the first attempt is shown")
    shop.engine.ledger.client.zadd(keys.run_key(again, "timers"), {"a": 1}, xx=True)
    shop.engine.fire(again)
    wait_until(lambda: monitor.states(again) == {"a:1": "RETRY", "a:2": "SUCCESS"}, "so is the second")
    tasks = monitor.tasks()
    item, bad = tasks[task_id(run, "each/1", 1)], tasks[task_id(run, "bad", 1)]
    assert (item["name"], item["args"], item["kwargs"]) == ("orders.each", run, "{'item': 1}")
    assert item["worker"].startswith("default@")
    assert item["runtime"] < 5
    assert item["started"] <= item["succeeded"]
    assert bad["exception"] == "ValueError: no such luck"
    assert tasks[task_id(again, "a", 1)]["exception"] == "ValueError: not yet"
    assert {task["name"].partition(".")[0] for task in tasks.values()} == {"orders", "again"}
    assert "orchestrator.step" not in monitor.client.get("/api/task/types").text


def test_a_worker_is_shown_with_its_queues_and_what_its_processes_run(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run = shop.start(Workflow(name="w", steps=(Step(id="a", task="tasks:wait_for", with_={"path": str(gate)}),)))
    wait_until(lambda: monitor.states(run) == {"a:1": "STARTED"}, "the step is at work")
    (shown,) = monitor.client.get("/workers?json=1").json()["data"]
    name = shown["hostname"]
    assert worker.process is not None
    assert name.startswith("default@")
    assert name.endswith(f":{worker.process.pid}")
    assert (shown["status"], shown["pid"]) == (True, worker.process.pid)
    told = monitor.client.get(f"/api/workers?refresh=1&workername={name}").json()[name]
    queues = {f"orchestrator.default.{priority}" for priority in ("high", "normal", "low")}
    assert {queue["name"] for queue in told["active_queues"]} == queues
    assert told["stats"]["pool"]["max-concurrency"] == 2
    assert told["stats"]["total"] == {}
    (active,) = told["active"]
    assert (active["id"], active["name"]) == (task_id(run, "a", 1), "w.a")
    assert active["worker_pid"] in told["stats"]["pool"]["processes"]
    assert told["registered"] == told["reserved"] == []
    assert "orchestrator.step" not in monitor.client.get(f"/worker/{name}").text
    gate.touch()
    shop.end(run)
    worker.stop()
    wait_until(lambda: not monitor.client.get("/workers?json=1").json()["data"][0]["status"], "it is shown as gone")


def test_a_revoke_cancels_one_item_and_its_neighbours_in_the_message_go_on(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    each = {"item": parse("{{ item }}"), "gate": str(gate), "held": 1}
    run = shop.start(Workflow(name="w", steps=(Step(id="f", task="tasks:hold", foreach=list(range(130)), with_=each),)))
    wait_until(gate.exists, "the item is at work")
    wait_until(lambda: monitor.states(run).get("f:1:1") == "STARTED", "it is shown")
    # As the button on its page does.
    headers = {"Origin": f"http://127.0.0.1:{monitor.port}", "Sec-Fetch-Site": "same-origin"}
    answer = monitor.client.post(
        f"/api/task/revoke/{task_id(run, 'f/1', 1)}", data={"terminate": "true"}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    ended = shop.end(run)
    assert ended.steps[0].items == {"succeeded": 129, "cancelled": 1}
    assert (ended.state, ended.error and ended.error["type"]) == ("failed", "StepCancelled")
    wait_until(lambda: monitor.states(run).get("f:1:1") == "REVOKED", "it is shown as revoked")
    assert set(monitor.states(run).values()) == {"SUCCESS", "REVOKED"}


def test_a_step_that_waits_for_its_next_attempt_is_revoked_at_once(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess
) -> None:
    later = RetryPolicy(maximum_attempts=2, initial_interval=600, maximum_interval=600)
    run = shop.start(Workflow(name="w", steps=(Step(id="a", task="tasks:fail", retry=later),)))
    wait_until(lambda: monitor.states(run) == {"a:1": "RETRY"}, "it has failed")
    monitor.client.post(f"/api/task/revoke/{task_id(run, 'a', 1)}")
    assert shop.end(run).steps[0].state == "cancelled"
    wait_until(lambda: monitor.states(run) == {"a:1": "REVOKED"}, "it is shown as revoked")


def test_a_step_that_sleeps_or_waits_for_a_nested_run_is_revoked(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess
) -> None:
    long = Step(id="long", task="tasks:stamp", with_={"record": "/dev/null", "name": "n", "seconds": 120})
    shop.engine.ledger.publish_workflows([Plan.of(Workflow(name="inner", steps=(long,)))])
    run = shop.start(Workflow(name="w", steps=(Step(id="nap", sleep="1h"), Step(id="nested", workflow="inner"))))
    wait_until(lambda: monitor.states(run) == {"nap:1": "SLEEPING", "nested:1": "WAITING"}, "both wait")
    for step in ("nap", "nested"):
        monitor.client.post(f"/api/task/revoke/{task_id(run, step, 1)}")
    assert [one.state for one in shop.end(run).steps] == ["cancelled", "cancelled"]
    wait_until(lambda: set(monitor.states(run).values()) == {"REVOKED"}, "they are shown as revoked")


def test_a_revoke_is_carried_out_when_no_worker_is_up(
    settings: Settings, shop: Place, monitor: MonitorProcess, tmp_path: Path
) -> None:
    run = shop.start(Workflow(name="w", steps=(Step(id="a", task="tasks:noop"), Step(id="b", task="tasks:noop"))))
    with (tmp_path / "dispatcher.log").open("wb") as log:
        role = subprocess.Popen(
            command("dispatcher", "--project", str(settings.project)), env=on_servers(settings), stdout=log, stderr=log
        )
    try:
        # Who listens is not told of: it is asked until it does.
        def is_cancelled() -> bool:
            assert monitor.client.post(f"/api/task/revoke/{task_id(run, 'a', 1)}").status_code == 200
            return shop.engine.ledger.state_of(run, "a") == "cancelled"

        wait_until(is_cancelled, "the step is cancelled")
        assert shop.engine.ledger.state_of(run, "b") == "queued"
        entries, _ = Audit(shop.engine.ledger).list()
        assert [(one["who"], one["action"], one["target"]) for one in entries] == [
            ("remote control", "revoke", f"{run}/a")
        ]
        for odd in ("nobody:a:1", "x", f"{run}:nowhere:1"):
            assert monitor.client.post(f"/api/task/revoke/{odd}").status_code == 200
        # Somebody with a Flower of their own: it asks workers for events, and workers ask the ledger.
        shop.engine.ledger.client.delete(keys.MONITORED)
        shop.engine.app.control.enable_events()
        wait_until(lambda: shop.engine.ledger.client.exists(keys.MONITORED), "workers are told that somebody watches")
    finally:
        role.terminate()
        assert role.wait(timeout=20) == 0, (tmp_path / "dispatcher.log").read_text()


def test_servers_that_were_away_are_watched_again(
    settings: Settings, own_server: Server, start_worker: Callable[..., WorkerProcess]
) -> None:
    """The worker has no process when they go. Nobody waits for events meanwhile."""
    away = settings.evolve(broker_url=own_server.url, ledger_url=own_server.url)
    (settings.project / "tasks.py").write_text(TASKS)
    shop = Place(away, settings.project / "log")
    worker = WorkerProcess(away).start()
    monitor = MonitorProcess(away).start()
    try:
        wait_until(lambda: monitor.client.get("/workers?json=1").json()["data"], "it shows the worker")
        port = own_server.url.rpartition(":")[2].partition("/")[0]
        own_server.stop()
        wait_until(lambda: "monitoring_waits" in worker.log.read_text(), "events are lost")
        own_server.start()
        assert own_server.url.rpartition(":")[2].partition("/")[0] == port
        one = Workflow(name="w", steps=(Step(id="a", task="tasks:noop"),))

        def is_shown() -> bool:
            run = shop.run(one).id
            return bool(wait_for_a_moment(lambda: monitor.states(run) == {"a:1": "SUCCESS"}))

        wait_until(is_shown, "steps are shown again", 60)
        wait_until(lambda: shop.engine.app.control.ping(timeout=1.0), "the worker answers again")
    finally:
        monitor.stop()
        assert worker.stop() == 0
        shop.engine.close()


def wait_for_a_moment(predicate: Callable[[], bool]) -> bool:
    until = time.monotonic() + 3
    while time.monotonic() < until:
        if predicate():
            return True
    return False


def test_what_does_not_fit_steps_is_refused_with_what_to_do_instead(
    shop: Place, monitor: MonitorProcess, worker: WorkerProcess
) -> None:
    control = shop.engine.app.control
    name = monitor.client.get("/workers?json=1").json()["data"][0]["hostname"]
    wait_until(lambda: control.ping(timeout=1.0), "the worker listens")
    for answers, said in (
        (control.rate_limit("w.a", "1/s", reply=True), "max_parallel"),
        (control.time_limit("w.a", soft=1, reply=True), "`timeout` of the step"),
        (control.pool_grow(1, reply=True), "orchestrator pools scale"),
        (control.pool_shrink(1, reply=True), "orchestrator pools scale"),
        (control.autoscale(4, 1, reply=True), "orchestrator.toml"),
        (control.cancel_consumer("orchestrator.default.normal", reply=True), "`pool` of the step"),
        (control.broadcast("shutdown", reply=True), "SIGTERM"),
        (control.broadcast("make_coffee", reply=True), "no command that is known here"),
    ):
        assert said in answers[0][name]["error"], answers
    assert control.revoke("x", reply=True)[0][name] == {
        "ok": "x: 'x' is no task id as RUN:STEP:ATTEMPT or RUN:STEP:INDEX:ATTEMPT"
    }
    for path, said in (
        (f"/api/worker/shutdown/{name}", "SIGTERM"),
        (f"/api/worker/pool/grow/{name}", "orchestrator pools scale"),
        (f"/api/worker/queue/cancel-consumer/{name}?queue=q", "`pool` of the step"),
        ("/api/task/rate-limit/w.a", "max_parallel"),
        ("/api/task/send-task/w.a", "orchestrator run"),
        ("/api/something/else", "nothing to change here"),
    ):
        answer = monitor.client.post(path)
        assert (answer.status_code, said in answer.text) == (403, True), answer.text
    assert shop.run(Workflow(name="w", steps=(Step(id="a", task="tasks:noop"),))).state == "succeeded"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-Forwarded-For": "10.0.0.1"},
    ],
)
def test_without_a_password_pages_of_other_sites_are_kept_out(monitor: MonitorProcess, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/api/task/revoke/r:a:1"), ("GET", "/api/tasks"), ("GET", "/"), ("OPTIONS", "/")):
        answer = monitor.client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert "without a password" in answer.text
        assert "access-control-allow-origin" not in answer.headers


def test_with_a_password_it_is_asked_for_also_of_other_machines(settings: Settings, shop: Place) -> None:
    monitor = MonitorProcess(
        settings, "--host", "0.0.0.0", ORCHESTRATOR_MONITOR_AUTH="env:MONITOR", MONITOR="ann:secret"
    ).start()
    try:
        for path in ("/", "/api/tasks", "/metrics", "/broker"):
            assert monitor.client.get(path).status_code == 401, path
            assert monitor.client.get(path, auth=("ann", "guess")).status_code == 401, path
            answer = monitor.client.get(path, auth=("ann", "secret"), headers={"Host": "monitor.example"})
            assert answer.status_code == 200, (path, answer.text)
        assert monitor.client.post("/api/task/revoke/r:a:1").status_code == 401
        assert monitor.client.post("/api/task/revoke/r:a:1", auth=("ann", "secret")).status_code == 200
        cross = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert monitor.client.post("/api/task/revoke/r:a:1", auth=("ann", "secret"), headers=cross).status_code == 403
        assert "secret" not in monitor.log.read_text()
    finally:
        monitor.stop()


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--host", "0.0.0.0"], {}, "monitor_host 0.0.0.0 is not this machine alone, and there is no password"),
        (["--host", "192.0.2.1"], {"A": "a:b"}, "cannot listen on 192.0.2.1 port"),
        (["--host", "x" * 70], {"A": "a:b"}, "cannot listen on xxx"),
        ([], {"A": "no colon"}, "monitor_auth: what env:A holds is not `user:password`"),
        ([], {"ORCHESTRATOR_MONITOR_AUTH": "env:NOWHERE"}, "the environment has no variable NOWHERE"),
        ([], {"ORCHESTRATOR_MONITOR_AUTH": "a:b"}, "monitor_auth must be env:NAME or file:PATH of `user:password`"),
        (["--port", "70000"], {}, "monitor_port must be at most 65535, not 70000"),
    ],
)
def test_what_it_cannot_start_with_is_one_line(
    settings: Settings, arguments: list[str], env: dict[str, str], said: str
) -> None:
    if "A" in env:
        env = {"ORCHESTRATOR_MONITOR_AUTH": "env:A"} | env
    done = refused(settings, ["--port", str(free_port()), *arguments], env)
    assert said in done


def test_a_port_in_use_is_one_line(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(settings, ["--port", str(port)], {})
        assert f"port {port} on 127.0.0.1 is in use; stop what listens there, or set monitor_port to another" in said


def refused(settings: Settings, arguments: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(
        command("monitor", "--project", str(settings.project), *arguments),
        env=on_servers(settings, **env), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_the_password_never_stands_in_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="never the password itself"):
        Settings.load(tmp_path, environ={}, monitor_auth="ann:secret")


def test_the_events_of_a_step_are_within_a_kilobyte_and_only_while_somebody_watches(
    settings: Settings, shop: Place, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    """On the wire, with the envelope: of a step that is alone, also if it takes so long that they are two messages."""
    seen: list[tuple[str, int]] = []
    received: list[dict[str, Any]] = []
    with told_of(settings, seen), events_of(shop, received):
        costs_of_events(shop, start_worker, tmp_path, seen, received)


@contextmanager
def told_of(settings: Settings, seen: list[tuple[str, int]]) -> Iterator[None]:
    """Collect the sizes of what is published of events: (channel, bytes)."""
    client = Redis.from_url(settings.ledger_url)
    with client.pubsub() as pubsub:
        pubsub.psubscribe(
            **{"*celeryev*": lambda m: seen.append((m["channel"].decode(), len(m["data"]) + len(m["channel"])))}
        )
        thread = pubsub.run_in_thread(sleep_time=0.1, daemon=True)
        wait_until(lambda: client.pubsub_numpat(), "it is listened to")
        yield
        thread.stop()
        thread.join()
    client.close()


@contextmanager
def events_of(shop: Place, received: list[dict[str, Any]]) -> Iterator[None]:
    """Collect events as Celery's tools read them."""
    with shop.engine.app.connection_for_read() as connection:
        receiver = EventReceiver(connection, app=shop.engine.app, handlers={"*": received.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True)
        thread.start()
        yield
        receiver.should_stop = True
        thread.join()


def costs_of_events(
    shop: Place,
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
    seen: list[tuple[str, int]],
    received: list[dict[str, Any]],
) -> None:
    start_worker()
    alone = Workflow(name="nightly-import-of-orders", steps=(Step(id="load_customers", task="tasks:noop"),))
    shop.run(alone)
    assert seen == []
    shop.engine.pools.monitor()
    wait_until(lambda: any(event["type"] == "worker-online" for event in received), "the worker says that it is there")

    def cost(workflow: Workflow) -> int:
        shop.engine.pools.monitor()
        seen.clear()
        run = shop.run(workflow).id
        wait_until(
            lambda: [e for e in received if e["type"] == "task-succeeded" and e["uuid"].startswith(run)], "it is told"
        )
        return sum(size for channel, size in seen if "task" in channel)

    assert cost(alone) <= 700
    stamp = {"record": f"{tmp_path}/stamps", "name": "a", "seconds": 1.5}
    long = Workflow(
        name="nightly-import-of-orders", steps=(Step(id="load_customers", task="tasks:stamp", with_=stamp),)
    )
    assert cost(long) <= 1024
    numbers = Step(id="numbers", task="tasks:numbers", with_={"n": 300})
    many = Step(id="each", task="tasks:echo", foreach=parse("{{ numbers }}"), with_={"value": 1}, needs=("numbers",))
    fan_out = Workflow(name="many", steps=(numbers, many))
    assert cost(fan_out) <= 100 * 302
    fields = {"hostname", "pid", "clock", "timestamp", "utcoffset", "uuid", "type", "local_received"}
    for event in received:
        if event["type"].startswith("task-"):
            assert fields <= event.keys()
    clocks = [event["clock"] for event in received if event["type"].startswith("task-")]
    assert clocks == sorted(clocks)
