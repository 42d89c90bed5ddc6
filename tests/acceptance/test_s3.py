"""Objects of a bucket start runs, each once, while the triggers are killed and the network breaks."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import Up, settle
from tests.acceptance.proxy import Proxy
from tests.conftest import wait_until
from tests.moto import CREDENTIALS, Moto, arn

BUCKET = "incoming"
TASKS = "def size(key, size):\n    return [key, size]\n"
WORKFLOW = """
workflow: objects
on: [{{s3: {{bucket: {bucket}, prefix: in/, {how}, endpoint_url: "{url}"}}}}]
steps: {{size: {{task: "tasks:size", with: {{key: "{{{{ event.data.key }}}}", size: "{{{{ event.data.size }}}}"}}}}}}
"""


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[Moto]:
    made = Moto(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["queue: objects", "poll: 1s"])
def test_each_object_is_one_run_whatever_is_killed(how: str, moto: Moto, make_up: Callable[..., Up]) -> None:
    queue = moto.queue("objects")
    moto.bucket(BUCKET, queue=arn("objects"))
    s3 = moto.client("s3")
    proxy = Proxy(moto.url)
    workflow = WORKFLOW.format(bucket=BUCKET, how=how, url=proxy.url)
    up = make_up({"tasks.py": TASKS, "workflows/objects.yaml": workflow})
    up.start(**CREDENTIALS)
    up.wait_ready()
    chance = random.Random(5)
    expected: Counter[str] = Counter()
    is_over = threading.Event()

    def put() -> None:
        for n in range(240):
            key = f"in/a+b ü/{n % 200}"
            s3.put_object(Bucket=BUCKET, Key=key, Body=str(n).encode())
            expected[key] += 1
            settle(chance.random() / 20)
        is_over.set()

    putting = threading.Thread(target=put)
    if how.startswith("poll"):
        put()  # an overwrite between two listings is seen once
        expected = Counter(set(expected))
        is_over.clear()
    putting.start()
    if how.startswith("poll"):
        expected = Counter({f"in/a+b ü/{n}": 1 for n in range(200)})
    while not is_over.is_set():
        settle(chance.random() * 2)
        control = up.pid_of("control")
        if control is not None:
            os.kill(control, signal.SIGKILL)
        settle(chance.random())
        proxy.break_connections()
    putting.join()

    def started() -> Counter[str]:
        return Counter(run["event_id"] for run in up.runs())

    wait_until(lambda: len(started()) >= expected.total(), "each object has its run", 40)
    if "queue" in how:
        wait_until(lambda: moto.depth(queue) == 0, "the queue is empty", 60)
    wait_until(lambda: all(run["state"] == "succeeded" for run in up.runs()), "all have succeeded", 60)
    runs = up.runs()
    assert max(Counter(run["event_id"] for run in runs).values()) == 1
    outputs = Counter(json.loads(up.ask("runs", "show", run["id"], "--json"))["output"][0] for run in runs[:20])
    assert all(key in expected for key in outputs)
    assert len(runs) == expected.total()
    assert up.stop() == 0
