"""Steps in a real worker: what they are given, what becomes of what they return, print and raise."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator.expressions import data, parse
from orchestrator.runs import Run, RunState
from orchestrator.workflows import Param, Step, TriggerRule, Workflow
from tests.integration.conftest import Monitor, Place, read_stamps


def step(step_id: str, task: str = "echo", /, *, needs: tuple[str, ...] = (), **options: Any) -> Step:
    given = {key: parse(value) for key, value in options.pop("with_", {}).items()}
    for name in ("if_", "foreach"):
        if name in options:
            options[name] = parse(options[name])
    return Step(id=step_id, task=f"tasks:{task}", with_=given, needs=needs, **options)


def workflow(*steps: Step, **options: Any) -> Workflow:
    return Workflow(name="w", steps=steps, **options)


def states(run: Run) -> dict[str, str]:
    return {one.id: str(one.state) for one in run.steps}


def test_outputs_travel_down_the_graph_and_the_only_leaf_is_the_output(place: Place) -> None:
    run = place.run(
        workflow(
            step("a", with_={"value": 20}),
            step("b", with_={"value": "{{ a + 1 }}"}),
            step("c", "add", with_={"numbers": ["{{ a }}", "{{ b }}"]}),
        )
    )
    assert (run.state, run.output) == (RunState.SUCCEEDED, 41)
    assert run.started_at is not None
    assert run.finished_at is not None
    assert run.steps[0].attempts == 1
    assert "default@" in (run.steps[0].worker or "")


def test_several_leaves_make_a_mapping_and_output_an_expression(place: Place) -> None:
    two = (step("a", with_={"value": 1}), step("b", with_={"value": 2}))
    assert place.run(workflow(*two)).output == {"a": 1, "b": 2}
    assert place.run(workflow(*two, output=parse({"sum": "{{ a + b }}"}), has_output=True)).output == {"sum": 3}


def test_params_event_and_run_are_names(place: Place) -> None:
    event = {"specversion": "1.0", "id": "e7", "source": "s", "type": "t", "data": {"n": "123", "l": "[1,2]"}}
    names = ("params.x", "event.data.n", "event.data.l", "run.workflow")
    run = place.run(
        workflow(
            step("a", with_={"value": [f"{{{{ {x} }}}}" for x in names]}),
            params={"x": Param(type="integer")},
        ),
        event=event,
        params={"x": 5},
    )
    # The strings of an event stay strings: neither a number nor a list is made of them.
    assert run.output == [5, "123", "[1,2]", "w"]


def test_values_from_outside_are_never_parsed_as_expressions(place: Place) -> None:
    evil = "{{ 7 * 7 }}"
    event = {"specversion": "1.0", "id": "e", "source": "s", "type": "t", "data": evil}
    steps = (
        step("a", with_={"value": "{{ event.data }}"}),
        step("b", with_={"value": "text {{ a }}"}),
        Step(id="c", task="tasks:echo", with_={"value": data([evil])}),
    )
    assert place.run(workflow(*steps), event=event).output == {"b": f"text {evil}", "c": [evil]}


def test_a_fan_out_keeps_the_order_and_an_empty_one_gives_an_empty_list(place: Place) -> None:
    def fan(n: int) -> Workflow:
        return workflow(
            step("n", "numbers", with_={"n": n}),
            step("f", foreach="{{ n }}", with_={"value": "{{ [index, item * 2] }}"}),
            step("g", with_={"value": "{{ f }}"}),
        )

    assert place.run(fan(300)).output == [[n, n * 2] for n in range(300)]
    assert place.run(fan(0)).output == []


def test_a_fan_out_runs_all_items_although_some_fail(place: Place) -> None:
    run = place.run(
        workflow(
            step("f", "fail_on", foreach=list(range(100)), with_={"item": "{{ item }}", "bad": [3, 77]}),
            step("after"),
            step("below", with_={"value": "{{ f }}"}),
            step(
                "look",
                with_={
                    "value": [
                        "{{ f | select('none') | list | length }}",
                        "{{ steps.f.errors | map(attribute='index') }}",
                    ]
                },
                trigger_rule=TriggerRule.ALL_DONE,
            ),
        )
    )
    assert states(run) == {"f": "failed", "after": "succeeded", "below": "upstream_failed", "look": "succeeded"}
    by_id = {one.id: one for one in run.steps}
    assert by_id["f"].items == {"succeeded": 98, "failed": 2}
    assert by_id["look"].output == [2, [3, 77]]
    # `look` took the failure up, so the run is not failed by it.
    assert run.state is RunState.SUCCEEDED


def test_max_parallel_bounds_what_runs_at_a_time(place: Place, tmp_path: Path) -> None:
    record = tmp_path / "record"
    place.run(
        workflow(
            step(
                "f",
                "stamp",
                foreach=list(range(8)),
                max_parallel=1,
                with_={"record": str(record), "name": "i{{ index }}", "seconds": 0.01},
            )
        )
    )
    spans = sorted(read_stamps(record).values())
    assert len(spans) == 8
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_an_item_is_not_held_back_by_a_long_one_in_its_part(place: Place, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (place.settings.project / "mixed.py").write_text(
        "import tasks\ndef act(kind, path):\n    return getattr(tasks, kind)(path=path)\n"
    )
    # 130 items: parts of three. The first item waits for a file that the third makes.
    kinds = ["wait_for", "echo", "touch"] + ["echo"] * 127
    run = place.run(
        Workflow(
            name="w",
            steps=(
                Step(
                    id="f",
                    task="mixed:act",
                    foreach=data(kinds),
                    with_={"kind": parse("{{ item }}"), "path": str(mark)},
                ),
            ),
        )
    )
    assert run.state is RunState.SUCCEEDED


def test_if_skips_a_step_and_what_needs_it_but_not_under_none_failed(place: Place) -> None:
    run = place.run(
        workflow(
            step("a", with_={"value": 0}),
            step("b", if_="{{ a > 0 }}"),
            step("c", with_={"value": "{{ b }}"}),
            step("d", with_={"value": "{{ [b, steps.b.state] }}"}, trigger_rule=TriggerRule.NONE_FAILED),
        )
    )
    assert states(run) == {"a": "succeeded", "b": "skipped", "c": "skipped", "d": "succeeded"}
    assert run.state is RunState.SUCCEEDED
    assert run.output == {"c": None, "d": [None, "skipped"]}


def test_if_in_a_fan_out_is_asked_per_item_when_it_reads_the_item(place: Place) -> None:
    run = place.run(workflow(step("f", foreach=[1, 2, 3], if_="{{ item != 2 }}", with_={"value": "{{ item }}"})))
    assert run.output == [1, None, 3]
    assert run.steps[0].items == {"succeeded": 2, "skipped": 1}


def test_a_failed_step_fails_the_run_with_its_error_and_other_branches_finish(place: Place) -> None:
    run = place.run(
        workflow(step("bad", "fail", with_={"message": "boo"}), step("below", needs=("bad",)), step("other"))
    )
    assert states(run) == {"bad": "failed", "below": "upstream_failed", "other": "succeeded"}
    assert run.state is RunState.FAILED
    assert run.error is not None
    assert (run.error["step"], run.error["type"], run.error["message"]) == ("bad", "ValueError", "boo")
    frames = [line for line in run.error["traceback"].splitlines() if line.startswith("  File")]
    assert frames
    assert all("tasks.py" in frame for frame in frames), run.error["traceback"]


def test_one_failed_takes_a_failure_up(place: Place) -> None:
    run = place.run(
        workflow(
            step("bad", "fail"),
            step("mend", trigger_rule=TriggerRule.ONE_FAILED, with_={"value": "{{ steps.bad.errors[0].type }}"}),
            step("ok"),
            step("idle", needs=("ok",), trigger_rule=TriggerRule.ONE_FAILED),
        )
    )
    assert states(run) == {"bad": "failed", "mend": "succeeded", "ok": "succeeded", "idle": "skipped"}
    assert run.state is RunState.SUCCEEDED
    assert run.output == {"mend": "ValueError", "idle": None}


def test_context_says_where_one_is(place: Place) -> None:
    run = place.run(workflow(step("t", "talk", foreach=[0], with_={})))
    (told,) = run.output
    assert datetime.now(UTC) < datetime.fromisoformat(told.pop("deadline")) < datetime.now(UTC) + timedelta(days=1)
    assert told == {"run": run.id, "step": "t", "attempt": 1, "index": 0, "event": "e1", "key": f"{run.id}/t/0"}


def test_what_a_step_prints_and_logs_is_kept(place: Place) -> None:
    run = place.run(workflow(step("t", "talk"), step("quiet", "noop")))
    ((slot, attempt, text, _),) = place.queries.logs(run.id)[0]
    assert (slot, attempt) == ("t", 1)
    assert text.splitlines() == ["printed", "to stderr", "INFO mine: logged", "WARNING w.t: by context"]


def test_each_line_of_the_workers_log_says_whose_it_is(place: Place) -> None:
    run = place.run(workflow(step("t", "tell", foreach=[0], with_={"secret": "{{ secrets.TOKEN }}"})))
    lines = [json.loads(line) for line in place.log.read_text().splitlines() if run.id in line]
    for line in lines:
        names = {"run": run.id, "workflow": "w", "event_id": "e1", "step": "t/0", "attempt": 1, "pool": "default"}
        assert line.items() >= (names | {"role": "worker"}).items()
    told, threads, failed = lines
    assert (told["event"], told["logger"], told["level"]) == ("opened with ***", "shop", "warning")
    assert told["key"] == ["***"]
    assert threads["event"] == "from a thread"
    assert (failed["event"], failed["error"]) == ("step_failed", "RuntimeError")
    ((_, _, text, _),) = place.queries.logs(run.id)[0]
    assert text.splitlines() == ["mine: opened with ***", "mine: from a thread"]


def test_threads_of_a_step_and_bytes_are_captured_too(place: Place) -> None:
    run = place.run(workflow(step("t", "talk_in_threads")))
    ((_, _, text, _),) = place.queries.logs(run.id)[0]
    assert sorted(text.splitlines()) == ["bytes", "from", "threads"]


def test_a_step_may_use_processes_of_its_own(place: Place) -> None:
    assert place.run(workflow(step("s", "squares_in_processes", with_={"numbers": [1, 2, 3]}))).output == [1, 4, 9]


def test_captured_text_is_bounded_and_says_so(place: Place) -> None:
    run = place.run(workflow(step("t", "chatter", with_={"characters": 200_000})))
    ((_, _, text, _),) = place.queries.logs(run.id)[0]
    assert len(text) < 70_000
    assert text.rstrip().endswith("more characters were not kept]")


def test_secrets_reach_the_step_and_are_masked_everywhere_else(place: Place) -> None:
    run = place.run(workflow(step("t", "whisper", with_={"secret": "{{ secrets.TOKEN }}"})))
    assert run.error is not None
    assert run.error["message"] == "leaked ***"
    ((_, _, text, _),) = place.queries.logs(run.id)[0]
    assert text == "the secret is ***\n"
    client = place.engine.ledger.client
    for key in client.scan_iter(f"*{run.id}*"):
        content = client.hgetall(key) if client.type(key) == "hash" else {}
        assert "ter2" not in str(content)


def test_what_a_step_changes_of_its_arguments_no_other_sees(place: Place) -> None:
    event = {"specversion": "1.0", "id": "e", "source": "s", "type": "t", "data": {"a": 1}}
    given = {"values": "{{ n }}", "item": "{{ item }}", "event_data": "{{ event.data }}"}
    steps = (
        step("n", "numbers", with_={"n": 3}),
        step("f", "spoil", foreach=[{"k": 1}] * 200, with_=given),
        step("g", with_={"value": "{{ [n, event.data] }}"}, needs=("f",)),
        step("h", with_={"value": "{{ f }}"}),
    )
    run = place.run(workflow(*steps), event=event)
    assert run.output == {"g": [[0, 1, 2], {"a": 1}], "h": [[[0, 1, 2], {"k": 1}, {"a": 1}, {"a": 1}]] * 200}


def test_an_undeclared_secret_is_told(place: Place) -> None:
    run = place.run(workflow(step("t", with_={"value": "{{ secrets.NOPE }}"})))
    assert "secret 'NOPE' is not declared" in (run.error or {})["message"]


def test_rich_values_become_json_and_others_are_an_error_with_step_and_type(place: Place) -> None:
    run = place.run(workflow(step("t", "rich_value")))
    assert run.output == {
        "point": {"x": 1, "when": "2026-01-02T03:04:05+00:00"},
        "price": "1.10", "path": "/a", "id": "00000000-0000-0000-0000-000000000001", "pair": [1, 2],
    }  # fmt: skip
    run = place.run(workflow(step("t", "poor_value")))
    assert run.state is RunState.FAILED
    message = (run.error or {})["message"]
    assert "step t" in message
    assert "['rows'][1]" in message
    assert "object" in message


def test_large_values_travel_by_reference(place: Place) -> None:
    run = place.run(
        workflow(step("b", "big", with_={"characters": 300_000}), step("l", "length", with_={"value": "{{ b }}"}))
    )
    assert run.output == 300_000
    stored = place.engine.ledger.client.hget(f"orchestrator:{{{run.id}}}:outputs", "b")
    assert stored.startswith("@runs/")


def test_a_list_of_large_items_is_kept_in_chunks(place: Place) -> None:
    run = place.run(
        workflow(
            step("n", foreach=list(range(30)), with_={"value": "{{ 'x' * 20000 }}"}),
            step("f", "length", foreach="{{ n }}", with_={"value": "{{ item }}"}),
            step("g", "add", with_={"numbers": "{{ f }}"}),
        )
    )
    assert run.output == 600_000


def test_sys_exit_in_a_step_fails_the_step_and_not_the_worker(place: Place) -> None:
    run = place.run(workflow(step("t", "leave")))
    assert (run.error or {})["message"] == "the step called sys.exit(3)"


def test_wrong_arguments_and_bad_expressions_fail_the_step(place: Place) -> None:
    run = place.run(workflow(step("t", "add", with_={"nope": 1})))
    assert "unexpected keyword argument" in (run.error or {})["message"]
    run = place.run(workflow(step("a", with_={"value": {}}), step("t", with_={"value": "{{ a.b.c }}"})))
    assert (run.error or {})["type"] == "ExpressionError"
    run = place.run(workflow(step("a", with_={"value": 5}), step("f", foreach="{{ a }}")))
    assert (run.error or {})["message"] == "foreach must give a list, not int"


def test_a_child_that_is_killed_is_replaced_and_its_step_runs_again(place: Place, tmp_path: Path) -> None:
    run = place.run(workflow(step("t", "die_once", with_={"mark": str(tmp_path / "mark")})))
    assert (run.state, run.output) == (RunState.SUCCEEDED, "lived")
    assert run.steps[0].losses == 1
    assert run.steps[0].attempts == 1


def test_a_step_that_always_kills_its_process_ends_as_failed(place: Place) -> None:
    run = place.end(place.start(workflow(step("t", "die"))), timeout_s=60)
    assert (run.error or {})["type"] == "WorkerLostError"
    assert run.steps[0].losses == place.settings.maximum_losses


def test_no_message_carries_a_chord_and_a_chain_carries_at_most_25_links(place: Place, monitor: Monitor) -> None:
    chain = tuple(step(f"s{n}", needs=(f"s{n - 1}",) if n else ()) for n in range(60))
    fan = step("f", foreach=list(range(200)), needs=("s59",))
    place.run(workflow(*chain, fan, step("g", with_={"value": "{{ f }}"})))
    bodies = monitor.bodies()
    assert len(bodies) > 3
    for message, (args, kwargs, embed) in zip(monitor.messages, bodies, strict=True):
        assert len(args) in (2, 4)
        assert kwargs == {}
        assert embed["chord"] is None
        assert embed["callbacks"] is None
        assert message["headers"]["ignore_result"] is True
        assert len(embed["chain"] or []) < 25


def test_bytes_published_grow_linearly_with_the_steps(place: Place) -> None:
    """Stock Celery: 22 KB, 1.46 MB and 138 MB for the chains."""

    def published(made: Workflow) -> int:
        with Monitor(place.settings) as seen:
            assert place.run(made).state is RunState.SUCCEEDED
        return sum(seen.sizes)

    chains = {
        n: published(workflow(*(step(f"s{i}", needs=(f"s{i - 1}",) if i else ()) for i in range(n))))
        for n in (10, 100, 1000)
    }
    fans = {n: published(workflow(step("f", foreach=list(range(n))))) for n in (10, 100, 1000)}
    for sizes in (chains, fans):
        assert sizes[100] <= sizes[10] * 11
        assert sizes[1000] <= sizes[100] * 11
