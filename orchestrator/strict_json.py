"""JSON as everybody reads it: what Python reads beyond that is refused, and what is nested without end; pure."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from orchestrator.errors import one_line

#: What is nested deeper is no JSON that anybody has made for others to read, and trouble for whoever does.
LEVELS = 100
#: A text that has no end reaches to the end: else it would be looked for again from each quote in it.
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class NotJsonError(ValueError):
    """A text is not JSON, or such as not everybody can read: NaN, half a surrogate pair, more than LEVELS deep."""


def read_json(body: bytes) -> Any:
    """Return the value of a text in JSON. Raises NotJsonError."""
    if body.count(b"[") + body.count(b"{") > LEVELS and _is_deep(body):
        raise NotJsonError(f"it is nested more than {LEVELS} levels deep")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        raise NotJsonError("it is not UTF-8") from exc
    except UnicodeEncodeError as exc:
        raise NotJsonError("a text in it is not Unicode") from exc
    except (ValueError, RecursionError) as exc:
        raise NotJsonError(one_line(str(exc), 200)) from exc
    return value


def _is_deep(body: bytes) -> bool:
    """Tell whether lists and objects are nested deeper than LEVELS, if they are balanced; texts do not count."""
    left = _TEXT.sub(b"", body).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(LEVELS):
        inner = left.replace(b"[]", b"")  # takes the innermost level away
        if len(inner) == len(left):
            return False
        left = inner
    return bool(left)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return number
