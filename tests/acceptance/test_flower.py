"""Flower on a real `up`: on both brokers by its HTTP API, and its pages as a browser shows them."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import sync_playwright

from tests.acceptance.conftest import Broker, Up
from tests.acceptance.rabbitmq import is_required
from tests.conftest import Server, wait_until

MakeUp = Callable[[dict[str, str]], Up]
FILES = {
    "tasks.py": """
import pathlib, time
def charge(order):
    return order
def ship(order, gate):
    pathlib.Path(gate).touch()
    time.sleep(120)
def refuse():
    raise ValueError("the card was declined")
""",
    "workflows/orders.yaml": """
workflow: orders
params: {gate: string}
steps:
  charge: {task: "tasks:charge", foreach: [1, 2, 3], with: {order: "{{ item }}"}}
  ship: {task: "tasks:ship", needs: [charge], with: {order: 1, gate: "{{ params.gate }}"}}
  refuse: {task: "tasks:refuse"}
  report: {task: "tasks:charge", needs: [refuse], trigger_rule: all_done, with: {order: 0}}
""",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(up: Up, tmp_path: Path) -> tuple[httpx.Client, str]:
    """Start `up --flower` and a run that holds at a step; returns a client of Flower, and the run."""
    port = free_port()
    up.start("--flower", ORCHESTRATOR_MONITOR_PORT=str(port))
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    wait_until(lambda: answers(client), "Flower answers: " + up.text(), 60)
    assert f"monitor   http://127.0.0.1:{port} (Flower)" in up.text()
    wait_until(lambda: client.get("/workers?json=1").json()["data"], "it shows a worker", 60)
    run = up.ask("run", "orders", "--input", json.dumps({"gate": f"{tmp_path}/gate"})).strip()
    wait_until((tmp_path / "gate").exists, "the step is at work", 60)
    return client, run


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


def test_a_run_is_seen_and_one_step_of_it_revoked(
    make_up: MakeUp, broker: Broker, server: Server, tmp_path: Path
) -> None:
    ledger = server.url.removesuffix("/0") + "/5"
    url = ledger if broker.name == "redis" else broker.url
    up = make_up(FILES | {"orchestrator.toml": f'[settings]\nbroker_url = "{url}"\nledger_url = "{ledger}"\n'})
    client, run = begin(up, tmp_path)
    expected = {
        "charge:1": "SUCCESS", "charge:0:1": "SUCCESS", "charge:1:1": "SUCCESS", "charge:2:1": "SUCCESS",
        "refuse:1": "FAILURE", "report:1": "SUCCESS", "ship:1": "STARTED",
    }  # fmt: skip

    def states() -> dict[str, str]:
        tasks = client.get("/api/tasks").json().items()
        return {name.removeprefix(f"{run}:"): task["state"] for name, task in tasks if name.startswith(run)}

    wait_until(lambda: states() == expected, "all steps are shown")
    assert client.get("/api/task/types").json()["task-types"] == sorted(
        f"orders.{step}" for step in ("charge", "refuse", "report", "ship")
    )
    name = client.get("/workers?json=1").json()["data"][0]["hostname"]
    wait_until(
        lambda: client.get(f"/api/workers?refresh=1&workername={name}").json().get(name, {}).get("active"),
        "the worker tells what it runs",
    )
    assert client.post(f"/api/task/revoke/{run}:ship:1").status_code == 200
    told = json.loads(up.ask("runs", "wait", run, "--json", code=1))
    assert {step["id"]: step["state"] for step in told["steps"]} == {
        "charge": "succeeded", "ship": "cancelled", "refuse": "failed", "report": "succeeded",
    }  # fmt: skip
    wait_until(lambda: states()["ship:1"] == "REVOKED", "it is shown as revoked")
    assert up.process is not None
    (monitor,) = (one for one in psutil.Process(up.process.pid).children() if "monitor" in one.cmdline())
    monitor.kill()
    wait_until(lambda: "monitor ended" in up.text(), "its end is noticed")
    wait_until(lambda: answers(client), "it is started again")
    wait_until(lambda: client.get("/workers?json=1").json()["data"], "it shows the worker again")
    client.close()
    assert up.stop() == 0


def test_a_port_in_use_is_said_before_anything_is_started(make_up: MakeUp) -> None:
    up = make_up(FILES)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up.start("--flower", ORCHESTRATOR_MONITOR_PORT=str(port))
        assert up.process is not None
        assert up.process.wait(timeout=60) != 0
    assert f"port {port} on 127.0.0.1 is in use" in up.text().splitlines()[-1]


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. Where there is none, tests are skipped, but never where it must be there."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        why = "chromium is not installed: apt-get install chromium"
        if is_required():
            pytest.fail(f"{why}; CI and REQUIRE_RABBITMQ let no test be skipped")
        pytest.skip(f"NOBODY LOOKED AT FLOWER'S PAGES: {why}")
    return found


def test_its_pages_show_the_run_in_a_browser(make_up: MakeUp, chromium: str, tmp_path: Path) -> None:
    up = make_up(FILES)
    client, run = begin(up, tmp_path)
    wait_until(lambda: f"{run}:report:1" in client.get("/api/tasks").json(), "the steps are shown")
    name = client.get("/workers?json=1").json()["data"][0]["hostname"]
    client.get(f"/api/workers?refresh=1&workername={name}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})

        def look(path: str, *expected: str) -> None:
            """Wait until a page shows what is expected, and keep a picture of it."""
            page.goto(f"{client.base_url}/{path}")
            for text in expected:
                page.get_by_text(text, exact=True).first.wait_for(timeout=20_000)
            page.screenshot(path=tmp_path / f"{path.partition('/')[0] or 'workers'}.png")
            assert "orchestrator.step" not in page.content()

        look("", name, "Online")
        steps = ("orders.charge", "orders.ship", "orders.refuse", "orders.report")
        look("tasks", *steps, "SUCCESS", "FAILURE", "STARTED")
        look("broker", "orchestrator.default.normal")
        look(f"worker/{name}", name)
        look(f"task/{run}:ship:1", "STARTED", "Terminate")
        page.locator("#task-terminate").click()
        up.ask("runs", "wait", run, code=1)
        wait_until(lambda: client.get(f"/api/task/info/{run}:ship:1").json()["state"] == "REVOKED", "it is told of")
        look(f"task/{run}:ship:1", "REVOKED")
        browser.close()
    assert json.loads(up.ask("runs", "show", run, "--json"))["state"] == "failed"
    client.close()
    assert up.stop() == 0
