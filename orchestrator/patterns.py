r"""EventPattern: which events a workflow wants, in the language of Amazon EventBridge.

A pattern is an object shaped like the events it selects. A leaf is an array of rules: a value that must be
equal, or an operator. An event matches when *every* field of the pattern has *some* rule that holds:

    {"type": ["order.created"], "data": {"size": [{"numeric": [">", 10]}], "vip": [true]}}

Operators: `prefix suffix equals-ignore-case wildcard anything-but numeric exists cidr`, and `$or` in place of
a field name. The pattern is compiled once to predicates; matching is linear in the pattern and in the part of
the event that the pattern names, needs no clock and no I/O, and never raises on JSON.

What EventBridge documents, and AWS's own matcher (github.com/aws/event-ruler) does, is done here:

- A field of the event that holds an array matches if *any* element does. That is so for `anything-but` too:
  `["rugby", "baseball"]` has an element which is anything but rugby, so it matches (Amazon SNS documents this
  case); use one field for one value where that surprises.
- Nested arrays count as one flat array, an empty array or an object is no leaf (`exists` is false there), and
  a parent that is missing has no fields: `exists: false` holds for all below it. `null` is a value: it exists.
- Objects in an array are tried one at a time: all that one object of the pattern says has to hold for the
  *same* element. `exists: false` under such an array asks for an element that lacks the field.
- Types are not mixed: `true` is not 1 and "1" is not 1. 1, 1.0 and 1e0 are the same number.
- `anything-but` holds for any value that is there and not excluded, whatever its type; never for no value.

Where we differ, on purpose: numbers compare exactly and without EventBridge's bound of 5e9 and six decimals
(files are bigger than that); a name with a dot is one name, not a path; case is ignored by Unicode case
folding; `equals-ignore-case` takes a list anywhere; `$or` is never a field name; `cidr` refuses host bits.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from orchestrator.errors import OrchestratorError

MAX_DEPTH: Final = 32
"""Objects inside objects, `$or` included. It bounds recursion, so that no pattern exhausts the stack."""

MAX_COMBINATIONS: Final = 1000
"""EventBridge's bound on what the branches of all `$or` multiply to."""

_LARGEST: Final = sys.float_info.max
_SHOWN: Final = 200  # characters of an event's value in a sentence for a person

Predicate = Callable[[object], bool]


class Absent(Enum):
    """The value of a field that an event does not have; `null` is a value, this is none."""

    ABSENT = "absent"

    def __str__(self) -> str:
        return self.value


ABSENT: Final = Absent.ABSENT


class PatternError(OrchestratorError):
    """A pattern has faults; `faults` holds every one, as (dotted path in the pattern, message)."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        listed = (f"{path}: {message}" if path else message for path, message in self.faults)
        super().__init__("event pattern: " + "; ".join(listed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The clause of a pattern that said no to an event; `str()` of it is one line for a person.

    `path` is the field, `clause` the JSON of its rules, `value` what the event has there: ABSENT if nothing.
    For `$or`, path ends in `$or` and value maps the fields that its branches refused to what the event has.
    For several objects in an array none of which matched, clause is the pattern of one and value the array.
    """

    path: str
    clause: str
    value: object

    def __str__(self) -> str:
        seen = str(self.value) if self.value is ABSENT else _json(self.value)
        return f"{self.path}: wanted {self.clause}, saw {_shortened(seen)}"


@dataclass(frozen=True, slots=True, repr=False)
class EventPattern:
    """A compiled pattern. Equal to another when their JSON is, whatever the order of the fields."""

    text: str = field(compare=False)
    """The pattern as JSON, in the order in which it was written."""
    _canonical: str
    _root: _Fields = field(compare=False)

    @classmethod
    def compile(cls, pattern: object) -> EventPattern:
        """Check a pattern (JSON as Python objects) and compile it. Raises PatternError with every fault."""
        compiler = _Compiler()
        root = compiler.fields(pattern, at="", depth=1)
        if not compiler.faults and root.combinations() > MAX_COMBINATIONS:
            compiler.faults.append(("", f"the branches of $or multiply to more than {MAX_COMBINATIONS}; split it"))
        if compiler.faults:
            raise PatternError(compiler.faults)
        return cls(_json(pattern), _json(pattern, sort_keys=True), root)

    @property
    def pattern(self) -> dict[str, Any]:
        """The pattern as it was written; a new copy each time."""
        copy: dict[str, Any] = json.loads(self.text)
        return copy

    def matches(self, event: Mapping[str, object]) -> bool:
        """Tell whether the event (in the JSON format of CloudEvents) is wanted."""
        return self._root.matches(event)

    def may_match(self, known: Mapping[str, object]) -> bool:
        """Tell whether some event with these fields at the top could match; ABSENT: it has no such field."""
        return all(node.matches(known[name]) for name, node in self._root.nodes if name in known)

    def explain(self, event: Mapping[str, object]) -> Mismatch | None:
        """Return the first clause that says no, in the order of the pattern; None if the event matches."""
        return None if self._root.matches(event) else self._root.why_not(event, "")

    def __repr__(self) -> str:
        return f"EventPattern.compile({self.pattern!r})"


# What a pattern compiles to: a tree of objects whose leaves are predicates on one value. `why_not` may only be
# asked of a node that does not match.


@dataclass(frozen=True, slots=True)
class _Leaf:
    clause: str
    rules: tuple[Predicate, ...]

    def matches(self, value: object) -> bool:
        leaves = [each for each in _flat(value) if not isinstance(each, Mapping)] or [ABSENT]
        return any(rule(leaf) for leaf in leaves for rule in self.rules)

    def why_not(self, value: object, path: str) -> Mismatch:
        return Mismatch(path=path, clause=self.clause, value=value)

    def combinations(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class _AnyOf:
    clause: str
    branches: tuple[_Fields, ...]

    def matches(self, value: object) -> bool:
        return any(branch.matches(value) for branch in self.branches)

    def why_not(self, value: object, path: str) -> Mismatch:
        missed = [branch.why_not(value, "") for branch in self.branches]
        seen = {each.path: each.value for each in missed if each.value is not ABSENT}
        return Mismatch(path=path, clause=self.clause, value=seen or ABSENT)

    def combinations(self) -> int:
        return sum(branch.combinations() for branch in self.branches)


@dataclass(frozen=True, slots=True)
class _Fields:
    clause: str
    nodes: tuple[tuple[str, _Leaf | _AnyOf | _Fields], ...]

    def matches(self, value: object) -> bool:
        return any(all(node.matches(_at(each, name)) for name, node in self.nodes) for each in _objects(value))

    def why_not(self, value: object, path: str) -> Mismatch:
        candidates = _objects(value)
        if len(candidates) > 1:
            return Mismatch(path=path, clause=self.clause, value=value)
        there = ((name, node, _at(candidates[0], name)) for name, node in self.nodes)
        name, node, found = next(each for each in there if not each[1].matches(each[2]))
        return node.why_not(found, _join(path, name))

    def combinations(self) -> int:
        return math.prod(node.combinations() for _, node in self.nodes)


def leaves_at(event: object, path: Sequence[str]) -> list[object]:
    """Return every leaf that an event has at a path, in any element of the arrays on the way."""
    found: list[object] = [event]
    for name in path:
        found = [each[name] for value in found for each in _flat(value) if isinstance(each, Mapping) and name in each]
    return [each for value in found for each in _flat(value) if not isinstance(each, Mapping)]


def _at(value: Mapping[str, object], name: str) -> object:
    return value if name == "$or" else value.get(name, ABSENT)


def _flat(value: object) -> list[object]:
    """Return the elements of nested arrays as one list; without recursion, because events may nest deeply."""
    if not isinstance(value, list | tuple):
        return [] if value is ABSENT else [value]
    flat: list[object] = []
    pending: list[object] = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, list | tuple):
            pending.extend(reversed(each))
        else:
            flat.append(each)
    return flat


def _objects(value: object) -> list[Mapping[str, object]]:
    """Return the objects in which to look for fields; one without fields stands in where there is none."""
    return [each for each in _flat(value) if isinstance(each, Mapping)] or [{}]


# Operators: each takes the operand and returns a predicate on a leaf (which may be ABSENT).


class _RuleError(Exception):
    """One rule of a pattern is wrong; becomes a fault at the field it belongs to."""


def _affix(name: str, holds: Callable[[str, str], bool]) -> Callable[[object], Predicate]:
    def compiled(operand: object) -> Predicate:
        if not isinstance(operand, Mapping):
            text = _text(name, operand)
            return lambda leaf: isinstance(leaf, str) and holds(leaf, text)
        if list(operand) != ["equals-ignore-case"]:
            raise _RuleError(f'"{name}" takes a string or {{"equals-ignore-case": "a string"}}, and nothing else')
        folded = _text(f"{name} equals-ignore-case", operand["equals-ignore-case"]).casefold()
        return lambda leaf: isinstance(leaf, str) and holds(leaf.casefold(), folded)

    return compiled


def _equals_ignore_case(operand: object) -> Predicate:
    wanted = {text.casefold() for text in _texts("equals-ignore-case", operand)}
    return lambda leaf: isinstance(leaf, str) and leaf.casefold() in wanted


def _wildcard(operand: object) -> Predicate:
    parts = _wildcard_parts(_text("wildcard", operand))
    first, last, between = parts[0], parts[-1], parts[1:-1]
    if len(parts) == 1:
        return lambda leaf: leaf == first

    def holds(leaf: object) -> bool:
        if not (isinstance(leaf, str) and leaf.startswith(first) and leaf.endswith(last)):
            return False
        # The leftmost place is always right for a part: nothing is tried twice, so the time is linear.
        start, end = len(first), len(leaf) - len(last)
        for part in between:
            found = leaf.find(part, start, end)
            if found < 0:
                return False
            start = found + len(part)
        return start <= end

    return holds


def literal_ends(wildcard: str) -> tuple[str, str]:
    """Return the texts that whatever a (sound) wildcard stands for begins and ends with."""
    parts = _wildcard_parts(wildcard)
    return parts[0], parts[-1]


def _wildcard_parts(text: str) -> list[str]:
    r"""Split at each `*`, with `\*` and `\\` resolved."""
    parts = [""]
    pieces = re.findall(r"\\?.", text, re.DOTALL)
    for before, piece in itertools.pairwise(["", *pieces]):
        if piece == before == "*":
            raise _RuleError(f'"wildcard" takes no two * in a row ({_kind(text)}): one already stands for any text')
        if piece == "*":
            parts.append("")
        elif piece.startswith("\\") and piece[1:] not in ("*", "\\"):
            raise _RuleError(rf'"wildcard" knows the escapes \* and \\ only; see the backslash in {_kind(text)}')
        else:
            parts[-1] += piece[-1]
    return parts


def _anything_but(operand: object) -> Predicate:
    if isinstance(operand, Mapping):
        excluded = _excluded_by_operator(operand)
    else:
        values = list(operand) if isinstance(operand, list | tuple) else [operand]
        if not values or not (all(isinstance(each, str) for each in values) or all(map(_is_number, values))):
            raise _RuleError(
                '"anything-but" takes a string, a number, a list that has only strings or only numbers,'
                f" or an object with one of {', '.join(_EXCLUDABLE)}, not {_kind(operand)}"
            )
        excluded = _one_of(values)
    return lambda leaf: leaf is not ABSENT and not excluded(leaf)


def _excluded_by_operator(operand: Mapping[Any, object]) -> Predicate:
    if len(operand) != 1 or next(iter(operand)) not in _EXCLUDABLE:
        raise _RuleError(f'"anything-but" takes an object with one of {", ".join(_EXCLUDABLE)}, and nothing else')
    ((name, inner),) = operand.items()
    texts = _texts(f"anything-but {name}", inner)
    if name in ("prefix", "suffix") and "" in texts:
        raise _RuleError(f'"anything-but" with an empty {name} excludes every string; name at least a character')
    tests = [_OPERATORS[name](text) for text in texts]
    return lambda leaf: any(test(leaf) for test in tests)


def _numeric(operand: object) -> Predicate:
    if not isinstance(operand, list | tuple) or len(operand) not in (2, 4):
        raise _RuleError(f'"numeric" takes [">", 0] or a range like [">=", 0, "<", 10], not {_kind(operand)}')
    pairs = list(zip(operand[::2], operand[1::2], strict=True))
    for sign, bound in pairs:
        if not isinstance(sign, str) or sign not in _COMPARISONS:
            raise _RuleError(f'"numeric" compares by one of {" ".join(_COMPARISONS)}, not by {_kind(sign)}')
        if not _is_number(bound):
            raise _RuleError(f'"numeric" compares with a number, not with {_kind(bound)}')
    if len(pairs) == 2:
        (low_sign, low), (high_sign, high) = sorted(pairs, key=lambda pair: pair[0] in ("<", "<="))
        if low_sign not in (">", ">=") or high_sign not in ("<", "<="):
            raise _RuleError('"numeric" takes as a range one of > >= and one of < <=, such as [">=", 0, "<", 10]')
        if low > high or (low == high and (low_sign, high_sign) != (">=", "<=")):
            raise _RuleError(f'"numeric" has a range that no number is in: {low_sign} {low} and {high_sign} {high}')
    tests = [(_COMPARISONS[sign], bound) for sign, bound in pairs]
    return lambda leaf: typed(leaf)[0] == "number" and all(compare(leaf, bound) for compare, bound in tests)


def _exists(operand: object) -> Predicate:
    if not isinstance(operand, bool):
        raise _RuleError(f'"exists" takes true or false, not {_kind(operand)}')
    return lambda leaf: (leaf is not ABSENT) is operand


def _cidr(operand: object) -> Predicate:
    text = _text("cidr", operand)
    address, _, bits = text.partition("/")
    try:
        network = ipaddress.ip_network(text, strict=False)
        if not bits.isdecimal():
            raise _RuleError(f'"cidr" takes a network with its bits, such as "{network}", not {_kind(text)}')
        if network.network_address != ipaddress.ip_address(address):
            raise _RuleError(f'"cidr" has bits set beyond its mask in {_kind(text)}; the network is "{network}"')
    except ValueError as exc:
        raise _RuleError(f'"cidr" takes a network such as "10.0.0.0/24" or "2001:db8::/32", not {_kind(text)}') from exc

    def holds(leaf: object) -> bool:
        try:
            return isinstance(leaf, str) and ipaddress.ip_address(leaf) in network
        except ValueError:
            return False

    return holds


_OPERATORS: Final[Mapping[str, Callable[[object], Predicate]]] = {
    "prefix": _affix("prefix", str.startswith),
    "suffix": _affix("suffix", str.endswith),
    "equals-ignore-case": _equals_ignore_case,
    "wildcard": _wildcard,
    "anything-but": _anything_but,
    "numeric": _numeric,
    "exists": _exists,
    "cidr": _cidr,
}
_EXCLUDABLE: Final = ("prefix", "suffix", "equals-ignore-case", "wildcard")
_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    ">=": operator.ge,
}


def _one_of(values: Iterable[object]) -> Predicate:
    wanted = frozenset(typed(value) for value in values)
    return lambda leaf: typed(leaf) in wanted


def typed(value: object) -> tuple[str, object]:
    """Return what equality means in JSON: Python alone says that True == 1."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int | float):
        return "number", value
    if isinstance(value, str):
        return "string", value
    return ("null", None) if value is None else ("not a JSON scalar", None)


def _is_number(value: object) -> bool:
    # The bounds keep out infinity, NaN and integers too long to be written again.
    return not isinstance(value, bool) and isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST


def _text(name: str, operand: object) -> str:
    if not isinstance(operand, str):
        raise _RuleError(f'"{name}" takes a string, not {_kind(operand)}')
    return operand


def _texts(name: str, operand: object) -> list[str]:
    texts = list(operand) if isinstance(operand, list | tuple) else [operand]
    if not texts:
        raise _RuleError(f'"{name}" takes a string or a list of strings, not an empty list')
    return [_text(name, text) for text in texts]


class _Compiler:
    """Walks a pattern once; goes on after a fault, so that all are reported together."""

    def __init__(self) -> None:
        self.faults: list[tuple[str, str]] = []

    def fields(self, pattern: object, *, at: str, depth: int) -> _Fields:
        nodes: list[tuple[str, _Leaf | _AnyOf | _Fields]] = []
        if not isinstance(pattern, Mapping):
            self._refuse(at, f'a pattern is an object such as {{"source": ["shop"]}}, not {_kind(pattern)}')
        elif not pattern:
            self._refuse(at, 'an empty object names no field; for every event write "source": [{"exists": true}]')
        elif depth > MAX_DEPTH:
            self._refuse(at, f"more than {MAX_DEPTH} objects inside each other; name the field at a higher level")
        else:
            for name, wanted in pattern.items():
                if isinstance(name, str):
                    nodes.append((name, self._node(name, wanted, at=_join(at, name), depth=depth)))
                else:
                    self._refuse(at, f"a field name is a string, not {_kind(name)}; put it in quotes")
        return _Fields(_json(pattern), tuple(nodes))

    def _node(self, name: str, wanted: object, *, at: str, depth: int) -> _Leaf | _AnyOf | _Fields:
        if name == "$or":
            return self._any_of(wanted, at=at, depth=depth)
        if _is_operator(name, wanted):
            self._refuse(at, f'"{name}" is an operator and stands in the array of a field: [{{"{name}": …}}]')
        elif isinstance(wanted, Mapping):
            return self.fields(wanted, at=at, depth=depth + 1)
        elif not isinstance(wanted, list | tuple):
            self._refuse(at, f"rules stand in an array: [{_kind(wanted)}], not {_kind(wanted)}")
        elif not wanted:
            self._refuse(at, 'an empty array matches nothing; write a value, or {"exists": true} for any')
        else:
            return self._leaf(wanted, at=at)
        return _Leaf("", ())

    def _any_of(self, wanted: object, *, at: str, depth: int) -> _AnyOf:
        if not isinstance(wanted, list | tuple) or len(wanted) < 2:
            self._refuse(at, f"takes an array of at least two patterns, not {_kind(wanted)}")
            return _AnyOf("", ())
        branches = [self.fields(each, at=f"{at}[{i}]", depth=depth + 1) for i, each in enumerate(wanted)]
        return _AnyOf(_json(wanted), tuple(branches))

    def _leaf(self, wanted: list[object] | tuple[object, ...], *, at: str) -> _Leaf:
        rules: list[Predicate] = []
        values: list[object] = []
        for rule in wanted:
            if rule is None or isinstance(rule, str | bool) or _is_number(rule):
                values.append(rule)
                continue
            try:
                rules.append(_compile_operator(rule))
            except _RuleError as exc:
                self._refuse(at, str(exc))
        return _Leaf(_json(wanted), (_one_of(values), *rules) if values else tuple(rules))

    def _refuse(self, at: str, message: str) -> None:
        self.faults.append((at, message))


def _compile_operator(rule: object) -> Predicate:
    if not isinstance(rule, Mapping):
        raise _RuleError(f"a rule is a string, number, true, false, null or an operator, not {_kind(rule)}")
    if len(rule) != 1:
        raise _RuleError(f"an operator is an object with one name, not {len(rule)}; write one object for each")
    ((name, operand),) = rule.items()
    if not isinstance(name, str) or name not in _OPERATORS:
        nearest = difflib.get_close_matches(str(name).lower(), _OPERATORS, n=1)
        hint = f'did you mean "{nearest[0]}"?' if nearest else f"known are {', '.join(_OPERATORS)}"
        raise _RuleError(f"unknown operator {_kind(name)}; {hint}")
    return _OPERATORS[name](operand)


def _is_operator(name: str, wanted: object) -> bool:
    """Tell an operator that was written as a field name from a field of the event called `prefix`."""
    try:
        _compile_operator({name: wanted})
    except _RuleError:
        return False
    return True


def _join(path: str, name: str) -> str:
    shown = name if name.isprintable() else json.dumps(name)
    return f"{path}.{shown}" if path else shown


def _kind(value: object) -> str:
    """Name a wrong value in a fault: a scalar by its JSON, anything bigger by its type."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}" if value else "an empty array"
    return _shortened(_json(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _json(value: object, *, sort_keys: bool = False) -> str:
    """Return compact JSON that can be printed anywhere; of what is not JSON, its text or its type."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys, default=_as_json)
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__
    # File names that are not UTF-8 arrive as lone surrogates, which no terminal takes; JSON has \udc80 for them.
    return text.encode("utf-8", "backslashreplace").decode()


def _as_json(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)
