"""Run the rule that sizes pools over arrivals in simulated time, beside other rules.

python -m tests.simulation [--only burst,daily] [--write docs]
"""

from __future__ import annotations

import argparse
import time

from orchestrator.pools import PoolSettings

from . import arrivals
from .pool import Figures, Pool
from .rules import Ours, rules

SETTINGS = PoolSettings(maximum=32, concurrency=8)


def share_within(figures: Figures, within_s: float) -> float:
    return sum(wait_s <= within_s for wait_s in figures.waits_s) / len(figures.waits_s)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--why", action="store_true")
    options = parser.parse_args()
    for make in arrivals.PATTERNS:
        pattern = make()
        if options.only and pattern.name not in options.only.split(","):
            continue
        print(f"\n{pattern.title}   ({len(pattern.messages)} messages, {pattern.work_s:.0f} s of work)")
        for name, start in rules(pattern, SETTINGS).items():
            began = time.perf_counter()
            pool = Pool(pattern)
            rule = start(pool)
            f = pool.run()
            print(
                f"  {name:30} p50 {percentile(f.waits_s, 0.5):7.2f} p95 {percentile(f.waits_s, 0.95):8.2f}"
                f" max {f.waits_s[-1]:8.2f} in5 {share_within(f, 5):7.2%} proc-s {f.process_s:9.0f}"
                f" changes {f.changes:5} starts {f.starts:5} peak {max(s for _, s in f.sizes)} ({time.perf_counter() - began:.1f} s)"
            )
            if options.why and isinstance(rule, Ours):
                for at_s, desired, why in rule.whys[:60]:
                    print(f"     {at_s:8.1f} {desired:3} {why}")


if __name__ == "__main__":
    main()
