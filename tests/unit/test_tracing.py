"""The Python face: what is traced, and each refusal with its line and field."""

import inspect
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.definitions import read_definition
from orchestrator.errors import DefinitionError, TracingError
from orchestrator.expressions import evaluate
from orchestrator.outputs import Output, errors_of, event, index, item, state_of
from orchestrator.retries import RetryPolicy
from orchestrator.subscriptions import OnEvent, OnFile
from orchestrator.tracing import on, sleep, task, until, workflow
from orchestrator.workflows import Defaults, Param, Phase

HERE = Path(__file__)


@task
def split(path, parts=2):
    """Split a file."""
    return [path] * parts


@task(pool="cpu")
def total(chunk, factor=1, *, context=None):
    return len(chunk) * factor


@task
def report(totals: list, title: str = "report") -> dict[str, Any]:
    return {"title": title, "totals": totals}


@task(name="anything")
def anything(**values):
    return values


def drawn(function, **options):
    """Trace, and expect no faults."""
    found, faults, _ = workflow(**options)(function).trace()
    assert faults == []
    return found


def faults_of(function, **options):
    """Trace, and return the faults as (line after the `def`, field, message)."""
    start = function.__code__.co_firstlineno
    _, faults, _ = workflow(**{"name": "w", **options})(function).trace()
    assert {fault.file for fault in faults} <= {str(HERE)}
    return [(fault.line - start, fault.field, fault.message) for fault in faults]


def with_of(function):
    """Trace a workflow of one `anything(x=...)`, and return its `x`."""
    return drawn(function, name="w").steps[-1].with_["x"]


def test_yaml_and_python_give_the_same_workflow():
    """The example of the design, in both faces."""

    @workflow(on=[on.file("inbox", "*.csv", settle="1s")])
    def invoices(path: str = event.data["path"]):
        totals = total.map(split(path))
        return report.options(if_=totals.filter("length") > 0)(totals)

    text = """
workflow: invoices
on:
  - file: {path: inbox, glob: "*.csv", settle: 1s}
params:
  path: {type: string, default: "{{ event.data.path }}"}
steps:
  split:
    task: test_tracing:split
    with: {path: "{{ params.path }}"}
  total:
    task: test_tracing:total
    foreach: "{{ split }}"
    with: {chunk: "{{ item }}"}
    pool: cpu
  report:
    task: test_tracing:report
    with: {totals: "{{ total }}"}
    if: "{{ total | length > 0 }}"
output: "{{ report }}"
"""
    from_yaml = read_definition(Path("invoices.yaml"), text.replace("test_tracing", __name__))
    from_python = invoices.trace()
    assert from_yaml.faults == from_python.faults == []
    assert from_python.workflow == from_yaml.workflow


def test_outside_a_workflow_a_task_is_the_plain_function():
    """Users test tasks like any function."""
    assert split("a", parts=3) == ["a", "a", "a"]
    assert total("abc") == 3
    assert (split.__name__, split.__doc__, split.__module__) == ("split", "Split a file.", __name__)
    assert split.__wrapped__ is split.function
    assert list(inspect.signature(split).parameters) == ["path", "parts"]


def test_a_workflow_does_not_run_by_being_called():
    """The error says how it runs."""

    @workflow
    def nightly():
        split("a")

    with pytest.raises(TracingError, match="orchestrator run nightly"):
        nightly()
    with pytest.raises(TracingError, match="only in a @workflow function"):
        total.map([1])


def test_steps_get_the_names_of_their_functions_and_their_options():
    """A second call gets a number; options say the rest."""

    def w(event):
        first = split("a")
        second = split(path=event.data.path, parts=3)
        third = split.options(
            id="third", needs=[first, "split_2"], if_=False, trigger_rule="all_done", pool="big", description="d"
        )(second[0])
        total.options(max_parallel=2, pool="default").map([first, "x"], factor=third)

    found = drawn(w)
    assert [step.id for step in found.steps] == ["split", "split_2", "third", "total"]
    _, second, third, last = found.steps
    assert second.with_ == {"path": {"$expr": "event.data.path"}, "parts": 3}
    assert (third.needs, third.if_, third.pool, third.description) == (("split", "split_2"), False, "big", "d")
    assert third.trigger_rule == "all_done"
    assert last.foreach == [{"$expr": "split"}, "x"]
    assert (last.max_parallel, last.pool) == (2, "default")
    assert last.with_ == {"chunk": {"$expr": "item"}, "factor": {"$expr": "third"}}
    assert last.upstream() == ("split", "third")
    assert not found.has_output


def test_params_come_from_the_signature():
    """Annotations are types, defaults are defaults; `event` and `run` are not parameters."""

    def w(
        event, run, a: str, b: int = 1, c: float = 0.5, d: bool = True, e: list = (), f: dict = {},  # noqa: B006
        g: list[int] = (), h: Literal["x", "y"] = "x", i: None = None, j="{{ k }}", *, k: Any,
        m: dict[str, int], n: list[Any],
    ):  # fmt: skip
        anything(x=[a, run.id, event.id])

    def v(f: dict = {"$expr": "x"}):  # noqa: B006
        anything(x=f)

    assert drawn(v).params["f"].default == {"$data": {"$expr": "x"}}
    found = drawn(w)
    assert found.params == {
        "a": Param(type="string"),
        "b": Param(type="integer", default=1),
        "c": Param(type="number", default=0.5),
        "d": Param(type="boolean", default=True),
        "e": Param(type="array", default=[]),
        "f": Param(type="object", default={}),
        "g": Param(type="array", items=Param(type="integer"), default=[]),
        "h": Param(type="string", enum=["x", "y"], default="x"),
        "i": Param(default=None),
        "j": Param(default="{{ k }}"),
        "k": Param(),
        "m": Param(type="object"),
        "n": Param(type="array"),
    }
    assert [name for name, param in found.params.items() if param.is_required] == ["a", "k", "m", "n"]
    assert found.steps[0].with_ == {"x": [{"$expr": "params.a"}, {"$expr": "run.id"}, {"$expr": "event.id"}]}


X = Output("x")
Y = Output("y")


@pytest.mark.parametrize(
    ("output", "source", "value"),
    [
        (X.a["b"][0], "x.a.b[0]", 5),
        (X["_a"], 'x["_a"]', 6),
        (X["a b"], 'x["a b"]', 7),
        (X.a.b[0:1], "x.a.b[0:1]", [5]),
        (X.a.b[::-1], "x.a.b[::-1]", [9, 5]),
        (X.a.b[Y - 3], "x.a.b[y - 3]", 5),
        (X.name.upper(), "x.name.upper()", "N"),
        (X.a.b.filter("length"), "x.a.b | length", 2),
        (X.a.b.filter("length") > 1, "x.a.b | length > 1", True),
        (X.a.b.filter("join", "-"), 'x.a.b | join("-")', "5-9"),
        (X.a.b.filter("sort", reverse=True).filter("first"), "x.a.b | sort(reverse=true) | first", 9),
        ((Y + 1).filter("string"), "(y + 1) | string", "4"),
        (Y == 3, "y == 3", True),
        (Y != None, "y != none", True),  # noqa: E711
        (3 <= Y,  # noqa: SIM300
 "y >= 3", True),
        ((Y > 1) & (Y < 3), "y > 1 and y < 3", False),
        ((Y > 1) | (Y < 3), "y > 1 or y < 3", True),
        (((Y > 5) | (Y > 1)) & (Y < 9), "(y > 5 or y > 1) and y < 9", True),
        (~(Y > 5), "not y > 5", True),
        (~Y == 3, "(not y) == 3", False),
        ((Y == 3) == True, "(y == 3) == true", True),  # noqa: E712
        ((Y + 1) * 2, "(y + 1) * 2", 8),
        (1 + Y * 2, "1 + y * 2", 7),
        (9 - (Y - 1), "9 - (y - 1)", 7),
        (9 - Y - 1, "9 - y - 1", 5),
        (Y / 2, "y / 2", 1.5),
        (Y // 2 % 2, "y // 2 % 2", 1),
        (2 ** (Y**2), "2 ** (y ** 2)", 512),
        ((-Y) ** 2, "(-y) ** 2", 9),
        (-(Y**2), "-(y ** 2)", -9),
        (-1 - Y, "-1 - y", -4),
        ((-1) ** Y, "(-1) ** y", -1),
        (Y == "a\"'{{é\n", 'y == "a\\"\'{{é\\n"', False),
        (X.a.b == [5, Y * 3], "x.a.b == [5, y * 3]", True),
        (X.a == {"b": [5, 9]}, 'x.a == {"b": [5, 9]}', True),
        (X.name + "s", 'x.name + "s"', "ns"),
        ("s" + X.name, '"s" + x.name', "sn"),
    ],
)  # fmt: skip
def test_what_is_done_with_outputs_builds_expressions(output, source, value):
    """Operators keep Python's precedence, and evaluate to what Python would have given."""
    assert output._source == source
    assert evaluate({"$expr": source}, {"x": {"a": {"b": [5, 9]}, "_a": 6, "a b": 7, "name": "n"}, "y": 3}) == value


def test_text_with_an_output_in_it_is_a_template():
    """`str`, f-strings and % put the expression into the text; the rest of it stays as it is."""
    names = {"split": "S"}
    for function, text in (
        (lambda: anything(x=f"rows/{split('a')}.csv"), "rows/S.csv"),
        (lambda: anything(x=str(split("a"))), "S"),
        (lambda: anything(x="%s-%s" % (split("a"), 1)), "S-1"),  # noqa: UP031
        (lambda: anything(x="{}".format(split("a")) + "{{ split }}"), "S{{ split }}"),
        (lambda: anything(x=f"{{{split('a')}}} {{% raw %}}\r\n"), "{S} {% raw %}\r\n"),
        (lambda: anything(x=f"{split('a')}".upper()), "S"),
    ):
        template = with_of(function)
        assert "$text" in template
        assert evaluate(template, names) == text
    assert with_of(lambda: anything(x=f"rows/{split('a')}")) == {"$text": "rows/{{ split }}"}


@pytest.mark.parametrize("write", [lambda out: f"n = {out!r}", lambda out: f"n = {[out]}", lambda out: str({"a": out})])
def test_the_repr_of_an_output_does_not_become_data(write):
    """A list's or a mapping's text has it too; no run could tell what was meant."""
    found = faults_of(lambda: anything(x=write(anything())))
    assert [(field, message[:40]) for _, field, message in found] == [
        ("steps.anything_2.with.x", "<Output anything> was put into text by i")
    ]
    assert with_of(lambda: anything(x="<Output anything>")) == "<Output anything>"


@pytest.mark.parametrize(
    "value",
    [
        "{{ secrets.KEY }}",
        "{{",
        ["{{ x }}", {"a": "{{ x }}"}],
        {"$expr": "event"},
        {"$text": "{{ x }}"},
        {"a": 1.5},
        None,
    ],
)
def test_plain_values_are_data_whatever_they_look_like(value):
    """Nothing that is a Python value is ever evaluated."""
    assert evaluate(with_of(lambda: anything(x=value)), {}) == value


def test_outputs_in_lists_and_mappings_are_found():
    """Dependencies come from wherever an output stands."""

    def w():
        rows = split("a")
        return {"rows": [rows, {"first": rows[0]}], "text": f"n={rows}"}

    found = drawn(w)
    assert found.output == {
        "rows": [{"$expr": "split"}, {"first": {"$expr": "split[0]"}}],
        "text": {"$text": "n={{ split }}"},
    }
    assert found.has_output


def test_state_and_errors_of_a_step():
    """They make the step one that must end first."""

    def w():
        rows = split("a")
        anything.options(trigger_rule="all_done")(x=[state_of(rows), errors_of(rows)])

    (_, step) = drawn(w).steps
    assert step.with_["x"] == [{"$expr": "steps.split.state"}, {"$expr": "steps.split.errors"}]
    assert step.upstream() == ("split",)


def test_item_and_index_are_for_the_arguments_of_a_map():
    """The first parameter gets the item unless it is given."""

    def w():
        total.map([[1], [2]], chunk=item["rows"], factor=index)

    (step,) = drawn(w).steps
    assert step.with_ == {"chunk": {"$expr": "item.rows"}, "factor": {"$expr": "index"}}


def test_a_workflow_within_a_workflow_is_a_step():
    """`event` and `run` are not passed; the parameters are, by position or name."""

    @workflow(name="in-ner")
    def inner(event, a: int, b: int = 2):
        anything(x=a)

    def outer():
        inner(1, b=3)
        return inner.options(max_parallel=1).map([1, 2], b=4)

    first, second = drawn(outer).steps
    assert (first.id, first.workflow, first.task, first.with_) == ("inner", "in-ner", None, {"a": 1, "b": 3})
    assert (second.id, second.with_) == ("inner_2", {"a": {"$expr": "item"}, "b": 4})


def test_attempts_of_a_step_and_of_all():
    """Options are the step's own; what the task says is put in when the project is loaded."""

    @task(retry=RetryPolicy(maximum_attempts=5), timeout="5m", memory="1GB")
    def patient(): ...

    def w():
        patient()
        patient.options(retry=2, timeout=1.5, memory="512MB")()

    found = drawn(w, retry=RetryPolicy(jitter="none"), timeout="1h")
    assert patient.defaults == Defaults(retry=RetryPolicy(maximum_attempts=5), timeout_s=300.0, memory=10**9)
    assert (found.retry, found.timeout_s) == (RetryPolicy(jitter="none"), 3600.0)
    assert [(s.retry, s.timeout_s, s.memory) for s in found.steps] == [
        (None, None, None),
        (RetryPolicy(maximum_attempts=2), 1.5, 512_000_000),
    ]
    assert task(retry=None, timeout=None)(split.function).defaults == Defaults()


def test_steps_that_wait():
    """They are called, mapped and given options as tasks are."""

    def w(event, hours: int = 1):
        first = sleep("1h")
        second = until(event.data["due"])
        sleep.options(id="nap", needs=[first, second], if_=hours > 1)(f"{hours}h")
        sleep.options(max_parallel=2).map([1, 2])
        until.map(event.data.times)
        return anything(x=second)

    *waits, last = drawn(w).steps
    assert [(s.id, s.sleep, s.until, s.foreach) for s in waits] == [
        ("sleep", "1h", None, None),
        ("until", None, {"$expr": "event.data.due"}, None),
        ("nap", {"$text": "{{ params.hours }}h"}, None, None),
        ("sleep_2", {"$expr": "item"}, None, [1, 2]),
        ("until_2", None, {"$expr": "item"}, {"$expr": "event.data.times"}),
    ]
    assert (waits[2].needs, waits[2].if_) == (("sleep", "until"), {"$expr": "params.hours > 1"})
    assert last.upstream() == ("until",)


def test_a_wait_has_no_meaning_outside_a_workflow():
    """It would not wait, so it says so."""
    with pytest.raises(TracingError, match=r"`sleep\(...\)` is a step, and has a meaning only in a @workflow function"):
        sleep("1h")


def _wrong_waits():
    sleep("soon")
    until("tomorrow")
    sleep.options(retry=3, pool="cpu")("1h")
    sleep.options(timout=3)("1h")
    sleep.options(id="x")("1h", "2h")
    sleep.map([1], when="2h")
    until(object())
    sleep(item)


def test_wrong_waits_are_collected():
    """As wrong calls are."""
    found = [(line, field) for line, field, _ in faults_of(_wrong_waits)]
    assert sorted(found) == [
        (1, "steps.sleep.sleep"), (2, "steps.until.until"), (3, "steps.sleep_2.pool"), (3, "steps.sleep_2.retry"),
        (4, "steps.sleep_3.timout"), (5, "steps.x"), (6, "steps.sleep_4"), (7, "steps.until_2.until"),
        (8, "steps.sleep_5.sleep"),
    ]  # fmt: skip


def test_hooks_are_drawn_by_functions_of_their_own():
    """They get by name what they ask for: event, run, parameters, and the outputs of the workflow's steps."""

    def on_failure(run, event, region, total, note="n"):
        first = anything(x=[run.failures, event.id, region, total, state_of(total), note])
        report.options(needs=[first])([], title=f"failed: {run.error}")

    def w(event, region: str = "eu"):
        return total(split(event.data.path))

    found = drawn(w, on_failure=on_failure, finally_=lambda run: anything(x=run.state))
    assert [(s.phase, s.id) for s in found.steps] == [
        (Phase.STEPS, "split"),
        (Phase.STEPS, "total"),
        (Phase.ON_FAILURE, "anything"),
        (Phase.ON_FAILURE, "report"),
        (Phase.FINALLY, "anything_2"),
    ]
    assert found.step("anything").with_["x"] == [
        *({"$expr": source} for source in ("run.failures", "event.id", "params.region", "total", "steps.total.state")),
        "n",
    ]
    assert found.step("report").with_["title"] == {"$text": "failed: {{ run.error }}"}
    assert found.upstream_of(found.step("report")) == ("anything",)
    assert found.upstream_of(found.step("anything")) == ()


def test_hooks_in_yaml_and_python_give_the_same_workflow():
    """Also with attempts and waits."""

    def tell(run):
        anything(x=run.failures)

    @workflow(on_failure=tell, finally_=lambda: sleep("1m"), retry=2, timeout="1h")
    def nightly(path: str):
        split.options(retry=RetryPolicy(initial_interval="2s"), timeout="5m", memory="1GB")(path)

    text = """
workflow: nightly
params: {path: string}
retry: 2
timeout: 1h
steps:
  split:
    task: MODULE:split
    with: {path: "{{ params.path }}"}
    retry: {initial_interval: 2s}
    timeout: 5m
    memory: 1GB
on_failure:
  anything:
    task: MODULE:anything
    with: {x: "{{ run.failures }}"}
finally:
  sleep: {sleep: 1m}
"""
    from_yaml = read_definition(Path("nightly.yaml"), text.replace("MODULE", __name__))
    from_python = nightly.trace()
    assert from_yaml.faults == from_python.faults == []
    assert from_python.workflow == from_yaml.workflow


def _main():
    split("a")


def _reads_what_there_is_not(runn):
    anything(x=1)


def _breaks_off(run):
    anything(x=1)
    if run.failures:
        pass


def _needs_main(split):
    anything.options(needs=[split])(x=1)


async def _is_async():
    anything(x=1)


@pytest.mark.parametrize(
    ("hook", "line", "field", "message"),
    [
        (5, None, "on_failure", "must be a plain function that draws steps, not 5"),
        (_is_async, None, "on_failure", "must be a plain function that draws steps, not <function"),
        (print, None, "on_failure", "must be a plain function that draws steps, not <built-in"),
        (lambda: None, 0, "on_failure", "draws no step; call a task in it"),
        (_reads_what_there_is_not, 0, "on_failure", "unknown parameter 'runn'; did you mean 'run'?"),
        (_breaks_off, 2, "on_failure", "`if`, `and`, `or`, `not` cannot be used on <Output run.failures>"),
        (_needs_main, 1, "on_failure.anything.needs", "'split' is a step of `steps:`; only other steps of `steps:`"),
        (lambda: anything(x=item), 0, "on_failure.anything.with.x", "`item` has a meaning only in a step with"),
        (
            lambda run: anything(x=run.failed),
            0,
            "on_failure.anything.with.x",
            "unknown name 'run.failed'; did you mean",
        ),
    ],
)
def test_what_is_wrong_in_a_hook_is_a_fault_there(hook, line, field, message):
    """At its own lines, or at the workflow's where it has none."""
    found, faults, _ = workflow(name="w", on_failure=hook)(_main).trace()
    (fault,) = faults
    start = (_main if line is None else hook).__code__.co_firstlineno
    assert (fault.file, fault.line, fault.field) == (str(HERE), start + (line or 0), field)
    assert fault.message.startswith(message)
    assert found.steps[0].id == "split"


def test_the_steps_themselves_know_nothing_of_how_the_run_ended():
    """Only hooks come after that."""
    ((_, field, message),) = faults_of(lambda run: anything(x=run.failures))
    assert field == "steps.anything.with.x"
    assert message.startswith("`run.failures` is known only to the steps of `on_failure:` and `finally:`")


def test_on_and_descriptions():
    """As in YAML; a description is the first paragraph of the docstring."""

    def w():
        """Do
        much.

        More.
        """
        anything(x=1)

    found = drawn(w, on=[on.file(Path("in"), recursive=True, min_size="1KB"), on.event({"type": ["a"]})], name="n")
    assert found.on == (OnFile(path="in", recursive=True, min_size=1000), OnEvent(pattern={"type": ["a"]}))
    assert (found.name, found.description) == ("n", "Do much.")


def _branches():
    if split("a"):
        pass


def _loops():
    rows = split("a")
    for _ in rows:
        pass


def _takes_length():
    len(split("a"))


def _takes_length_of_text():
    anything(x=f"{split('a')}"[1:])


def _chains():
    1 < split("a") < 3  # noqa: B015


def _contains():
    "a" in split("a")  # noqa: B015


def _makes_int():
    int(split("a"))


def _formats():
    anything(x=f"{split('a'):>10}")


def _raises():
    split("a")
    {}["x"]


def _wrong_policy():
    split.options(retry=RetryPolicy(maximum_attempts=0))("a")


def _private():
    split("a")._x  # noqa: B018


def _state_of_part():
    state_of(split("a")[0])


@pytest.mark.parametrize(
    ("function", "line", "message"),
    [
        (_branches, 1, "give the step `.options(if_=...)`"),
        (_loops, 2, "call a task with `.map(...)`"),
        (_takes_length, 1, 'write .filter("length")'),
        (_takes_length_of_text, 1, "text with an output in it was cut up"),
        (_chains, 1, "if_="),
        (_contains, 1, "`in`"),
        (_makes_int, 1, 'write .filter("int")'),
        (_formats, 1, "the format '>10' cannot be applied"),
        (_raises, 2, "raises KeyError: 'x'"),
        (_wrong_policy, 1, "RetryPolicy.maximum_attempts: must be a whole number"),
        (_private, 1, "raises AttributeError: write ['_x']"),
        (_state_of_part, 1, "is not what a task or workflow was called for"),
    ],
)
def test_what_only_a_run_can_tell_is_refused(function, line, message):
    """The fault stands at the line of the workflow's function, and names what to write instead."""
    (found,) = faults_of(function)
    assert found[0] == line
    assert message in found[2]
    assert "DefinitionError" not in found[2]


def _wrong_calls():
    split()
    split("a", prats=3)
    split("a", 1, 2)
    split("a", path="b")
    total("a", context=1)
    anything(x={1, 2})
    anything(x={1: 2})
    total.map("abc")
    split.options(id="split")("a")
    split.options(trigger_rule="all_sucess", max_parallel="3")("a")
    split.options(retry={"jitter": 1, "nap": 2}, pol="x", timeout=0, memory="1")("a")
    split.options(needs=[event.data, 5])("a")
    split.options(needs="nothing")("a")
    split.options(max_parallel=3)("a")
    anything(x=item)
    anything(x=event.data.filter("lenght"))
    anything(x=float("nan"))


def test_wrong_calls_are_collected():
    """Every call that is wrong is a fault at its line, and the trace goes on."""
    found = faults_of(_wrong_calls)
    assert sorted((line, field) for line, field, _ in found) == sorted([
        (1, "steps.split.with"), (2, "steps.split_2.with.prats"), (3, "steps.split_3"), (4, "steps.split_4.with.path"),
        (5, "steps.total.with.context"), (6, "steps.anything.with.x"), (7, "steps.anything_2.with.x"),
        (8, "steps.total_2.foreach"), (9, "steps.split"), (10, "steps.split_6.trigger_rule"),
        (10, "steps.split_6.max_parallel"), (11, "steps.split_7.retry.jitter"),
        (11, "steps.split_7.retry.nap"), (11, "steps.split_7.pol"), (11, "steps.split_7.timeout"),
        (11, "steps.split_7.memory"),
        (12, "steps.split_8.needs"), (12, "steps.split_8.needs"), (13, "steps.split_9.needs"),
        (14, "steps.split_10.max_parallel"), (15, "steps.anything_3.with.x"), (16, "steps.anything_4.with.x"),
        (17, "steps.anything_5.with.x"),
    ])  # fmt: skip
    text = "\n".join(message for _, _, message in found)
    for words in (
        "missing argument: path", "unknown argument 'prats'; did you mean 'parts'?", "3 arguments are given by",
        "'path' is given twice", "`context` is given by the worker", "is not a JSON value", "must be plain text, not 1",
        "takes a list or the output", "two steps have the id 'split'", "did you mean 'all_success'?",
        "must be a whole number", "must be more than 0", "unknown key 'nap'",
        "unknown option 'pol'; did you mean 'pool'?",
        "must be steps, by id or output", "unknown step 'nothing'", "belongs to a step with `foreach:`",
        "`item` has a meaning",
        "no filter named 'lenght'",
    ):  # fmt: skip
        assert words in text


def test_wrong_signatures_are_faults():
    """Of parameters that have no type in a definition."""

    def w(a: str | None, b: set = (), *args, c: "Missing" = 1, d: int = "x", **kw):  # noqa: F821
        anything(x=a)

    def v(a: str | None, b: set = (), *args, d: int = "x", **kw):
        anything(x=a)

    assert ("params", "an annotation cannot be read: NameError: name 'Missing' is not defined") in [
        fault[1:] for fault in faults_of(w)
    ]
    assert [fault[1] for fault in faults_of(v)] == [
        "params.a",
        "params.b",
        "params.args",
        "params.kw",
        "params.d.default",
    ]


def test_a_workflow_needs_steps_and_a_name():
    """The checks of a Workflow are those of YAML."""

    def w():
        pass

    assert [fault[1] for fault in faults_of(w, name="a b")] == ["workflow", "steps"]
    assert faults_of(w, on=["inbox"])[0][1:] == ("on.0", "must be on.file(...), on.event(...) or the like, not 'inbox'")
    assert [fault[1:] for fault in faults_of(w)] == [("steps", "a workflow needs at least one step")]


@pytest.mark.parametrize(
    ("decorate", "field", "message"),
    [
        (lambda: task(retry=0), "task.retry", "must be a whole number from 1"),
        (lambda: task(retry="often"), "task.retry", "must be a mapping, or the number of attempts, not 'often'"),
        (lambda: task(retry={"jitter": 1}), "task.retry.jitter", "must be one of full, equal, none, not 1"),
        (lambda: task(retry=RetryPolicy(jitter="x")), "RetryPolicy.jitter", "must be one of full, equal, none"),
        (lambda: task(timeout=0), "task.timeout", "must be more than 0, not 0"),
        (lambda: task(timeout="soon"), "task.timeout", "must be a duration, such as"),
        (lambda: task(memory=512), "task.memory", "must be from 1MB to 1000000GB, such as 512MB"),
        (lambda: task(timout=3), "task.timout", "unknown argument 'timout'; did you mean 'timeout'?"),
        (lambda: task(pol="x"), "task.pol", "unknown argument 'pol'; did you mean 'pool'?"),
        (lambda: workflow(timeout=0), "workflow.timeout", "must be more than 0, not 0"),
        (lambda: workflow(retry=-1), "workflow.retry", "must be a whole number from 1"),
        (lambda: workflow(memory="1GB"), "workflow.memory", "unknown argument 'memory'"),
        (lambda: workflow(finaly=3), "workflow.finaly", "unknown argument 'finaly'; did you mean 'finally_'?"),
        (lambda: workflow(nam="x"), "workflow.nam", "unknown argument 'nam'; did you mean 'name'?"),
        (lambda: on.file("a", glub="x"), "on.file.glub", "unknown key 'glub'; did you mean 'glob'?"),
        (lambda: on.file("a", settle="soon"), "on.file.settle", "must be a duration"),
        (lambda: on.file(""), "on.file.path", "must not be empty"),
        (lambda: on.event({"a": "b"}), "on.event.a", "rules stand in an array"),
        (lambda: on.schedule(corn="* * * * *"), "on.schedule.corn", "unknown key 'corn'; did you mean 'cron'?"),
    ],
)
def test_what_is_wrong_in_a_decorator_raises_at_once(decorate, field, message):
    """With the file and line of the call."""
    with pytest.raises(DefinitionError) as caught:
        decorate()
    (fault,) = caught.value.faults
    assert (fault.file, fault.line, fault.field) == (str(HERE), decorate.__code__.co_firstlineno, field)
    assert message in fault.message


def test_a_trigger_that_does_not_exist_is_named():
    """With what there is."""
    with pytest.raises(AttributeError, match="unknown trigger 'fil'; did you mean 'file'"):
        _ = on.fil
