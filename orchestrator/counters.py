"""Counters: what metrics count, kept in the ledger for all processes together (keys.COUNTERS).

A process adds up what it has seen and hands it in every few seconds, so that a step costs no round trip more. What a
process that is killed had not handed in yet is missing: counters show how much, not exactly which.

A field of the hash is `name|label=value,label=value`; of a histogram, `name_bucket|...,le=BOUND` counts what is in that
bucket alone, and `name_sum|...` adds up the values.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from orchestrator.errors import UnavailableError
from orchestrator.ledger import Ledger, keys
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

#: Upper bounds of the buckets of every histogram, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_BUCKETS = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
_FLUSH_S = 2.0


@lru_cache(maxsize=4096)
def field(name: str, **labels: str) -> str:
    """Return the field of a counter."""
    return f"{name}|" + ",".join(f"{label}={quote(value, safe='/: +')}" for label, value in labels.items())


def read_field(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the labels of a field."""
    name, _, rest = text.partition("|")
    pairs = (pair.partition("=") for pair in rest.split(",") if pair)
    return name, {label: unquote(value) for label, _, value in pairs}


class Counters:
    """Counts of this process that are not handed in yet. Safe to share between threads, not over a fork."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._counts: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_away = False

    def add(self, counter: str, by: float = 1) -> None:
        """Add to a counter, given by its field; takes no time and never fails."""
        with self._lock:
            self._counts[counter] = self._counts.get(counter, 0) + by
        if self._thread is None or not self._thread.is_alive():
            self._begin()

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        bucket = _BUCKETS[bisect_left(BOUNDS, value)]
        self.add(field(f"{name}_bucket", **labels, le=bucket))
        self.add(field(f"{name}_sum", **labels), float(value))

    def _begin(self) -> None:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._loop, name="counters", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # a step may have left it no memory: the next count tries again
            self._thread = None

    def _loop(self) -> None:
        while not self._stopping.wait(_FLUSH_S):
            self.flush()

    def flush(self) -> None:
        """Hand in what was counted; what cannot be now is kept. Never fails."""
        with self._lock:
            counts, self._counts = self._counts, {}
        if not counts:
            return
        try:
            with self._ledger.client.pipeline(transaction=True) as pipe:
                for counter, by in counts.items():
                    hand_in(pipe, counter, by)
                self._ledger.guard(pipe.execute)
            self._is_away = False
        except UnavailableError:  # others say so; a client that has sent it may have been heard, then it counts twice
            self._is_away = True
            with self._lock:
                for counter, by in counts.items():
                    self._counts[counter] = self._counts.get(counter, 0) + by
        except Exception:  # this may be in a loop that owns its thread, and the work goes on without metrics
            log.warning("counters_not_kept", exc_info=True)

    def close(self) -> None:
        """Hand in what is left, and end; a ledger that is away is not waited for."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=1)
            self._thread = None
        if not self._is_away:
            self.flush()


def hand_in(client: Any, counter: str, by: float = 1) -> None:
    """Add to a counter by a client, or in a pipeline of one."""
    if isinstance(by, int):
        client.hincrby(keys.COUNTERS, counter, by)
    else:
        client.hincrbyfloat(keys.COUNTERS, counter, by)
