"""A worker: one Celery worker (prefork) for one pool, with its parent's watch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from billiard.process import current_process
from celery import Celery, bootsteps, signals
from celery.app.trace import LOG_REJECTED
from celery.exceptions import SecurityWarning

from orchestrator.celery_app import PRIORITIES, make_app, queue_name
from orchestrator.engine import Engine
from orchestrator.errors import DefinitionError, UnavailableError
from orchestrator.pools import PoolKind, worker_name
from orchestrator.project import load_project
from orchestrator.remote_control import RemoteControl
from orchestrator.settings import Settings
from orchestrator.telemetry import get_logger
from workers import capture, children, threads
from workers.commands import Commands
from workers.consumer import Consumer
from workers.machine import Machine, gpus_of
from workers.reporting import Reporting
from workers.sizing import Sizing
from workers.slots import Slots
from workers.step import Identity, StepRunner, StepTask
from workers.task_events import Monitoring, Pipe, StepEvents
from workers.watch import Watch, forking, give_up

log = get_logger(__name__)

#: How long a child may take until it is ready.
_READY_S = 30.0


def run_worker(settings: Settings, pool: str, *, concurrency: int | None = None, up_pid: int | None = None) -> int:
    """Run the worker of a pool until it is told to stop (SIGTERM, SIGINT); returns its exit code. Blocks.

    With `up_pid` it also stops when its parent is no longer the `up` with that pid.
    SIGTERM: takes nothing new, lets steps in progress finish, leaves their successors to others. Raises DefinitionError
    if the project does not load.
    """
    capture.install()
    project = load_project(settings.project, pools=settings.declared_pools, defaults=settings.defaults)
    if project.faults:
        raise DefinitionError(project.faults)
    # Celery warns of root because of pickle; nothing here is ever unpickled.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    machine, wanted = Machine.look(), settings.pool(pool)
    ceiling = machine.ceiling(pool, wanted, concurrency, is_declared=pool in settings.pools)
    slots, pipe = Slots(ceiling), Pipe()
    with ExitStack() as ended:
        ended.callback(slots.close)
        ended.callback(pipe.close)
        app = make_app(settings, pool=pool)
        identity = Identity(worker_name(pool, socket.gethostname(), os.getpid()), project.code_hash)
        task = StepTask()
        app.register_task(task)
        events = StepEvents(pipe, slots)
        # Celery's own set-up would write to the root logger; ours is made by the command line.
        signals.setup_logging.connect(lambda **_: None, weak=False)
        # A connection that has died unseen is not to cost the leases.
        engine = Engine(settings, app=app, patience_s=2.0, timeout_s=2.0)
        sizing = Sizing(wanted, ceiling, slots)
        reporting = Reporting(engine, slots, sizing, identity, pool=pool, kind=wanted.kind)
        watch = Watch(engine, slots, identity, kind=wanted.kind, reporting=reporting, up_pid=up_pid, events=events)
        monitoring = Monitoring(app, slots, pipe, identity.worker, publishing=forking)
        control = RemoteControl(
            engine,
            identity.worker,
            Commands(engine, slots, monitoring, pool=pool, worker=identity.worker, controller=lambda: worker).by_name(),
            is_worker=True,
            is_wanted=lambda: slots.is_monitored,
            guard=forking,
        )
        parts = (watch, control, monitoring)
        if wanted.kind is PoolKind.THREADS:
            # Shared by the threads; it waits for servers as that of a child does.
            steps_engine = Engine(settings, app=app)
            ended.callback(steps_engine.counters.close)
            pool_class = threads.pool_of(slots, _thread_begins(steps_engine, task, identity, pool, slots, events))
        else:
            _prepare_children(app, settings, task, identity, pool=pool, slots=slots, gpus=machine.gpus, events=events)
            pool_class = children.pool_of(slots, watch.out_of_memory)
        app.steps["worker"].add(_watch_step(parts, slots))
        app.conf.worker_consumer = partial(Consumer, engine.ledger)
        app.conf.worker_autoscaler = sizing.attach
        # Celery kills a child that is not ready by then, and on a machine with much to do it may be slow.
        app.conf.worker_proc_alive_timeout = _READY_S
        worker = app.Worker(
            hostname=identity.worker,
            pool=pool_class,
            concurrency=ceiling,
            autoscale=(ceiling, 0),
            pool_putlocks=False,  # there is a message in work for each process at most: sizing.py sees to it
            queues=[queue_name(pool, priority) for priority in PRIORITIES],
            loglevel="WARNING",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        try:
            worker.start()
        finally:
            # Not as a step of Celery's: those stop before the pool, whose steps go on and need their leases.
            for part in parts:
                part.stop()
        return int(worker.exitcode or 0)


def _watch_step(parts: Sequence[Watch | Monitoring | RemoteControl], slots: Slots) -> type[Any]:
    class WatchStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
        """Starts the watch once the children are there, and tells them when the worker is to stop."""

        requires = {"celery.worker.components:Pool"}  # noqa: RUF012 -- celery reads it from the class

        def start(self, parent: Any) -> None:
            signals.worker_shutting_down.connect(self._drain, weak=False)
            for part in parts:
                part.start()

        @staticmethod
        def _drain(**_: Any) -> None:
            slots.drain()

    return WatchStep


def _prepare_children(
    app: Celery,
    settings: Settings,
    task: StepTask,
    identity: Identity,
    *,
    pool: str,
    slots: Slots,
    gpus: tuple[str, ...],
    events: StepEvents,
) -> None:
    gpus_each = settings.pool(pool).gpu

    def begin(**_: Any) -> None:
        # A step may start processes of its own, which multiprocessing would refuse in a daemon.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        _hush()
        engine, slot = Engine(settings, app=app), int(current_process().index)
        if gpus_each:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of(slot, gpus_each, gpus)
        before = slots.read(slot)
        if before is not None:  # the child whose place this one takes has died in a step
            try:
                give_up(engine, before, identity, children.describe(slots.exit_of(slot, before.pid)))
            except UnavailableError as exc:
                log.warning("left_to_rescuer", run=before.run, unit=before.unit, error=str(exc))
            slots.clear(slot)
        task.runner = StepRunner(engine, identity, pool=pool, slots=slots, slot=slot, events=events)

    signals.worker_process_init.connect(begin, weak=False)
    signals.worker_process_shutdown.connect(lambda **_: task.runner.end(), weak=False)


def _thread_begins(
    engine: Engine, task: StepTask, identity: Identity, pool: str, slots: Slots, events: StepEvents
) -> Callable[[int], None]:
    """Return what each thread that runs steps does first."""
    _hush()

    def begin(slot: int) -> None:
        task.runner = StepRunner(engine, identity, pool=pool, slots=slots, slot=slot, events=events, is_thread=True)

    return begin


def _hush() -> None:
    # A message that goes back because a server is away: `step_waits` says so, once and without a traceback.
    logging.getLogger("celery.app.trace").addFilter(lambda record: record.msg != LOG_REJECTED.strip())
