"""Bodies of requests: JSON in UTF-8 of a bounded size, read strictly, as a model says."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.api.answers import Refusal

#: Larger bodies are refused before they are read.
MAXIMUM_BYTES = 10 * 1024 * 1024


class Asked(BaseModel):
    """What a body may say; it says nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)


_Model = TypeVar("_Model", bound=Asked)


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    too_large = Refusal(413, f"the body is larger than {MAXIMUM_BYTES} bytes", headers={"Connection": "close"})
    if length.isdecimal() and (len(length) > 12 or int(length) > MAXIMUM_BYTES):
        raise too_large
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed; send it as it is")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BYTES:
            raise too_large
    if body and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(415, "the body must be JSON, with the content type application/json")
    return bytes(body)


#: The body of a request as it came.
Body = Annotated[bytes, Depends(_read)]


def read_json(body: bytes) -> Any:
    """Return the value of a body. Refuses what no event can carry: NaN, halves of surrogate pairs, numbers beyond all
    bounds, endless nesting.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        raise Refusal(400, "the body is not UTF-8") from exc
    except UnicodeEncodeError as exc:
        raise Refusal(400, "the body is not JSON: it holds text that is not Unicode (a lone surrogate)") from exc
    except RecursionError as exc:
        raise Refusal(400, "the body is nested too deeply") from exc
    except ValueError as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from exc
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name}")


def read_body(body: bytes, model: type[_Model]) -> _Model:
    """Return what a body says; an empty one says nothing."""
    value = read_json(body) if body else {}
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise RequestValidationError(exc.errors(include_url=False)) from exc


def schema_of(*models: type[BaseModel], required: bool = True, **more: Any) -> dict[str, Any]:
    """Return what OpenAPI says of a body that is one of these models; `more` has schemas by further content types."""
    schemas = [model.model_json_schema() for model in models]
    content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    content |= {kind: {"schema": schema} for kind, schema in more.items()}
    return {"requestBody": {"required": required, "content": content}}
