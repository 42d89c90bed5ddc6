"""The project that is put under load: workflows of every shape, each with what must come of it.

Every body writes a line to the outside record when it begins and one when it ends (record.py reads them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.runs import child_run_id
from orchestrator.workflows import Phase

#: Type of the event that starts a kind, without the kind's name.
EVENT_TYPE = "chaos."
RECORD = "record"
#: Directories beside the record: which crashes have been, and which runs are mended.
CRASHES, MENDED = "crashes", "mended"
#: The bucket that notifies a queue, but of names that end in TOLD alone; and one that does not.
BUCKET, NOTIFICATIONS, TOLD = "chaos", "notifications", ".txt"
POLLED_BUCKET = "polled"

TASKS = '''
"""Bodies that say on disk, in one write each, that they begin and that they end."""

import os, signal, time
from contextlib import contextmanager
from pathlib import Path

WORK = Path(__file__).resolve().parent.parent
RECORD = os.open(WORK / "record", os.O_APPEND | os.O_CREAT | os.O_WRONLY)


def write(word, context):
    # A kill may tear a write: a whole line has its end, and begins on its own.
    line = f"\\n{word} {context.idempotency_key} {context.attempt} {os.getpid()} {time.monotonic():.6f} .\\n"
    os.write(RECORD, line.encode())
    os.fsync(RECORD)


@contextmanager
def recorded(context, seconds=0.0):
    write("begin", context)
    word = "fail"
    try:
        time.sleep(seconds)
        yield
        word = "end"
    finally:
        write(word, context)


def add(values, context, seconds=0.0):
    with recorded(context, seconds):
        return sum(values)


def count(n, context):
    with recorded(context):
        return list(range(n))


def lines(path, context):
    with recorded(context), open(path) as file:
        return len(file.readlines())


def fail_first(values, fails, context, seconds=0.0):
    with recorded(context, seconds):
        if context.attempt <= fails:
            raise RuntimeError("not yet")
        return sum(values)


def crash_first(values, crashes, how, context):
    with recorded(context):
        for n in range(crashes):
            name = f"{context.idempotency_key}.{n}".replace("/", "_")
            try:
                os.close(os.open(WORK / "crashes" / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            write("crash", context)
            if how == "exit":
                os._exit(3)
            signal.raise_signal(signal.SIGSEGV)
        return sum(values)


def hang_first(values, how, context):
    with recorded(context):
        if context.attempt == 1:
            write("hang", context)
            if how == "deaf":
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(600)
        return sum(values)


def mendable(values, broken, context):
    with recorded(context):
        if broken and not (WORK / "mended" / context.run_id).exists():
            raise RuntimeError("broken")
        return sum(values)
'''

SETTINGS = """
[settings]
fsync = "always"
# No step is to fail for being unlucky.
maximum_losses = 1000
rescan_s = 5.0
grace_s = 5
stop_grace_s = 1.0

# Its processes come and go all the time, and some of its workers.
[pools.default]
max = 6
concurrency = 2
idle_after = "1s"
target = {start_within = "500ms"}
"""


#: Types of parameters that are no numbers; None: any.
_TYPES = {"path": "string", "key": "string", "due_at": "string", "run": "string", "state": "string", "output": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A workflow, and what must come of a run of it.

    `slots` are the steps and items with a body, hooks apart; `children` the nested runs: (step, index or None, kind,
    params). `attempts` says how many attempts a slot needs (else 1), `crashes` how often it crashes its process,
    `broken` which slots fail until they are mended. All are functions of the run's parameters. `timed` are the slots
    with a timeout, `maximum` is how many attempts the policies allow in an episode (of hooks: 1). A run of a kind that
    `pauses` waits for times, or for somebody to go on with it. `on` is what starts it, if not an event of its own, and
    `at` where its parameters are in that event.
    """

    name: str
    steps: Mapping[str, Any]
    output: str
    result: Callable[[Mapping[str, Any]], Any]
    slots: Callable[[Mapping[str, Any]], Sequence[str]]
    children: Callable[[Mapping[str, Any]], Sequence[tuple[str, int | None, str, dict[str, Any]]]] = lambda _: ()
    params: Sequence[str] = ("x",)
    on: Mapping[str, Any] | None = None
    at: str = "event.data."
    on_failure: Mapping[str, Any] = field(default_factory=dict)
    finally_: Mapping[str, Any] = field(default_factory=dict)
    attempts: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda _: {}
    crashes: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda _: {}
    broken: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: ()
    timed: Sequence[str] = ()
    maximum: int = 1
    pauses: bool = False

    @property
    def hooks(self) -> dict[str, Phase]:
        """Return the steps of the hooks, all with a body."""
        return dict.fromkeys(self.on_failure, Phase.ON_FAILURE) | dict.fromkeys(self.finally_, Phase.FINALLY)

    @property
    def first_hooks(self) -> set[str]:
        """Return the first of each: the others need those."""
        return {next(iter(hooks)) for hooks in (self.on_failure, self.finally_) if hooks}

    def definition(self) -> dict[str, Any]:
        on = self.on or {"event": {"type": [EVENT_TYPE + self.name]}}
        names = {
            name: {"default": "{{ " + self.at + name + " }}", **({"type": kind} if kind else {})}
            for name, kind in ((name, _TYPES.get(name, "integer")) for name in self.params)
        }
        hooks = {"on_failure": self.on_failure, "finally": self.finally_}
        return {
            "workflow": self.name, "on": [on], "params": names, "steps": self.steps, "output": self.output,
            **{phase: steps for phase, steps in hooks.items() if steps},
        }  # fmt: skip


def _call(task: str, *values: str, given: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return {"task": f"tasks:{task}", "with": {"values": "{{ [" + ", ".join(values) + "] }}", **given}, **options}


def _add(*values: str, seconds: float | str = 0.0, **options: Any) -> dict[str, Any]:
    return _call("add", *values, given={"seconds": seconds}, **options)


def _retry(attempts: int, interval: str, **options: Any) -> dict[str, Any]:
    return {"retry": {"maximum_attempts": attempts, "initial_interval": interval, "maximum_interval": "2s"} | options}


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


_ITEMS = 12


def _flaky() -> Kind:
    """Attempts that fail, of a step and of items; and a wait in between, which nobody is at work for."""
    retry = _retry(4, "100ms", jitter="equal")
    steps = {
        "a": _call("fail_first", "params.x", "1", given={"fails": "{{ params.fails }}"}, **retry),
        "nap": {"sleep": "{{ 1 + params.x % 2 }}", "needs": ["a"]},
        "each": _call(
            "fail_first", "item", "a", given={"fails": "{{ item % 3 }}"}, foreach=list(range(_ITEMS)), needs=["nap"],
            **retry,
        ),
        "total": {"task": "tasks:add", "with": {"values": "{{ each }}"}},
    }  # fmt: skip
    return Kind(
        name="flaky", steps=steps, output="{{ total }}", params=("x", "fails"), pauses=True, maximum=4,
        result=lambda p: _ITEMS * (p["x"] + 1) + sum(range(_ITEMS)),
        slots=lambda _: ["a", "total", *(f"each/{n}" for n in range(_ITEMS))],
        attempts=lambda p: {"a": 1 + p["fails"]} | {f"each/{n}": 1 + n % 3 for n in range(_ITEMS)},
    )  # fmt: skip


def _crashy() -> Kind:
    """Steps and items that take their process with them."""
    steps = {
        "a": _call("crash_first", "params.x", "1", given={"crashes": 2, "how": "exit"}),
        "b": _call("crash_first", "a", "1", given={"crashes": 1, "how": "signal"}),
        "each": _call(
            "crash_first", "item", "b", given={"crashes": "{{ 1 if item % 3 == 1 else 0 }}", "how": "exit"},
            foreach=list(range(6)),
        ),
        "total": {"task": "tasks:add", "with": {"values": "{{ each }}"}},
    }  # fmt: skip
    return Kind(
        name="crashy", steps=steps, output="{{ total }}", result=lambda p: 6 * (p["x"] + 2) + 15,
        slots=lambda _: ["a", "b", "total", *(f"each/{n}" for n in range(6))],
        crashes=lambda _: {"a": 2, "b": 1, "each/1": 1, "each/4": 1},
    )  # fmt: skip


def _hang() -> Kind:
    """Steps that do not come back: one hears what it is told, the other does not and is killed."""
    late = {"timeout": "2s", **_retry(4, "100ms")}
    steps = {
        "a": _call("hang_first", "params.x", "1", given={"how": "sleep"}, **late),
        "b": _call("hang_first", "params.x", "2", given={"how": "deaf"}, **late),
        "c": _add("a", "b"),
    }
    return Kind(
        name="hang", steps=steps, output="{{ c }}", result=lambda p: 2 * p["x"] + 3, slots=lambda _: list(steps),
        attempts=lambda _: {"a": 2, "b": 2}, timed=("a", "b"), maximum=4, pauses=True,
    )  # fmt: skip


def _mend() -> Kind:
    """A step, two items and a hook that fail until they are mended, next to some that do not."""
    retry = _retry(2, "100ms")
    steps = {
        "a": _add("params.x", "1"),
        "b": _call("mendable", "a", "1", given={"broken": "{{ params.broken == 1 }}"}, **retry),
        "c": _add("b", "1"),
        "d": _add("a", "2", seconds=0.1),
        "each": _call(
            "mendable", "item", "d", given={"broken": "{{ params.broken == 1 and item % 4 == 0 }}"},
            foreach=list(range(8)), **retry,
        ),
        "total": {"task": "tasks:add", "with": {"values": "{{ each + [c] }}"}},
    }  # fmt: skip
    return Kind(
        name="mend", steps=steps, output="{{ total }}", params=("x", "broken", "hook"), pauses=True, maximum=2,
        on_failure={"tell": _add("params.x")},
        finally_={"clean": _call("mendable", "1", given={"broken": "{{ params.hook == 1 }}"}), "last": _add("clean")},
        result=lambda p: 8 * (p["x"] + 3) + 28 + p["x"] + 3,
        slots=lambda _: ["a", "b", "c", "d", "total", *(f"each/{n}" for n in range(8))],
        broken=lambda p: ["b", "each/0", "each/4"] * p["broken"] + ["clean"] * p["hook"],
    )  # fmt: skip


def _outer() -> Kind:
    """Nested runs that fail until they are mended."""
    steps = {
        "a": _add("params.x", "1"),
        "inner": {"workflow": "mend", "with": {"x": "{{ a }}", "broken": 1, "hook": "{{ params.hook }}"}},
        "each": {
            "workflow": "mend", "foreach": [0, 1, 2], "needs": ["a"],
            "with": {"x": "{{ item }}", "broken": "{{ 1 if item == 1 else 0 }}", "hook": 0},
        },
        "total": {"task": "tasks:add", "with": {"values": "{{ each + [inner] }}"}},
    }  # fmt: skip
    return Kind(
        name="outer", steps=steps, output="{{ total }}", params=("x", "hook"), pauses=True,
        finally_={"clean": _add("params.x")},
        result=lambda p: sum(9 * x + 55 for x in (0, 1, 2, p["x"] + 1)),
        slots=lambda _: ["a", "total"],
        children=lambda p: [
            ("inner", None, "mend", {"x": p["x"] + 1, "broken": 1, "hook": p["hook"]}),
            *(("each", n, "mend", {"x": n, "broken": int(n == 1), "hook": 0}) for n in range(3)),
        ],
    )  # fmt: skip


def _slow() -> Kind:
    """Has something of everything at work for some seconds, to be cancelled at any moment."""
    seconds = "{{ params.ms / 1000 }}"
    steps: dict[str, Any] = {f"s{n}": _add(f"s{n - 1}" if n else "params.x", "1", seconds=seconds) for n in range(6)}
    steps |= {
        "r": _call("fail_first", "params.x", given={"fails": 2}, **_retry(4, "800ms", jitter="none")),
        "nap": {"sleep": "1500ms", "needs": ["s0"]},
        "each": _add("item", "s1", seconds=0.04, foreach=list(range(30)), max_parallel=3),
        "inner": {"workflow": "slow_inner", "with": {"x": "{{ s0 }}", "ms": "{{ params.ms }}"}},
        "total": {"task": "tasks:add", "with": {"values": "{{ each + [s5, r, inner] }}"}, "needs": ["nap"]},
    }
    return Kind(
        name="slow", steps=steps, output="{{ total }}", params=("x", "ms"), pauses=True, maximum=4,
        finally_={"clean": _add("params.x")},
        result=lambda p: 30 * (p["x"] + 2) + sum(range(30)) + p["x"] + 6 + p["x"] + 2 * (p["x"] + 1) + 3,
        slots=lambda _: ["r", "total", *(f"s{n}" for n in range(6)), *(f"each/{n}" for n in range(30))],
        attempts=lambda _: {"r": 3},
        children=lambda p: [("inner", None, "slow_inner", {"x": p["x"] + 1, "ms": p["ms"]})],
    )  # fmt: skip


def _slow_inner() -> Kind:
    steps = {
        "a": _add("params.x", "1", seconds="{{ params.ms / 1000 }}"),
        "b": _add("params.x", "1", seconds="{{ params.ms / 500 }}"),
        "c": _add("a", "b", "1", seconds="{{ params.ms / 500 }}"),
    }
    return Kind(
        name="slow_inner", steps=steps, output="{{ c }}", result=lambda p: 2 * p["x"] + 3,
        slots=lambda _: list(steps), params=("x", "ms"), pauses=True, finally_={"clean": _add("params.x")},
    )  # fmt: skip


def _sent(name: str, on: Mapping[str, Any] | None = None, *, at: str = "event.data.", param: str = "x") -> Kind:
    """What a trigger starts, with a number."""
    steps = {"a": _add(f"params.{param}", "1"), "b": _add("a", "1", seconds=0.02)}
    return Kind(
        name=name, steps=steps, output="{{ b }}", result=lambda p: p[param] + 2, slots=lambda _: list(steps),
        params=(param,), on=on, at=at,
    )  # fmt: skip


def _hook(name: str, **options: Any) -> Kind:
    verify = {
        "secrets": ["env:CHAOS_SECRET"], "header": "X-Signature", "prefix": "v1=", "timestamp_header": "X-Time",
        "payload": "{timestamp}.{body}", "id_header": "Idempotency-Key",
    }  # fmt: skip
    return _sent(name, {"webhook": {"path": name, "verify": {"hmac": verify}, **options}}, at="event.data.body.")


def _queue(name: str, url: str) -> Kind:
    return _sent(name, {"queue": {"url": f"env:{url}", "queue": name}}, at="event.data.body.")


def _object(name: str, bucket: str, **options: str) -> Kind:
    """An object of N bytes."""
    return _sent(name, {"s3": {"bucket": bucket, "prefix": "in/", **options}}, param="size")


def _removed() -> Kind:
    on = {"bucket": BUCKET, "prefix": "gone/", "queue": NOTIFICATIONS, "events": "removed"}
    return Kind(
        name="removed", steps={"a": _add("1", "1")}, output="{{ params.key }}", result=lambda p: p["key"],
        slots=lambda _: ["a"], params=("key",), on={"s3": on},
    )  # fmt: skip


def _tick() -> Kind:
    return Kind(
        name="tick", steps={"a": _add("1", "1")}, output="{{ params.due_at }}", result=lambda p: p["due_at"],
        slots=lambda _: ["a"], params=("due_at",), on={"schedule": {"every": "1s", "catchup": "all"}},
    )  # fmt: skip


#: Each end of a run of these has a run of `after`.
FOLLOWED = ("chain", "slow", "mend")


def _after() -> Kind:
    return Kind(
        name="after",
        steps={"a": _add("params.episode", "1")},
        output="{{ [a, params.run, params.state, params.output] }}",
        result=lambda p: [p["episode"] + 1, p["run"], p["state"], p["output"]],
        slots=lambda _: ["a"],
        params=("run", "state", "episode", "output"),
        on={"run": {"workflow": list(FOLLOWED), "state": ["succeeded", "failed", "cancelled"]}},
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _chain(), _diamond(), _tangle(), _fan(), _wide(), _shared(), _nested(), _long(), _take(),
        _flaky(), _crashy(), _hang(), _mend(), _outer(), _slow(), _slow_inner(),
        _hook("hooked"), _hook("answered", respond="sync", timeout="5s"),
        _object("object", BUCKET, queue=NOTIFICATIONS, reconcile="20s"), _object("polled", POLLED_BUCKET, poll="2s"),
        _removed(), _sent("posted"),
        _queue("listed", "CHAOS_LIST_URL"), _queue("queued", "CHAOS_SQS_URL"), _tick(), _after(),
    )
}  # fmt: skip
#: Those that are started by what is beside the system (sources.py), the clock, or other runs; a project has them if it
#: says so.
TRIGGERED = (
    "hooked", "answered", "posted", "object", "polled", "removed", "listed", "queued", "tick", "after",
)  # fmt: skip


class Will(StrEnum):
    """What is done with a run, and so what it comes to."""

    NOTHING = ""
    #: It fails and stays so.
    LEAVE = "leave"
    #: It fails, and goes on: by `runs resume`; by its dead letters; by those, with other arguments; by two at once.
    RESUME = "resume"
    REDRIVE = "redrive"
    REDRIVE_INPUT = "redrive with input"
    BOTH = "both at once"
    #: It is cancelled, and left; or resumed.
    CANCEL = "cancel"
    CANCEL_RESUME = "cancel and resume"

    @property
    def cancels(self) -> bool:
        return self in (Will.CANCEL, Will.CANCEL_RESUME)

    @property
    def goes_on(self) -> bool:
        return self not in (Will.NOTHING, Will.LEAVE, Will.CANCEL)

    @property
    def states(self) -> tuple[str, ...]:
        """Return the states that such a run may come to."""
        return {Will.LEAVE: ("failed",), Will.CANCEL: ("cancelled", "succeeded")}.get(self, ("succeeded",))


def write_project(root: Path, triggered: Collection[str] = ()) -> None:
    """Write the project to `root`, with some of the TRIGGERED; the record is made beside it."""
    (root / "workflows").mkdir(parents=True)
    (root / "inbox").mkdir()
    (root / "tasks.py").write_text(TASKS)
    (root / "orchestrator.toml").write_text(SETTINGS)
    for kind in (kind for kind in KINDS.values() if kind.name not in TRIGGERED or kind.name in triggered):
        # JSON is YAML.
        (root / "workflows" / f"{kind.name}.yaml").write_text(json.dumps(kind.definition(), indent=1))
    (root.parent / RECORD).touch()
    for name in (CRASHES, MENDED):
        (root.parent / name).mkdir()


@dataclass(frozen=True, slots=True)
class Expected:
    """A run that must be there: because an event was accepted, or as the nested run of such a run.

    `will` is that of the accepted event's run, and `root` its id.
    """

    run: str
    kind: Kind
    params: Mapping[str, Any] = field(hash=False)
    parent: str = ""
    will: Will = Will.NOTHING
    root: str = ""

    def family(self, child_of: Callable[[str, str], str] = lambda run, slot: "") -> list[Expected]:
        """Return this run and all that are nested in it.

        `child_of` says which run a slot of a run has waited for, if another than that of its first attempt.
        """
        found = [self]
        for step, index, kind, params in self.kind.children(self.params):
            slot = step if index is None else f"{step}/{index}"
            run = child_of(self.run, slot) or child_run_id(self.run, step, index, 1)
            child = Expected(run, KINDS[kind], params, self.run, self.will, self.root or self.run)
            found += child.family(child_of)
        return found
