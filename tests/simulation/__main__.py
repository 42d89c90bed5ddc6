"""Run the rule that sizes pools over arrivals in simulated time, beside other rules.

    python -m tests.simulation [--only burst,daily] [--write docs/scaling.md]

With --write, the tables in that file and the plots in the folder `scaling` beside it are made anew. All is drawn from
a fixed seed: the same code gives the same bytes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.pools import PoolSettings

from . import arrivals
from .arrivals import Pattern
from .plots import plot
from .pool import Figures, Pool
from .rules import Ours, rules

#: Four workers of eight processes.
SETTINGS = PoolSettings(maximum=32, concurrency=8)
HEAD = ("wait p50", "p95", "longest", "within 5 s", "process-seconds", "changes", "starts")
#: Pattern -> what else is tried there.
VARIED = ("burst", "on-off")


def simulate(pattern: Pattern, start: Callable[[Pool], object]) -> Figures:
    pool = Pool(pattern)
    start(pool)
    return pool.run()


def percentile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def share_within(figures: Figures, within_s: float) -> float:
    return sum(wait_s <= within_s for wait_s in figures.waits_s) / len(figures.waits_s)


def cells(figures: Figures) -> list[str]:
    """Return the columns of HEAD."""
    waits = (percentile(figures.waits_s, 0.5), percentile(figures.waits_s, 0.95), figures.waits_s[-1])
    return [
        *(f"{wait_s:.1f} s" for wait_s in waits),
        f"{share_within(figures, 5):.1%}",
        f"{figures.process_s:,.0f}",
        f"{figures.changes:,}",
        f"{figures.starts:,}",
    ]


def variants() -> dict[str, Callable[[Pool], Ours]]:
    """Return other settings of this project's rule."""

    def ours(*, knows_age: bool = True, **changes: float) -> Callable[[Pool], Ours]:
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        return lambda pool: Ours(pool, settings, knows_age=knows_age)

    return {
        'as above: `target = "5s"`, `idle_after = "60s"`, `concurrency = 8`': ours(),
        '`target = "1s"`': ours(start_within_s=1.0),
        '`target = "30s"`': ours(start_within_s=30.0),
        '`idle_after = "30s"`, as Celery': ours(idle_after_s=30.0),
        '`idle_after = "5m"`, as KEDA': ours(idle_after_s=300.0),
        "`min = 8`": ours(minimum=8),
        "`concurrency = 32`: one worker": ours(concurrency=32),
        "the age of messages is not known": ours(knows_age=False),
    }


def table(first: str, rows: dict[str, Figures]) -> str:
    head = "| " + " | ".join([first, *HEAD]) + " |\n|" + "---|" + "---:|" * len(HEAD) + "\n"
    return head + "".join("| " + " | ".join([name, *cells(figures)]) + " |\n" for name, figures in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="patterns, by name")
    parser.add_argument("--write", type=Path, help="the document whose tables and plots are made anew")
    options = parser.parse_args()
    chosen = set(filter(None, options.only.split(",")))
    for make in arrivals.PATTERNS:
        pattern = make()
        if chosen and pattern.name not in chosen:
            continue
        rows = {name: simulate(pattern, start) for name, start in rules(pattern, SETTINGS).items()}
        made = {pattern.name: table("rule", rows)}
        if pattern.name in VARIED:
            made[f"{pattern.name}-keys"] = table(
                "keys", {name: simulate(pattern, one) for name, one in variants().items()}
            )
        for name, text in made.items():
            print(f"{name}: {pattern.title}\n\n{text}")
            if options.write:
                write(options.write, name, text)
        if options.write:
            folder = options.write.parent / options.write.stem
            folder.mkdir(exist_ok=True)
            (folder / f"{pattern.name}.svg").write_text(plot(pattern, rows, SETTINGS.maximum, SETTINGS.start_within_s))


def write(document: Path, name: str, text: str) -> None:
    """Put a table between its marks in a document."""
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->\n)", re.DOTALL)
    before = document.read_text()
    if not marks.search(before):
        raise SystemExit(f"{document} has no place for the table {name}: put <!-- {name} --> and <!-- end --> there")
    document.write_text(marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", before))


if __name__ == "__main__":
    main()
