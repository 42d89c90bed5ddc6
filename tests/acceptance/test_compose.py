"""docker-compose.yml on a real Docker Engine: it comes up, works, survives kills, and stops cleanly.

Where no registry can be reached the base images are stand-ins (infra/docker/stand-ins.sh). The tests share what they
bring up, which takes a minute or two, and run in order: the last one stops it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.docker_engine import (
    Compose,
    DockerEngine,
    EngineCannotRunError,
    is_impossible,
    is_missing,
    is_required,
)
from tests.conftest import ROOT, wait_until, write_project

IMAGE = "orchestrator:0.1.0"
MOST_IMAGE_MB = 250
#: Services that make something at the first start, and are done.
ONCE = {"secrets", "token"}
ROLES = {"dispatcher", "triggers", "beat", "gateway", "worker", "autoscaler", "flower"}

SLOW = {
    "slow.py": """
import socket
import time


def work(seconds):
    time.sleep(seconds)
    return socket.gethostname()
""",
    # One of them for each entry of the list that is delivered.
    "workflows/slow.yaml": """
workflow: slow
on: [{webhook: {path: slow}}]
steps:
  work: {task: "slow:work", foreach: "{{ event.data.body }}", with: {seconds: "{{ item }}"}}
output: "{{ work }}"
""",
}
INVOICE = "article,quantity,unit_price\nbolts,3,2.5\nnuts,2,1\n"


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    why = is_impossible()
    if not why and (why := is_missing()) and is_required():
        pytest.fail(f"{why}; CI and REQUIRE_DOCKER do not let these tests be skipped")
    if why:
        pytest.skip(f"NOTHING WAS TESTED IN CONTAINERS: {why}")
    running = DockerEngine()
    try:
        try:
            running.start()
        except EngineCannotRunError as exc:
            pytest.skip(f"NOTHING WAS TESTED IN CONTAINERS: dockerd does not run on this machine: {exc}")
        yield running
    finally:
        running.stop()


def _free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def compose(engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """All of it, up, from a copy of what is in the repository."""
    tree = tmp_path_factory.mktemp("compose") / "orchestrator"
    others = shutil.ignore_patterns(
        ".git", ".venv", "tests", "__pycache__", ".*_cache", ".orchestrator", "*.whl", "*.csv"
    )
    shutil.copytree(ROOT, tree, ignore=others)
    write_project(tree / "examples" / "shop", SLOW)
    _let_others_read(tree)
    gateway, flower, prometheus, grafana = _free_ports(4)
    began = time.monotonic()
    engine.run(
        str(tree / "infra" / "docker" / "stand-ins.sh"), "python", "valkey", "prometheus", "wheels", timeout_s=600
    )
    made = time.monotonic()
    up = Compose(
        engine, tree,
        ORC_GATEWAY_PORT=gateway, ORC_FLOWER_PORT=flower, ORC_PROMETHEUS_PORT=prometheus, ORC_GRAFANA_PORT=grafana,
    )  # fmt: skip
    up("up", "-d", "--build", timeout_s=600)
    print(f"stand-ins {made - began:.0f} s, up {time.monotonic() - made:.0f} s")
    wait_until(lambda: _answers(up), f"the gateway answers:\n{up.logs()}", 60)
    yield up
    up("down", "--volumes")


def _let_others_read(tree: Path) -> None:
    """The roles are not root, and the folders of tests are root's alone."""
    for directory in (tree, *tree.parents):
        if directory == Path("/"):
            break
        directory.chmod(directory.stat().st_mode | 0o011)
    for path in tree.rglob("*"):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def _url(compose: Compose, service: str, port: int) -> str:
    (binding,) = compose.container(service)["NetworkSettings"]["Ports"][f"{port}/tcp"]
    return f"http://{binding['HostIp']}:{binding['HostPort']}"


def _answers(compose: Compose) -> bool:
    try:
        return httpx.get(f"{_url(compose, 'gateway', 8080)}/api/v1/runs", timeout=5).status_code == 401
    except httpx.HTTPError:
        return False


def _token(compose: Compose) -> dict[str, str]:
    return {"Authorization": f"Bearer {compose('exec', '-T', 'dispatcher', 'cat', '/secrets/token').strip()}"}


def _runs(compose: Compose, workflow: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = compose.ask("runs", "list", "--workflow", workflow, "--limit", "1000")["items"]
    return found


def _drop(compose: Compose, name: str) -> str:
    """Put a file into the shared folder, and return its path as the roles see it."""
    (compose.tree / "examples" / "shop" / "inbox" / name).write_text(INVOICE)
    return f"/project/inbox/{name}"


def _ended(compose: Compose, path: str) -> dict[str, Any] | None:
    """Return the run of a file, once it has ended."""
    found = [run for run in _runs(compose, "invoices") if run["input"]["path"] == path]
    assert len(found) <= 1, found
    return found[0] if found and found[0]["finished_at"] else None


def _deliver(url: str, seconds: list[float], key: str) -> bool:
    """Deliver something for `slow`; whether it was accepted."""
    try:
        answer = httpx.post(f"{url}/hooks/slow", json=seconds, headers={"Idempotency-Key": key}, timeout=5)
    except httpx.HTTPError:
        return False
    return answer.status_code == 202


def test_a_file_in_the_shared_folder_becomes_a_finished_run(compose: Compose) -> None:
    path = _drop(compose, "first.csv")
    run = wait_until(lambda: _ended(compose, path), f"its run has ended:\n{compose.logs()}", 60)
    assert (run["state"], run["output"]["total"]) == ("succeeded", 9.5)


def test_one_small_image_serves_every_role_and_root_none(compose: Compose) -> None:
    (image,) = compose.engine.inspect(IMAGE)
    megabytes = image["Size"] / 1e6
    print(f"image: {megabytes:.0f} MB")
    assert megabytes < MOST_IMAGE_MB
    assert image["Config"]["User"] == "1000:1000"
    ours = [one for one in compose.containers() if one["Config"]["Image"] == IMAGE]
    assert {one["Config"]["Labels"]["com.docker.compose.service"] for one in ours} == ROLES | ONCE
    assert {one["Image"] for one in ours} == {image["Id"]}
    compilers = ["cc", "gcc", "c++", "ld", "make", "/opt/orchestrator/bin/pip"]
    shell = f"for name in {' '.join(compilers)}; do ! command -v $name || exit 1; done"
    compose("exec", "-T", "dispatcher", "sh", "-c", shell)


def test_the_gateway_asks_for_the_token_of_the_first_start_which_the_roles_alone_can_read(compose: Compose) -> None:
    runs = f"{_url(compose, 'gateway', 8080)}/api/v1/runs"
    assert httpx.get(runs).status_code == 401
    assert httpx.get(runs, headers={"Authorization": "Bearer orc.first.wrong"}).status_code == 401
    assert httpx.get(runs, headers=_token(compose)).status_code == 200
    modes = compose("exec", "-T", "dispatcher", "sh", "-c", "stat -c '%a %U %n' /secrets/*").split("\n")
    assert sorted(line for line in modes if line) == [
        "400 orchestrator /secrets/monitor-auth",
        "400 orchestrator /secrets/server-url",
        "400 orchestrator /secrets/valkey-password",
        "600 orchestrator /secrets/token",
    ]
    # Nothing secret is where everybody who may ask the engine sees it.
    secrets = compose("exec", "-T", "dispatcher", "sh", "-c", "cat /secrets/valkey-password /secrets/token").split()
    shown = json.dumps(compose.containers()) + compose("top")
    assert not any(secret in shown for secret in secrets)


def test_a_second_start_makes_no_second_secrets(compose: Compose) -> None:
    before = _token(compose)
    compose("up", "-d")
    assert _token(compose) == before
    assert "a good token first is in /secrets/token" in compose("logs", "--no-color", "token")


def test_limits_and_restarts_are_those_of_the_file_and_ports_are_this_machines_alone(compose: Compose) -> None:
    for one in compose.containers():
        host, name = one["HostConfig"], one["Config"]["Labels"]["com.docker.compose.service"]
        assert host["Memory"] > 0, name
        assert host["NanoCpus"] > 0, name
        assert host["PidsLimit"] > 0, name
        assert host["RestartPolicy"]["Name"] == ("no" if name in ONCE else "unless-stopped"), name
        addresses = {entry["HostIp"] for entries in host["PortBindings"].values() for entry in entries}
        assert addresses <= {"127.0.0.1"}, name


def test_whoever_hangs_is_seen_by_the_health_check_and_whoever_works_is_healthy(compose: Compose) -> None:
    compose.wait_healthy()
    beat = compose.container("beat")
    check = ["docker", "exec", beat["Id"], "sh", "-c", beat["Config"]["Healthcheck"]["Test"][1]]

    def hangs() -> bool:
        return subprocess.run(check, env=compose.engine.environment, capture_output=True).returncode != 0

    assert not hangs()
    pids = compose.engine.run("docker", "top", beat["Id"], "-o", "pid,args").splitlines()[1:]
    (pid,) = [int(line.split()[0]) for line in pids if "orchestrator beat" in line and "init" not in line]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(hangs, "the health check finds it", 60)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not hangs(), "it is well again", 30)


def test_more_workers_take_part(compose: Compose) -> None:
    compose("up", "-d", "--scale", "worker=3")
    names = {one["Config"]["Hostname"] for one in compose.containers("worker")}
    assert len(names) == 3

    def reporting() -> set[str]:
        return {one["host"] for one in compose.ask("pools", "show", "default")["members"] if not one["is_draining"]}

    wait_until(lambda: reporting() == names, f"they report: {reporting()}", 60)
    (pool,) = compose.ask("pools", "list")["items"]
    assert (pool["name"], pool["workers"], pool["faults"]) == ("default", 3, [])
    assert _deliver(_url(compose, "gateway", 8080), [0.5] * 60, "scale")
    run = wait_until(lambda: [one for one in _runs(compose, "slow") if one["finished_at"]], "it has ended", 120)[0]
    assert (run["state"], set(run["output"])) == ("succeeded", names)


def test_kills_of_a_worker_and_of_the_gateway_lose_nothing_and_repeat_nothing(compose: Compose) -> None:
    before = {run["id"] for run in _runs(compose, "slow")}
    url = _url(compose, "gateway", 8080)
    accepted = [f"a-{n}" for n in range(20) if _deliver(url, [1.0], f"a-{n}")]
    assert len(accepted) == 20
    paths = [_drop(compose, f"kill-{n}.csv") for n in range(20)]
    victim = compose.containers("worker")[0]["Id"]
    compose.engine.run("docker", "kill", victim)
    compose.engine.run("docker", "kill", compose.container("gateway")["Id"])
    assert not _deliver(url, [1.0], "b-0")
    paths += [_drop(compose, f"meanwhile-{n}.csv") for n in range(5)]
    # `docker kill` is a wish to have it stopped: it stays so until somebody starts it again.
    compose("up", "-d", "--scale", "worker=3")
    url = _url(compose, "gateway", 8080)
    for n in range(10):
        wait_until(lambda n=n: _deliver(url, [1.0], f"b-{n}"), "the gateway takes deliveries again", 60)

    def is_over() -> bool:
        slow = [run for run in _runs(compose, "slow") if run["id"] not in before]
        return (
            len(slow) == 30
            and all(run["state"] == "succeeded" for run in slow)
            and all((run := _ended(compose, path)) and run["state"] == "succeeded" for path in paths)
        )

    wait_until(is_over, f"all that was accepted has been done, once:\n{compose.logs()}", 300)
    assert compose.ask("dead-letters", "list")["items"] == []


def test_a_process_that_dies_by_itself_is_started_again(compose: Compose) -> None:
    worker = compose.containers("worker")[0]
    os.kill(worker["State"]["Pid"], signal.SIGKILL)  # as the kernel does when memory is short
    started = worker["State"]["StartedAt"]

    def is_back() -> bool:
        (state,) = [one["State"] for one in compose.engine.inspect(worker["Id"])]
        return state["Status"] == "running" and state["StartedAt"] != started

    wait_until(is_back, "the engine has started it again", 60)
    compose.wait_healthy("worker")


def test_flower_shows_it_all(compose: Compose) -> None:
    url = _url(compose, "flower", 5555)
    assert httpx.get(f"{url}/api/tasks").status_code == 401
    user, password = compose("exec", "-T", "flower", "cat", "/secrets/monitor-auth").strip().split(":")

    def shown() -> list[str]:
        # Flower shows what happens while it looks.
        answer = httpx.get(f"{url}/api/tasks", params={"limit": 1000}, auth=(user, password), timeout=10)
        assert answer.status_code == 200, answer.text
        return sorted({task["name"] for task in answer.json().values() if task["state"] == "SUCCESS"})

    path = _drop(compose, "flower.csv")
    wait_until(lambda: _ended(compose, path), "its run has ended", 60)
    steps = [f"invoices.{step}" for step in ("amounts", "articles", "report", "rows")]
    wait_until(lambda: set(steps) <= set(shown()), f"every step is shown: {shown()}", 60)


def test_prometheus_reads_the_metrics_and_can_answer_every_query_of_the_dashboard(compose: Compose) -> None:
    compose("--profile", "monitoring", "up", "-d", "prometheus")
    url = _url(compose, "prometheus", 9090)

    def ask(query: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10)
        assert answer.status_code == 200, f"{query}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def is_scraped() -> bool:
        try:
            return [one["value"][1] for one in ask('up{job="orchestrator"}')] == ["1"]
        except httpx.HTTPError:
            return False

    wait_until(is_scraped, f"the gateway's metrics are read:\n{compose.logs()}", 90)
    dashboard = json.loads((ROOT / "infra" / "monitoring" / "grafana" / "dashboards" / "orchestrator.json").read_text())
    empty = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            # A rate needs two readings; what there is to read is seen in one.
            found = ask(target["expr"].replace("$__rate_interval", "5m"))
            if not found and "[" not in target["expr"]:
                empty.append(panel["title"])
    assert set(empty) <= {"Age of the oldest message"}  # while nothing waits there is none
    compose("--profile", "monitoring", "stop", "prometheus")
    assert compose.container("prometheus")["State"]["ExitCode"] == 0


def test_everything_stops_within_its_grace_and_lets_the_step_in_work_end(compose: Compose) -> None:
    before = {run["id"] for run in _runs(compose, "slow")}
    assert _deliver(_url(compose, "gateway", 8080), [15.0], "last")

    def new() -> list[dict[str, Any]]:
        return [run for run in _runs(compose, "slow") if run["id"] not in before]

    def steps() -> list[dict[str, Any]]:
        (run,) = new()
        found: list[dict[str, Any]] = compose.ask("runs", "show", run["id"], "--step", "work")["items"]
        return found

    wait_until(lambda: new() and [one["state"] for one in steps()] == ["running"], "it is in work", 60)
    began = time.monotonic()
    compose("stop", timeout_s=120)
    took = time.monotonic() - began
    print(f"stopped in {took:.1f} s")
    assert {one["Name"]: one["State"]["ExitCode"] for one in compose.containers() if one["State"]["ExitCode"]} == {}
    assert took < 40
    compose("start", "valkey")
    compose.wait_healthy("valkey")
    compose("start", "dispatcher")
    (step,) = steps()
    assert (step["state"], step["attempts"], step.get("losses", 0)) == ("succeeded", 1, 0)
