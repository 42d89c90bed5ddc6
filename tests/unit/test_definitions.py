"""YAML definitions: what is read, and each refusal with its line and field."""

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.definitions import json_schema, parse_duration, read_definition
from orchestrator.durations import parse_time
from orchestrator.retries import Jitter, RetryPolicy
from orchestrator.schema import parse_size
from orchestrator.subscriptions import OnEvent, OnFile
from orchestrator.workflows import Param, Phase, Step, TriggerRule, Workflow
from tests.unit.test_retries import POLICY

GOOD = """\
workflow: good
description: All there is.
on:
  - file: {path: inbox, glob: "*.csv", recursive: true, settle: 500ms, min_size: 10KB, marker: .done, polling: true}
  - event: {type: [shop.order]}
params:
  path: {type: string, default: "{{ event.data.path }}"}
  n: integer
retry: 2
timeout: 1h
steps:
  split:
    task: tasks:split
    retry:
      maximum_attempts: 5
      initial_interval: 500ms
      backoff_coefficient: 1.5
      maximum_interval: 2m
      jitter: equal
      non_retryable_errors: [ValueError]
      retryable_errors: [shop.errors.NoStock, OSError]
    timeout: 5m
    memory: 512MB
    with: {path: "{{ params.path }}", title: "n = {{ params.n }}", raw: {$expr: x}}
    description: first
  total:
    task: tasks:total
    foreach: "{{ split }}"
    max_parallel: 3
    with: {chunk: "{{ item }}"}
    pool: cpu
  report:
    workflow: reports
    with: {totals: "{{ total }}"}
    needs: [split]
    if: "{{ total | length > 0 }}"
    trigger_rule: none_failed
  pause:
    sleep: 1h
    needs: [report]
  due:
    until: "{{ item.at }}"
    foreach: "{{ split }}"
on_failure:
  tell:
    task: tasks:tell
    with: {failures: "{{ run.failures }}", totals: "{{ total }}", how: "{{ steps.report.state }}"}
    retry: 1
finally:
  later:
    until: 2026-01-31T06:00:00+01:00
  clean:
    task: tasks:clean
    needs: [later]
    trigger_rule: all_done
output: {report: "{{ report }}"}
"""


def read(text):
    return read_definition(Path("workflows/w.yaml"), text)


def shown(text):
    return [f"{fault.line}: {fault.field}: {fault.message}" for fault in read(text).faults]


def test_a_definition_is_read_whole():
    """Each key comes to its place in the Workflow."""
    workflow, faults, lines = read(GOOD)
    assert faults == []
    assert workflow == Workflow(
        name="good",
        description="All there is.",
        on=(
            OnFile(
                path="inbox", glob="*.csv", recursive=True, settle_s=0.5, min_size=10_000, marker=".done", polling=True
            ),
            OnEvent(pattern={"type": ["shop.order"]}),
        ),
        params={"path": Param(type="string", default={"$expr": "event.data.path"}), "n": Param(type="integer")},
        steps=(
            Step(
                id="split",
                task="tasks:split",
                with_={
                    "path": {"$expr": "params.path"},
                    "title": {"$text": "n = {{ params.n }}"},
                    "raw": {"$data": {"$expr": "x"}},
                },
                retry=RetryPolicy(
                    maximum_attempts=5,
                    initial_interval=0.5,
                    backoff_coefficient=1.5,
                    maximum_interval=120,
                    jitter="equal",
                    non_retryable_errors=["ValueError"],
                    retryable_errors=["shop.errors.NoStock", "OSError"],
                ),
                timeout_s=300.0,
                memory=512_000_000,
                description="first",
            ),
            Step(
                id="total",
                task="tasks:total",
                foreach={"$expr": "split"},
                max_parallel=3,
                with_={"chunk": {"$expr": "item"}},
                pool="cpu",
            ),
            Step(
                id="report",
                workflow="reports",
                with_={"totals": {"$expr": "total"}},
                needs=("split",),
                if_={"$expr": "total | length > 0"},
                trigger_rule=TriggerRule.NONE_FAILED,
            ),
            Step(id="pause", sleep="1h", needs=("report",)),
            Step(id="due", until={"$expr": "item.at"}, foreach={"$expr": "split"}),
            Step(
                id="tell",
                phase=Phase.ON_FAILURE,
                task="tasks:tell",
                with_={
                    "failures": {"$expr": "run.failures"},
                    "totals": {"$expr": "total"},
                    "how": {"$expr": "steps.report.state"},
                },
                retry=RetryPolicy(maximum_attempts=1),
            ),
            Step(id="later", phase=Phase.FINALLY, until="2026-01-31T06:00:00+01:00"),
            Step(
                id="clean",
                phase=Phase.FINALLY,
                task="tasks:clean",
                needs=("later",),
                trigger_rule=TriggerRule.ALL_DONE,
            ),
        ),
        retry=RetryPolicy(maximum_attempts=2),
        timeout_s=3600.0,
        output={"report": {"$expr": "report"}},
        has_output=True,
    )
    assert not workflow.params["path"].is_required
    assert workflow.params["n"].is_required
    assert lines[("steps", "total", "max_parallel")] == 29
    assert lines.at(("steps", "total", "nothing", "there")) == 26
    assert lines[("finally", "clean", "needs")] == 54
    assert Workflow.from_json(json.loads(json.dumps(workflow.to_json()))) == workflow


def test_what_a_step_of_a_hook_reads_of_the_steps_makes_no_edge():
    """All of those have ended when a hook begins."""
    workflow = read(GOOD).workflow
    assert workflow.step("tell").upstream() == ("report", "total")
    assert workflow.upstream_of(workflow.step("tell")) == ()
    assert workflow.upstream_of(workflow.step("clean")) == ("later",)
    assert workflow.upstream_of(workflow.step("report")) == ("split", "total")
    assert workflow.upstream_of(workflow.step("due")) == ("split",)


def test_a_workflow_that_asks_for_nothing_new_is_stored_as_before():
    """The hash of its plan is made of this."""
    (step,) = read("workflow: w\nsteps: {a: {task: t:a}}").workflow.steps
    assert step.to_json() == {"id": "a", "task": "t:a"}
    assert Workflow(name="w", steps=(step,)).to_json() == {"name": "w", "steps": [step.to_json()]}


def test_yaml_is_1_2():
    """`on`, `yes` and dates are text; keys are always text."""
    (step,) = read(
        "workflow: w\nsteps: {a: {task: t:a, with: {on: yes, d: 2020-01-01, o: 0o10, 1: 010}}}"
    ).workflow.steps
    assert step.with_ == {"on": "yes", "d": "2020-01-01", "o": 8, "1": 10}


HEAD = "workflow: w\n"
STEPS = "steps: {a: {task: t:a}}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "1: : is empty; write at least `workflow: NAME` and `steps:`"),
        ("# nothing\n", "1: : is empty; write at least `workflow: NAME` and `steps:`"),
        ("5", "1: : must be a mapping with `workflow:` and `steps:`, not 5"),
        ("- a\n", "1: : must be a mapping with `workflow:` and `steps:`, not a list"),
        ("a:\n\t- b", "2: : not YAML: a tab indents this line; use spaces"),
        ("a: [1\n", "2: : not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: c: d\n", "2: : not YAML: mapping values are not allowed here"),
        ("a: *b\n", "1: : not YAML: found undefined alias 'b'"),
        (b"a: 1\nb: \xff\n", "2: : is not UTF-8: byte 0xff in this line; save it as UTF-8"),
        ("a: 1\nb: \x01\n", "2: : not YAML: the character U+0001 is not allowed"),
        (HEAD + STEPS + "---\n" + HEAD, "3: : holds several documents; write one workflow per file"),
        (
            HEAD + STEPS + "output: !!python/name:os.system x\n",
            "3: output: '!!python/name:os.system' is not a JSON value",
        ),
        (HEAD + STEPS + "output: .nan\n", "3: output: '.nan' is not a JSON value; quote it if it is text"),
        (HEAD + STEPS + "output: &a [*a]\n", "1: : has more than 50000 values"),
        (HEAD + STEPS + "output: {? [1] : 2}\n", "3: output: a key must be text"),
        (
            HEAD + "steps:\n  a: {task: t:a}\n  a: {task: t:b}\n",
            "4: steps.a: duplicate key; it is given in line 3 already",
        ),
        (
            HEAD + "steps: {a: &b {task: t:a}, c: {<<: *b, task: t:a}}\n",
            "2: steps.c.<<: merge keys are not part of YAML 1.2",
        ),
        (STEPS, "1: workflow: is required, and is missing"),
        (HEAD, "1: steps: is required, and is missing"),
        ("workflow: 5\n" + STEPS, "1: workflow: must be text, not 5"),
        ("workflow: a b\n" + STEPS, "1: workflow: 'a b' cannot be a name"),
        (HEAD + "steps: {}\n", "2: steps: a workflow needs at least one step"),
        (HEAD + "steps: [a]\n", "2: steps: must be a mapping, not a list"),
        (HEAD + "steps:\n", "2: steps: has no value; give it one, or take the key away"),
        (HEAD + STEPS + "stpes: {}\n", "3: stpes: unknown key 'stpes'; did you mean 'steps'?"),
        (
            HEAD + STEPS + "xyz: {}\n",
            "3: xyz: unknown key 'xyz'; known: workflow, description, on, params, retry, timeout, "
            "steps, on_failure, finally, output",
        ),
        (HEAD + STEPS + "timeout: 0\n", "3: timeout: must be more than 0, not 0"),
        (HEAD + STEPS + "timeout: soon\n", "3: timeout: must be a duration, such as"),
        (HEAD + STEPS + "timout: 1h\n", "3: timout: unknown key 'timout'; did you mean 'timeout'?"),
        (HEAD + STEPS + "retry: 0\n", "3: retry: must be a whole number from 1 (no retry) to 10000, not 0"),
        (HEAD + STEPS + "retry:\n  jitter: some\n", "4: retry.jitter: must be one of full, equal, none, not 'some'"),
        (HEAD + STEPS + "memory: 1GB\n", "3: memory: unknown key 'memory'"),
        (HEAD + STEPS + "finally: {}\n", "3: finally: must not be empty"),
        (HEAD + STEPS + "finally: [a]\n", "3: finally: must be a mapping, not a list"),
        (HEAD + STEPS + "on_failure: {}\n", "3: on_failure: must not be empty"),
        (HEAD + STEPS + "on_failure:\n", "3: on_failure: has no value; give it one, or take the key away"),
        (HEAD + STEPS + "on_failure:\n  b: []\n", "4: on_failure.b: must be a mapping, not a list"),
        (HEAD + STEPS + "on_failure:\n  b: {tsak: t:b, task: t:b}\n", "4: on_failure.b.tsak: unknown key 'tsak'"),
        (HEAD + STEPS + "on_failure:\n  b: {task: 5}\n", "4: on_failure.b.task: must be text, not 5"),
        (HEAD + STEPS + "on_failure:\n  b-c: {task: t:b}\n", "4: on_failure.b-c: 'b-c' cannot be a step's id"),
        (
            HEAD + STEPS + "finally:\n  a: {task: t:b}\n",
            "4: finally.a: 'a' is a step of `steps:` already; ids are unique over all steps of a workflow",
        ),
        (
            HEAD + STEPS + "on_failure: {b: {task: t:b}}\nfinally:\n  b: {task: t:b}\n",
            "5: finally.b: 'b' is a step of `on_failure:` already",
        ),
        (
            HEAD + STEPS + "finally:\n  b: {task: t:b, needs: [a]}\n",
            "4: finally.b.needs: 'a' is a step of `steps:`; only other steps of `steps:` can need it",
        ),
        (
            HEAD + STEPS + "on_failure: {b: {task: t:b}}\nfinally:\n  c: {task: t:b, with: {x: '{{ b }}'}}\n",
            "5: finally.c.with.x: 'b' is a step of `on_failure:`; only other steps of `on_failure:` can need it",
        ),
        (
            HEAD + STEPS + "finally:\n  c: {task: t:b, with: {x: '{{ aa }}'}}\n",
            "4: finally.c.with.x: unknown step or name 'aa'; did you mean 'a'?",
        ),
        (
            HEAD + STEPS + "finally:\n  c: {task: t:b, with: {x: '{{ run.failurs }}'}}\n",
            "4: finally.c.with.x: unknown name 'run.failurs'; did you mean 'run.failures'?",
        ),
        (
            HEAD + STEPS + "finally:\n  c: {task: t:b, if: '{{ run.state == 1 }}', foreach: 5}\n",
            "4: finally.c.foreach: must be a list, or one expression",
        ),
        (
            HEAD + STEPS + "finally:\n  c: {task: t:b, trigger_rule: sometimes}\n",
            "4: finally.c.trigger_rule: must be one of all_success",
        ),
        (
            HEAD + STEPS + "finally:\n  c: {task: t:b, needs: [d]}\n  d: {task: t:b, needs: [c]}\n",
            "4: finally.c: the steps need each other in a circle: c -> d -> c",
        ),
        (
            HEAD + STEPS + "output: '{{ run.state }}'\n",
            "3: output: `run.state` is known only to the steps of `on_failure:` and `finally:`",
        ),
        (
            HEAD + STEPS + "finally: {b: {task: t:b}}\noutput: '{{ b }}'\n",
            "4: output: 'b' is a step of `finally:`; only",
        ),
        (HEAD + STEPS + "output: '{{ b }}'\n", "3: output: unknown step or name 'b'"),
        (HEAD + STEPS + "output: '{{ a'\n", "3: output: bad expression '{{ a'"),
        (HEAD + STEPS + "on: inbox\n", "3: on: must be a list, not 'inbox'"),
        (HEAD + STEPS + "on:\n  - s3: {}\n", "4: on.0.s3.bucket: is required, and is missing"),
        (HEAD + STEPS + "on:\n  - s3: {bucket: A_b, poll: 1s}\n", "4: on.0.s3.bucket: 'A_b' cannot be a bucket"),
        (HEAD + STEPS + "on:\n  - s3: {bucket: abc}\n", "4: on.0.s3: needs `queue:`"),
        (
            HEAD + STEPS + "on:\n  - s3: {bucket: abc, poll: 1s, events: removed}\n",
            "4: on.0.s3.events: `removed` is told by",
        ),
        (HEAD + STEPS + "on:\n  - s3: {bucket: abc, queue: a/b}\n", "4: on.0.s3.queue: 'a/b' cannot be a queue"),
        (
            HEAD + STEPS + "on:\n  - s3: {bucket: abc, poll: 1s, endpoint_url: minio}\n",
            "4: on.0.s3.endpoint_url: 'minio' is no URL",
        ),
        (HEAD + STEPS + "on:\n  - webhook: {path: 'a b'}\n", "4: on.0.webhook.path: 'a b' cannot be a path"),
        (HEAD + STEPS + "on:\n  - webhook: {path: a, methods: BREW}\n", "4: on.0.webhook.methods: must be one of"),
        (HEAD + STEPS + "on:\n  - schedule: {}\n", "4: on.0.schedule: a schedule has exactly one of"),
        (HEAD + STEPS + "on:\n  - queue: {url: 'ftp://x', queue: q}\n", "4: on.0.queue.url: must be one of"),
        (HEAD + STEPS + "on:\n  - run: {workflow: a, state: done}\n", "4: on.0.run.state.0: must be one of"),
        (HEAD + STEPS + "on:\n  - run: {workflow: a, pattern: {x: 1}}\n", "4: on.0.run.pattern.x: rules stand in an"),
        (HEAD + STEPS + "on:\n  - fil: {}\n", "4: on.0.fil: unknown key 'fil'; did you mean 'file'?"),
        (HEAD + STEPS + "on:\n  - {}\n", "4: on.0: must have one of the keys `file`, `event`, `s3`"),
        (HEAD + STEPS + "on:\n  - {file: {path: a}, event: {type: [a]}}\n", "4: on.0: must have one of the keys"),
        (HEAD + STEPS + "on:\n  - file: {glob: a}\n", "4: on.0.file.path: is required, and is missing"),
        (HEAD + STEPS + "on:\n  - file: {path: ''}\n", "4: on.0.file.path: must not be empty"),
        (
            HEAD + STEPS + "on:\n  - file: {path: a, glub: b}\n",
            "4: on.0.file.glub: unknown key 'glub'; did you mean 'glob'?",
        ),
        (
            HEAD + STEPS + "on:\n  - file: {path: a, settle: soon}\n",
            "4: on.0.file.settle: must be a duration, such as 30",
        ),
        (
            HEAD + STEPS + "on:\n  - file: {path: a, min_size: 1XB}\n",
            "4: on.0.file.min_size: must be a number of bytes",
        ),
        (HEAD + STEPS + "on:\n  - file: {path: a, polling: 1}\n", "4: on.0.file.polling: must be true or false, not 1"),
        (HEAD + STEPS + "on:\n  - event: {}\n", "4: on.0.event: "),
        (HEAD + STEPS + "on:\n  - event:\n      data: {a: b}\n", "5: on.0.event.data.a: rules stand in an array"),
        (HEAD + STEPS + "params: {a: strng}\n", "3: params.a: must be one of string, integer, number, boolean"),
        (HEAD + STEPS + "params: {a: strng}\n", "not 'strng'; did you mean 'string'?"),
        (HEAD + STEPS + "params: {a: {type: str}}\n", "3: params.a.type: must be one of string"),
        (HEAD + STEPS + "params: {a: {typ: string}}\n", "3: params.a.typ: unknown key 'typ'; did you mean 'type'?"),
        (HEAD + STEPS + "params: {a: 5}\n", "3: params.a: must be a type's name or a mapping, not 5"),
        (
            HEAD + STEPS + "params: {a: {type: integer, default: x}}\n",
            "3: params.a.default: Input should be a valid integer",
        ),
        (HEAD + STEPS + "params: {a: {type: integer, default: '{{ 1/0 }}'}}\n", "3: params.a.default: '1/0': ZeroDiv"),
        (
            HEAD + STEPS + "params: {a: {default: '{{ params.b }}'}}\n",
            "3: params.a.default: `params` cannot be used here",
        ),
        (HEAD + STEPS + "params: {a: {default: '{{ event. }}'}}\n", "3: params.a.default: bad expression"),
        (HEAD + STEPS + "params: {a-b: string}\n", "3: params.a-b: 'a-b' cannot be a parameter's name"),
        (HEAD + STEPS + "params: {a: {type: string, pattern: '('}}\n", "3: params.a.pattern: not a regular expression"),
        (
            HEAD + STEPS + "params: {a: {type: string, items: {}}}\n",
            "3: params.a.items: belongs to a parameter of type: array",
        ),
        (HEAD + STEPS + "params: {a: {type: array, items: {minimum: 1}}}\n", "3: params.a.items.minimum: belongs to"),
        (
            HEAD + STEPS + "params: {a: {type: string, minimum: 1}}\n",
            "3: params.a.minimum: belongs to a parameter of type",
        ),
        (
            HEAD + STEPS + "params: {a: {type: integer, minimum: 2, maximum: 1}}\n",
            "3: params.a.minimum: 2.0 is above maximum",
        ),
    ],
)
def test_each_refusal_of_a_file_says_where(text, fault):
    """One thing is wrong in each; it is reported once, with its line and field."""
    assert [found for found in shown(text) if fault in found], shown(text)
    assert len(shown(text)) == 1 or text.startswith("output")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("tsak: t:a, task: t:a", "tsak: unknown key 'tsak'; did you mean 'task'?"),
        ("task: t:a, retry: often", "retry: must be a mapping, or the number of attempts, not 'often'"),
        ("task: t:a, retry: true", "retry: must be a mapping, or the number of attempts, not True"),
        ("task: t:a, retry: -1", "retry: must be a whole number from 1"),
        ("task: t:a, retry: ", "retry: has no value; give it one, or take the key away"),
        (
            "task: t:a, retry: {max_attempts: 5}",
            "retry.max_attempts: unknown key 'max_attempts'; did you mean 'maximum_a",
        ),
        ("task: t:a, retry: {maximum_attempts: 10001}", "retry.maximum_attempts: must be a whole number from 1"),
        ("task: t:a, retry: {initial_interval: -1}", "retry.initial_interval: must be a duration, such as"),
        (
            "task: t:a, retry: {retryable_errors: [no-name]}",
            "retry.retryable_errors: 'no-name' cannot be an error's name",
        ),
        ("task: t:a, timeout: 0", "timeout: must be more than 0, not 0"),
        ("task: t:a, timeout: '{{ b }}'", "timeout: must be a duration, such as"),
        ("task: t:a, memory: 0", "memory: must be from 1MB to 1000000GB, such as 512MB, not 0"),
        ("task: t:a, memory: 512", "memory: must be from 1MB to 1000000GB, such as 512MB, not 512"),
        ("task: t:a, memory: much", "memory: must be a number of bytes, or text such as"),
        ("task: t:a, memory: 2000000GB", "memory: must be from 1MB"),
        ("workflow: c, memory: 1GB", "memory: belongs to a step with `task:`"),
        ("sleep: 1h, retry: 5", "retry: belongs to a step with `task:` or `workflow:`; this one only waits"),
        ("sleep: 1h, timeout: 5", "timeout: belongs to a step with `task:` or `workflow:`; this one only waits"),
        ("sleep: 1h, with: {x: 5}", "with: belongs to a step with `task:` or `workflow:`; this one only waits"),
        ("sleep: 1h, pool: cpu", "pool: belongs to a step with `task:` or `workflow:`; this one only waits"),
        ("sleep: 1h, memory: 1GB", "memory: belongs to a step with `task:`"),
        ("sleep: soon", "sleep: must be a duration, such as 30, 500ms, 1s, 5m, 2h or 1d, not 'soon'"),
        ("sleep: -1", "sleep: must be a duration, such as"),
        ("sleep: [1h]", "sleep: must be a duration, such as"),
        ("sleep: ", "sleep: has no value; give it one, or take the key away"),
        ("sleep: '{{ item }}'", "sleep: `item` has a meaning only in a step with `foreach:`"),
        ("sleep: '{{ bb }}s'", "sleep: unknown step or name 'bb'; did you mean 'b'?"),
        ("sleep: '{{ b( }}'", "sleep: bad expression"),
        ("sleep: '{{ secrets.X }}'", "sleep: `secrets` cannot be used here"),
        ("sleep: '{{ a }}'", "the steps need each other in a circle: a -> a"),
        ("until: tomorrow", "until: must be a time with its zone, such as 2026-01-31T06:00:00Z or"),
        ("until: 2026-01-31T06:00:00", "until: must be a time with its zone"),
        ("until: 2026-02-31T06:00:00Z", "until: must be a time with its zone"),
        ("until: 2026-01-31", "until: must be a time with its zone"),
        ("until: 5", "until: must be a time with its zone"),
        ("until: '{{ steps.c.output }}'", "until: unknown step 'c'"),
        (
            "sleep: 1h, until: 2026-01-31T06:00:00Z",
            "a step has exactly one of `task:`, `workflow:`, `sleep:` and `until:`",
        ),
        ("task: t:a, sleep: 1h", "a step has exactly one of `task:`"),
        (
            "task: t:a, with: {x: '{{ run.failures }}'}",
            "with.x: `run.failures` is known only to the steps of `on_failure:`",
        ),
        ("task: t:a, if: '{{ run.error }}'", "if: `run.error` is known only to the steps of `on_failure:`"),
        ("task: t:a, with: {x: '{{ run.idd }}'}", "with.x: unknown name 'run.idd'; did you mean 'run.id'?"),
        ("task: 5", "task: must be text, not 5"),
        ("task: ''", "task: must not be empty"),
        ("task: ", "task: has no value; give it one, or take the key away"),
        ("task: t:a, workflow: b", "a step has exactly one of `task:`, `workflow:`, `sleep:` and `until:`"),
        ("description: x", "a step has exactly one of `task:`, `workflow:`, `sleep:` and `until:`"),
        ("task: t:a, with: [1]", "with: must be a mapping, not a list"),
        ("task: t:a, with: {x: '{{ bb }}'}", "with.x: unknown step or name 'bb'; did you mean 'b'?"),
        ("task: t:a, with: {x: '{{ steps.c.state }}'}", "with.x: unknown step 'c'"),
        ("task: t:a, with: {x: '{{ params.nn }}'}", "with.x: unknown parameter 'nn'; did you mean 'n'?"),
        ("task: t:a, with: {x: '{{ b( }}'}", "with.x: bad expression '{{ b( }}'"),
        (
            "task: t:a, with: {x: '{{ b | lenght }}'}",
            "with.x: bad expression '{{ b | lenght }}': No filter named 'lenght'",
        ),
        ("task: t:a, with: {x: '{{ item }}'}", "with.x: `item` has a meaning only in a step with `foreach:`"),
        ("task: t:a, needs: b", "needs: must be a list, not 'b'"),
        ("task: t:a, needs: [5]", "needs.0: must be text, not 5"),
        ("task: t:a, needs: [bb]", "needs: unknown step 'bb'; did you mean 'b'?"),
        ("task: t:a, needs: [a]", "the steps need each other in a circle: a -> a"),
        ("task: t:a, foreach: 5", "foreach: must be a list, or one expression"),
        ("task: t:a, foreach: 'x {{ b }}'", "foreach: must be a list, or one expression"),
        ("task: t:a, foreach: '{{ b'", "foreach: bad expression"),
        ("task: t:a, foreach: '{{ secrets.X }}'", "foreach: `secrets` cannot be used here"),
        ("task: t:a, foreach: ", "foreach: has no value"),
        ("task: t:a, max_parallel: 2", "max_parallel: belongs to a step with `foreach:`"),
        ("task: t:a, foreach: [1], max_parallel: 0", "max_parallel: must be at least 1"),
        ("task: t:a, foreach: [1], max_parallel: '2'", "max_parallel: must be a whole number, not '2'"),
        ("task: t:a, if: yes", "if: must be one expression"),
        (
            "task: t:a, trigger_rule: all_sucess",
            "trigger_rule: must be one of all_success, all_done, one_failed, none_failed",
        ),
        ("task: t:a, pool: 5", "pool: must be text, not 5"),
    ],
)
def test_each_refusal_of_a_step_says_where(keys, fault):
    """One thing is wrong in the step of line 4; it is reported once."""
    text = f"workflow: w\nparams: {{n: integer}}\nsteps:\n  a: {{{keys}}}\n  b: {{task: t:b}}\n"
    (found,) = shown(text)
    assert found.startswith((f"4: steps.a.{fault}", f"4: steps.a: {fault}"))


@pytest.mark.parametrize("name", ["item", "a-b", "true", "self", "1"])
def test_a_name_that_cannot_be_written_in_expressions_is_no_step(name):
    """The fault stands at the step."""
    (found,) = shown(f"workflow: w\nsteps:\n  {name}: {{task: t:a}}\n")
    assert found.startswith(f"3: steps.{name}: {name!r} cannot be a step's id")


def test_a_circle_is_shown_with_its_path():
    """The path ends where it began."""
    steps = "  a: {task: t:a, needs: [c]}\n  b: {task: t:a, needs: [a]}\n  c: {task: t:a, with: {x: '{{ b }}'}}\n"
    text = f"workflow: w\nsteps:\n{steps}"
    assert shown(text) == ["3: steps.a: the steps need each other in a circle: a -> c -> b -> a"]


def test_every_circle_is_shown():
    """One per circle, not only the first."""
    text = "workflow: w\nsteps:\n"
    text += "".join(f"  {a}: {{task: 't:a', needs: [{b}]}}\n" for a, b in (("a", "b"), ("b", "a"), ("c", "c")))
    assert shown(text) == [
        "3: steps.a: the steps need each other in a circle: a -> b -> a",
        "5: steps.c: the steps need each other in a circle: c -> c",
    ]


def test_an_entry_that_cannot_be_read_keeps_its_number_and_is_not_also_incomplete():
    """Else the faults of those after it would be told of the wrong lines."""
    on = """on:
  - {file: {path: a}, event: {type: [a]}}
  - schedule: {every: 0, timezone: Nowhere}
  - webhook: {path: a, rate: 0, verify: {githb: env:X}}
  - webhook: {path: b, verify: s3cr3t}
  - webhook: {path: c, verify: {hmac: s3cr3t}}
  - cron: "@daily"
  - s3: {bucket: A_b, poll: 1s}
"""
    assert [(fault.line, fault.field, fault.message) for fault in read(HEAD + STEPS + on).faults] == [
        (4, "on.0", "must have one of the keys `file`, `event`, `s3`, `webhook`, `schedule`, `queue`, `run`; "
         "write one entry for each"),
        (5, "on.1.schedule.every", "must be more than 0, not 0"),
        (5, "on.1.schedule.timezone", "unknown time zone 'Nowhere'; use an IANA name, such as Europe/Paris"),
        (6, "on.2.webhook.verify.githb", "unknown key 'githb'; did you mean 'github'?"),
        (6, "on.2.webhook.rate", "must be more than 0, not 0"),
        (7, "on.3.webhook.verify", "must be a mapping"),
        (8, "on.4.webhook.verify.hmac", "must be a mapping"),
        (9, "on.5.cron", "unknown key 'cron'; it is a key of `schedule:`"),
        (10, "on.6.s3.bucket", "'A_b' cannot be a bucket: 3 to 63 of a-z, 0-9, '-' and '.', from a letter or digit to "
         "one"),
    ]  # fmt: skip


def test_all_faults_of_a_file_come_at_once():
    """What is wrong in shape does not hide what is wrong in meaning."""
    text = (
        "workflow: 5\ntimeout: 0\non: [{s3: {}}, {event: {a: b}}]\nparams: {p: str}\nsteps:\n"
        "  a: {task: 1, needs: [c], retry: {jitter: x, n: 1}}\n"
        "  b: {task: t:b, with: {x: '{{ cc }}'}, if: '{{ b( }}'}\n"
        "  c: [1]\noutput: '{{ d }}'\nfinally: {e: {sleep: x}}\n"
    )
    fields = [(fault.line, fault.field) for fault in read(text).faults]
    assert fields == [
        (1, "workflow"), (2, "timeout"), (3, "on.0.s3.bucket"), (3, "on.1.event.a"), (4, "params.p"),
        (6, "steps.a.task"), (6, "steps.a.retry.jitter"), (6, "steps.a.retry.n"),
        (7, "steps.b.if"), (7, "steps.b.with.x"), (8, "steps.c"), (9, "output"),
        (10, "finally.e.sleep"),
    ]  # fmt: skip
    assert {fault.file for fault in read(text).faults} == {"workflows/w.yaml"}


def test_aliases_cannot_blow_a_file_up():
    """A few bytes that stand for billions of values are refused at once."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
    )
    assert shown(bomb) == ["1: : has more than 50000 values (aliases written out), or nests deeper than 50"]
    assert "nests deeper" in shown("[" * 5000)[0]
    assert "larger than" in shown("#" * 1_000_001)[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(5, 5), (0, 0), (0.5, 0.5), ("5", 5), ("500ms", 0.5), ("1s", 1), ("1.5 m", 90), ("2h", 7200), (" 1d ", 86400)],
)
def test_durations(text, seconds):
    """A number of seconds, or a number with a unit."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", -1, "1w", "1h30", "١s", True, None, [], float("nan"), "1e9s"])
def test_nonsense_is_no_duration(text):
    """The error says what a duration looks like."""
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["99999d", 1e300, float("inf"), "9" * 400])
def test_a_duration_has_an_end(text):
    """Above a century nothing is meant."""
    with pytest.raises(ValueError, match="longest"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31T06:00:00Z", "2026-01-31T07:00:00+01:00", "2026-01-31t06:00:00.000z", "2026-01-31 05:30:00.0-00:30",
    ],
)  # fmt: skip
def test_times(text):
    """RFC 3339, in UTC whatever zone was given."""
    found = parse_time(text)
    assert (found, found.tzinfo) == (datetime(2026, 1, 31, 6, tzinfo=UTC), UTC)


@pytest.mark.parametrize(
    "text",
    [
        "", "now", 5, None, "2026-01-31", "2026-01-31T06:00:00", "2026-01-31T06:00Z", "20260131T060000Z",
        "2026-13-31T06:00:00Z", "2026-01-31T25:00:00Z", "2026-01-31T06:00:60Z", "0001-01-01T00:00:00+23:00",
        "2026-01-31T06:00:00+99:00", "２026-01-31T06:00:00Z",
    ],
)  # fmt: skip
def test_nonsense_is_no_time(text):
    """The error says what a time looks like."""
    with pytest.raises(ValueError, match="must be a time with its zone"):
        parse_time(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("7", 7), ("7B", 7), ("10KB", 10_000), ("10 kb", 10_000), ("1KiB", 1024), ("2MB", 2_000_000)],
)
def test_sizes(text, size):
    """KB is 1000 bytes, KiB is 1024."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [-1, True, 1.5, "1.5KB", "KB", "10XB", None])
def test_nonsense_is_no_size(text):
    """The error says what a size looks like."""
    with pytest.raises(ValueError, match="must be a number of bytes"):
        parse_size(text)


def test_the_schema_is_what_is_read():
    """Every key that is read is in the JSON Schema with words for an editor, the short forms too."""
    schema = json_schema()
    assert schema["required"] == ["workflow", "steps"]
    assert set(schema["properties"]) == {
        "workflow", "description", "on", "params", "retry", "timeout", "steps", "on_failure", "finally", "output",
    }  # fmt: skip
    definitions = schema["$defs"]
    assert set(definitions["Step"]["properties"]) == {
        "task", "workflow", "sleep", "until", "with", "needs", "foreach", "max_parallel", "if", "trigger_rule",
        "retry", "timeout", "memory", "resources", "pool", "description",
    }  # fmt: skip
    assert set(definitions["OnEntry"]["properties"]) == {"file", "event", "s3", "webhook", "schedule", "queue", "run"}
    for name in ("Step", "FileTrigger", "WebhookTrigger", "ScheduleTrigger", "OnEntry"):
        assert definitions[name]["additionalProperties"] is False
        assert all(field.get("description") for field in definitions[name]["properties"].values())
    assert definitions["FileTrigger"]["properties"]["settle"]["anyOf"][0]["type"] == "number"
    number, policy = definitions["Step"]["properties"]["retry"]["anyOf"]
    assert number["minimum"] == 1
    assert list(policy["properties"]) == [field.name for field in fields(RetryPolicy)]
    assert policy["additionalProperties"] is False
    for name, field in policy["properties"].items():
        assert field["description"]
        given = {} if "default" not in field else {name: field["default"]}
        assert RetryPolicy(**given) == RetryPolicy()
    assert policy["properties"]["jitter"]["enum"] == list(Jitter)
    assert definitions["Step"]["oneOf"] == [{"required": [k]} for k in ("task", "workflow", "sleep", "until")]
    schedules = [{"required": [k]} for k in ("cron", "every", "at")] + [
        {"required": ["solar", "latitude", "longitude"]}
    ]
    assert definitions["ScheduleTrigger"]["oneOf"] == schedules
    assert definitions["S3Trigger"]["anyOf"] == [{"required": ["queue"]}, {"required": ["poll"]}]
    assert definitions["RunTrigger"]["properties"]["state"]["anyOf"][0]["enum"] == ["succeeded", "failed", "cancelled"]
    assert {"$ref": "#/$defs/Param"} in schema["properties"]["params"]["additionalProperties"]["anyOf"]
    assert '"null"}' not in json.dumps(schema)


NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
TEMPLATE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just({"$expr": "a | length"}),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAME, inner, max_size=2),
    max_leaves=5,
)
STEP = st.builds(
    Step,
    id=NAME,
    phase=st.sampled_from(Phase),
    sleep=st.none() | st.just("1h") | st.integers(0, 9) | st.just({"$expr": "b"}),
    until=st.none() | st.just("2026-01-31T06:00:00Z") | st.just({"$text": "{{ b }}Z"}),
    retry=st.none() | POLICY,
    timeout_s=st.none() | st.floats(0.1, 1e9),
    memory=st.none() | st.integers(10**6, 10**15),
    task=st.none() | st.just("tasks:a"),
    workflow=st.none() | NAME,
    with_=st.dictionaries(NAME, TEMPLATE, max_size=2),
    needs=st.lists(NAME, max_size=2).map(tuple),
    foreach=st.none() | st.lists(TEMPLATE, max_size=2) | st.just({"$expr": "b"}),
    max_parallel=st.none() | st.integers(1, 9),
    if_=st.none() | st.booleans() | st.just({"$expr": "b"}),
    trigger_rule=st.sampled_from(TriggerRule),
    pool=NAME,
    description=st.text(max_size=5),
)
ON = st.builds(OnEvent, pattern=st.just({"type": ["a"]})) | st.builds(
    OnFile,
    path=st.text(max_size=5),
    settle_s=st.none() | st.floats(0, 9),
    min_size=st.integers(0, 9),
    marker=st.none() | NAME,
)
PARAM = st.sampled_from(
    [Param(), Param(type="string", default=None), Param(type="array", items=Param(enum=[1, "a"])), Param(minimum=1.5)]
)
WORKFLOW = st.builds(
    lambda output, **fields: Workflow(output=output, has_output=output is not None, **fields),
    name=NAME,
    steps=st.lists(STEP, max_size=3).map(tuple),
    on=st.lists(ON, max_size=2).map(tuple),
    params=st.dictionaries(NAME, PARAM, max_size=2),
    retry=st.none() | POLICY,
    timeout_s=st.none() | st.floats(0.1, 1e9),
    output=TEMPLATE,
    description=st.text(max_size=5),
)


@given(WORKFLOW)
def test_a_workflow_comes_back_from_json_as_it_was(workflow):
    """What control process and workers exchange loses nothing."""
    again = Workflow.from_json(json.loads(json.dumps(workflow.to_json())))
    assert again == workflow
    assert again.to_json() == workflow.to_json()
    assert [p.is_required for p in again.params.values()] == [p.is_required for p in workflow.params.values()]


@given(st.text() | st.binary())
def test_no_text_raises(text):
    """Whatever is in a file, it is read or has a fault."""
    found = read(text)
    assert found.faults or found.workflow


@pytest.mark.parametrize(("enum", "value"), [([1, "a"], True), ([False], 0)])
def test_true_is_not_the_number_one(enum, value):
    """As in JSON Schema."""
    assert Param(enum=enum).problems(value)
    assert not Param(enum=[*enum, value]).problems(value)
