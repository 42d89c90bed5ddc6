"""Objects of a bucket start runs, each once, while the triggers are killed and the network breaks."""

from __future__ import annotations

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

TASKS = """
import os
def note(key, etag):
    descriptor = os.open("record", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, f"{key} {etag}\\n".encode())
    os.close(descriptor)
"""
WORKFLOW = """
workflow: objects
on: [{{s3: {{bucket: incoming, prefix: in/, {how}, endpoint_url: "{url}"}}}}]
steps: {{note: {{task: "tasks:note", with: {{key: "{{{{ event.data.key }}}}", etag: "{{{{ event.data.etag }}}}"}}}}}}
"""


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[Moto]:
    made = Moto(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "keys"), [("queue: objects", 200), ("poll: 1s", 240)])
def test_each_object_is_one_run_whatever_is_killed(
    how: str, keys: int, moto: Moto, make_up: Callable[..., Up], tmp_path: Path
) -> None:
    """With a queue an overwrite is a second run; a listing sees the last of several alone, so there is none here."""
    queue = moto.queue("objects")
    moto.bucket("incoming", queue=arn("objects"))
    s3, proxy = moto.client("s3"), Proxy(moto.url)
    tasks = TASKS.replace('"record"', repr(str(tmp_path / "record")))
    up = make_up({"tasks.py": tasks, "workflows/objects.yaml": WORKFLOW.format(how=how, url=proxy.url)})
    up.start(**CREDENTIALS)
    up.wait_ready()
    chance, expected = random.Random(5), Counter[str]()

    def put() -> None:
        for n in range(240):
            key = f"in/a+b-ü/{n % keys}"
            etag = s3.put_object(Bucket="incoming", Key=key, Body=str(n).encode())["ETag"].strip('"')
            expected[f"{key} {etag}"] += 1
            settle(0.03)

    putting = threading.Thread(target=put)
    putting.start()
    while putting.is_alive():
        settle(chance.random() * 3)
        control = up.pid_of("control")
        if control is not None:
            os.kill(control, signal.SIGKILL)
        settle(chance.random())
        proxy.break_connections()
    putting.join()

    def noted() -> Counter[str]:
        path = tmp_path / "record"
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    wait_until(lambda: noted() >= expected, "each object has its run", 120)
    if how.startswith("queue"):
        wait_until(lambda: moto.depth(queue) == 0, "the queue is empty", 60)
    assert noted() == expected
    assert len(up.runs()) == 240
    assert up.stop() == 0
