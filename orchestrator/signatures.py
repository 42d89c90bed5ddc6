"""What the signature of a user's function says: which arguments a task takes, which parameters a workflow has."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from orchestrator.schema import nearest
from orchestrator.workflows import Param

#: The parameter of a task's function that the worker fills in.
CONTEXT = "context"

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def takes_context(function: Callable[..., Any]) -> bool:
    """Tell whether a task's function wants a Context, by a parameter named `context`."""
    return CONTEXT in parameters_of(function)


def argument_faults(function: Callable[..., Any], given: Iterable[str]) -> list[tuple[str, str]]:
    """Return (argument, message) for each argument that a task does not take, and ("", message) for what it lacks."""
    parameters = parameters_of(function)
    known = [name for name, p in parameters.items() if p.kind in _BY_NAME and name != CONTEXT]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = set(given)
    found = []
    for name in sorted(given):
        if name == CONTEXT:
            found.append((name, "`context` is given by the worker; take it away here"))
        elif name not in known and not takes_any:
            found.append((name, f"unknown argument {name!r}; {nearest(name, known)}"))
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        found.append(("", f"missing argument{'s'[: len(missing) - 1]}: {', '.join(missing)}"))
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()):
        found.append(("", "the function has parameters that are positional only; arguments are given by name"))
    return found


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; none for what Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}


_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"
}  # fmt: skip


def param_of(annotation: Any) -> Param:
    """Return the parameter that an annotation stands for. Raises TypeError if there is none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (inspect.Parameter.empty, None, Any):
        return Param()
    if origin is Literal:
        types_of = {_TYPES.get(type(value)) for value in arguments}
        return Param(enum=list(arguments), **({"type": types_of.pop()} if len(types_of) == 1 else {}))  # type: ignore[arg-type]
    if origin is list and arguments != (Any,):
        return Param(type="array", items=param_of(arguments[0]))
    if (origin or annotation) in _TYPES:
        return Param(type=_TYPES[origin or annotation])  # type: ignore[arg-type]
    hint = "; leave the annotation away where several types will do" if origin in (Union, types.UnionType) else ""
    raise TypeError(
        f"{annotation!r} cannot be a parameter's type; use str, int, float, bool, list, dict or Literal{hint}"
    )
