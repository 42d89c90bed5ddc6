"""Children: the processes of a worker as their parent sees them: alive, held still, or ended, and how."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from billiard.pool import RUN
from celery.concurrency.asynpool import AsynPool, Worker
from celery.concurrency.prefork import TaskPool
from celery.worker.state import task_ready

from workers.slots import Exit, Slots

#: What whoever stops a worker may send to all its processes (a terminal, systemd), not to the parent alone.
_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OOM_KILLS = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)
#: A kill for want of memory and the end of a child belong together if no more than this lies between them.
_OOM_S = 2.0
#: How long to wait for a process to stop: it does so at once, unless it is deep in the kernel.
_STILL_S = 0.02


class OutOfMemory:
    """The machine's count of processes that it has killed for want of memory, if it tells (Linux)."""

    def __init__(self) -> None:
        self._count = _oom_kills()
        self._rose_at = float("-inf")

    def look(self, now: float) -> None:
        """Note whether there were more; called often, so that `is_likely` knows when."""
        count = _oom_kills()
        if count > self._count:
            self._count, self._rose_at = count, now

    def is_likely(self, now: float) -> bool:
        """Tell whether a process was killed for want of memory a moment ago."""
        self.look(now)
        return now - self._rose_at < _OOM_S


def _oom_kills() -> int:
    try:
        found = _OOM_KILLS.search(Path("/proc/vmstat").read_bytes())
    except OSError:
        return 0
    return 0 if found is None else int(found[1])


class _Child(Worker):  # type: ignore[misc]  # celery has no types
    """A child that its parent ends, and nobody else: billiard would raise SystemExit in the step, which then fails."""

    def on_loop_start(self, pid: int) -> None:
        def on_stop(number: int, _frame: object) -> None:
            if os.getpid() != pid:  # a process that a step has forked
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        for number in _STOPS:
            signal.signal(number, on_stop)
        hold, go_on = partial(_mask, signal.SIG_BLOCK), partial(_mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=hold, after_in_parent=go_on, after_in_child=_end_as_others_do)
        super().on_loop_start(pid)

    def _ensure_messages_consumed(self, completed: int) -> bool:
        """What it has said is in its pipe, where its parent finds it. Celery waits 30 s for it to have read all.

        It never does that when it was told to stop while a message was on its way to the child.
        """
        return True

    def _do_exit(self, pid: int, exitcode: int | None, exc: Exception | None = None) -> None:
        """End. billiard would tell its parent so, and wait a second for the SIGTERM that comes in answer."""
        try:
            if self.on_exit is not None:
                self.on_exit(pid, exitcode or 0)
        finally:
            os._exit(exitcode if exitcode is not None else int(exc is not None))


def _mask(how: int) -> None:
    signal.pthread_sigmask(how, _STOPS)


def _end_as_others_do() -> None:
    """Let what a step has forked be ended by a signal at once, also by one that came while it was forked.

    A handler of Python's runs between two of its instructions, and forgets in a fork what it was told: who waits in C
    for a lock that nobody releases, as the workers of a multiprocessing.Pool do that is being terminated, would never
    come to it.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    _mask(signal.SIG_UNBLOCK)


class Children(AsynPool):  # type: ignore[misc]  # celery has no types
    """The children of a worker, each with the slot of its index; none to begin with (sizing.py says how many).

    All of it is done in the event loop. A child leaves so: it is told by its slot to begin nothing further, and when
    its message has ended, or at once if it has none, nothing more is written to it and it is sent what ends it. Celery
    would send it SIGTERM. Nobody else takes the slot of a child until that is gone.
    """

    Worker = _Child
    #: Set by `pool_of`.
    slots: Slots
    out_of_memory: OutOfMemory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: How children have ended that never became ready, since somebody last looked.
        self.failed_starts: list[str] = []
        self.has_started = False
        super().__init__(*args, **kwargs)

    def WorkerProcess(self, worker: Any) -> Any:  # noqa: N802 -- billiard's name
        child = super().WorkerProcess(worker)
        child.is_up = child.is_leaving = child.is_told = False
        return child

    # What there is

    @property
    def size(self) -> int:
        """How many children there are, also those that start and those that leave."""
        return len(self._pool)

    @property
    def staying(self) -> int:
        """How many do not leave."""
        return sum(not child.is_leaving for child in self._pool)

    @property
    def busy(self) -> int:
        """How many of those have a message."""
        return sum(not child.is_leaving and self._is_busy(child) for child in self._pool)

    @property
    def busy_leaving(self) -> int:
        """How many have a message and leave after it."""
        return sum(child.is_leaving and self._is_busy(child) for child in self._pool)

    @property
    def waiting(self) -> int:
        """How many messages have been taken that no child has yet."""
        return len(self.outbound_buffer)

    def _is_busy(self, child: Any) -> bool:
        return child.inqW_fd in self._busy_workers or child.inqW_fd in self._active_writes

    # How there are more

    def start_one(self) -> None:
        """Start a child, in a slot that is free. Raises OSError if the system has no room for it."""
        taken = {child.index for child in self._pool}
        index = next(index for index in range(self.slots.count) if index not in taken)
        self.slots.set_leaving(index, 0)
        there = len(self._pool)
        try:
            self._create_worker_process(index)
        except OSError:
            self._queues.update({queues: None for queues, owner in self._queues.items() if owner in self._pool[there:]})
            del self._pool[there:]
            raise

    def get_process_queues(self) -> Any:
        if None not in self._queues.values():
            self._queues[self.create_process_queues()] = None
        return super().get_process_queues()

    def on_process_alive(self, pid: int) -> None:
        super().on_process_alive(pid)
        for child in self._pool:
            if child.pid == pid:
                child.is_up = self.has_started = True
                if child.is_leaving:
                    self._end(child)

    # How there are fewer

    def leave(self, count: int) -> None:
        """Have so many leave: those first that have nothing to do, then those whose messages began last."""
        staying = [child for child in self._pool if not child.is_leaving]
        idle = [child for child in staying if not self._is_busy(child)]
        busy = [child for child in staying if self._is_busy(child)]
        busy.sort(key=lambda child: self.slots.message_since(child.index), reverse=True)
        for child in (*idle, *busy)[:count]:
            child.is_leaving = True
            self.slots.set_leaving(child.index, child.pid)
        self.end_leaving()

    def keep(self, count: int) -> int:
        """Have up to so many of those that leave stay after all; answers how many."""
        kept = 0
        for child in self._pool:
            is_spent = self.slots.is_spent(child.index, child.pid)
            if kept < count and child.is_leaving and not child.is_told and not is_spent:
                child.is_leaving = False
                self.slots.set_leaving(child.index, 0)
                kept += 1
        return kept

    def on_job_ready(self, job: Any, i: Any, obj: Any, pipe: int) -> None:
        child = self._fileno_to_inq.get(pipe)
        if child is not None and self.slots.is_leaving(child.index, child.pid):
            self._end(child)  # before anything else is written to it
        super().on_job_ready(job, i, obj, pipe)

    def end_leaving(self) -> None:
        """End those that leave and have nothing to do."""
        for child in self._pool:
            if child.is_leaving and child.is_up and not self._is_busy(child):
                self._end(child)

    def _end(self, child: Any) -> None:
        if child.is_told:
            return
        child.is_leaving = True
        self._all_inqueues.discard(child.inqW_fd)
        self.hub_remove(child.inqW_fd)
        with suppress(BlockingIOError):  # there is no room in its pipe: the next look tries again
            child.inq.put(None)
            child.is_told = child._controlled_termination = True

    def give_back(self, count: int) -> None:
        """Give back the last messages that no child has: others may have room for them."""
        for _ in range(min(count, self.waiting)):
            job = self.outbound_buffer.pop()
            job.discard()
            request = job._accept_callback.__self__
            task_ready(request)
            request.reject(requeue=True)

    # How they end

    def maintain_pool(self) -> None:
        """Note which have ended. What Celery does beyond that, replace them, is decided elsewhere (sizing.py)."""
        if self._state == RUN:
            self._join_exited_workers()

    def did_start_ok(self) -> bool:
        return True

    def _join_exited_workers(self, *, shutdown: bool = False) -> Any:
        before = list(self._pool)
        codes = super()._join_exited_workers(shutdown=shutdown)
        for child in before if codes else ():
            if child not in self._pool and not child.is_up:
                self.failed_starts.append(describe(self.slots.exit_of(child.index, child.pid)))
        if codes and not shutdown:
            # A message, or what was to end the child, may be in its pipe yet: the next one gets pipes of its own.
            for queues, owner in list(self._queues.items()):
                if owner is not None and owner not in self._pool:
                    self.destroy_queues(queues, owner)
        return codes

    def _process_cleanup_queues(self, proc: Any) -> None:
        """Nothing: Celery would leave them to the next child."""

    def process_flush_queues(self, proc: Any) -> None:
        # Called of each child that has ended, between its end being known and its replacement.
        code = proc.exitcode
        if code is not None:
            is_out_of_memory = code == -signal.SIGKILL and self.out_of_memory.is_likely(time.monotonic())
            self.slots.note_exit(proc.index, proc.pid, Exit(code, is_out_of_memory))
            self.slots.forget_message(proc.index)
        super().process_flush_queues(proc)

    def terminate_job(self, pid: int, _signal: int | None = None) -> None:
        super().terminate_job(pid, signal.SIGKILL)


def pool_of(slots: Slots, out_of_memory: OutOfMemory) -> type[Any]:
    """Return a prefork pool for Celery whose children have these slots."""

    class SlotChildren(Children):
        pass

    SlotChildren.slots, SlotChildren.out_of_memory = slots, out_of_memory

    class SlotTaskPool(TaskPool):  # type: ignore[misc]  # celery has no types
        Pool = SlotChildren

        @property
        def processes(self) -> Children | None:
            """The children, while the pool is open."""
            return self._pool if self._pool is not None and self._pool._state == RUN else None

        def on_terminate(self) -> None:
            # Celery would send them SIGTERM, and wait.
            for child in [] if self._pool is None else self._pool._pool:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            super().on_terminate()

    return SlotTaskPool


def describe(exit_: Exit | None) -> str:
    """Say for a person how a child has ended."""
    if exit_ is None:
        return "its process is gone"
    if exit_.code >= 0:
        return f"exit code {exit_.code}"
    try:
        name = signal.Signals(-exit_.code).name
    except ValueError:
        name = f"signal {-exit_.code}"
    return f"killed by {name}" + (" (out of memory?)" if exit_.is_out_of_memory else "")


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and that its parent has not asked about yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return _state(pid) not in ("Z", "X")


def hold(pid: int) -> bool:
    """Stop a process (SIGSTOP); True if it stands still, False if that takes longer than a moment, or it is gone."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    until = time.monotonic() + _STILL_S
    while (state := _state(pid)) not in ("T", "t"):
        if state in ("Z", "X"):
            return False
        if time.monotonic() > until:
            return not state  # where it is not told, that moment has to do
        time.sleep(0.0005)
    return True


def let_go(pid: int) -> None:
    """Let a process that is held go on."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def _state(pid: int) -> str:
    """Return the letter of the state of a process, as ps has it; X if it is gone, empty where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X" if Path("/proc/self/stat").exists() else ""
