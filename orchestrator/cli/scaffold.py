"""`orchestrator init`: a small project that runs as it is."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import InputError, UnavailableError

_FILES = {
    "orchestrator.toml": """\
# Everything here is optional.

[settings]
# How long steps in progress may go on when `up` is stopped, in seconds.
grace_s = 30

# [pools.cpu]           # steps with `pool: cpu` run here
# max = 8               # processes at a time; none as long as there is nothing to do
# idle_after = "60s"    # how long one may have nothing to do before it goes

# [secrets]             # {{ secrets.API_KEY }} in a definition
# API_KEY = "env:API_KEY"
""",
    "tasks.py": '''\
"""The functions that the steps call. They are plain functions: test them like any other."""

import csv


def read(path):
    """Return the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def price(row):
    """Return what one row comes to."""
    return float(row["quantity"]) * float(row["unit_price"])


def report(file, amounts):
    """Sum it up."""
    print(f"{file}: {len(amounts)} rows")
    return {"file": file, "rows": len(amounts), "total": round(sum(amounts), 2)}
''',
    "workflows/invoices.yaml": """\
# A file that arrives in inbox/ starts this; try: cp examples.csv inbox/
workflow: invoices
description: Sum up each CSV file that arrives.
on:
  - file: {path: inbox, glob: "*.csv"}
  # - schedule: {cron: "0 6 * * MON-FRI", timezone: Europe/Paris}
  # - webhook: {path: invoices, verify: {github: env:GITHUB_SECRET}}
  # and s3, queue, run, event: see docs/triggers.md
params:
  path: {type: string, default: "{{ event.data.path }}"}
steps:
  rows:
    task: tasks:read
    with: {path: "{{ params.path }}"}
  amounts:
    task: tasks:price
    foreach: "{{ rows }}"
    with: {row: "{{ item }}"}
  report:
    task: tasks:report
    with: {file: "{{ params.path }}", amounts: "{{ amounts }}"}
output: "{{ report }}"
""",
    "examples.csv": "article,quantity,unit_price\nbolts,100,0.12\nnuts,80,0.07\nwashers,250,0.01\n",
    "inbox/.gitkeep": "",
    ".gitignore": ".orchestrator/\n__pycache__/\n",
}


def make_project(directory: Path) -> None:
    """Write the project. Raises InputError if the directory has something in it, UnavailableError if it cannot."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is there already and is not an empty directory; choose another name")
    try:
        for name, text in _FILES.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as exc:
        raise UnavailableError(f"cannot write to {directory}: {exc.strerror}") from exc
