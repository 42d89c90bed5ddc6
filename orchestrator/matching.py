"""Matching: which workflows an event starts, and why the others do not; pure.

Every entry of every `on:` is an event pattern. Most patterns ask for certain values, or beginnings or ends of texts, in
some field; an index over one such field of each pattern, the one that tells most apart, finds the few patterns that an
event can match. Only these are tried, so what an event costs hardly depends on how many workflows there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.events import MANUAL, MANUAL_SOURCE, RUN_EVENTS, RUNS_SOURCE, TRIGGER
from orchestrator.patterns import ABSENT, EventPattern, leaves_at, literal_ends, typed
from orchestrator.subscriptions import OnRun, kind_of_on, pattern_of
from orchestrator.workflows import Workflow

#: What the index knows of an entry: the field, and one key for each rule of it: (kind, value).
_Path = tuple[str, ...]
_Key = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of an `on:`: all its patterns have to match."""

    workflow: str
    kind: str
    patterns: tuple[EventPattern, ...]
    #: Which workflows' runs it follows; empty unless it says so.
    follows: tuple[str, ...] = ()

    def matches(self, body: Mapping[str, Any]) -> bool:
        return all(pattern.matches(body) for pattern in self.patterns)

    def why_not(self, body: Mapping[str, Any]) -> str | None:
        """Return the clause that says no, and what it saw; None if none does."""
        mismatches = (pattern.explain(body) for pattern in self.patterns)
        return next((f"{self.kind}: {mismatch}" for mismatch in mismatches if mismatch is not None), None)


@dataclass(slots=True)
class _Field:
    """The entries that are found by one field."""

    equal: dict[_Key, list[_Entry]] = field(default_factory=dict)
    #: By length, then by text.
    begin: dict[int, dict[str, list[_Entry]]] = field(default_factory=dict)
    end: dict[int, dict[str, list[_Entry]]] = field(default_factory=dict)
    #: By the number that a value must not be below, or above; in order.
    least: list[tuple[float, int, _Entry]] = field(default_factory=list)
    most: list[tuple[float, int, _Entry]] = field(default_factory=list)

    def add(self, key: _Key, entry: _Entry) -> None:
        kind, value = key
        if kind == "prefix":
            self.begin.setdefault(len(value), {}).setdefault(value, []).append(entry)
        elif kind == "suffix":
            self.end.setdefault(len(value), {}).setdefault(value, []).append(entry)
        elif kind in ("least", "most"):
            bounds = self.least if kind == "least" else self.most
            insort(bounds, (value, len(bounds), entry))
        else:
            self.equal.setdefault(key, []).append(entry)

    def find(self, value: object) -> Iterator[_Entry]:
        yield from self.equal.get(typed(value), ())
        if isinstance(value, str):
            for length, texts in self.begin.items():
                yield from texts.get(value[:length], ())
            for length, texts in self.end.items():
                yield from texts.get(value[len(value) - length :] if length <= len(value) else "", ())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from (entry for *_, entry in self.least[: bisect_right(self.least, value, key=_bound)])
            yield from (entry for *_, entry in self.most[bisect_left(self.most, value, key=_bound) :])


def _bound(row: tuple[float, int, _Entry]) -> float:
    return row[0]


class Matcher:
    """The entries of all workflows, compiled and indexed. Immutable; safe to share between threads."""

    def __init__(self, workflows: Iterable[Workflow]) -> None:
        self._entries: dict[str, list[_Entry]] = {}
        keyed: list[tuple[_Entry, dict[_Path, list[_Key]]]] = []
        for workflow in workflows:
            entries = self._entries.setdefault(workflow.name, [])
            for on in workflow.on:
                patterns = [pattern_of(workflow.name, on)]
                own = getattr(on, "pattern", None)
                if own is not None and own != patterns[0]:
                    patterns.append(dict(own))
                follows = on.workflow if isinstance(on, OnRun) else ()
                entry = _Entry(workflow.name, kind_of_on(on), tuple(map(EventPattern.compile, patterns)), follows)
                entries.append(entry)
                fields: dict[_Path, list[_Key]] = {}
                for pattern in patterns:
                    fields |= dict(_fields(pattern, ()))
                keyed.append((entry, fields))
        self._order = {name: number for number, name in enumerate(self._entries)}
        common = Counter((path, key) for _, fields in keyed for path, found in fields.items() for key in found)
        self._fields: dict[_Path, _Field] = {}
        self._others: list[_Entry] = []
        for entry, fields in keyed:
            if not fields:
                self._others.append(entry)
                continue
            best = min(fields, key=lambda path: sum(common[path, key] for key in fields[path]))
            for key in fields[best]:
                self._fields.setdefault(best, _Field()).add(key, entry)

    def match(self, body: Mapping[str, Any]) -> list[str]:
        """Return the names of the workflows that an event (in the JSON format of CloudEvents) starts."""
        if is_by_hand(body):
            return [name] if (name := body.get("subject")) in self._entries else []
        found = {entry.workflow for entry in self._others if entry.matches(body)}
        for path, index in self._fields.items():
            for value in leaves_at(body, path):
                found |= {entry.workflow for entry in index.find(value) if entry.matches(body)}
        return sorted(found, key=self._order.__getitem__)

    def followed(self) -> set[str]:
        """Return the ends of which runs may start a workflow, as `workflow:state`, or `*:state` for all workflows."""
        found: set[str] = set()
        for entry in (entry for entries in self._entries.values() for entry in entries):
            for state, type_ in RUN_EVENTS.items():
                known = {"type": type_, "source": RUNS_SOURCE, TRIGGER: ABSENT}
                if all(one.may_match(known) for one in entry.patterns):
                    found |= {f"{workflow}:{state}" for workflow in entry.follows or ("*",)}
        return found

    def why_not(self, workflow: str, body: Mapping[str, Any]) -> str | None:
        """Say why a workflow is not started by an event: what each of its entries says; None if it is."""
        entries = self._entries.get(workflow, [])
        if is_by_hand(body):
            return None if body.get("subject") == workflow else "the event is for another workflow"
        reasons = [entry.why_not(body) for entry in entries]
        if None in reasons:
            return None
        return "; ".join(dict.fromkeys(filter(None, reasons))) or "it has no `on:`; only `orchestrator run` starts it"


def is_by_hand(body: Mapping[str, Any]) -> bool:
    """Tell whether an event starts one workflow by hand: then it is for no other."""
    return body.get("type") == MANUAL and body.get("source") == MANUAL_SOURCE


def _fields(pattern: Mapping[str, Any], above: _Path) -> Iterator[tuple[_Path, list[_Key]]]:
    """Give the fields of a pattern all rules of which an index can hold, with their keys."""
    for name, wanted in pattern.items():
        if name == "$or":
            continue
        if isinstance(wanted, Mapping):
            yield from _fields(wanted, (*above, name))
            continue
        rules = [_key(rule) for rule in wanted]
        keys = [key for key in rules if key is not None]
        if len(keys) == len(rules):
            yield (*above, name), keys


def _key(rule: object) -> _Key | None:
    if not isinstance(rule, Mapping):
        return typed(rule)
    ((operator, operand),) = rule.items()
    if operator == "numeric":
        sign, bound = operand[:2]
        return typed(bound) if sign == "=" else ("least" if sign in (">", ">=") else "most", bound)
    if not isinstance(operand, str):
        return None
    if operator == "wildcard":
        first, last = literal_ends(operand)
        operator, operand = ("prefix", first) if len(first) >= len(last) else ("suffix", last)
    return (operator, operand) if operator in ("prefix", "suffix") else None
