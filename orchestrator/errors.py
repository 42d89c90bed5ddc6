"""Every error of this project has one root.

Three kinds, never mixed: a *bad definition* (all faults at once), a *failure of the world* (a server that
is away, a disk that is full) and a *wrong request* (a run that does not exist). Each message says what is
wrong, which thing it is about and what to do, in one line, because the command line prints it as it is.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class OrchestratorError(Exception):
    """Root of all errors raised on purpose; `str()` of it is one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong in a definition, and where.

    `line` counts from 1 and is None where the fault belongs to a whole file; `field` is a dotted path in the
    definition (`steps.split.with`), empty for the file as such.
    """

    file: str
    line: int | None = None
    field: str = ""
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}"


class DefinitionError(OrchestratorError):
    """A definition has faults; `faults` holds every one of them, in the order of the files."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class ExpressionError(OrchestratorError):
    """An expression does not parse, or could not be evaluated with the values it was given."""


class InputError(OrchestratorError):
    """The input of a run does not fit the workflow's `params`."""


class PayloadError(OrchestratorError):
    """A value cannot be kept as JSON, or a stored value could not be read back."""


class SettingsError(OrchestratorError):
    """A setting is unknown or has a value that makes no sense."""


class NotFoundError(OrchestratorError):
    """A run, workflow or event with that name or id is not known (or is past its retention)."""


class InFlightError(OrchestratorError):
    """What was asked for needs a run that has ended, and this one is going on."""


class UnavailableError(OrchestratorError):
    """The broker, the ledger or the disk cannot take what it was asked to take; trying later may work."""


class AlreadyRunningError(OrchestratorError):
    """Somebody else holds this data directory or port."""


class TracingError(OrchestratorError, TypeError):
    """A Python workflow does something with a value that only a run will have, or is called like a function."""


class TaskNotFoundError(OrchestratorError):
    """A task reference leads to no function: its module does not import, has no such name, or is not the project's.

    `line` is where in `file` importing failed, if that is known and inside the project.
    """

    def __init__(self, reference: str, reason: str, *, file: str | None = None, line: int | None = None) -> None:
        self.reference = reference
        self.reason = reason
        self.file = file
        self.line = line
        where = f" ({file}:{line})" if file else ""
        super().__init__(f"task {reference!r}: {reason}{where}")


def definition_error(*faults: tuple[str, str]) -> DefinitionError:
    """Return the error for what is wrong, as (field, message), in a call of ours; its place is the caller's file."""
    file, line = place_of_call()
    return DefinitionError(Fault(file=file, line=line, field=field, message=message) for field, message in faults)


def place_of_call() -> tuple[str, int]:
    """Return the file and the line of the call that led into this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# -- The words used everywhere for what is wrong. -------------------------------------------------------------------


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is not known, and which known one is nearest."""
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what would be right instead of `name`: the nearest of the known ones, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"


def one_of(allowed: Iterable[str], value: object) -> str:
    """Say that `value` is none of the words that are allowed, and which is nearest."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"must be one of {', '.join(names)}, not {shorten(value)}{hint}"


def shorten(value: object, limit: int = 60) -> str:
    """Return a `repr` of at most about `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int = 300) -> str:
    """Return any text as one line that can be printed: what cannot is written as an escape, what is long is cut."""
    line = " ".join(text[: 2 * limit].split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe(error: Mapping[str, Any]) -> str:
    """Return a recorded error (`type`, `message`) as one line that can be printed."""
    return one_line(f"{error['type']}: {error['message']}").removesuffix(":")
