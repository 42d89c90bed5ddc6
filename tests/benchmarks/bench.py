"""Compare this project with plain Celery: the same work, on the same server, in turns.

    python tests/benchmarks/bench.py [--rounds 5] [--only W1,W3] [--json FILE]

W1 to W4 are timed from just before the first run is submitted until this process knows the last result. Both sides
have a prefork worker of two, which idles while it is the other's turn; plain_celery.py says how plain Celery is set
up. Results are compared each time. Nothing here is a test: a ratio never fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import redis
from rich.console import Console
from rich.table import Table

from orchestrator.dispatcher import manual_event
from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.project import load_in_subprocess
from orchestrator.runs import RunState
from orchestrator.settings import Settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATIENCE_S = 60.0
#: W5, in each round; between two of them nothing happens for about this long.
STARTS_A_ROUND = 12
BETWEEN_STARTS_S = (0.1, 0.4)
IDLE_S = 5.0

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Runs that are started at once, each with its input and the result that both sides must come to."""

    name: str
    title: str
    workflow: str
    plain: Callable[..., Any]
    inputs: Sequence[dict[str, Any]] = ({},)
    expected: Sequence[Any]
    #: How often in a round; more where one time is short.
    samples: int = 1


@dataclass(slots=True)
class Outcome:
    """What was measured of one workload: seconds (of M, bytes), one list a round."""

    name: str
    title: str
    plain: list[list[float]] = field(default_factory=list)
    ours: list[list[float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def workloads() -> list[Workload]:
    """Return W1 to W4."""
    import plain_celery

    return [
        Workload(
            name="W1", title="40 steps in a row, fib(10) each", workflow="row_of_40", samples=5,
            plain=lambda: plain_celery.row(40, 10), expected=[40 * 55],
        ),
        Workload(
            name="W2", title="10 steps in a row, fib(30) each", workflow="row_of_10",
            plain=lambda: plain_celery.row(10, 30), expected=[10 * 832_040],
        ),
        Workload(
            name="W3", title="foreach of 1,000 no-ops and their sum", workflow="fan",
            plain=lambda: plain_celery.fan(1000), expected=[sum(range(1000))],
        ),
        Workload(
            name="W4", title="200 diamonds a -> b, c -> d -> e at once", workflow="diamond",
            plain=plain_celery.diamond, inputs=[{"x": i} for i in range(200)],
            expected=[2 * i + 5 for i in range(200)],
        ),
    ]  # fmt: skip


# Processes


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for what is started: without settings of whoever runs this."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "CELERY_"))}
    return kept | {"PYTHONPATH": str(ROOT)} | extra


@contextmanager
def process(command: Sequence[str], log: Path, *, cwd: Path = ROOT, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in the background; on leaving, end it and what it has started."""
    with log.open("ab") as output:
        # A session of its own: Ctrl-C is for us, and we end it in order.
        running = subprocess.Popen(
            command, cwd=cwd, env=environment(**env), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield running
    except Exception:
        console.print(f"[red]{log.name}:[/red]\n{log.read_text(errors='replace')[-2000:]}", markup=False)
        raise
    finally:
        family = _family(running.pid)
        running.terminate()
        try:
            running.wait(timeout=20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        for left in psutil.wait_procs(family, timeout=2)[1]:
            left.kill()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(predicate: Callable[[], Any], description: str) -> Any:
    """Wait until `predicate` gives something true and return it."""
    until = time.monotonic() + PATIENCE_S
    while not (value := predicate()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited {PATIENCE_S:g} s in vain until {description}")
        time.sleep(0.05)
    return value


def answers(url: str | None) -> bool:
    """Tell whether a server answers."""
    if url is None:
        return False
    client = redis.Redis.from_url(url)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


@contextmanager
def embedded_server(data_dir: Path, fsync: str) -> Iterator[str]:
    """Run an embedded server and give its URL, without the number of a database."""
    data_dir.mkdir()
    with process(EmbeddedServer(data_dir, fsync=fsync).prepare(), data_dir / "server.log"):
        url = EmbeddedServer.url_of(data_dir)
        assert url is not None
        wait_until(lambda: answers(url), "the server answers")
        yield url.removesuffix("/0")


def plain_worker(url: str, work: Path) -> Any:
    """Run plain Celery's worker."""
    options = ["-c", "2", "--without-gossip", "--without-mingle", "--loglevel", "WARNING"]
    command = [sys.executable, "-m", "celery", "-A", "plain_celery", "worker", *options]
    return process(command, work / "plain-worker.log", cwd=HERE, BENCH_PLAIN_URL=url)


def our_worker(settings: Settings, work: Path) -> Any:
    """Run our worker."""
    command = [sys.executable, "-m", "orchestrator", "worker", "--project", str(settings.project)]
    return process(
        command,
        work / "our-worker.log",
        ORCHESTRATOR_BROKER_URL=settings.broker_url,
        ORCHESTRATOR_LEDGER_URL=settings.ledger_url,
        ORCHESTRATOR_DATA_DIR=str(settings.data_dir),
    )


# The two sides


class Plain:
    """Plain Celery, seen by who submits."""

    def run(self, workload: Workload) -> tuple[float, list[Any]]:
        """Submit and wait; returns (seconds, results)."""
        began = time.perf_counter()
        pending = [workload.plain(**given).apply_async() for given in workload.inputs]
        results = [one.get(timeout=PATIENCE_S) for one in pending]
        took = time.perf_counter() - began
        forget_parts()
        return took, results


def forget_parts() -> None:
    """End Celery's listening for parts of chords, with which it goes on after `get`; each round shall begin alike."""
    import plain_celery

    for waiters in plain_celery.app.backend._pending_results:
        for one in [result for known in list(waiters.values()) for result in list(known.values())]:
            one.backend.remove_pending_result(one)


class Ours:
    """This project, seen by who starts runs: the end of a run is told on a channel, its result is in the ledger."""

    def __init__(self, settings: Settings, plans: dict[str, Plan]) -> None:
        self._engine = Engine(settings)
        self._plans = plans
        for plan in plans.values():
            self._engine.ledger.put_plan(plan)
        self._listener = self._engine.ledger.client.pubsub(ignore_subscribe_messages=True)
        self._listener.subscribe(keys.RUN_ENDED)

    def close(self) -> None:
        self._listener.close()
        self._engine.close()

    def run(self, workload: Workload) -> tuple[float, list[Any]]:
        """Start and wait; returns (seconds, results)."""
        plan = self._plans[workload.workflow]
        began = time.perf_counter()
        started = [self._start(plan, given) for given in workload.inputs]
        waiting, results = set(started), {}
        while waiting:
            for run in self.ended() or list(waiting):
                if run in waiting and (result := self.result(run)) is not None:
                    results[run] = result[0]
                    waiting.remove(run)
            if time.perf_counter() - began > PATIENCE_S:
                raise TimeoutError(f"{workload.name}: {len(waiting)} runs have not ended")
        return time.perf_counter() - began, [results[run] for run in started]

    def _start(self, plan: Plan, given: dict[str, Any]) -> str:
        run = uuid.uuid4().hex[:24]
        event = manual_event(plan.workflow.name, given, event_id=run).to_json()
        params = plan.workflow.resolve_params(given, event)
        self._engine.start(run, plan, event=event, params=params)
        return run

    def ended(self) -> list[str]:
        """Wait for up to a second for the end of a run; returns its id, or nothing."""
        message = self._listener.get_message(timeout=1.0)
        return [json.loads(message["data"])["run"]] if message is not None else []

    def result(self, run: str) -> tuple[Any] | None:
        """Return the result of a run, if it has ended."""
        state, output, error = self._engine.ledger.outcome(run)
        if not state or not RunState(state).is_end:
            return None
        if state != RunState.SUCCEEDED:
            raise RuntimeError(f"run {run} {state}: {error}")
        return (self._engine.payloads.unpack(output),)


def compare(workload: Workload, plain: Plain, ours: Ours, rounds: int) -> Outcome:
    """Measure both sides in turns, after one round that does not count."""
    outcome = Outcome(workload.name, workload.title)
    for number in range(rounds + 1):
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(workload.samples):
            sides = [("plain", plain.run), ("ours", ours.run)]
            for name, run in sides if number % 2 else reversed(sides):
                gc.collect()
                took, results = run(workload)
                if results != workload.expected:
                    raise AssertionError(f"{workload.name}, {name}: {results} is not {workload.expected}")
                seconds[name].append(took)
        if number:
            outcome.plain.append(seconds["plain"])
            outcome.ours.append(seconds["ours"])
            shown = {name: f"{statistics.median(some):.3f} s" for name, some in seconds.items()}
            console.print(f"{workload.name} round {number}: plain {shown['plain']}, ours {shown['ours']}")
    return outcome


# Idle: W5 and M


class Inbox:
    """The folder that `up` watches, and the ledger in which it is seen what came of a file."""

    def __init__(self, inbox: Path, ours: Ours) -> None:
        self._inbox = inbox
        self._ours = ours
        self._count = 0

    def drop(self) -> float:
        """Write a file and wait for its run; returns the seconds from before its close to the start of the step."""
        self._count += 1
        path = self._inbox / f"{self._count}.txt"
        with path.open("w") as file:
            file.write(f"{self._count}\n")
            file.flush()
            closed = time.time()
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            for run in self._ours.ended():
                result = self._ours.result(run)
                if result is not None and result[0]["path"] == str(path):
                    return float(result[0]["at"]) - closed
        raise TimeoutError(f"no run came of {path}")


def plain_start() -> float:
    """Return the seconds from before `apply_async` of one task to its start."""
    import plain_celery

    sent = time.time()
    result = plain_celery.started.delay("").get(timeout=PATIENCE_S)
    return float(result["at"]) - sent


def idle(wanted: set[str], rounds: int, work: Path, settings: Settings, plans: dict[str, Plan]) -> list[Outcome]:
    """Measure W5 and M with `up` as a user runs it, on a server of its own, beside a new worker of plain Celery."""
    starts = Outcome("W5", "idle: a file's close to the start of its step (plain: apply_async to start of a task)")
    memory = Outcome("M", "idle: PSS of all that `up` runs, its server too (plain: the worker alone)")
    with ExitStack() as stack:
        # The two are never both there while memory is measured: shared pages would be divided between them.
        plain = stack.enter_context(ExitStack())
        worker = plain.enter_context(plain_worker(os.environ["BENCH_PLAIN_URL"], work))
        plain_start()
        if "M" in wanted:
            weigh(memory, "plain", worker.pid)
        up, files = _up(stack, work, settings, plans)
        files.drop()
        for number in range(rounds + 1 if "W5" in wanted else 0):
            seconds: dict[str, list[float]] = {"plain": [], "ours": []}
            for _ in range(STARTS_A_ROUND if number else 2):
                for name, start in (("plain", plain_start), ("ours", files.drop)):
                    time.sleep(random.uniform(*BETWEEN_STARTS_S))
                    seconds[name].append(start())
            if number:
                starts.plain.append(seconds["plain"])
                starts.ours.append(seconds["ours"])
                shown = {name: f"{statistics.median(some) * 1000:.1f} ms" for name, some in seconds.items()}
                console.print(f"W5 round {number}: plain {shown['plain']}, ours {shown['ours']}")
        plain.close()
        if "M" in wanted:
            weigh(memory, "ours", up.pid)
    return [outcome for outcome in (starts, memory) if outcome.name in wanted]


def _up(
    stack: ExitStack, work: Path, settings: Settings, plans: dict[str, Plan]
) -> tuple[subprocess.Popen[bytes], Inbox]:
    data_dir = work / "up"
    command = [sys.executable, "-m", "orchestrator", "up", "--project", str(settings.project)]
    up = stack.enter_context(process([*command, "--data-dir", str(data_dir)], work / "up.log"))
    wait_until(lambda: answers(EmbeddedServer.url_of(data_dir)), "the server of `up` answers")
    url = EmbeddedServer.url_of(data_dir)
    ours = Ours(settings.evolve(data_dir=data_dir, broker_url=url, ledger_url=url), plans)
    stack.callback(ours.close)
    inbox = settings.project / "inbox"
    inbox.mkdir(exist_ok=True)
    return up, Inbox(inbox, ours)


def weigh(memory: Outcome, side: str, pid: int) -> None:
    """Note the PSS of a process and all that it has started, after it has been idle for a while."""
    time.sleep(IDLE_S)
    rows = [(_role(one), one.memory_full_info().pss) for one in _family(pid)]
    memory.details[side] = rows
    total = [[float(sum(size for _, size in rows))]]
    if side == "plain":
        memory.plain = total
    else:
        memory.ours = total


def _role(one: psutil.Process) -> str:
    words = one.cmdline()
    if any("valkey-server" in word for word in words[:1]):
        return "valkey-server"
    if "celery" in words or "worker" in words:
        parent = one.parent()
        return "worker child" if parent is not None and parent.cmdline() == words else "worker parent"
    return next((word for word in words if word in ("up", "control")), words[0] if words else one.name())


# What comes out


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent are not above."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round(percent / 100 * (len(ranked) - 1)))]


def summary(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the rows of the table for one outcome: medians, ratio and spread."""
    plain, ours = ([value for some in side for value in some] for side in (outcome.plain, outcome.ours))
    percents = (50, 95) if outcome.name == "W5" else (50,)
    rows = []
    for percent in percents:
        row: dict[str, Any] = {"workload": outcome.name, "title": outcome.title, "unit": "s"}
        if outcome.name == "W5":
            row["workload"] = f"W5 p{percent}"
        if outcome.name == "M":
            row["unit"] = "bytes"
        row["plain"], row["ours"] = (
            statistics.median(side) if percent == 50 else percentile(side, percent) for side in (plain, ours)
        )
        row["ratio"] = row["ours"] / row["plain"]
        row["plain_spread"], row["ours_spread"] = ([min(side), max(side)] for side in (plain, ours))
        rows.append(row)
    return rows


def machine(url: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    client = redis.Redis.from_url(f"{url}/0", decode_responses=True)
    server: Any = client.info("server")
    config: Any = client.config_get("append*")
    client.close()
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "cores": os.cpu_count(),
        "cpu": cpu,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in ("celery", "kombu", "redis")},
        "valkey": server.get("valkey_version", server["redis_version"]),
        "appendonly": config["appendonly"],
        "appendfsync": config["appendfsync"],
    }


def show(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], about: dict[str, Any]) -> None:
    """Print the tables."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title="Medians; ratio = ours / plain Celery; spread is min to max")
    for heading in ("", "workload"):
        table.add_column(heading)
    for heading in ("plain", "ours", "ratio", "plain spread", "ours spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        scale, unit = (2**20, "MB") if row["unit"] == "bytes" else (0.001, "ms")
        spreads = [f"{low / scale:,.1f}-{high / scale:,.1f}" for low, high in (row["plain_spread"], row["ours_spread"])]
        table.add_row(
            row["workload"], row["title"], f"{row['plain'] / scale:,.1f} {unit}", f"{row['ours'] / scale:,.1f} {unit}",
            f"{row['ratio']:.2f}", *spreads,
        )  # fmt: skip
    out.print(table)
    for outcome in outcomes:
        if outcome.details:
            table = Table(title="Idle, PSS of each process")
            table.add_column("side")
            table.add_column("process")
            table.add_column("MB", justify="right")
            for side, processes in outcome.details.items():
                for role, size in processes:
                    table.add_row(side, role, f"{size / 2**20:.1f}")
            out.print(table)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()))


def measure(rounds: int, wanted: set[str], work: Path, fsync: str) -> tuple[list[Outcome], dict[str, Any]]:
    """Start all that is needed, measure, stop it."""
    project = work / "project"
    shutil.copytree(HERE / "project", project, ignore=shutil.ignore_patterns("__pycache__"))
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        url = stack.enter_context(embedded_server(work / "data", fsync))
        os.environ["BENCH_PLAIN_URL"] = f"{url}/1"
        settings = Settings.load(
            project, environ={}, data_dir=work / "data", broker_url=f"{url}/0", ledger_url=f"{url}/0"
        )
        loaded = load_in_subprocess(settings.project, pools=settings.declared_pools, defaults=settings.defaults)
        if loaded.faults:
            raise RuntimeError("\n".join(map(str, loaded.faults)))
        plans = {name: Plan.of(workflow) for name, workflow in loaded.workflows.items()}
        stack.callback(forget_parts)
        about = machine(url)
        chosen = [workload for workload in workloads() if workload.name in wanted]
        if chosen:
            with plain_worker(os.environ["BENCH_PLAIN_URL"], work), our_worker(settings, work), ExitStack() as clients:
                ours = Ours(settings, plans)
                clients.callback(ours.close)
                for workload in chosen:
                    outcomes.append(compare(workload, Plain(), ours, rounds))
        if wanted & {"W5", "M"}:
            outcomes += idle(wanted, rounds, work, settings, plans)
    return outcomes, about


def main() -> None:
    known = ("W1", "W2", "W3", "W4", "W5", "M")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(known), help=f"some of {','.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", default=HERE / "result.json", help="where to keep figures")
    parser.add_argument("--fsync", choices=("everysec", "always"), default="everysec", help="of the server, for both")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    if arguments.rounds < 1 or not wanted <= set(known):
        parser.error(f"--rounds is from 1, and --only takes some of {','.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as work:
        try:
            outcomes, about = measure(arguments.rounds, wanted, Path(work), arguments.fsync)
        except KeyboardInterrupt:
            sys.exit(130)
    rows = [row for outcome in outcomes for row in summary(outcome)]
    show(rows, outcomes, about)
    body = {"machine": about, "rounds": arguments.rounds, "table": rows}
    body["measured"] = {o.name: {"plain": o.plain, "ours": o.ours, **o.details} for o in outcomes}
    arguments.json.write_text(json.dumps(body, indent=1) + "\n")
    console.print(f"all figures: {arguments.json}")


if __name__ == "__main__":
    main()
