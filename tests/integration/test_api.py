"""The API over real HTTP: what it answers, whom it lets in, and what it makes of bad requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from orchestrator.api import make_app
from orchestrator.bus import EventBus
from orchestrator.dispatcher import Dispatcher
from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.workflows import Param, Step, Workflow
from tests.conftest import wait_until

NOW_MS = 1_700_000_000_000


class Served:
    """An ASGI application on a real port."""

    def __init__(self, app: Any) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="served")

    def __enter__(self) -> Served:
        self._thread.start()
        wait_until(lambda: self._server.started, "the server listens")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._listener.close()


@pytest.fixture
def api(engine: Engine) -> Iterator[httpx.Client]:
    """A client of the API on the test's own, empty ledger."""
    with Served(make_app(engine)) as served, httpx.Client(base_url=f"{served.url}/api/v1", timeout=30) as client:
        yield client


def workflow(name: str = "w", **options: Any) -> Workflow:
    only = (Step(id="a", task="tasks:echo", with_={"value": parse("{{ params.n }}")}),)
    options = {"params": {"n": Param(type="integer", default=1)}} | options
    return Workflow(name=name, steps=only, **options)


def put_in_force(engine: Engine, *workflows: Workflow) -> Dispatcher:
    dispatcher = Dispatcher(engine, EventBus(engine.app))
    dispatcher.apply(workflows or [workflow()])
    return dispatcher


def is_problem(answer: httpx.Response, status: int) -> str:
    """Check that an answer is a problem, and return what it says."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert "\n" not in body["detail"]
    return str(body["detail"])


def test_smoke(api: httpx.Client, engine: Engine) -> None:
    put_in_force(engine)
    for path in ("/runs", "/events", "/dead-letters", "/dead-letters/groups", "/workflows", "/audit", "/openapi.json"):
        answer = api.get(path)
        assert answer.status_code == 200, answer.text
    assert api.get("/workflows/w").json()["name"] == "w"
    assert "a" in api.get("/workflows/w/graph").text
    assert api.get("/workflows/w/build").json()["items"]
    is_problem(api.get("/runs/none"), 404)
    is_problem(api.get("/nothing"), 404)
    is_problem(api.put("/runs"), 405)
    is_problem(api.get("/runs?limit=0"), 422)
    is_problem(api.get("/runs?after=x"), 422)
    started = api.post("/workflows/w/runs", json={"input": {"n": 3}, "key": "k"})
    assert started.status_code == 202, started.text
    print(started.json(), started.headers)
    print(api.get("/audit").json())
    is_problem(api.post("/workflows/w/runs", json={"input": {"m": 3}}), 422)
    print(api.post("/events", json={"type": "x", "data": 1}).json())
