"""Metrics in the Prometheus format, and whether this process could do its work just now.

All comes from what the ledger counts anyhow: the cost does not grow with the number of runs. Servers that are away are
not waited for: then there is what can be said without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from orchestrator.brokers import broker_of
from orchestrator.celery_app import EVENT_QUEUE, PRIORITIES, queue_name
from orchestrator.counters import BOUNDS, read_field
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import connect
from orchestrator.ledger.pools import PoolRecords
from orchestrator.workflows import DEFAULT_POOL

#: A server that takes longer is away.
_TIMEOUT_S = 1.0

#: Counter in the ledger -> (name, what it says, labels).
_COUNTERS = {
    "runs_started": ("orchestrator_runs_started", "Runs that were started.", ("workflow",)),
    "runs": ("orchestrator_runs", "Runs that have ended, by state; once for each episode.", ("workflow", "state")),
    "steps": (
        "orchestrator_steps",
        "Attempts of steps and items that have ended, by state; retrying: it failed, and is tried again.",
        ("workflow", "state"),
    ),
    "events": ("orchestrator_events", "Events that were dealt with, by what came of them.", ("verdict",)),
    "cpu_seconds": ("orchestrator_step_cpu_seconds", "Processor time that attempts have taken.", ("workflow", "pool")),
    "gb_seconds": (
        "orchestrator_step_memory_gb_seconds",
        "Memory that attempts have taken: the peak of the process for as long as the attempt took.",
        ("workflow", "pool"),
    ),
    "dead_letters": ("orchestrator_dead_lettered", "Dead letters that have come, by reason.", ("reason",)),
}
_HISTOGRAMS = {
    "queue_seconds": (
        "orchestrator_queue_time_seconds",
        "From publishing a message of steps to its first step's begin.",
    ),
    "step_seconds": ("orchestrator_step_duration_seconds", "How long attempts of steps and items took."),
}


#: What the autoscaler says of a pool -> (name, what it says).
_POOL_GAUGES = {
    "size": ("orchestrator_pool_size", "Processes that a pool has."),
    "busy": ("orchestrator_pool_busy", "Processes of a pool that are at work."),
    "workers": ("orchestrator_pool_workers", "Workers of a pool, each with some processes or none."),
    "desired": ("orchestrator_pool_desired", "Processes that a pool is to have."),
    "backlog": ("orchestrator_pool_backlog", "Messages that wait for a pool, as the autoscaler has seen it."),
    "oldest_age_s": ("orchestrator_pool_oldest_age_seconds", "For how long the oldest of them has waited."),
    "faults": ("orchestrator_pool_faults", "What keeps workers of a pool from starting or working."),
}


class Metrics:
    """What can be seen from here. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        settings = engine.settings
        self._settings = settings
        self._ledger = Ledger(connect(settings.ledger_url, timeout_s=_TIMEOUT_S))
        #: Whether one server is both, which then need not be asked twice.
        self._is_one = settings.broker_url == settings.ledger_url
        self._broker = broker_of(settings, engine.app, timeout_s=_TIMEOUT_S)
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self._collect))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their content type, as who asks accepts."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def faults(self) -> list[str]:
        """Say what keeps this process from its work: a ledger that takes no writes, a broker that is away."""
        found = [self._ledger.refusal()]
        if not self._is_one:
            try:
                self._broker.depths([EVENT_QUEUE])
            except UnavailableError as exc:
                found.append(str(exc))
        return [fault for fault in found if fault]

    def _collect(self) -> Iterator[Metric]:
        client = self._ledger.client
        with client.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.COUNTERS)
            pipe.zcard(keys.ACTIVE)
            pipe.zcard(keys.DEAD_LETTERS)
            pipe.llen(keys.SET_ASIDE)
            try:
                counts, in_flight, dead_letters, set_aside = self._ledger.guard(pipe.execute)
                is_up = True
            except UnavailableError:
                counts, is_up = {}, False
        yield GaugeMetricFamily("orchestrator_ledger_up", "Whether the ledger answers.", value=is_up)
        if is_up:
            yield GaugeMetricFamily("orchestrator_runs_in_flight", "Runs that have not ended.", value=in_flight)
            yield GaugeMetricFamily("orchestrator_dead_letters", "Dead letters on the list.", value=dead_letters)
            yield GaugeMetricFamily("orchestrator_set_aside", "Messages that are to become them.", value=set_aside)
            yield from self._pools()
        rows: dict[str, list[tuple[dict[str, str], float]]] = {}
        for text, value in counts.items():
            name, labels = read_field(text)
            rows.setdefault(name, []).append((labels, float(value)))
        yield from _counted(rows)
        seen = {labels.get("pool", "") for labels, _ in rows.get("queue_seconds_sum", ())}
        pools = sorted({DEFAULT_POOL, *self._settings.pools, *seen} - {""})
        names = {queue_name(pool, priority): (pool, priority) for pool in pools for priority in PRIORITIES}
        depths = None
        if is_up or not self._is_one:
            with suppress(UnavailableError):
                depths = self._broker.depths([EVENT_QUEUE, *names])
        yield GaugeMetricFamily("orchestrator_broker_up", "Whether the broker answers.", value=depths is not None)
        if depths is not None:
            yield from _waiting(depths[0], dict(zip(names.values(), depths[1:], strict=True)))

    def _pools(self) -> Iterator[Metric]:
        """What is known of pools; nothing if no autoscaler has said it of late."""
        try:
            states = PoolRecords(self._ledger).current_states()
        except UnavailableError:
            return
        yield GaugeMetricFamily(
            "orchestrator_autoscaler_up", "Whether an autoscaler has reported of late.", value=states is not None
        )
        for name, (title, about) in _POOL_GAUGES.items():
            family = GaugeMetricFamily(title, about, labels=("pool",))
            for pool, state in (states or {}).items():
                value = len(state.faults) if name == "faults" else getattr(state, name)
                family.add_metric([pool], value or 0)  # the oldest of none has not waited
            yield family


def _waiting(bus: int, depths: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
    yield GaugeMetricFamily("orchestrator_bus_depth", "Events that wait for the dispatcher.", value=bus)
    family = GaugeMetricFamily(
        "orchestrator_queue_depth", "Messages that wait for a worker.", labels=("pool", "priority")
    )
    for labels, depth in depths.items():
        family.add_metric(labels, depth)
    yield family


def _counted(rows: Mapping[str, Sequence[tuple[dict[str, str], float]]]) -> Iterator[Metric]:
    for counter, (name, about, names) in _COUNTERS.items():
        family = CounterMetricFamily(name, about, labels=names)
        for labels, value in sorted(rows.get(counter, ()), key=lambda row: sorted(row[0].items())):
            family.add_metric([labels.get(label, "") for label in names], value)
        yield family
    for counter, (name, about) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, about, labels=("pool",))
        sums = {labels.get("pool", ""): value for labels, value in rows.get(f"{counter}_sum", ())}
        buckets: dict[str, dict[str, float]] = {}
        for labels, value in rows.get(f"{counter}_bucket", ()):
            buckets.setdefault(labels.get("pool", ""), {})[labels.get("le", "")] = value
        for pool, found in sorted(buckets.items()):
            bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
            total = accumulate(found.get(bound, 0.0) for bound in bounds)
            histogram.add_metric([pool], list(zip(bounds, total, strict=True)), sums.get(pool, 0.0))
        yield histogram


class _Collector(Collector):
    def __init__(self, collect: Any) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()  # type: ignore[no-any-return]

    def describe(self) -> Iterable[Metric]:
        return ()  # else it would be asked when it is registered
