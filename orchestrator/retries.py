"""RetryPolicy: which failed attempts of a step are followed by another one, and how long after; pure.

The words are Temporal's. `maximum_attempts` counts the first try. The interval before the next attempt is
`initial_interval * backoff_coefficient ** (failed attempts - 1)`, at most `maximum_interval`, and jitter takes a part
of it away at random, so that what failed together does not come again together.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from orchestrator.durations import parse_duration
from orchestrator.errors import definition_error, nearest, one_of, shorten

MOST_ATTEMPTS = 10_000


class Jitter(StrEnum):
    """What of an interval is left to chance: all of it, its second half, or nothing."""

    FULL = "full"
    EQUAL = "equal"
    NONE = "none"


@dataclass(frozen=True, slots=True, init=False)
class RetryPolicy:
    """How often a step is tried, and how long the pauses between attempts are; intervals are kept as seconds.

    Errors are told by the names of their class and its base classes, bare (`ValueError`) or with their module
    (`shop.errors.NoStock`). With `retryable_errors` only those are tried again; `non_retryable_errors` never are.
    """

    maximum_attempts: int
    initial_interval: float
    backoff_coefficient: float
    maximum_interval: float
    jitter: Jitter
    non_retryable_errors: tuple[str, ...]
    retryable_errors: tuple[str, ...]

    def __init__(
        self,
        *,
        maximum_attempts: int = 3,
        initial_interval: str | float = 1.0,
        backoff_coefficient: float = 2.0,
        maximum_interval: str | float = 300.0,
        jitter: Jitter | str = Jitter.FULL,
        non_retryable_errors: Iterable[str | type[BaseException]] = (),
        retryable_errors: Iterable[str | type[BaseException]] = (),
    ) -> None:
        """Intervals are durations (seconds, or text such as `500ms`); errors are given by name or as classes.

        Raises DefinitionError with everything that makes no sense, and with the place of the call.
        """
        values, faults = _check(
            {
                "maximum_attempts": maximum_attempts,
                "initial_interval": initial_interval,
                "backoff_coefficient": backoff_coefficient,
                "maximum_interval": maximum_interval,
                "jitter": jitter,
                "non_retryable_errors": non_retryable_errors,
                "retryable_errors": retryable_errors,
            }
        )
        if faults:
            raise definition_error(*((f"RetryPolicy.{key}", message) for key, message in faults))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def delay_s(self, failed: int, chance: float) -> float:
        """Return how many seconds to wait after the failed-th attempt (1 is the first); `chance` is in [0, 1)."""
        if not self.initial_interval:
            return 0.0
        try:
            interval = min(self.maximum_interval, self.initial_interval * self.backoff_coefficient ** (failed - 1))
        except OverflowError:
            interval = self.maximum_interval
        if self.jitter is Jitter.FULL:
            return interval * chance
        return interval / 2 * (1 + chance) if self.jitter is Jitter.EQUAL else interval

    def may_retry(self, failed: int, kinds: Sequence[str]) -> bool:
        """Tell whether another attempt may follow the failed-th; `kinds` are the error's names (`kinds_of`)."""
        if failed >= self.maximum_attempts or not set(kinds).isdisjoint(self.non_retryable_errors):
            return False
        return not self.retryable_errors or not set(kinds).isdisjoint(self.retryable_errors)

    def to_json(self) -> dict[str, Any]:
        """Return the policy as plain JSON, without what is at its default."""
        default = RetryPolicy()
        return {
            name: str(value) if isinstance(value, Jitter) else list(value) if isinstance(value, tuple) else value
            for name in KEYS
            if (value := getattr(self, name)) != getattr(default, name)
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RetryPolicy:
        """Read what `to_json` wrote."""
        return cls(**body)


KEYS = tuple(field.name for field in fields(RetryPolicy))


def read_policy(value: object) -> tuple[RetryPolicy | None, list[tuple[str, str]]]:
    """Read a policy as definitions give it: a RetryPolicy, a mapping, or, for short, the number of attempts.

    Returns it, or None and (key, message) for everything that is wrong; the key is "" for the value as such.
    """
    if isinstance(value, RetryPolicy):
        return value, []
    if isinstance(value, int) and not isinstance(value, bool):
        policy, faults = read_policy({"maximum_attempts": value})
        return policy, [("", message) for _, message in faults]
    if not isinstance(value, Mapping):
        return None, [("", f"must be a mapping, or the number of attempts, not {shorten(value)}")]
    known = {key: value[key] for key in value if key in KEYS}
    values, faults = _check(known)
    faults += [(str(key), f"unknown key {key!r}; {nearest(str(key), KEYS)}") for key in value if key not in KEYS]
    return (None, faults) if faults else (RetryPolicy(**values), [])


def kinds_of(error: type[BaseException]) -> tuple[str, ...]:
    """Return the names by which a policy may tell errors of this class: its own and its bases', bare and qualified."""
    names = (name for kind in error.__mro__[:-1] for name in (kind.__name__, _qualified(kind)))
    return tuple(dict.fromkeys(names))


def _qualified(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _check(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the values as they are kept, and (key, message) for each fault: of a value, and of values together."""
    values: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for key, value in given.items():
        try:
            values[key] = _READERS[key](value)
        except ValueError as exc:
            faults.append((key, str(exc)))
    initial, maximum = values.get("initial_interval", 1.0), values.get("maximum_interval", 300.0)
    if maximum < initial and {"initial_interval", "maximum_interval"}.isdisjoint(key for key, _ in faults):
        key = "maximum_interval" if "maximum_interval" in given else "initial_interval"
        faults.append((key, f"maximum_interval ({maximum:g} s) is below initial_interval ({initial:g} s)"))
    for name in values.get("retryable_errors", ()):
        if name in values.get("non_retryable_errors", ()):
            faults.append(("retryable_errors", f"{name!r} is in non_retryable_errors too; take it out of one of them"))
    return values, faults


def _attempts(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_ATTEMPTS:
        raise ValueError(f"must be a whole number from 1 (no retry) to {MOST_ATTEMPTS}, not {shorten(value)}")
    return value


def _seconds(value: Any) -> float:
    return parse_duration(value).total_seconds()


def _coefficient(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise ValueError(f"must be a number from 1, not {shorten(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{shorten(value)} is too large") from None


def _jitter(value: object) -> Jitter:
    if value not in tuple(Jitter):
        raise ValueError(one_of(Jitter, value))
    return Jitter(str(value))


def _errors(value: object) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"must be a list of names of errors, not {shorten(value)}")
    names = []
    for name in value:
        text = _qualified(name) if isinstance(name, type) and issubclass(name, BaseException) else name
        if not isinstance(text, str) or not all(p.isidentifier() and not keyword.iskeyword(p) for p in text.split(".")):
            raise ValueError(f"{shorten(name)} cannot be an error's name; write ValueError or shop.errors.NoStock")
        names.append(text)
    return tuple(names)


_READERS = {
    "maximum_attempts": _attempts,
    "initial_interval": _seconds,
    "backoff_coefficient": _coefficient,
    "maximum_interval": _seconds,
    "jitter": _jitter,
    "non_retryable_errors": _errors,
    "retryable_errors": _errors,
}
