"""Expressions in definitions: `{{ ... }}`, by Jinja2's sandbox.

A value in a definition is kept as *template data*, plain JSON in which three forms are special:

- `{"$expr": "split | length"}`: one lone expression; it keeps the type of what it evaluates to;
- `{"$text": "n = {{ n }}"}`: text with expressions in it; it evaluates to a string, which is never parsed again;
- `{"$data": ...}`: any JSON value, taken as it is (so data that looks like an expression stays data).

Everything else stands for itself. What events and steps bring is only ever a *value* of a name: it is never
parsed. Names that are not defined are errors. Jinja's statements (`{% %}`) and comments have no meaning here.
Nothing in this module does I/O or looks at a clock; evaluation is deterministic.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.environment import TemplateExpression
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from orchestrator.errors import ExpressionError

#: Names that every expression may use; they cannot be step ids.
RESERVED_NAMES = frozenset({"event", "params", "run", "item", "index", "secrets", "steps"})

_GLOBALS = ("range", "dict")
#: Words that mean something inside a Jinja expression; `self` would be Jinja's own view of the template.
_KEYWORDS = frozenset(
    {"true", "false", "none", "True", "False", "None", "and", "or", "not", "in", "is", "if", "else", "self", *_GLOBALS}
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}\Z")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; a dot on an object reads its keys first, so that `order.items` is the data and not a method."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


def _plain(value: Any) -> Any:
    """Make lists of what filters leave lazy, and an error of what is undefined or is no data."""
    if isinstance(value, jinja2.Undefined):
        str(value)  # StrictUndefined raises UndefinedError that names the missing thing
    if isinstance(value, Markup):
        return str(value)
    if isinstance(value, list | tuple | range | Iterator | KeysView | ValuesView | ItemsView):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if callable(value):
        raise TypeError(f"{getattr(value, '__name__', 'this')!r} is a method and not data; call it with ()")
    return value


def _environment() -> _Environment:
    # Delimiters that no text contains switch statements and comments off.
    environment = _Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        block_start_string="\x00{%",
        block_end_string="%}\x00",
        comment_start_string="\x00{#",
        comment_end_string="#}\x00",
        cache_size=0,
        # In text as well, a lazy list is written as a list, and a method is an error.
        finalize=_plain,
    )
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    # A repeated evaluation must come to the same value.
    del environment.filters["random"]
    return environment


_ENVIRONMENT = _environment()


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What an expression reads: `names` (reserved ones, step outputs), and X by `steps.X`, `params.X` and `run.X`."""

    names: frozenset[str] = frozenset()
    steps: frozenset[str] = frozenset()
    params: frozenset[str] = frozenset()
    run: frozenset[str] = frozenset()

    def __or__(self, other: References) -> References:
        return References(
            names=self.names | other.names,
            steps=self.steps | other.steps,
            params=self.params | other.params,
            run=self.run | other.run,
        )

    @property
    def step_ids(self) -> frozenset[str]:
        """Every step that is read, by output or by `steps.X`."""
        return (self.names - RESERVED_NAMES) | self.steps


def is_step_id(name: str) -> bool:
    """Tell whether `name` can be a step's id, that is: can be written as a name in an expression."""
    return bool(_NAME.match(name)) and name not in RESERVED_NAMES and name not in _KEYWORDS


def parse(value: object) -> Any:
    """Turn a value as written in YAML into template data.

    Strings with `{{` in them become `$expr` or `$text`; keys of mappings are never expressions.
    Raises ExpressionError for the first expression that does not parse.
    """
    if isinstance(value, str):
        return _parse_text(value) if "{{" in value else value
    if isinstance(value, list):
        return [parse(element) for element in value]
    if isinstance(value, dict):
        parsed = {str(key): parse(element) for key, element in value.items()}
        return {"$data": value} if _is_special(parsed) else parsed
    return value


def data(value: object) -> Any:
    """Return template data that evaluates to exactly `value`, whatever it looks like."""
    return {"$data": value} if isinstance(value, dict | list) else value


def expression(source: str) -> dict[str, str]:
    """Return template data for one lone expression, given without its braces."""
    return {"$expr": source}


def _is_special(value: Mapping[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)) in ("$expr", "$text", "$data")


def _parse_text(text: str) -> dict[str, str]:
    try:
        body = _ENVIRONMENT.parse(text).body
    except jinja2.TemplateSyntaxError as exc:
        raise ExpressionError(f"bad expression {text.strip()!r}: {exc.message}") from exc
    except RecursionError:
        raise ExpressionError("bad expression: too deeply nested") from None
    stripped = text.strip()
    if stripped.startswith("{{") and stripped.endswith("}}") and _is_lone(body):
        # A sign right at the braces is Jinja's whitespace control; after a blank it is a sign.
        source = stripped[2:-2].removeprefix("-").removeprefix("+").removesuffix("-").strip()
        try:
            # `{{ a }} {{ b }}` also begins and ends so; only a lone expression compiles without its braces.
            _ENVIRONMENT.compile_expression(source)
        except jinja2.TemplateSyntaxError as exc:
            raise ExpressionError(f"bad expression {stripped!r}: {exc.message}") from exc
        return {"$expr": source}
    return {"$text": text}


def _is_lone(body: list[nodes.Node]) -> bool:
    expressions = [
        node
        for output in body
        for node in (output.nodes if isinstance(output, nodes.Output) else [output])
        if not (isinstance(node, nodes.TemplateData) and not node.data.strip())
    ]
    return len(expressions) == 1 and not isinstance(expressions[0], nodes.TemplateData)


def references(template: Any) -> References:
    """Return what a template reads. Raises ExpressionError where it cannot be told before the run."""
    found = References()
    for kind, source in _expressions(template):
        found |= _references(kind, source)
    return found


def _expressions(template: Any) -> Iterator[tuple[str, str]]:
    if isinstance(template, list):
        for element in template:
            yield from _expressions(element)
    elif isinstance(template, dict):
        if _is_special(template):
            ((kind, source),) = template.items()
            if kind != "$data":
                yield kind, source
        else:
            for element in template.values():
                yield from _expressions(element)


@lru_cache(maxsize=4096)
def _references(kind: str, source: str) -> References:
    text = "{{ " + source + " }}" if kind == "$expr" else source
    try:
        tree = _ENVIRONMENT.parse(text)
        for call in tree.find_all((nodes.Filter, nodes.Test)):
            known = _ENVIRONMENT.filters if isinstance(call, nodes.Filter) else _ENVIRONMENT.tests
            if call.name not in known:
                raise ExpressionError(
                    f"bad expression {source!r}: no {type(call).__name__.lower()} named {call.name!r}"
                )
        undeclared = meta.find_undeclared_variables(tree)
        if any(node.name == "self" for node in tree.find_all(nodes.Name)):
            raise ExpressionError(f"bad expression {source!r}: `self` has no meaning here")
    except RecursionError:
        raise ExpressionError("bad expression: too deeply nested") from None
    except jinja2.TemplateError as exc:
        raise ExpressionError(f"bad expression {source!r}: {exc.message}") from exc
    by_name: set[str] = set()
    reads_of_steps = 0
    for attribute in tree.find_all(nodes.Getattr):
        if isinstance(attribute.node, nodes.Name) and attribute.node.name == "steps":
            by_name.add(attribute.attr)
            reads_of_steps += 1
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.node, nodes.Name) and item.node.name == "steps" and isinstance(item.arg, nodes.Const):
            by_name.add(str(item.arg.value))
            reads_of_steps += 1
    if sum(node.name == "steps" for node in tree.find_all(nodes.Name)) != reads_of_steps:
        raise ExpressionError(f"bad expression {source!r}: write steps.NAME with the step's name as it is")
    methods = {id(call.node) for call in tree.find_all(nodes.Call)}
    attributes: dict[str, set[str]] = {"params": set(), "run": set()}
    for read in tree.find_all(nodes.Getattr):
        if isinstance(read.node, nodes.Name) and read.node.name in attributes and id(read) not in methods:
            attributes[read.node.name].add(read.attr)
    names = frozenset(undeclared) - {"steps", *_GLOBALS}
    return References(
        names=names,
        steps=frozenset(by_name),
        params=frozenset(attributes["params"]),
        run=frozenset(attributes["run"]),
    )


def evaluate(template: Any, names: Mapping[str, Any]) -> Any:
    """Evaluate template data with the given names; the result is plain data, never an Undefined.

    Raises ExpressionError with the expression and the reason (undefined name, wrong type, forbidden access).
    """
    if isinstance(template, list):
        return [evaluate(element, names) for element in template]
    if not isinstance(template, dict):
        return template
    if not _is_special(template):
        return {key: evaluate(element, names) for key, element in template.items()}
    ((kind, source),) = template.items()
    if kind == "$data":
        return source
    if kind == "$expr" and source in names:  # the commonest expression is a bare name
        return names[source]
    try:
        if kind == "$text":
            return _text(source).render(names)
        return _plain(_expression(source)(names))
    except jinja2.TemplateError as exc:
        raise ExpressionError(
            f"{{{{ {source} }}}}: {exc.message}" if kind == "$expr" else f"{source!r}: {exc.message}"
        ) from exc
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
        raise ExpressionError(f"{source!r}: {type(exc).__name__}: {exc}") from exc


@lru_cache(maxsize=4096)
def _expression(source: str) -> TemplateExpression:
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


@lru_cache(maxsize=4096)
def _text(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)
