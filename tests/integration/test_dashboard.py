"""The dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re

from prometheus_client.parser import text_string_to_metric_families

from orchestrator.engine import Engine
from orchestrator.metrics import Metrics
from tests.conftest import ROOT

DASHBOARD = ROOT / "infra" / "monitoring" / "grafana" / "dashboards" / "orchestrator.json"
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def test_every_query_of_the_dashboard_is_about_metrics_that_are_exposed(engine: Engine) -> None:
    text, _ = Metrics(engine).expose("")
    exposed = {
        f"{family.name}{suffix}"
        for family in text_string_to_metric_families(text.decode())
        for suffix in _SUFFIXES.get(family.type, ("",))
    }
    queries = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", [])
    ]
    asked = {name for query in queries for name in re.findall(r"orchestrator_\w+", query)}
    assert asked - exposed == set()
    # And what there is to see of runs, queue times, pools and dead letters is asked for.
    told = {"runs_started_total", "runs_total", "queue_time_seconds_bucket", "pool_size", "dead_letters"}
    assert {f"orchestrator_{name}" for name in told} <= asked
