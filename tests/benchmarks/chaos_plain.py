"""Kill plain Celery as `make chaos` kills us: the same bodies, the same kinds of kills, by the same code.

    python tests/benchmarks/chaos_plain.py [--kills 60] [--seed 7] [--ours FILE] [--json FILE]

`--ours` is what `python -m tests.chaos --json FILE` has written. Celery has two workers of two children, Redis as
broker and result backend, an append-only file that is synced always, late acknowledgement, and a visibility timeout of
30 s: once with the sweep as it comes, once every second. Nothing here is a test: it only counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from orchestrator.embedded import EmbeddedServer  # noqa: E402 -- the path comes first
from tests.chaos import record, recovery, report  # noqa: E402
from tests.chaos.killer import Killer  # noqa: E402
from tests.chaos.processes import Role, System, wait_for  # noqa: E402

#: No body begins or ends for so long: visibility timeout, default sweep, and some more.
_STUCK_S = 180.0
_WEIGHTS = {"child": 82, "worker": 14, "stop": 4}
_IN_FLIGHT = 12

console = Console(highlight=False)


class _Targets:
    def __init__(self, system: System) -> None:
        self._roles = system.roles

    def server(self) -> int | None:
        return self._roles["server"].pid

    def workers(self) -> list[int]:
        return [role.pid for name, role in self._roles.items() if name.startswith("worker") and role.pid is not None]

    def other(self, what: str) -> int | None:
        raise ValueError(what)


class _Load:
    """Starts canvases and looks for the results of their last tasks."""

    def __init__(self, url: str, chance: random.Random) -> None:
        import chaos_celery

        self.celery = chaos_celery
        self._client = redis.Redis.from_url(url, decode_responses=True)
        self._chance = chance
        #: run -> (kind, x, id of the task that answers)
        self.runs: dict[str, tuple[str, int, str]] = {}
        self.open: set[str] = set()
        self.half_started = 0
        self.wrong = 0

    def start(self, kind: str, x: int) -> None:
        run = f"run{len(self.runs) + self.half_started}"
        try:
            result = self.celery.workflow(kind, run, x).apply_async(retry=True)
        except Exception:  # noqa: BLE001 -- nobody knows how much of it was published: it is not counted
            self.half_started += 1
            return
        self.runs[run] = (kind, x, result.id)
        self.open.add(run)

    def round(self, number: int) -> None:
        x = self._chance.randrange(1000)
        starts = [("chain", x), ("chain", x), ("diamond", x), ("diamond", x), ("diamond", x), ("fan", 200)]
        if number % 5 == 1:
            starts.append(("fan", 5000))
        for kind, value in starts:
            self.start(kind, value)

    def refresh(self) -> None:
        waiting = sorted(self.open)
        try:
            rows = self._client.mget([f"celery-task-meta-{self.runs[run][2]}" for run in waiting]) if waiting else []
        except redis.RedisError:
            return
        for run, row in zip(waiting, rows, strict=True):
            if row:
                kind, x, _ = self.runs[run]
                told = json.loads(row)
                self.wrong += told["status"] != "SUCCESS" or told["result"] != self.celery.result(kind, x)
                self.open.discard(run)


def run(*, kills: int, seed: int, every_s: float, is_tight: bool) -> dict[str, Any]:
    """Do the scenario once and count."""
    work = Path(tempfile.mkdtemp(prefix="orchestrator-chaos-plain-"))
    (work / "data").mkdir()
    (work / "record").touch()
    system = System(work)
    system.start(Role("server", EmbeddedServer(work / "data", fsync="always").prepare()))
    url = EmbeddedServer.url_of(work / "data")
    assert url is not None
    wait_for(lambda: _answers(url), "the server answers")
    env = {"CHAOS_PLAIN_URL": url, "CHAOS_PLAIN_RECORD": str(work / "record"), "PYTHONPATH": f"{ROOT}:{HERE}"}
    env["CHAOS_PLAIN_TIGHT"] = "1" if is_tight else ""
    os.environ.update(env)
    sys.modules.pop("chaos_celery", None)
    command = [sys.executable, "-m", "celery", "-A", "chaos_celery", "worker", "-c", "2", "--loglevel", "WARNING"]
    for n in range(2):
        name = f"worker{n}"
        system.start(Role(name, [*command, "--without-gossip", "--without-mingle", "-n", name], env))
    try:
        load = _Load(url, random.Random(seed))
        killer = Killer(_Targets(system), work, random.Random(seed + 1), _WEIGHTS)
        chance, number, strike_at = random.Random(seed + 2), 0, time.monotonic() + every_s
        while killer.kills < kills:
            load.refresh()
            if len(load.open) < _IN_FLIGHT + 6 * (number // 6):  # what will never end is not to hold up what comes
                load.round(number)
                number += 1
            killer.wake(time.monotonic())
            if time.monotonic() >= strike_at:
                killer.strike()
                strike_at = time.monotonic() + chance.uniform(0.2, 1.8) * every_s
            time.sleep(0.05)
        killer.close()
        _settle(load, work / "record")
        return _count(load, killer, work)
    finally:
        system.stop()
        shutil.rmtree(work, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.RedisError:
        return False


def _settle(load: _Load, path: Path) -> None:
    seen, since = (0, 0), time.monotonic()
    while load.open and time.monotonic() - since < _STUCK_S:
        load.refresh()
        now = (len(load.open), path.stat().st_size)
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.2)


def _count(load: _Load, killer: Killer, work: Path) -> dict[str, Any]:
    bodies = record.parse((work / "record").read_text().splitlines())
    harms = record.read_harms(work / "harms.jsonl")
    lost_bodies = 0
    for one in load.open:
        kind, x, _ = load.runs[one]
        if kind != "chain":
            *header, body = load.celery.slots(kind, x)
            done = bodies.get(one, {})
            ended = all(any(e.end is not None for e in done.get(slot, ())) for slot in header)
            lost_bodies += ended and body not in done
    executions = [es for slots in bodies.values() for es in slots.values()]
    return {
        "kills": dict(killer.counts),
        "runs": len(load.runs),
        "never": len(load.open),
        "wrong": load.wrong,
        "half_started": load.half_started,
        "lost_chord_bodies": lost_bodies,
        "bodies": sum(len(es) for es in executions),
        "again": sum(len(es) - 1 for es in executions),
        "never_again": sum(es[-1].end is None for es in executions),
        "recovery": report.summarise(recovery.measure(bodies, harms)),
    }


def _ours(path: Path) -> dict[str, Any]:
    body = json.loads(path.read_text())
    return {
        "kills": body["kills"], "runs": sum(body["runs"].values()), "never": len(body["faults"].get("runs", [])),
        "wrong": 0, "half_started": 0, "lost_chord_bodies": 0, "bodies": body["bodies"],
        "again": sum(body["repeated"].values()), "never_again": 0, "recovery": body["recovery"],
    }  # fmt: skip


def show(columns: dict[str, dict[str, Any]]) -> None:
    """Print them side by side."""
    table = Table("", *columns)

    def row(title: str, cell: Any) -> None:
        table.add_row(title, *(str(cell(column)) for column in columns.values()))

    def times(column: dict[str, Any]) -> str:
        found = column["recovery"].get("kill child or worker: body")
        return f"{found['p50']:.1f} / {found['p95']:.1f} / {found['max']:.1f} s" if found else "-"

    row("kills", lambda c: sum(c["kills"].values()))
    row("of which of the server", lambda c: c["kills"].get("server", 0))
    row("runs", lambda c: c["runs"])
    row("runs that never ended", lambda c: c["never"])
    row("runs that failed, or with a wrong result", lambda c: c["wrong"])
    row("chord bodies lost", lambda c: c["lost_chord_bodies"])
    row("starts that failed, half published or not", lambda c: c["half_started"])
    row("bodies run", lambda c: c["bodies"])
    row("of which again", lambda c: c["again"])
    row("bodies that were killed and never ran again", lambda c: c["never_again"])
    row("from a kill to the next start of a body: p50 / p95 / max", times)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--every", type=float, default=1.7)
    parser.add_argument("--ours", type=Path, default=None, help="the report of `python -m tests.chaos --json`")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    columns = {}
    for name, is_tight in (("Celery, sweep as it comes", False), ("Celery, sweep every second", True)):
        columns[name] = run(kills=options.kills, seed=options.seed, every_s=options.every, is_tight=is_tight)
        console.print(f"{name}: {columns[name]['never']} of {columns[name]['runs']} runs never ended", style="dim")
    if options.ours is not None:
        columns["ours"] = _ours(options.ours)
    show(columns)
    if options.json is not None:
        options.json.write_text(json.dumps(columns, indent=1))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # celery's results would ask a server that is gone for a minute
