"""Output: what stands, while a workflow function is traced, for a value that only a run will have.

Everything done with an Output builds an expression (expressions.py):

- `out.name`, `out["name"]`, `out[0]`, `out[1:3]`, `out.name.upper()`; a name that begins with `_` only by `out["_x"]`;
- `== != < <= > >=`, `+ - * / // % **`, and `&`, `|`, `~` for and, or, not (Python's own words cannot be traced;
  put comparisons in parentheses: `(a > 1) & (b > 2)`);
- `out.filter("length")`: a filter of Jinja's, in the place of `len(out)`, `int(out)`, `sum(out)` and such;
- `f"rows/{out}"`: text with the expression in it.

`if out:` and `for x in out:` cannot be traced: they are errors that name `if_` and `.map`.
An attribute named `filter` is reached by `out["filter"]`.
"""

from __future__ import annotations

import json
import math
import random
import re
from contextvars import ContextVar
from typing import Any, NoReturn

from orchestrator.errors import TracingError

# How tightly the outermost operator of an expression binds, as Jinja's parser has it.
_OR, _AND, _NOT, _COMPARE, _ADD, _MULTIPLY, _POWER, _UNARY, _FILTER, _ATOM = range(10)

_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_outputs: ContextVar[Outputs | None] = ContextVar("outputs", default=None)


def _binary(operator: str, level: int) -> tuple[Any, Any]:
    left, right = level, level + 1
    if level == _COMPARE:  # `a < b < c` would be a chain
        left = right
    if level == _POWER:  # Jinja reads `-a ** b` as (-a) ** b, Python does not: say which
        left = right = _FILTER

    def method(self: Output, other: Any) -> Output:
        return Output(f"{_source(self, left)} {operator} {_source(other, right)}", level)

    def reflected(self: Output, other: Any) -> Output:
        return Output(f"{_source(other, left)} {operator} {_source(self, right)}", level)

    return method, reflected


def _refusal(what: str, instead: str) -> Any:
    def method(self: Output, *_: Any) -> NoReturn:
        raise TracingError(
            f"{what} cannot be used on {self!r}, which has its value only when the workflow runs; {instead}"
        )

    return method


class Output:
    """An expression under construction; see the module's text. Not hashable, has no truth, no length, no elements."""

    __slots__ = ("_level", "_source", "_step")

    def __init__(self, source: str, level: int = _ATOM, *, step: str | None = None) -> None:
        self._source = source
        self._level = level
        self._step = step

    def __getattr__(self, name: str) -> Output:
        if name.startswith("_"):
            raise AttributeError(f"write [{name!r}] for a name with an underscore in front, not .{name}")
        return self[name]

    def __getitem__(self, key: Any) -> Output:
        source = _source(self, _ATOM)
        if isinstance(key, str) and _PLAIN_NAME.match(key):
            return Output(f"{source}.{key}")
        if isinstance(key, slice):
            parts = [key.start, key.stop] if key.step is None else [key.start, key.stop, key.step]
            return Output(f"{source}[{':'.join('' if part is None else _source(part, _OR) for part in parts)}]")
        return Output(f"{source}[{_source(key, _OR)}]")

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        return Output(f"{_source(self, _ATOM)}({_arguments(args, kwargs)})")

    def filter(self, name: str, *args: Any, **kwargs: Any) -> Output:
        """Apply a filter of Jinja's: `out.filter("length")` is `{{ out | length }}`."""
        called = f"({_arguments(args, kwargs)})" if args or kwargs else ""
        return Output(f"{_source(self, _FILTER)} | {name}{called}", _FILTER)

    __add__, __radd__ = _binary("+", _ADD)
    __sub__, __rsub__ = _binary("-", _ADD)
    __mul__, __rmul__ = _binary("*", _MULTIPLY)
    __truediv__, __rtruediv__ = _binary("/", _MULTIPLY)
    __floordiv__, __rfloordiv__ = _binary("//", _MULTIPLY)
    __mod__, __rmod__ = _binary("%", _MULTIPLY)
    __pow__, __rpow__ = _binary("**", _POWER)
    __and__, __rand__ = _binary("and", _AND)
    __or__, __ror__ = _binary("or", _OR)
    __lt__, __gt__ = _binary("<", _COMPARE)[0], _binary(">", _COMPARE)[0]
    __le__, __ge__ = _binary("<=", _COMPARE)[0], _binary(">=", _COMPARE)[0]
    __eq__, __ne__ = _binary("==", _COMPARE)[0], _binary("!=", _COMPARE)[0]
    __hash__ = None  # type: ignore[assignment]

    def __invert__(self) -> Output:
        return Output(f"not {_source(self, _NOT)}", _NOT)

    def __neg__(self) -> Output:
        return Output(f"-{_source(self, _ATOM)}", _UNARY)

    __bool__ = _refusal("`if`, `and`, `or`, `not`", "give the step `.options(if_=...)`, and write & | ~ in expressions")
    __iter__ = _refusal("`for` or *", "call a task with `.map(...)`")
    __len__ = _refusal("len()", 'write .filter("length")')
    __contains__ = _refusal("`in`", 'write .filter("select", "equalto", x).filter("first")')
    __int__ = __index__ = _refusal("int()", 'write .filter("int")')
    __float__ = _refusal("float()", 'write .filter("float")')
    __enter__ = _refusal("`with`", "do that in a task")
    __setitem__ = __delitem__ = _refusal("assigning", "do that in a task")

    def __str__(self) -> str:
        outputs = _outputs.get()
        return outputs.mark(self) if outputs is not None else repr(self)

    def __format__(self, spec: str) -> str:
        if spec:
            raise TracingError(
                f'the format {spec!r} cannot be applied to {self!r}; write .filter("format", ...) or a task'
            )
        return str(self)

    def __repr__(self) -> str:
        text = f"<Output {self._source}>"
        outputs = _outputs.get()
        if outputs is not None:
            outputs.shown.add(text)
        return text


#: The roots of expressions that are not a step's output; for defaults of parameters, and arguments of `.map`.
event = Output("event")
item = Output("item")
index = Output("index")
secrets = Output("secrets")


def state_of(output: Output) -> Output:
    """Return how the step with that output ended: `steps.X.state`."""
    return Output(f"steps.{_step_of(output)}.state")


def errors_of(output: Output) -> Output:
    """Return the errors of the step with that output: `steps.X.errors`."""
    return Output(f"steps.{_step_of(output)}.errors")


def _step_of(output: Output) -> str:
    if not isinstance(output, Output) or output._step is None:
        raise TracingError(
            f"{output!r} is not what a task or workflow was called for; give the output of a step itself"
        )
    return output._step


class Outputs:
    """The Outputs that were written into text during one trace; a context manager around that trace.

    `str()` cannot return an Output, so it returns a mark that no text contains by chance; `template` puts the
    expressions in the place of the marks. So plain text, whatever it looks like, stays data.
    """

    def __init__(self) -> None:
        # Digits only, so that no change of case spoils a mark.
        self._secret = str(random.SystemRandom().getrandbits(64))
        self._marked: list[Output] = []
        #: What `repr()` said of outputs: for a person, and never for a run.
        self.shown: set[str] = set()
        self._mark = re.compile(rf"\x02{self._secret}:(\d+)\x03")

    def __enter__(self) -> Outputs:
        self._token = _outputs.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _outputs.reset(self._token)

    def mark(self, output: Output) -> str:
        """Return text that stands for `output`."""
        self._marked.append(output)
        return f"\x02{self._secret}:{len(self._marked) - 1}\x03"

    def template(self, value: Any) -> Any:
        """Return template data for an argument. Raises TracingError for what is not JSON."""
        if isinstance(value, Output):
            return {"$expr": value._source}
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list | tuple):
            return [self.template(element) for element in value]
        if isinstance(value, dict):
            parsed = {self._key(key): self.template(element) for key, element in value.items()}
            if len(parsed) == 1 and next(iter(parsed)) in ("$expr", "$text", "$data"):
                return {"$data": literal_data(value)}
            return parsed
        return literal_data(value)

    def _key(self, key: Any) -> str:
        if not isinstance(key, str) or self._mark.search(key):
            raise TracingError(f"a key of a mapping must be plain text, not {key!r}")
        return key

    def _text(self, text: str) -> Any:
        parts = self._mark.split(text)
        if self._secret in "".join(parts[::2]):
            raise TracingError("text with an output in it was cut up; a task can do that when the workflow runs")
        for shown in self.shown:
            if shown in text:
                raise TracingError(
                    f"{shown} was put into text by its repr; write the output itself in the text, "
                    "without !r and not within a list or mapping"
                )
        if len(parts) == 1:
            return text
        plain = [part if not re.search(r"[{\r\x00]", part) else f"{{{{ {_literal(part)} }}}}" for part in parts[::2]]
        marked = [f"{{{{ {self._marked[int(number)]._source} }}}}" for number in parts[1::2]]
        return {"$text": plain[0] + "".join(mark + part for mark, part in zip(marked, plain[1:], strict=True))}


def literal_data(value: Any) -> Any:
    """Return `value` as plain JSON data. Raises TracingError if it is not, or if an Output is in it."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [literal_data(element) for element in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: literal_data(element) for key, element in value.items()}
    raise TracingError(f"{value!r} is not a JSON value (text, number, true, false, null, list or mapping)")


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [f"{name}={_source(value, _OR)}" for name, value in kwargs.items()]
    return ", ".join([*(_source(value, _OR) for value in args), *named])


def _source(value: Any, level: int) -> str:
    """Return the expression for `value`, in parentheses if it binds less tightly than `level`."""
    if isinstance(value, Output):
        return value._source if value._level >= level else f"({value._source})"
    is_negative = isinstance(value, int | float) and not isinstance(value, bool) and value < 0
    return f"({_literal(value)})" if is_negative and level > _UNARY else _literal(value)


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_source(element, _OR) for element in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_source(element, _OR)}" for key, element in value.items()) + "}"
    value = literal_data(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)
