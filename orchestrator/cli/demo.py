"""`orchestrator demo`: the examples, for real: `up` in one process, and in another somebody who drops files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.bus import EventBus
from orchestrator.cli.access import cli_command, engine_of, settings_of
from orchestrator.cli.addresses import addresses
from orchestrator.cli.output import coloured, duration, one_line
from orchestrator.errors import NotFoundError, OrchestratorError, UnavailableError
from orchestrator.events import Event
from orchestrator.ledger.queries import Queries
from orchestrator.runs import Run, RunState

_TIME_LIMIT_S = 90.0

#: What the dropping process does: three files at once, one moved in, one written slowly in two halves, one malformed.
_DROP = """
import os, pathlib, sys, time
inbox, aside = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
def rows(n): return "".join(f"bolts,{i},0.10\\n" for i in range(1, n + 1))
head = "article,quantity,unit_price\\n"
slow = (inbox / "slow.csv").open("w")
slow.write(head + rows(10)[:40])
slow.flush()
for n in (1, 2, 3):
    (inbox / f"invoice-{n}.csv").write_text(head + rows(n * 10))
    time.sleep(0.3)
(aside / "moved.csv").write_text(head + rows(20))
os.rename(aside / "moved.csv", inbox / "moved.csv")
(inbox / "malformed.csv").write_text(head + "bolts,many,0.10\\n")
time.sleep(2)
slow.write(rows(10)[40:])
slow.close()
"""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What must come of a file or an event."""

    subject: str
    workflow: str
    state: RunState
    output: Any = None
    error: str = ""


def _invoice(rows: int) -> dict[str, Any]:
    pieces = sum(range(1, rows + 1))
    return {"rows": rows, "total": round(pieces * 0.1, 2), "articles": {"bolts": pieces}}


_EXPECTED = (
    _Expected("invoice-1.csv", "invoices", RunState.SUCCEEDED, _invoice(10)),
    _Expected("invoice-2.csv", "invoices", RunState.SUCCEEDED, _invoice(20)),
    _Expected("invoice-3.csv", "invoices", RunState.SUCCEEDED, _invoice(30)),
    _Expected("moved.csv", "invoices", RunState.SUCCEEDED, _invoice(20)),
    _Expected("slow.csv", "invoices", RunState.SUCCEEDED, _invoice(10)),
    _Expected("malformed.csv", "invoices", RunState.FAILED, error="ValueError"),
    _Expected("order-1", "large_orders", RunState.SUCCEEDED, "Thank you, Ada!"),
    _Expected("returns", "returns", RunState.SUCCEEDED, "Send us 3 bolts."),
    _Expected("invoices", "alarm", RunState.SUCCEEDED, "invoices failed: ValueError"),
)


def run_demo(*, keep: bool = False) -> int:
    """Run it and return 0 if every run ended as it should, else 1."""
    console = Console()
    directory = Path(tempfile.mkdtemp(prefix="orchestrator-demo-"))
    try:
        project = directory / "shop"
        shutil.copytree(_examples() / "shop", project, ignore=shutil.ignore_patterns("__pycache__", ".orchestrator"))
        console.print(f"[bold]Project[/] {project}: workflows/*.yaml and orders.py")
        with _up(project, directory / "up.log") as up:
            return _watch(console, project, directory, up)
    except OrchestratorError:
        log = directory / "up.log"
        if log.exists():
            sys.stderr.write(log.read_text())
        raise
    finally:
        if keep:
            console.print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _examples() -> Path:
    here = Path(__file__).resolve().parents[1]
    for place in (here / "examples", here.parent / "examples"):
        if (place / "shop").is_dir():
            return place
    raise NotFoundError("the examples are not installed with this copy of orchestrator; see the project's examples/")


@contextmanager
def _up(project: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            cli_command("up", "--project", str(project)),
            stdout=output,
            stderr=output,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _watch(console: Console, project: Path, directory: Path, up: subprocess.Popen[bytes]) -> int:
    settings = settings_of(project)
    until = time.monotonic() + _TIME_LIMIT_S
    while True:
        try:
            with engine_of(settings) as engine:
                return _drop_and_look(console, engine, project, directory, until)
        except OrchestratorError:
            if time.monotonic() > until or up.poll() is not None:
                raise
            time.sleep(0.1)


def _drop_and_look(console: Console, engine: Any, project: Path, directory: Path, until: float) -> int:
    console.print("[bold]Started[/] `orchestrator up`; another process now drops files into inbox/")
    console.print("one is written slowly in two halves, one is malformed; two orders arrive as events")
    dropper = subprocess.Popen([sys.executable, "-c", _DROP, str(project / "inbox"), str(directory)])
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    orders = [
        Event(
            id=f"order-{n}",
            source="demo",
            type="shop.order.placed",
            subject=f"order-{n}",
            time=moment,
            data={"customer": "Ada", "amount": amount, "lines": [{"article": "bolts", "quantity": amount}]},
        )
        for n, amount in ((1, 250), (2, 20))
    ]
    EventBus(engine.app).publish(orders)
    hook = f"{addresses(engine.settings.data_dir)['url']}/hooks/returns"
    console.print(f"[bold]POST[/] {hook} is answered: {_deliver(hook, {'article': 'bolts', 'quantity': 3}, until)}")
    queries = Queries(engine.ledger, engine.payloads)
    found: dict[str, Run] = {}
    with Live(console=console, refresh_per_second=8) as live:
        while time.monotonic() < until:
            found = _runs(engine, queries)
            live.update(_table(found))
            ended = sum(run.state.is_end for run in found.values())
            if dropper.poll() is not None and ended >= len(_EXPECTED):
                break
            time.sleep(0.1)
    dropper.wait()
    console.print()
    found = _runs(engine, queries)
    problems = _problems(found)
    for problem in problems:
        console.print(f"[red]not as it should be:[/] {problem}")
    if not problems:
        console.print(
            "[green]All as it should be:[/] the slow file was taken only when it was whole, the malformed one failed "
            "in its own step with its reason, which started the alarm, and the small order started nothing."
        )
    return 1 if problems else 0


def _deliver(url: str, body: Any, until: float) -> str:
    """Deliver to a webhook as a sender would, again until it is answered, and return the answer."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": "return-1"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 -- it is our gateway's
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 -- as above
                return str(answer.read().decode())
        except (OSError, HTTPException) as exc:
            if time.monotonic() > until:
                raise UnavailableError(f"the gateway does not answer at {url}: {exc}") from exc
            time.sleep(0.1)


def _runs(engine: Any, queries: Queries) -> dict[str, Run]:
    """Return the runs by what started them: the name of a file, the id of an order."""
    runs, _ = queries.runs(limit=100)
    found = {}
    for run in runs:
        event = json.loads(engine.ledger.client.hget(f"orchestrator:{{{run.id}}}:run", "event"))
        found[event["subject"]] = queries.run(run.id) if run.state.is_end else run
    return found


def _table(found: dict[str, Run]) -> Table:
    table = Table(title="Runs", title_justify="left")
    for column in ("started by", "workflow", "state", "took", "output or error"):
        table.add_column(column)
    for expected in _EXPECTED:
        run = found.get(expected.subject)
        if run is None:
            table.add_row(expected.subject, expected.workflow, coloured("..."), "", "")
            continue
        last = _outcome(run)
        table.add_row(
            expected.subject, run.workflow, coloured(str(run.state)), duration(run.created_at, run.finished_at), last
        )
    return table


def _outcome(run: Run) -> str:
    if run.error:
        return f"step {run.error.get('step')}: {run.error['type']}: {run.error['message']}"
    output = {k: v for k, v in run.output.items() if k != "file"} if isinstance(run.output, dict) else run.output
    return one_line(output, 90) if run.state.is_end else ""


def _problems(found: dict[str, Run]) -> list[str]:
    problems = []
    for expected in _EXPECTED:
        run = found.get(expected.subject)
        if run is None:
            problems.append(f"{expected.subject} started no run")
            continue
        output = run.output
        if isinstance(output, dict):
            output = {key: value for key, value in output.items() if key != "file"}
        if run.state is not expected.state or (expected.state is RunState.SUCCEEDED and output != expected.output):
            problems.append(f"{expected.subject}: run {run.id} {run.state}, {_outcome(run)}")
        if expected.error and (run.error or {}).get("type") != expected.error:
            problems.append(f"{expected.subject}: failed with {run.error}, not with {expected.error}")
    problems += [f"{subject} started a run" for subject in found if subject not in {e.subject for e in _EXPECTED}]
    return problems
