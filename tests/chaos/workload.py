"""The project that is put under load: workflows of every shape, each with what must come of it.

Every body writes a line to the outside record when it begins and one when it ends (record.py reads them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.runs import child_run_id

#: Type of the event that starts a kind, without the kind's name.
EVENT_TYPE = "chaos."
RECORD = "record"

TASKS = '''
"""Bodies that say on disk, in one write each, that they begin and that they end."""

import os, time
from contextlib import contextmanager
from pathlib import Path

RECORD = os.open(Path(__file__).resolve().parent.parent / "record", os.O_APPEND | os.O_CREAT | os.O_WRONLY)


def write(word, context):
    # A kill may tear a write: a whole line has its end, and begins on its own.
    line = f"\\n{word} {context.idempotency_key} {context.attempt} {os.getpid()} {time.monotonic():.6f} .\\n"
    os.write(RECORD, line.encode())
    os.fsync(RECORD)


@contextmanager
def recorded(context, seconds=0.0):
    write("begin", context)
    time.sleep(seconds)
    yield
    write("end", context)


def add(values, context, seconds=0.0):
    with recorded(context, seconds):
        return sum(values)


def count(n, context):
    with recorded(context):
        return list(range(n))


def lines(path, context):
    with recorded(context), open(path) as file:
        return len(file.readlines())
'''

SETTINGS = """
[settings]
fsync = "always"
# No step is to fail for being unlucky.
maximum_losses = 1000
rescan_s = 5.0
grace_s = 5

[pools.default]
concurrency = 2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A workflow, and what must come of a run of it.

    `slots` are the steps and items with a body; `children` the nested runs: (step, index or None, kind, params).
    All are functions of the run's parameters.
    """

    name: str
    steps: Mapping[str, Any]
    output: str
    result: Callable[[Mapping[str, Any]], Any]
    slots: Callable[[Mapping[str, Any]], Sequence[str]]
    children: Callable[[Mapping[str, Any]], Sequence[tuple[str, int | None, str, dict[str, Any]]]] = lambda _: ()
    params: Sequence[str] = ("x",)
    on: Mapping[str, Any] | None = None

    def definition(self) -> dict[str, Any]:
        on = self.on or {"event": {"type": [EVENT_TYPE + self.name]}}
        source = "event.data.path" if self.on else "event.data."
        names = {
            name: {"default": "{{ " + (source if self.on else source + name) + " }}"}
            | ({"type": "string"} if self.on else {"type": "integer"})
            for name in self.params
        }
        return {"workflow": self.name, "on": [on], "params": names, "steps": self.steps, "output": self.output}


def _add(*values: str, seconds: float | str = 0.0, **options: Any) -> dict[str, Any]:
    text = "{{ [" + ", ".join(values) + "] }}"
    return {"task": "tasks:add", "with": {"values": text, "seconds": seconds}, **options}


def _chain() -> Kind:
    steps = {f"c{n}": _add("params.x" if n == 0 else f"c{n - 1}", "1", seconds=0.005) for n in range(40)}
    return Kind(
        name="chain", steps=steps, output="{{ c39 }}", result=lambda p: p["x"] + 40, slots=lambda _: list(steps)
    )


def _diamond() -> Kind:
    steps = {
        "a": _add("params.x", "1"),
        "b": _add("a", "1", seconds=0.02),
        "c": _add("a", "2", seconds=0.05),
        "d": _add("b", "c"),
    }
    return Kind(
        name="diamond", steps=steps, output="{{ d }}", result=lambda p: 2 * p["x"] + 5, slots=lambda _: list(steps)
    )


def _tangle() -> Kind:
    """Not series-parallel: d is below two roots and above two joins; h joins across levels."""
    steps = {
        "a": _add("params.x", "1", seconds=0.02),
        "b": _add("params.x", "2", seconds=0.05),
        "c": _add("a", "1"),
        "d": _add("a", "b", seconds=0.02),
        "e": _add("b", "1"),
        "f": _add("c", "d"),
        "g": _add("d", "e", seconds=0.02),
        "h": _add("f", "g", "a"),
    }
    return Kind(
        name="tangle", steps=steps, output="{{ h }}", result=lambda p: 7 * p["x"] + 12, slots=lambda _: list(steps)
    )


def _fan() -> Kind:
    steps = {
        "numbers": {"task": "tasks:count", "with": {"n": "{{ params.x }}"}},
        "each": _add("item", "1", foreach="{{ numbers }}"),
        "total": {"task": "tasks:add", "with": {"values": "{{ each }}"}},
    }
    return Kind(
        name="fan", steps=steps, output="{{ total }}", result=lambda p: p["x"] * (p["x"] + 1) // 2,
        slots=lambda p: ["numbers", "total", *(f"each/{n}" for n in range(p["x"]))],
    )  # fmt: skip


def _wide() -> Kind:
    """Many roots: the first canvas is many messages."""
    steps: dict[str, Any] = {f"r{n}": _add("params.x", str(n)) for n in range(60)}
    steps["total"] = _add(*(f"r{n}" for n in range(60)))
    return Kind(
        name="wide", steps=steps, output="{{ total }}", result=lambda p: 60 * p["x"] + 1770, slots=lambda _: list(steps)
    )


def _shared() -> Kind:
    """The first item takes so long that its parent gives back what waits behind it in the same part."""
    steps = {
        "numbers": {"task": "tasks:count", "with": {"n": "{{ params.x }}"}},
        "each": _add("item", "1", seconds="{{ 1.5 if item == 0 else 0.01 }}", foreach="{{ numbers }}"),
        "total": {"task": "tasks:add", "with": {"values": "{{ each }}"}},
    }
    return Kind(
        name="shared", steps=steps, output="{{ total }}", result=lambda p: p["x"] * (p["x"] + 1) // 2,
        slots=lambda p: ["numbers", "total", *(f"each/{n}" for n in range(p["x"]))],
    )  # fmt: skip


def _nested() -> Kind:
    return Kind(
        name="nested",
        steps={
            "a": _add("params.x", "1"),
            "inner": {"workflow": "diamond", "with": {"x": "{{ a }}"}},
            "each": {"workflow": "tangle", "foreach": [0, 1, 2, 3, 4], "with": {"x": "{{ item }}"}, "needs": ["a"]},
            "total": {"task": "tasks:add", "with": {"values": "{{ each + [inner] }}"}},
        },
        output="{{ total }}",
        result=lambda p: sum(7 * n + 12 for n in range(5)) + 2 * (p["x"] + 1) + 5,
        slots=lambda _: ["a", "total"],
        children=lambda p: [
            ("inner", None, "diamond", {"x": p["x"] + 1}),
            *(("each", n, "tangle", {"x": n}) for n in range(5)),
        ],
    )


def _long() -> Kind:
    steps = {"a": _add("params.x", seconds=30.0), "b": _add("a", "1")}
    return Kind(name="long", steps=steps, output="{{ b }}", result=lambda p: p["x"] + 1, slots=lambda _: list(steps))


def _take() -> Kind:
    """A file `N.txt` has N lines when it is whole."""
    steps = {"lines": {"task": "tasks:lines", "with": {"path": "{{ params.path }}"}}, "b": _add("lines", "1")}
    return Kind(
        name="take", steps=steps, output="{{ b }}", result=lambda p: int(Path(p["path"]).stem.split("-")[0]) + 1,
        slots=lambda _: list(steps), params=("path",), on={"file": {"path": "inbox", "glob": "*.txt"}},
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (_chain(), _diamond(), _tangle(), _fan(), _wide(), _shared(), _nested(), _long(), _take())
}


def write_project(root: Path) -> None:
    """Write the project to `root`; the record is made beside it."""
    (root / "workflows").mkdir(parents=True)
    (root / "inbox").mkdir()
    (root / "tasks.py").write_text(TASKS)
    (root / "orchestrator.toml").write_text(SETTINGS)
    for kind in KINDS.values():
        # JSON is YAML.
        (root / "workflows" / f"{kind.name}.yaml").write_text(json.dumps(kind.definition(), indent=1))
    (root.parent / RECORD).touch()


@dataclass(frozen=True, slots=True)
class Expected:
    """A run that must be there: because an event was accepted, or as the nested run of such a run."""

    run: str
    kind: Kind
    params: Mapping[str, Any] = field(hash=False)
    parent: str = ""

    def family(self) -> list[Expected]:
        """Return this run and all that are nested in it."""
        found = [self]
        for step, index, kind, params in self.kind.children(self.params):
            child = Expected(child_run_id(self.run, step, index, 1), KINDS[kind], params, self.run)
            found += child.family()
        return found
