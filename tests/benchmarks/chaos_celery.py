"""The workflows of chaos_plain.py on plain Celery, with all that it offers against loss."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from celery import Celery, chain, chord
from celery.canvas import Signature

_URL = os.environ["CHAOS_PLAIN_URL"]
_RECORD = os.open(os.environ["CHAOS_PLAIN_RECORD"], os.O_APPEND | os.O_CREAT | os.O_WRONLY)

app = Celery("chaos", broker=_URL, backend=_URL)
_TIGHT = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1} if os.environ.get("CHAOS_PLAIN_TIGHT") else {}
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=2,
    broker_transport_options={"visibility_timeout": 30, **_TIGHT},
    result_backend_transport_options={"visibility_timeout": 30},
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
)


def _write(word: str, key: str) -> None:
    os.write(_RECORD, f"\n{word} {key} 1 {os.getpid()} {time.monotonic():.6f} .\n".encode())
    os.fsync(_RECORD)


@contextmanager
def _recorded(key: str, seconds: float = 0.0) -> Iterator[None]:
    _write("begin", key)
    time.sleep(seconds)
    yield
    _write("end", key)


@app.task
def add(above: float | list[float], key: str, n: int = 0, seconds: float = 0.0) -> float:
    """Add up what comes from above, and n."""
    with _recorded(key, seconds):
        return (sum(above) if isinstance(above, list) else above) + n


def workflow(kind: str, run: str, x: int) -> Signature:
    """Return the canvas of a kind; the same bodies as in tests/chaos/workload.py."""
    if kind == "chain":
        first = add.s(x, f"{run}/c0", 1, 0.005)
        return chain(first, *(add.s(f"{run}/c{n}", 1, 0.005) for n in range(1, 40)))
    if kind == "diamond":
        header = [add.s(f"{run}/b", 1, 0.02), add.s(f"{run}/c", 2, 0.05)]
        return add.s(x, f"{run}/a", 1) | chord(header, add.s(f"{run}/d"))
    if kind == "fan":
        return chord([add.s(n, f"{run}/each/{n}", 1) for n in range(x)], add.s(f"{run}/total"))
    raise ValueError(kind)


def slots(kind: str, x: int) -> list[str]:
    """Return the bodies of a kind, in the end the one that answers."""
    if kind == "chain":
        return [f"c{n}" for n in range(40)]
    return ["a", "b", "c", "d"] if kind == "diamond" else [*(f"each/{n}" for n in range(x)), "total"]


def result(kind: str, x: int) -> int:
    """Return what a run of a kind must come to."""
    return {"chain": x + 40, "diamond": 2 * x + 5, "fan": x * (x + 1) // 2}[kind]
