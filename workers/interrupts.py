"""Interrupts: how a child calls the user's function, and stops it softly when its parent says so.

The parent writes into the child's slot why what runs is to stop, and sends a signal; its handler raises StepTimeout or
StepCancelled in the user's function, once. It raises nowhere else: not in our code around the function, not in what
runs next, not in a process that the function has forked. A signal that comes at a bad moment does nothing, and the
parent, which sees that it was not heeded, sends another. A function that catches the exception and goes on, or does not
come back from C, is killed later (deadlines.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

from orchestrator.signals import StepCancelled, StepTimeout
from orchestrator.workflows import Step
from workers import capture
from workers.slots import Slots, Stop

#: billiard's signal for the same purpose: a child of Celery's has it for nothing else.
SIGNAL = signal.SIGUSR1
#: The timeout of a step that has none.
_TIMEOUT_S = 24 * 3600.0


def timeout_of(step: Step) -> float:
    """Return how long one attempt of a step may take, in seconds."""
    return step.timeout_s or _TIMEOUT_S


class Interrupts:
    """Calls functions in one child, whose main thread makes and uses this."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self._slots = slots
        self._slot = slot
        self._pid = 0
        self._number = 0
        self._timeout_s = 0.0
        self._stopped: StepTimeout | StepCancelled | None = None
        #: Whether a StepCancelled that the last call has raised is ours, and not an error of the function's own.
        self.is_cancelled = False

    def call(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float, since: float | None = None
    ) -> Any:
        """Return what the function returns; it is told to stop when `timeout_s` is over, or when it
        or its run is cancelled.

        The time counts from now, or from `since` (monotonic): of several calls for one step. Raises StepTimeout or
        StepCancelled if it was, whatever it makes of that, unless it returns. A copy of this process that it has made
        (`os.fork`), and that comes back from it too, ends here: it is no child of the worker.
        """
        # Not when the child starts, as billiard sets its own handler last of all; and each time, as a step may have.
        self._pid = self._pid or os.getpid()
        signal.signal(SIGNAL, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        self._timeout_s = timeout_s
        self.is_cancelled = False
        self._number = self._slots.enter(self._slot, (since or time.monotonic()) + timeout_s)
        try:
            return _enter(function, arguments)
        except BaseException as exc:
            if os.getpid() != self._pid:
                _end_copy(exc)
            if self._stopped is None or self._stopped is exc:
                raise
            raise self._stopped from None
        finally:
            if os.getpid() != self._pid:
                os._exit(0)
            self._slots.leave(self._slot)
            self._stopped = None
            signal.signal(SIGNAL, self._on_signal)  # one may be on its way

    def _on_signal(self, _signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid or self._stopped is not None:
            return
        reason = self._slots.interrupt_of(self._slot, self._number)
        if reason is None or not _may_raise(frame):
            return
        if reason is Stop.TIMEOUT:
            self._stopped = StepTimeout(f"it ran for longer than its timeout of {self._timeout_s:g} s")
        else:
            self._stopped = StepCancelled("it was cancelled, or its run")
            self.is_cancelled = True
        self._slots.heed(self._slot, self._number)
        raise self._stopped


def _enter(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call the function: it has control while this is on the stack with something on top of it."""
    return function(**arguments)


def _end_copy(exc: BaseException) -> NoReturn:
    """End this process as Python does when nothing catches `exc`."""
    code = exc.code if isinstance(exc, SystemExit) else 1
    if not isinstance(exc, SystemExit):
        traceback.print_exception(exc, file=sys.__stderr__)
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


def _may_raise(frame: FrameType | None) -> bool:
    """Tell whether the user's function has control, and an exception does no harm that it could not avoid.

    In our capture of its output and in `logging` a lock may just have been taken; `__del__` would swallow it.
    """
    if frame is None or frame.f_code is _enter.__code__ or frame.f_code.co_filename == logging.__file__:
        return False
    while frame is not None and frame.f_code is not _enter.__code__:
        if frame.f_code.co_filename == capture.__file__ or frame.f_code.co_name == "__del__":
            return False
        frame = frame.f_back
    return frame is not None
