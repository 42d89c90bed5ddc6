"""Record what comes in a real run: when each message is published, and for how long it is held by a process.

    python -m tests.simulation.record [--seconds 240]

An embedded server, one worker with more processes than are ever needed, and runs of a workflow that are started as
files come: some alone, some many at once. What the server is told is read from it (MONITOR): a message is published,
and is dropped when its process has done it. The result is `recorded.json`, which the simulation plays back.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import redis

from orchestrator.dispatcher import manual_event
from orchestrator.engine import Engine
from orchestrator.plan import Plan
from orchestrator.project import load_in_subprocess
from orchestrator.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench import embedded_server, our_worker, wait_until

QUEUE = "orchestrator.default.normal"
#: More than are ever at work at once, so that nothing waits.
PROCESSES = 24
TASKS = """
import random, time

def work(mean, x=None):
    time.sleep(random.lognormvariate(0, 0.5) * mean)
    return x
"""
WORKFLOW = """
workflow: order
params:
  items: {type: integer}
steps:
  read: {task: "tasks:work", with: {mean: 0.3}}
  check: {task: "tasks:work", with: {mean: 0.2, x: "{{ read }}"}}
  page:
    task: tasks:work
    foreach: "{{ range(params.items) }}"
    with: {mean: 0.8, x: "{{ item }}"}
    needs: [check]
  bill: {task: "tasks:work", with: {mean: 2, x: "{{ check }}"}}
  send: {task: "tasks:work", with: {mean: 0.4}, needs: [page, bill]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    seconds = parser.parse_args().seconds
    messages = Messages()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        project = work / "project"
        (project / "workflows").mkdir(parents=True)
        (project / "tasks.py").write_text(TASKS)
        (project / "workflows" / "order.yaml").write_text(WORKFLOW)
        (project / "orchestrator.toml").write_text(f"[pools.default]\nconcurrency = {PROCESSES}\n")
        with embedded_server(work / "data", "everysec") as url:
            settings = Settings.load(
                project, environ={}, data_dir=work / "data", broker_url=f"{url}/0", ledger_url=f"{url}/0"
            )
            listener = threading.Thread(target=messages.listen, args=(url,))
            listener.start()
            with our_worker(settings, work):
                wait_until(lambda: messages.is_served, "the worker asks for messages")
                start_runs(settings, seconds)
                wait_until(lambda: messages.open == 0, "all messages are done")
        listener.join()
    rows = messages.rows()
    title = "recorded: runs of a workflow of five steps, some at once"
    body = {"title": title, "horizon_s": round(rows[-1][0] / 1000) + 120, "messages": rows}
    text = json.dumps(body, separators=(",", ":")).replace("],[", "],\n[")
    (Path(__file__).parent / "recorded.json").write_text(text + "\n")
    print(f"{len(rows)} messages")


class Messages:
    """What becomes of messages, by what the server is told."""

    def __init__(self) -> None:
        self.is_served = False
        self._published: dict[tuple[str, str], float] = {}
        self._delivered: dict[str, tuple[float, float]] = {}
        self._done: list[tuple[float, float]] = []

    @property
    def open(self) -> int:
        """Messages that are published and not done."""
        return len(self._published) - len(self._done)

    def listen(self, url: str) -> None:
        """Listen until the server goes."""
        with suppress(redis.ConnectionError), redis.Redis.from_url(url, socket_timeout=None).monitor() as told:
            for command in told.listen():
                self._note(command["time"], command["command"])

    def rows(self) -> list[tuple[int, int]]:
        """Return for each message when it was published and for how long it was held, in ms."""
        first = min(self._published.values())
        return sorted((round((at_s - first) * 1000), round(held_s * 1000)) for at_s, held_s in self._done)

    def _note(self, at_s: float, command: str) -> None:
        verb, _, rest = command.partition(" ")
        key, _, rest = rest.partition(" ")
        self.is_served |= verb == "BRPOP"
        if verb == "LPUSH" and key == QUEUE:
            # One that a process gives back is published again; it has waited since the first time.
            self._published.setdefault(_identity(rest), at_s)
        elif key == "orchestrator.unacked":
            tag, _, message = rest.partition(" ")
            if verb == "HSET":
                self._delivered[tag] = (self._published[_identity(message)], at_s)
            elif verb == "HDEL" and tag in self._delivered:
                published_s, began_s = self._delivered.pop(tag)
                self._done.append((published_s, at_s - began_s))


def _identity(message: str) -> tuple[str, str]:
    found = re.search(r'"body": "([^"]*)".*?"id": "([^"]*)"', message)
    assert found is not None
    return found[1], found[2]


def start_runs(settings: Settings, seconds: float) -> None:
    loaded = load_in_subprocess(settings.project, pools=settings.declared_pools, defaults=settings.defaults)
    plan = Plan.of(loaded.workflows["order"])
    engine = Engine(settings)
    engine.ledger.put_plan(plan)
    rng = random.Random(6)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(10 if rng.random() < 0.15 else 1):
            run, given = uuid.uuid4().hex[:24], {"items": rng.choice([1, 2, 5, 30])}
            event = manual_event("order", given, event_id=run).to_json()
            engine.start(run, plan, event=event, params=plan.workflow.resolve_params(given, event))
        time.sleep(rng.expovariate(1 / 6))
    engine.close()


if __name__ == "__main__":
    main()
