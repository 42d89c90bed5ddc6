"""Command line of the chaos harness.

python -m tests.chaos [--kills 1000] [--seed 1] [--minutes 60] [--every 1.7] [--json FILE]
python -m tests.chaos points [NAME ...] [--parallel 2] [--json FILE]
python -m tests.chaos bad-input [--messages 100000] [--seed 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tests.chaos import random_mode


def main() -> int:
    """Run; the exit code is 0 only if every check holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=["random", "points", "bad-input"], default="random")
    parser.add_argument("names", nargs="*", help="points: only these, as `complete.before@child`")
    parser.add_argument("--kills", type=int, default=1000, help="random: end after so many kills")
    parser.add_argument("--seed", type=int, default=None, help="random: repeats its choices")
    parser.add_argument("--minutes", type=float, default=60.0, help="random: end after so long")
    parser.add_argument("--every", type=float, default=1.7, help="random: seconds between kills, on average")
    parser.add_argument("--parallel", type=int, default=3, help="points: so many at a time")
    parser.add_argument("--messages", type=int, default=100_000, help="bad-input: so many")
    parser.add_argument("--json", type=Path, default=None, help="write the report there as well")
    parser.add_argument("--keep", action="store_true", help="keep logs and record although all went well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and all that was started is stopped
    seed = secrets.randbelow(100_000) if options.seed is None else options.seed
    report: Any
    if options.mode == "points":
        from tests.chaos import points_mode

        report = points_mode.run(options.names, parallel=options.parallel)
    elif options.mode == "bad-input":
        from tests.chaos import bad_input

        report = bad_input.run(messages=options.messages, seed=seed)
    else:
        report = random_mode.run(kills=options.kills, seed=seed, minutes=options.minutes, every_s=options.every)
    report.show()
    if options.json is not None:
        report.write(options.json)
    if report.ok and not options.keep:
        shutil.rmtree(report.logs, ignore_errors=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
