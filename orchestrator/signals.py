"""Signals: what a step may raise to say how it goes on, and what is raised in a step that has to stop."""

from __future__ import annotations

from orchestrator.durations import parse_duration


class Retry(Exception):  # noqa: N818 -- not an error, but what a step asks for
    """Raised by a step: this attempt has failed; try again `after` that long, else after the policy's interval.

    It counts as an attempt, whatever errors the policy names. A step without `retry:` gets the default RetryPolicy.
    `after` is a duration (seconds, or text such as `5m`); raises ValueError for what is none.
    """

    # What holds in a subclass with an __init__ of its own, which does not call this one.
    after_s: float | None = None
    reason: str = ""

    def __init__(self, after: str | float | None = None, reason: str = "") -> None:
        super().__init__(after, reason)
        self.after_s = None if after is None else parse_duration(after).total_seconds()
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or "the step asked to be tried again"


class Fail(Exception):  # noqa: N818 -- not an error, but what a step asks for
    """Raised by a step: it has failed for good, and is not tried again by itself, whatever its policy."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class StepTimeout(BaseException):
    """Raised in a step whose `timeout` is over. It may clean up; its process is ended soon after if it goes on.

    Not an Exception, so that `except Exception` in the step does not take it for one of its own errors.
    """


class StepCancelled(BaseException):
    """Raised in a step whose run has been cancelled. It may clean up; its process is ended soon after if it goes on."""
