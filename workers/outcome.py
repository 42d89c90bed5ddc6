"""Outcome: what becomes of an attempt that has failed: another one, or an end."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from orchestrator.retries import RetryPolicy
from orchestrator.runs import StepError
from orchestrator.signals import Fail, Retry
from orchestrator.workflows import Step

#: What is not tried again, whatever the policy says.
_FINAL = ("worker_lost", "unknown_task")


@dataclass(frozen=True, slots=True)
class Outcome:
    """For Ledger.complete: `retrying` (in delay_ms) or `failed`, and the error for the attempt's record."""

    state: str
    tail: str
    delay_ms: int = 0
    error: StepError | None = None


def of_error(error: StepError, step: Step, tries: int, asked: BaseException | None = None) -> Outcome:
    """Decide by the step's policy what follows its tries-th attempt in this episode, which has failed with `error`.

    `asked` is what the step raised: a Retry asks for another attempt, by the default policy if the step has none, and a
    Fail for none.
    """
    fingerprint = error.fingerprint(step.task or step.workflow or step.id)
    tail = f',"error":{json.dumps(error.to_json() | {"fingerprint": fingerprint})}'
    policy = step.retry
    if isinstance(asked, Retry):
        policy = policy or RetryPolicy()
        may = tries < policy.maximum_attempts
    else:
        may = policy is not None and policy.may_retry(tries, error.kinds)
    if policy is None or not may or isinstance(asked, Fail) or error.reason in _FINAL:
        return Outcome("failed", tail, error=error)
    delay_s = policy.delay_s(tries, random.random())  # noqa: S311 -- spreads load, keeps no secret
    if isinstance(asked, Retry) and asked.after_s is not None:
        delay_s = asked.after_s
    return Outcome("retrying", tail, round(delay_s * 1000), error)
