"""JSON Schemas in definitions: whether they are sound, and whether a value fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from orchestrator.errors import one_line

_CHARACTERS = 300


def schema_fault(schema: Mapping[str, Any]) -> tuple[tuple[str, ...], str] | None:
    """Return (path in the schema, message) of what is wrong with it; None if it is sound and refers to itself alone."""
    import jsonschema  # which most projects do not need
    import referencing
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import DRAFT202012

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as exc:
        return tuple(map(str, exc.absolute_path)), one_line(exc.message, _CHARACTERS)
    except RecursionError:
        return (), "is nested too deeply"
    resource = referencing.Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = REGISTRY.with_resource("", resource).resolver_with_root(resource)
    for path, reference in _references(schema, ()):
        try:
            resolver.lookup(reference)
        except Exception:  # noqa: BLE001 -- whatever is wrong with it, nothing is fetched for it
            return (*path, "$ref"), f"{reference!r} leads to nothing in this schema, and others are not fetched"
    return None


def checker(schema: Mapping[str, Any]) -> Callable[[object], str | None]:
    """Return the function that says where and why a value does not fit a sound schema; None if it does."""
    import jsonschema
    from jsonschema_specifications import REGISTRY

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)

    def check(value: object) -> str | None:
        try:
            # The first, for there may be as many as a stranger likes; of alternatives the nearest.
            error = jsonschema.exceptions.best_match(islice(validator.iter_errors(value), 1))
        except RecursionError:
            return "it is nested too deeply"
        if error is None:
            return None
        return one_line(f"{error.json_path}: {error.message}", _CHARACTERS)

    return check


def _references(schema: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield path, schema["$ref"]
        for key, value in schema.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _references(value, (*path, str(key)))
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from _references(value, (*path, str(number)))
