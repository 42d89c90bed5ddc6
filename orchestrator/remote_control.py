"""Remote control: what Celery's tools ask for on the broker (Flower, `celery inspect`), answered by ours alone.

A mailbox of kombu's in a thread of its own, in the place of Celery's in the worker's event loop: what fails here harms
no worker, and no command that does not fit (they act on messages, which carry the steps of others) is even there. Who
listens hands in what it answers; all else is refused, with a word on what to do instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from kombu import Producer
from kombu.pidbox import Mailbox

from orchestrator.audit import Audit
from orchestrator.celery_app import broker_errors, impatient_connection, publishing
from orchestrator.engine import Engine, now_ms
from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.runs import parse_task_id
from orchestrator.runs import task_id as task_id_of
from orchestrator.service import Service
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

Command = Callable[..., Any]

#: How long a broker that is away is left alone, and how long it may take to answer.
_PAUSE_S = 5.0
_TIMEOUT_S = 1.0
_HEARTBEAT_S = 10
#: How long the broker keeps the mailbox of who is gone.
_EXPIRES_S = 60.0
#: Commands of Celery's that cannot be carried out here, and what to do instead.
REFUSED: Mapping[str, str] = {
    "rate_limit": "a message carries steps of several kinds; use max_parallel of a step, or max of its pool",
    "time_limit": "set `timeout` of the step in its workflow",
    "shutdown": "stop the process of the worker (SIGTERM); it is started again by what has started it",
    "pool_grow": "the autoscaler sets the size of a pool; `orchestrator pools scale NAME N` does so by hand",
    "pool_shrink": "the autoscaler sets the size of a pool; `orchestrator pools scale NAME N` does so by hand",
    "pool_restart": "changed code is taken up by new workers; a worker that is stopped is started again",
    "autoscale": "set min and max of [pools.NAME] in orchestrator.toml",
    "add_consumer": "a worker takes the steps of its pool; set `pool` of the step",
    "cancel_consumer": "a worker takes the steps of its pool; set `pool` of the step",
}


def revoke(engine: Engine, task_id: object = None, **_: object) -> dict[str, Any]:
    """Cancel the steps that task ids name (runs.task_id), each in its run; idempotent. Answers as commands do.

    What else a tool may say (`terminate`, `signal`) makes no difference: what is at work is told to stop, then killed.
    """
    told = []
    for one in task_id if isinstance(task_id, list | tuple) else [task_id]:
        try:
            run, slot, attempt = parse_task_id(str(one))
            cancelled = engine.cancel_step(run, slot, attempt)
        except (ValueError, OrchestratorError) as exc:
            told.append(f"{one}: {exc}")
            continue
        if cancelled:
            _note(engine, run, slot, attempt)
        told.append(f"{one}: {'cancelled' if cancelled else 'it has ended, or is being cancelled'}")
    return {"ok": "; ".join(told)}


def _note(engine: Engine, run: str, slot: str, attempt: int) -> None:
    """Write down that a step was cancelled by remote control; if it was not at work, tell the tools that it ended."""
    log.info("step_revoked", run=run, step=slot)
    away: tuple[type[Exception], ...] = (UnavailableError, *broker_errors(engine.app))
    try:
        Audit(engine.ledger).begin(
            {"who": "remote control", "address": "", "action": "revoke", "target": f"{run}/{slot}", "status": 200}
            | {"about": {"attempt": attempt}},
            now_ms(),
        )
        worker, ledger = engine.ledger.worker_of(run, slot, attempt).rpartition("/")[0], engine.ledger
        if worker and (ledger.state_of(run, slot) == "cancelled" or ledger.child_of(run, slot)):
            uuid = task_id_of(run, slot, attempt)
            about = {"uuid": uuid, "terminated": False, "signum": None, "expired": False}
            with publishing(engine.app) as producer:
                tell = engine.app.events.Dispatcher
                with tell(
                    producer.connection, hostname=worker, channel=producer.channel, buffer_while_offline=False
                ) as dispatcher:
                    # SLEEPING and WAITING are above REVOKED in the order of states of Celery; RETRY is not.
                    dispatcher.publish("task-retried", {"uuid": uuid}, producer)
                    dispatcher.publish("task-revoked", about, producer)
    except away as exc:
        log.warning("revoke_not_noted", run=run, step=slot, error=str(exc))


class _Handlers(dict[str, Command]):
    """What is answered to each command; of those that are not there, that they are not."""

    def __missing__(self, method: str) -> Command:
        why = REFUSED.get(method, "no command that is known here")
        return lambda _state, **_arguments: {"error": f"{method}: {why}"}


class _Producer(Producer):  # type: ignore[misc]  # kombu has no types
    """Gives up at once where kombu would try again without end: who asked waits for a second."""

    def publish(self, *args: Any, **options: Any) -> Any:
        return super().publish(*args, **options | {"retry": False})


class _Mailbox(Mailbox):  # type: ignore[misc]  # kombu has no types
    """Answers on the connection that it listens on."""

    @contextmanager
    def producer_or_acquire(self, producer: Any = None, channel: Any = None) -> Iterator[Any]:
        yield _Producer(channel, auto_declare=False)


class RemoteControl:
    """Listens under a name and answers `commands`, called as `command(**arguments)`, in a thread.

    A worker (`is_worker`) answers all others too, that it does not do that. `is_wanted` tells whether to listen now.
    While it uses the broker it holds `guard`, and with one it looks some times a second, and does not wait on the
    broker.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        commands: Mapping[str, Command],
        *,
        is_worker: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
        guard: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._app = engine.app
        self._name = name
        self._handlers = _Handlers({method: _ignoring_state(command) for method, command in commands.items()})
        self._is_worker = is_worker
        self._is_wanted = is_wanted
        self._guard: AbstractContextManager[Any] = nullcontext() if guard is None else guard
        # Of a wait: how long it holds the guard, and how long it lets others have it.
        self._wait_s, self._rest_s = (1.0, 0.0) if guard is None else (0.02, 0.2)
        self._service = Service("remote-control", self._loop)
        self._outage = Outage(log, "remote_control")

    def start(self) -> None:
        """Begin; returns at once."""
        self._service.start()

    def stop(self) -> None:
        """End; returns when the command in work is answered."""
        self._service.stop()

    def _loop(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            if not self._is_wanted():
                stopping.wait(0.5)
                continue
            try:
                self._listen(stopping)
            except broker_errors(self._app) as exc:
                self._outage.begins(exc)
                stopping.wait(_PAUSE_S)
            except Exception:  # this loop owns the thread
                log.exception("remote_control_failed")
                stopping.wait(_PAUSE_S)

    def _listen(self, stopping: threading.Event) -> None:
        connection = None
        try:
            with self._guard:
                connection = impatient_connection(self._app, _TIMEOUT_S, heartbeat=_HEARTBEAT_S)
                self._consume(connection)
            self._outage.ends()
            check_at = 0.0
            while self._is_wanted() and not stopping.is_set():
                with self._guard:
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=self._wait_s)
                    if time.monotonic() >= check_at:
                        check_at = time.monotonic() + _HEARTBEAT_S / 4
                        connection.heartbeat_check()
                if self._rest_s:
                    stopping.wait(self._rest_s)
        finally:
            if connection is not None:
                with self._guard:
                    connection.collect()

    def _consume(self, connection: Any) -> None:
        conf = self._app.conf
        mailbox = _Mailbox(
            conf.control_exchange,
            type="fanout",
            connection=connection,
            clock=self._app.clock,
            accept=["json"],
            serializer="json",
            # The name is ours alone, and after a connection was lost the broker may hold what was exclusive to it.
            queue_exclusive=False,
            queue_expires=_EXPIRES_S,
        )
        node = mailbox.Node(self._name, handlers=self._handlers, channel=connection.channel())
        node.listen(callback=lambda body, message: self._answer(node, body, message))

    def _answer(self, node: Any, body: Any, message: Any) -> None:
        if not isinstance(body, dict) or not (self._is_worker or body.get("method") in self._handlers):
            return
        try:
            node.handle_message(body, message)
        except broker_errors(self._app):
            raise
        except Exception:  # whatever was sent: who sent it is told, or has sent no command
            log.exception("command_failed", command=str(body.get("method"))[:100])


def _ignoring_state(command: Command) -> Command:
    return lambda _state, **arguments: command(**arguments)
