"""A project: found, loaded from both faces, and each fault that one file alone cannot tell."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from orchestrator.errors import NotFoundError, TaskNotFoundError
from orchestrator.pools import PoolKind, PoolSettings
from orchestrator.project import (
    code_files,
    definition_files,
    find_project,
    load_in_subprocess,
    load_project,
    resolve_task,
    takes_context,
)
from orchestrator.retries import RetryPolicy
from orchestrator.subscriptions import OnFile
from orchestrator.workflows import Defaults

TASKS = """
def split(path, parts=2): return [path]
def total(chunk, *, context): return chunk
def anything(**values): return values
def positional(a, /): return a
async def later(x): return x
class Tools:
    @staticmethod
    def use(x): return x
number = 5
"""

WORKFLOW = "workflow: {name}\nsteps:\n  a:\n    task: {task}\n    with: {{{arguments}}}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Write files into a new project; afterwards Python forgets its modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(**files):
        (tmp_path / "workflows").mkdir(exist_ok=True)
        for name, text in {"tasks.py": TASKS, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return tmp_path.resolve()

    yield write
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is None or Path(file).is_relative_to(tmp_path.resolve()):
            del sys.modules[name]


def yaml(task="tasks:split", arguments="path: x", name="w"):
    return WORKFLOW.format(name=name, task=task, arguments=arguments)


def pools(*names: str) -> dict[str, PoolSettings]:
    """Return declared pools, with nothing said of them."""
    return {name: PoolSettings() for name in names}


def faults_of(root, **options):
    return [str(fault) for fault in load_project(root, **options).faults]


def test_a_project_is_found_upwards(tmp_path):
    """The nearest directory with orchestrator.toml or workflows/."""
    inner = tmp_path / "shop" / "lib" / "deep"
    inner.mkdir(parents=True)
    with pytest.raises(NotFoundError, match="orchestrator init"):
        find_project(inner)
    (tmp_path / "workflows").mkdir()
    assert find_project(inner) == tmp_path
    (tmp_path / "shop" / "orchestrator.toml").touch()
    assert find_project(inner) == tmp_path / "shop"


def test_both_faces_are_loaded(project, capfd):
    """YAML and Python below workflows/, Python at the top that imports orchestrator; nothing else is executed."""
    python = (
        "from orchestrator import task, workflow\nprint('loud')\n@workflow\ndef {}():\n    return tasks.split('a')\n"
    )
    decorated = "import tasks\nfrom orchestrator import task\ntasks.split = task(tasks.split)\n"
    root = project(
        **{
            "workflows/one.yaml": yaml(name="one"),
            "workflows/deep/two.yml": yaml(name="two"),
            "workflows/deep/my-three.py": decorated + python.format("three"),
            "four.py": decorated + python.format("four"),
            "script.py": "raise SystemExit('executed')",
            "test_five.py": python.format("five"),
            "workflows/.hidden/six.yaml": "broken: [",
            "workflows/notes.txt": "none",
        }
    )
    found = load_project(root)
    assert found.faults == []
    assert sorted(found.workflows) == ["four", "one", "three", "two"]
    assert found.workflows["four"].steps[0].task == "tasks:split"
    assert [path.relative_to(root).as_posix() for path in definition_files(root)] == [
        "workflows/one.yaml",
        "workflows/deep/my-three.py",
        "workflows/deep/two.yml",
        "four.py",
    ]
    assert sys.path.count(str(root)) == 1
    assert sys.path[0] == str(root)
    assert capfd.readouterr().out == ""


def test_folders_of_file_triggers_become_absolute(project, monkeypatch):
    """They are relative to the project, and ~ is the home directory."""
    monkeypatch.setenv("HOME", "/home/me")
    text = yaml() + "on: [{file: {path: in/box}}, {file: {path: ~/in}}, {file: {path: /abs}}]\n"
    root = project(**{"workflows/w.yaml": text})
    on = load_project(root).workflows["w"].on
    assert [entry.path for entry in on if isinstance(entry, OnFile)] == [str(root / "in/box"), "/home/me/in", "/abs"]


@pytest.mark.parametrize(
    ("task", "arguments", "fault"),
    [
        ("tasks:splt", "", "4: steps.a.task: no 'splt' in 'tasks'; did you mean 'split'?"),
        ("taks:split", "", "4: steps.a.task: no module 'taks' in this project; did you mean 'tasks'?"),
        (
            "tasks.split",
            "",
            "4: steps.a.task: 'tasks.split' is neither `module:function` nor the name of a registered task",
        ),
        ("'tasks:'", "", "4: steps.a.task: must be `module:function`"),
        ("json:dumps", "obj: 1", "4: steps.a.task: 'json' is not a module of this project but "),
        ("sys:exit", "", "4: steps.a.task: 'sys' is not a module of this project but built in; a task is a function"),
        ("tasks:number", "", "4: steps.a.task: is not a function, but int"),
        ("tasks:later", "x: 1", "4: steps.a.task: is an `async def` function; tasks are plain functions"),
        ("tasks:split", "pth: x, path: x", "5: steps.a.with.pth: unknown argument 'pth'; did you mean 'path'?"),
        ("tasks:split", "parts: 3", "5: steps.a.with: missing argument: path"),
        ("tasks:total", "chunk: 1, context: 2", "5: steps.a.with.context: `context` is given by the worker"),
        ("tasks:positional", "", "5: steps.a.with: the function has parameters that are positional only"),
        (
            "broken:f",
            "",
            "4: steps.a.task: 'broken' does not import: ModuleNotFoundError: No module named 'nope' (lib/deep.py:2)",
        ),
        ("syntax:f", "", "4: steps.a.task: 'syntax' does not import: SyntaxError: invalid syntax (syntax.py:2)"),
        ("exits:f", "", "4: steps.a.task: 'exits' does not import: SystemExit: 3 (exits.py:1)"),
        ("lib.none:f", "", "4: steps.a.task: no module 'lib.none' in this project; did you mean"),
        ("flow:w", "", "4: steps.a.task: is a workflow; write `workflow: w2`"),
    ],
)
def test_a_task_that_does_not_fit_is_a_fault(project, task, arguments, fault):
    """At the line of the step's field."""
    root = project(
        **{
            "workflows/w.yaml": yaml(task, arguments),
            "broken.py": "from lib import deep\n",
            "lib/__init__.py": "",
            "lib/deep.py": "import json\nimport nope\n",
            "syntax.py": "x = 1\nx = = 2\n",
            "exits.py": "raise SystemExit(3)\n",
            "flow.py": "from orchestrator import workflow\n@workflow(name='w2')\ndef w(): ...\n",
        }
    )
    found = [text for text in faults_of(root) if not text.startswith("flow.py")]
    assert len(found) == 1
    assert found[0].startswith(f"workflows/w.yaml:{fault}")


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("tasks:split", "path: 1"),
        ("tasks:split", "path: 1, parts: 2"),
        ("tasks:total", "chunk: 1"),
        ("tasks:anything", "whatever: 1"),
        ("tasks:Tools.use", "x: 1"),
        ("lib.deep:f", ""),
    ],
)
def test_a_task_that_fits(project, task, arguments):
    """Nothing is said, and the worker finds the same function."""
    root = project(**{"workflows/w.yaml": yaml(task, arguments), "lib/deep.py": "def f(): return 7\n"})
    found = load_project(root)
    assert found.faults == []
    assert callable(resolve_task(root, found.workflows["w"].steps[0].task))


def test_a_broken_module_is_told_once_a_file(project):
    """Not once for each step that needs it."""
    text = "workflow: w\nsteps:\n" + "".join(f"  s{n}: {{task: 'broken:f{n}'}}\n" for n in range(5))
    assert len(faults_of(project(**{"workflows/w.yaml": text, "broken.py": "1 / 0"}))) == 1
    text = "workflow: w\nsteps:\n" + "".join(f"  s{n}: {{task: 'tasks:splt'}}\n" for n in range(5))
    assert len(faults_of(project(**{"workflows/w.yaml": text}))) == 5


def test_two_workflows_with_one_name(project):
    """Both places are named; each is checked for itself all the same."""
    root = project(**{"workflows/a.yaml": yaml(), "workflows/b.yaml": "# b\n" + yaml("tasks:xyz")})
    assert faults_of(root) == [
        "workflows/b.yaml:2: workflow: two workflows are named 'w'; the other is in workflows/a.yaml:1",
        "workflows/b.yaml:5: steps.a.task: no 'xyz' in 'tasks'; known: split, total, anything, "
        "positional, later, Tools",
    ]
    assert list(load_project(root).workflows) == ["w"]


def test_two_schedules_with_one_name(project):
    """Within a workflow, and of two whose names come to the same."""
    entries = ("{cron: '@daily'}", "{cron: '@hourly'}", "{cron: '@hourly', name: b}")
    twice = "on:\n" + "".join(f"  - schedule: {entry}\n" for entry in entries)
    root = project(
        **{
            "workflows/a.yaml": yaml() + twice,
            "workflows/b.yaml": yaml().replace("workflow: w", "workflow: w.b") + "on: [{schedule: {every: 1h}}]\n",
        }
    )
    assert faults_of(root) == [
        "workflows/a.yaml:8: on.1.schedule: two schedules are named 'w', here and in workflows/a.yaml:7; "
        "give one a `name:`",
        "workflows/b.yaml:6: on.0.schedule: two schedules are named 'w.b', here and in workflows/a.yaml:9; "
        "give one a `name:`",
    ]


def test_a_queue_that_two_read_differently(project):
    """They would take its messages from each other. Those who read it alike share them."""
    entries = (
        "{url: 'amqp://me:hunter2@rabbit/shop', queue: orders}",
        "{url: 'amqp://me:hunter2@rabbit/shop', queue: orders, pattern: {data: {body: {n: [1]}}}}",
        "{url: 'amqp://me:hunter2@rabbit/shop', queue: orders, format: cloudevents}",
        "{url: 'amqp://you@rabbit/shop', queue: orders}",
        "{url: 'amqp://you@rabbit/other', queue: orders, format: cloudevents}",
    )
    root = project(**{"workflows/a.yaml": yaml() + "on:\n" + "".join(f"  - queue: {entry}\n" for entry in entries)})
    message = "must be as in workflows/a.yaml:7, which has this queue too: each message is taken once"
    assert faults_of(root) == [
        f"workflows/a.yaml:9: on.2.queue.format: {message}",
        f"workflows/a.yaml:10: on.3.queue.url: {message}",
    ]


def test_faults_of_all_files_come_at_once_and_sound_workflows_stay(project):
    """A file that cannot be read does not hide the others."""
    root = project(
        **{
            "workflows/a.yaml": "workflow: a\nsteps: {x: {tsk: 1, task: 'tasks:nothing'}}\n",
            "workflows/b.yaml": "a: [",
            "workflows/c.yaml": yaml(name="c"),
            "workflows/d.py": "import orchestrator\nx = = 3\n",
            "e.py": "from orchestrator import on, workflow\n\n@workflow(on=[on.file('a', settle='x')])\ndef e(): ...\n",
            "f.py": "from orchestrator import workflow\n\n@workflow\ndef f():\n    raise ValueError('no\\nway')\n",
        }
    )
    found = load_project(root)
    assert [(fault.file, fault.line, fault.field) for fault in found.faults] == [
        ("e.py", 3, "on.file.settle"),
        ("e.py", 3, "steps"),
        ("f.py", 5, ""),
        ("workflows/a.yaml", 2, "steps.x.tsk"),
        ("workflows/a.yaml", 2, "steps.x.task"),
        ("workflows/b.yaml", 1, ""),
        ("workflows/d.py", 2, ""),
    ]
    assert str(found.faults[2]) == "f.py:5: raises ValueError: no way"
    assert str(found.faults[6]) == "workflows/d.py:2: 'workflows.d' does not import: SyntaxError: invalid syntax"
    assert list(found.workflows) == ["c"]


ENTRIES = """
@workflow(on=[
    on.webhook("gh", verify={"github": "env:NO_SUCH"}),
    on.schedule(every=0),
    on.schedule(cron="0 25 * * *", name="a"),
    on.schedule(cron="@daily", timezone="Europe/Pariss", name="b"),
    on.s3("My_Bucket", poll="30s"),
    on.webhook("gh", verfy="env:NO_SUCH"),
    on.webhook("gh"),
    on.run("nobody"),
])
def b():
    tasks.f()
"""


def test_every_fault_of_entries_in_python_comes_at_once_with_the_line_of_its_call(project):
    """A call that does not fit hides neither the other entries nor their numbers."""
    head = "import tasks\nfrom orchestrator import on, workflow\n"
    found = load_project(project(**{"tasks.py": "def f(): ...\n", "b.py": head + ENTRIES}), secrets={})
    assert [(fault.line, fault.field) for fault in found.faults if fault.field != "steps"] == [
        (5, "on.0.webhook.verify.github"),
        (6, "on.schedule.every"),
        (7, "on.2.schedule.cron"),
        (8, "on.3.schedule.timezone"),
        (9, "on.4.s3.bucket"),
        (10, "on.webhook.verfy"),
        (11, "on.6.webhook.path"),
        (12, "on.7.run.workflow"),
    ]
    assert found.workflows == {}


NESTED = (
    "workflow: {}\nparams: {{n: integer, m: {{type: integer, default: 1}}}}\n"
    "steps:\n  a: {{workflow: {}, with: {{{}}}}}\n"
)


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("innr", "n: 1", "4: steps.a.workflow: unknown workflow 'innr'; did you mean 'inner'?"),
        ("inner", "", "4: steps.a.with: missing parameter of 'inner': n"),
        ("inner", "n: 1, nn: 2", "4: steps.a.with.nn: unknown parameter 'nn' of 'inner'; did you mean 'n'?"),
        ("outer", "n: 1", "1: steps: the workflows run each other in a circle: outer -> outer"),
    ],
)
def test_a_nested_workflow_that_does_not_fit_is_a_fault(project, name, arguments, fault):
    """It must exist, and take what it is given."""
    inner = NESTED.replace("workflow: {}, with: {{{}}}", "task: 'tasks:anything'").format("inner")
    root = project(**{"workflows/inner.yaml": inner, "workflows/outer.yaml": NESTED.format("outer", name, arguments)})
    assert faults_of(root) == [f"workflows/outer.yaml:{fault}"]


def test_workflows_that_run_each_other_in_a_circle(project):
    """The path is shown."""
    texts = {f"workflows/{a}.yaml": NESTED.format(a, b, "n: 1") for a, b in (("x", "y"), ("y", "z"), ("z", "x"))}
    assert faults_of(project(**texts)) == [
        "workflows/x.yaml:1: steps: the workflows run each other in a circle: x -> y -> z -> x"
    ]


def test_a_nested_workflow_with_faults_of_its_own_is_not_also_unknown(project):
    """One cause, one fault."""
    root = project(
        **{
            "workflows/inner.yaml": "workflow: inner\nsteps: {a: {task: 'tasks:anything', x: 1}}\n",
            "workflows/outer.yaml": "workflow: outer\nsteps: {a: {workflow: inner}}\n",
        }
    )
    (fault,) = faults_of(root)
    assert fault.startswith(
        "workflows/inner.yaml:2: steps.a.x: unknown key 'x'; known: task, workflow, sleep, until, with, needs"
    )


RETRIES = """
from orchestrator import RetryPolicy, task

@task(retry=RetryPolicy(maximum_attempts=5), timeout="5m", memory="1GB")
def patient(): ...

@task
def plain(): ...
"""
TRIED = """
workflow: w
{retry}
steps:
  own: {{task: lib:patient, retry: 7, timeout: 1s, memory: 2MB}}
  of_task: {{task: lib:patient}}
  plain: {{task: lib:plain}}
  part: {{task: lib:patient, timeout: 1s}}
  nested: {{workflow: inner}}
  nested_own: {{workflow: inner, retry: 7, timeout: 1s}}
  nap: {{sleep: 1h}}
on_failure:
  tell: {{task: lib:plain}}
finally:
  clean: {{task: lib:patient}}
"""
PROJECT_DEFAULTS = Defaults(retry=RetryPolicy(maximum_attempts=2), timeout_s=60.0, memory=10**8)


@pytest.mark.parametrize("load", [load_project, load_in_subprocess])
def test_a_step_says_how_it_is_tried_else_its_task_its_workflow_its_project(project, load):
    """The nearest that says it; what one says of timeouts does not hide what another says of retries."""
    files = {"lib.py": RETRIES, "workflows/inner.yaml": yaml(name="inner")}

    def tried(retry, **options):
        found = load(project(**files, **{"workflows/w.yaml": TRIED.format(retry=retry)}), **options)
        assert found.faults == []
        steps = found.workflows["w"].steps
        return {s.id: (s.retry.maximum_attempts if s.retry else None, s.timeout_s, s.memory) for s in steps}

    always = {
        "own": (7, 1.0, 2_000_000), "of_task": (5, 300.0, 10**9), "part": (5, 1.0, 10**9), "clean": (5, 300.0, 10**9),
        "nested": (None, None, None), "nested_own": (7, 1.0, None), "nap": (None, None, None),
    }  # fmt: skip
    assert tried("") == always | dict.fromkeys(("plain", "tell"), (None, None, None))
    assert tried("retry: 3") == always | dict.fromkeys(("plain", "tell"), (3, None, None))
    assert tried("", defaults=PROJECT_DEFAULTS) == always | dict.fromkeys(("plain", "tell"), (2, 60.0, 10**8))
    assert tried("retry: 3", defaults=PROJECT_DEFAULTS) == always | dict.fromkeys(("plain", "tell"), (3, 60.0, 10**8))


def test_what_a_task_says_of_attempts_holds_in_python_as_in_yaml(project):
    """It is resolved when the project is loaded, and not when the graph is drawn."""
    text = RETRIES + (
        "from orchestrator import sleep, workflow\n"
        "@workflow(retry=3, timeout='1h', on_failure=lambda: plain())\n"
        "def w():\n"
        "    patient()\n"
        "    patient.options(retry=1, memory='2GB')()\n"
        "    plain()\n"
        "    sleep(1)\n"
    )
    found = load_project(project(**{"w.py": text}), defaults=PROJECT_DEFAULTS)
    assert found.faults == []
    workflow = found.workflows["w"]
    assert (workflow.retry, workflow.timeout_s) == (RetryPolicy(maximum_attempts=3), 3600.0)
    assert [(s.id, s.retry and s.retry.maximum_attempts, s.timeout_s, s.memory) for s in workflow.steps] == [
        ("patient", 5, 300.0, 10**9),
        ("patient_2", 1, 300.0, 2 * 10**9),
        ("plain", 3, 60.0, 10**8),
        ("sleep", None, None, None),
        ("plain_2", 3, 60.0, 10**8),
    ]


def test_steps_of_hooks_are_checked_as_others_are(project):
    """Their tasks, arguments, nested workflows and pools, at the line of their field."""
    text = yaml() + (
        "on_failure:\n  b:\n    task: tasks:splt\n  c:\n    workflow: w2\n"
        "finally:\n  d:\n    task: tasks:split\n    pool: cpus\n    with: {pth: 1, path: 2}\n"
    )
    root = project(**{"workflows/w.yaml": text})
    assert faults_of(root, pools=pools("default", "cpu")) == [
        "workflows/w.yaml:8: on_failure.b.task: no 'splt' in 'tasks'; did you mean 'split'?",
        "workflows/w.yaml:10: on_failure.c.workflow: unknown workflow 'w2'; did you mean 'w'?",
        "workflows/w.yaml:14: finally.d.pool: unknown pool 'cpus'; did you mean 'cpu'?",
        "workflows/w.yaml:15: finally.d.with.pth: unknown argument 'pth'; did you mean 'path'?",
    ]
    root = project(**{"workflows/w.yaml": yaml() + "finally: {b: {workflow: w}}\n"})
    assert faults_of(root) == ["workflows/w.yaml:1: steps: the workflows run each other in a circle: w -> w"]


def test_a_hook_of_another_file_has_its_faults_there(project):
    """And the workflow that uses it does not run."""
    hooks = "import tasks\nfrom orchestrator import task\nsplit = task(tasks.split)\n"
    hooks += "def tell():\n    split.options(pool='cpus')('a')\n"
    flow = "import hooks\nfrom orchestrator import workflow\n@workflow(finally_=hooks.tell)\ndef w():\n"
    root = project(**{"lib/__init__.py": "", "hooks.py": hooks, "w.py": flow + "    hooks.split('a')\n"})
    found = load_project(root, pools=pools("default"))
    (fault,) = found.faults
    assert str(fault).startswith("hooks.py:5: finally.split_2.pool: unknown pool 'cpus'")
    assert found.workflows == {}


def test_pools_must_be_known_if_they_are_declared(project):
    """With None, any name is a pool."""
    root = project(**{"workflows/w.yaml": yaml() + "    pool: cpus\n"})
    assert faults_of(root) == []
    assert len(load_in_subprocess(root, pools=pools()).faults) == 1
    assert faults_of(root, pools=pools("default", "cpu")) == [
        "workflows/w.yaml:6: steps.a.pool: unknown pool 'cpus'; did you mean 'cpu'?"
    ]


SIZES = {
    "default": PoolSettings(),
    "large": PoolSettings(memory=8 * 10**9, cpu=4),
    "medium": PoolSettings(memory=4 * 10**9, cpu=2),
    "vision": PoolSettings(memory=8 * 10**9, cpu=4, gpu=1),
    "web": PoolSettings(kind=PoolKind.THREADS),
}


@pytest.mark.parametrize(
    ("resources", "pool"),
    [
        ("{}", "default"),
        ("{cpu: 1}", "default"),
        ("{cpu: 1.5}", "medium"),
        ("{memory: 3GB}", "medium"),
        ("{memory: 4GB, cpu: 3}", "large"),
        ("{gpu: 1}", "vision"),
    ],
)
def test_resources_pick_the_smallest_pool_that_fits(project, resources, pool):
    """GPUs before memory before cores; a pool that says nothing has one core and promises no memory."""
    found = load_project(project(**{"workflows/w.yaml": yaml() + f"    resources: {resources}\n"}), pools=SIZES)
    assert found.faults == []
    (step,) = found.workflows["w"].steps
    assert step.pool == pool
    assert load_in_subprocess(found.root, pools=SIZES) == found


def test_resources_of_a_task_hold_for_its_steps(project):
    """In YAML too; a step's own count more, and a pool that is named is only checked."""
    tasks = """
    from orchestrator import task, workflow
    @task(resources={"gpu": 1})
    def see(path): return path
    @workflow
    def p(path: str):
        see.options(resources={"memory": "3GB"}, id="b")(see(path))
    """
    text = yaml(task="tasks:see") + "  c:\n    task: tasks:see\n    with: {path: x}\n    pool: vision\n"
    found = load_project(project(**{"tasks.py": tasks, "workflows/w.yaml": text}), pools=SIZES)
    assert [step.pool for step in found.workflows["w"].steps] == ["vision", "vision"]
    assert {step.id: step.pool for step in found.workflows["p"].steps} == {"see": "vision", "b": "medium"}


@pytest.mark.parametrize(
    ("rest", "fault"),
    [
        (
            "resources: {gpu: 2}",
            "steps.a.resources: no pool fits: it asks for gpu: 2, and default has cpu: 1; large has memory: 8GB, "
            "cpu: 4; medium has memory: 4GB, cpu: 2; vision has memory: 8GB, cpu: 4, gpu: 1; "
            "web has cpu: 1; give [pools.NAME] of orchestrator.toml more, or ask for less",
        ),
        (
            "{resources: {cpu: 2}, pool: default}",
            "steps.a.resources: does not fit the pool that it names: it asks for cpu: 2, and default has cpu: 1; "
            "give [pools.NAME] of orchestrator.toml more, or ask for less",
        ),
        ("resources: {cpus: 2}", "steps.a.resources.cpus: unknown key 'cpus'; did you mean 'cpu'?"),
        ("resources: {cpu: 0}", "steps.a.resources.cpu: must be more than 0, not 0"),
        ("resources: {gpu: -1}", "steps.a.resources.gpu: must be at least 0, not -1"),
        ("resources: {memory: much}", "steps.a.resources.memory: must be a number of bytes"),
        ("resources: 2", "steps.a.resources: must be a mapping, not 2"),
        (
            "{pool: web, timeout: 5s}",
            "steps.a.timeout: cannot be kept in pool 'web', whose kind is threads: a thread cannot be ended; "
            "take it away, or use a pool of kind prefork",
        ),
        ("{pool: web, memory: 1GB}", "steps.a.memory: cannot be kept in pool 'web', whose kind is threads"),
    ],
)
def test_what_no_pool_can_give_is_refused(project, rest, fault):
    """With the line of the field, what was asked for, and what there is."""
    given = rest[1:-1].replace(", pool", "\n    pool").replace(", timeout", "\n    timeout") if rest[0] == "{" else rest
    given = given.replace(", memory", "\n    memory")
    (found,) = faults_of(project(**{"workflows/w.yaml": yaml() + f"    {given}\n"}), pools=SIZES)
    assert f": {fault}" in found
    assert found.startswith("workflows/w.yaml:")


def test_a_timeout_of_the_project_is_not_for_threads(project):
    """It is said of all steps, and a thread cannot be ended."""
    root = project(**{"workflows/w.yaml": yaml() + "    pool: web\n"})
    found = load_project(root, pools=SIZES, defaults=Defaults(timeout_s=5.0, memory=10**9))
    assert found.faults == []
    (step,) = found.workflows["w"].steps
    assert (step.timeout_s, step.memory) == (None, None)


def test_without_pools_resources_that_one_process_has_are_met(project):
    """Then there is one pool, of which nothing is said."""
    root = project(**{"workflows/w.yaml": yaml() + "    resources: {cpu: 1}\n"})
    assert faults_of(root) == []
    (root / "workflows/w.yaml").write_text(yaml() + "    resources: {gpu: 1}\n")
    assert "no pool fits: it asks for gpu: 1, and default has cpu: 1" in faults_of(root)[0]


def test_registered_names_and_pools_of_decorators_hold_for_yaml(project):
    """The workflow carries `module:function`, so that the worker imports that module only."""
    tasks = """
    from orchestrator import task

    @task(name="split-rows", pool="cpu")
    def rows(path): return path

    @task(name="twice")
    def one(): ...

    @task(name="twice")
    def two(): ...
    """
    root = project(
        **{
            "lib.py": tasks.replace('"twice")\n    def two', '"other")\n    def two'),
            "workflows/w.yaml": yaml("split-rows"),
            "workflows/v.yaml": yaml("split-rows", name="v") + "    pool: default\n",
            "workflows/u.yaml": yaml("split-row", name="u"),
        }
    )
    found = load_project(root)
    assert [str(fault) for fault in found.faults] == [
        "workflows/u.yaml:4: steps.a.task: 'split-row' is neither `module:function` nor the name of a registered task; "
        "did you mean 'split-rows'?"
    ]
    assert (found.workflows["w"].steps[0].task, found.workflows["w"].steps[0].pool) == ("lib:rows", "cpu")
    assert found.workflows["v"].steps[0].pool == "default"
    twice = project(**{"lib.py": tasks, "workflows/u.yaml": yaml(name="u")})
    (fault,) = load_in_subprocess(twice).faults
    assert str(fault).startswith("lib.py:10: two tasks are registered as 'twice'; the other is lib:one")


@pytest.mark.parametrize("file", ["orchestrator.py", "workers/__init__.py", "triggers.py"])
def test_modules_with_our_names_are_refused(project, file):
    """They would stand in for ours."""
    root = project(**{file: "import orchestrator\n", "workflows/w.yaml": yaml()})
    name = file.split("/")[0].removesuffix(".py")
    assert faults_of(root) == [f"{file}: a project cannot have a module named {name!r}; rename it"]


def test_an_installed_package_named_workflows_does_not_hide_the_folder(project, tmp_path_factory):
    """A folder without __init__.py would yield to it."""
    other = tmp_path_factory.mktemp("site")
    (other / "workflows").mkdir()
    (other / "workflows" / "__init__.py").write_text("")
    sys.path.append(str(other))
    text = "from orchestrator import task, workflow\n@task\ndef t(): ...\n@workflow\ndef w(): t()\n"
    found = load_project(project(**{"workflows/w.py": text}))
    assert (found.faults, found.workflows["w"].steps[0].task) == ([], "workflows.w:t")


def test_resolve_task_says_what_is_wrong(project):
    """For the worker, with the reference and the reason as data."""
    root = project(**{"late.py": "import absent\n"})
    assert resolve_task(root, "tasks:split")("a") == ["a"]
    with pytest.raises(
        TaskNotFoundError, match=r"task 'late:f': 'late' does not import: .*absent.* \(late.py:1\)"
    ) as caught:
        resolve_task(root, "late:f")
    assert (caught.value.reference, caught.value.file, caught.value.line) == ("late:f", "late.py", 1)
    (root / "late.py").write_text("def f(): return 1\n")
    assert resolve_task(root, "late:f")() == 1
    with pytest.raises(TaskNotFoundError, match="new"):
        resolve_task(root, "new:f")
    (root / "new.py").write_text("from orchestrator import task\n@task\ndef f(context): return 2\n")
    function = resolve_task(root, "new:f")
    assert (type(function).__name__, takes_context(function)) == ("function", True)
    assert not takes_context(resolve_task(root, "tasks:split"))
    assert not takes_context(dict)


def test_the_code_hash_depends_on_names_and_contents_of_python_files(project):
    """And on nothing else."""
    root = project(**{"workflows/w.yaml": yaml()})
    first = load_project(root).code_hash
    assert len(first) == 12
    for name in ("notes.txt", "workflows/v.yaml", ".venv/x.py", "env/x.py", "node_modules/x.py", ".orchestrator/x.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "env" / "pyvenv.cfg").touch()
    assert load_project(root).code_hash == first
    (root / "lib").mkdir()
    (root / "lib" / "a.py").touch()
    second = load_project(root).code_hash
    (root / "lib" / "a.py").rename(root / "lib" / "b.py")
    third = load_project(root).code_hash
    assert len({first, second, third}) == 3
    assert [path.relative_to(root).as_posix() for path in code_files(root)] == ["tasks.py", "lib/b.py"]


LOUD = "import os, sys\nprint('loud')\nos.write(1, b'louder')\nos.system('echo loudest')\nimport orchestrator\n"


def test_loading_in_a_process_of_its_own_gives_the_same(project):
    """User's code never lives in the control process, and what it prints does not disturb."""
    text = (
        LOUD
        + "from orchestrator import on, task, workflow\n@task\ndef t(): ...\n"
        + "@workflow(on=[on.file('in')])\ndef w(): t()\n"
    )
    root = project(**{"w.py": text, "workflows/b.yaml": "a: [", "workflows/c.yaml": yaml(name="c")})
    found = load_in_subprocess(root, pools=pools("default"))
    assert "w" not in sys.modules
    assert found == load_project(root, pools=pools("default"))
    assert list(found.workflows) == ["c", "w"]
    assert (found.faults[0].file, found.faults[0].line) == ("workflows/b.yaml", 1)
    printed = subprocess.run(
        [sys.executable, "-m", "orchestrator.project", str(root)], capture_output=True, text=True, check=True
    )
    body = json.loads(printed.stdout)
    assert sorted(body) == ["code_hash", "faults", "workflows"]
    assert body["faults"][0][:3] == ["workflows/b.yaml", 1, ""]
    assert "loudest" in printed.stderr


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("sys.exit(3)", 2, "'w' does not import: SystemExit: 3"),
        ("os._exit(3)", None, "loading ended the process with exit code 3"),
        ("os.kill(os.getpid(), 11)", 2, "loading ended the process with exit code -11"),
        ("import time; time.sleep(60)", 2, "loading did not end in 3 s"),
        ("os.system('sleep 60 &'); import time; time.sleep(60)", 2, "loading did not end in 3 s"),
        ("raise KeyboardInterrupt", 2, "loading ended the process with exit code"),
    ],
)
def test_a_module_that_ends_or_hangs_the_process_is_a_fault(project, code, line, message):
    """Within the time that is given, and with the place if it can be known."""
    root = project(**{"w.py": f"import os, sys, orchestrator\n{code}\n"})
    began = time.monotonic()
    (fault,) = load_in_subprocess(root, timeout_s=3.0 if "time" in code else 60.0).faults
    assert time.monotonic() - began < 20
    assert fault.line == line
    assert fault.file == ("w.py" if line else ".")
    assert message in fault.message


def test_a_directory_that_is_none_is_said_so(tmp_path):
    """In both ways to load."""
    for load in (load_project, load_in_subprocess):
        with pytest.raises(NotFoundError, match="is not a directory"):
            load(tmp_path / "nowhere")


def test_threads_of_a_module_do_not_keep_the_process(project):
    """What a user's module leaves running ends with it."""
    root = project(
        **{"w.py": "import threading, time, orchestrator\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"}
    )
    began = time.monotonic()
    assert load_in_subprocess(root).faults == []
    assert time.monotonic() - began < 20


def test_a_file_that_cannot_be_read_is_a_fault(project):
    """As is one that points nowhere."""
    root = project(**{"workflows/w.yaml": yaml()})
    os.symlink(root / "nowhere", root / "workflows" / "x.yaml")  # noqa: PTH211
    assert faults_of(root) == ["workflows/x.yaml: cannot be read: No such file or directory"]


def test_a_workflow_can_only_follow_one_that_is_there(project):
    root = project(**{"workflows/w.yaml": yaml() + "on:\n  - run: {workflow: [w, v]}\n"})
    assert faults_of(root) == ["workflows/w.yaml:7: on.0.run.workflow: unknown workflow 'v'; known: w"]
