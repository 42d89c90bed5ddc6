"""Pools by the command line, the API and the metrics, with what an autoscaler and workers have said."""

from __future__ import annotations

import json
import re
import subprocess
import time
from typing import Any

import httpx
import pytest

from orchestrator.api import make_health
from orchestrator.audit import Audit
from orchestrator.engine import Engine
from orchestrator.plan import Plan
from orchestrator.pools import PoolSettings, PoolState, WorkerReport
from orchestrator.settings import Settings
from orchestrator.tokens import Scope, Tokens
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, command, on_servers, write_project
from tests.integration.test_api import Served, api, bearer, is_problem  # noqa: F401 -- a fixture
from tests.integration.test_metrics import reader


@pytest.fixture
def settings(settings: Settings) -> Settings:
    write_project(settings.project, {"orchestrator.toml": "[pools.p]\nmax = 4\n"})
    return settings.evolve(pools={"p": PoolSettings(maximum=4)})


def cli(settings: Settings, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        command("pools", *arguments, "--project", str(settings.project)),
        env=on_servers(settings), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


#: What is current stays so for as long as a test may take on a busy machine.
LATER_S = 300


def decide(engine: Engine, *, ago_s: float = -LATER_S, **fields: Any) -> None:
    at_ms = engine.ledger.now_ms() - int(ago_s * 1000)
    state = {"size": 3, "busy": 2, "workers": 2, "desired": 4, "desired_workers": 2, "why": "5 wait", "backlog": 5}
    state |= {"arrival_rate": 1.23456, "service_rate": 2.0, "clears_in_s": 2.5, "decided_ms": at_ms} | fields
    engine.pools.decide([PoolState(pool="p", at_ms=at_ms, **state)], {"p@h:1": 4})


def report(engine: Engine, **fields: Any) -> None:
    said = {"worker": "p@h:1", "pool": "p", "host": "h", "pid": 1, "code": "c0de" * 8, "size": 2, "in_work": [3.0]}
    engine.pools.report(WorkerReport(**said | {"seen_ms": time.time_ns() // 1_000_000 + LATER_S * 1000} | fields))


def test_a_pool_is_shown_as_the_autoscaler_sees_it(settings: Settings, engine: Engine) -> None:
    decide(engine, faults=["one of its workers dies at start"])
    report(engine)
    page = json.loads(cli(settings, "list", "--json"))
    assert page["next"] is None
    assert page["autoscaler"]["fault"] == ""
    default, p = page["items"]
    assert (default["name"], default["desired"], default["size"]) == ("default", None, 0)
    assert {name: p[name] for name in ("size", "busy", "workers", "desired", "why", "arrival_rate", "clears_in_s")} == {
        "size": 3, "busy": 2, "workers": 2, "desired": 4, "why": "5 wait", "arrival_rate": 1.235, "clears_in_s": 2.5,
    }  # fmt: skip
    assert p["backlog"] == 0, "as it is now"
    table = cli(settings, "list")
    for word in ("pool", "size", "busy", "backlog", "oldest", "arrivals/s", "served/s", "desired", "why", "clears in"):
        assert word in table.splitlines()[0]
    assert "p: one of its workers dies at start" in table
    assert "no autoscaler" not in table


def test_it_is_told_that_no_autoscaler_is_alive(settings: Settings, engine: Engine) -> None:
    assert "no autoscaler has ever reported" in cli(settings, "list")
    decide(engine, ago_s=40)
    report(engine)
    report(engine, worker="p@h:2", fault="it has no disk")
    report(engine, worker="p@h:3", seen_ms=1)
    page = json.loads(cli(settings, "list", "--json"))
    assert re.match(r"no autoscaler has reported for (4|5|6)\d s; ", page["autoscaler"]["fault"])
    p = page["items"][1]
    assert (p["size"], p["busy"], p["workers"], p["desired"]) == (4, 2, 2, 4), "what workers say themselves"
    assert p["faults"] == ["it has no disk"]
    assert "workers size themselves" in cli(settings, "list")


def test_a_pool_that_has_only_messages_is_seen(settings: Settings, engine: Engine) -> None:
    plan = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f", pool="lonely"),)))
    engine.ledger.put_plan(plan)
    engine.start("run", plan, event={}, params={})
    page = json.loads(cli(settings, "list", "--json"))
    [lonely] = [pool for pool in page["items"] if pool["name"] == "lonely"]
    assert (lonely["backlog"], lonely["workers"], lonely["faults"]) == (1, 0, ["messages wait and there is no worker"])
    assert lonely["oldest_age_s"] >= 0


def test_a_worker_that_nobody_has_heard_of_lately_is_shown_as_such(settings: Settings, engine: Engine) -> None:
    report(engine, seen_ms=engine.ledger.now_ms() - 45_000)
    [one] = json.loads(cli(settings, "show", "p", "--json"))["members"]
    assert re.match(r"not heard of for \d\d s", one["fault"])


def test_a_pool_is_scaled_by_hand_and_shown_with_its_workers(settings: Settings, engine: Engine) -> None:
    report(engine)
    decide(engine)
    assert "is to have 7 processes" in cli(settings, "scale", "p", "7")
    assert engine.pools.pins() == {"p": 7}
    assert engine.pools.wait(0.1) == {"p"}
    shown = json.loads(cli(settings, "show", "p", "--json"))
    assert shown["pinned"] == 7
    assert [(one["worker"], one["size"], one["target"], one["busy"]) for one in shown["members"]] == [
        ("p@h:1", 2, 4, 1)
    ]
    assert "p@h:1" in cli(settings, "show", "p")
    assert "decides" in cli(settings, "scale", "p", "auto")
    assert engine.pools.pins() == {}
    assert json.loads(cli(settings, "scale", "p", "0", "--json"))["pinned"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale", "p", "many"], "the size of a pool is a whole number, or auto, not 'many'"),
        (["scale", "p", "1.5"], "the size of a pool is a whole number"),
        (["scale", "p", "1000000"], "a pool has 0 to 100000 processes, not 1000000"),
        (["scale", "pp", "1"], "unknown pool 'pp'; did you mean 'p'? (there are: default, p)"),
        (["show", "none"], "unknown pool 'none'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(settings: Settings, arguments: list[str], message: str) -> None:
    said = cli(settings, *arguments, code=1)
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_api_answers_the_same_and_writes_down_who_scales(
    settings: Settings,
    engine: Engine,
    api: httpx.Client,  # noqa: F811
) -> None:
    decide(engine)
    report(engine)
    page = api.get("/pools").json()
    assert page["items"] == json.loads(cli(settings, "list", "--json"))["items"]
    assert page["autoscaler"]["fault"] == ""
    first = api.get("/pools", params={"limit": 1}).json()
    assert ([one["name"] for one in first["items"]], first["next"]) == (["default"], "default")
    assert [one["name"] for one in api.get("/pools", params={"after": "default"}).json()["items"]] == ["p"]
    assert api.get("/pools/p").json()["members"][0]["worker"] == "p@h:1"
    assert api.post("/pools/p/scale", json={"size": 2}).json()["pinned"] == 2
    assert api.post("/pools/p/scale", json={"size": "auto"}).json()["pinned"] is None
    entries, _ = Audit(engine.ledger).list()
    assert [(one["action"], one["target"], one["about"]) for one in entries] == [
        ("scale_pool", "p", {"size": "auto"}), ("scale_pool", "p", {"size": "2"}),
    ]  # fmt: skip
    for body in ({}, {"size": -1}, {"size": "many"}, {"size": 1.5}, {"size": True}, {"size": 10**9}, {"more": 1}):
        is_problem(api.post("/pools/p/scale", json=body), 422)
    is_problem(api.post("/pools/none/scale", json={"size": 1}), 404)
    is_problem(api.get("/pools/none"), 404)


def test_scaling_asks_for_admin(engine: Engine, api: httpx.Client) -> None:  # noqa: F811
    token = Tokens(engine.ledger).create("runner", Scope.RUN, now_ms=engine.ledger.now_ms())
    assert api.get("/pools", headers=bearer(token)).status_code == 200
    is_problem(api.post("/pools/default/scale", json={"size": 1}, headers=bearer(token)), 403)


def test_pools_are_in_the_metrics_as_long_as_an_autoscaler_speaks(engine: Engine) -> None:
    with Served(make_health(engine)) as served:
        read = reader(served.url)
        assert read("orchestrator_autoscaler_up") == 0
        decide(engine, oldest_age_s=7.5, faults=["a", "b"])
        assert read("orchestrator_autoscaler_up") == 1
        found = {name: read(f"orchestrator_pool_{name}", pool="p") for name in (
            "size", "busy", "workers", "desired", "backlog", "oldest_age_seconds", "faults",
        )}  # fmt: skip
        assert found == {
            "size": 3, "busy": 2, "workers": 2, "desired": 4, "backlog": 5, "oldest_age_seconds": 7.5, "faults": 2,
        }  # fmt: skip
        decide(engine, ago_s=60)
        assert read("orchestrator_autoscaler_up") == 0
        assert "orchestrator_pool_size{" not in httpx.get(f"{served.url}/metrics").text


def test_a_broker_that_is_away_does_not_keep_pools_from_being_shown(
    settings: Settings, engine: Engine, own_server: Server
) -> None:
    elsewhere = settings.evolve(broker_url=own_server.url)
    own_server.stop()
    decide(engine)
    pools = json.loads(cli(elsewhere, "list", "--json"))["items"]
    assert next(one["backlog"] for one in pools if one["name"] == "p") == 5, "as it was"
