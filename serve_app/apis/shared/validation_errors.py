"""Turns pydantic's validation errors into RequestErrors that name the wrong value and what is expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ValidationError

from qwen3_dist.errors import RequestError

Json = dict[str, Any]
# The expected value by pydantic's error type. Errors of our own annotations carry theirs in the context.
_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
}


def short(value: Any) -> str:
    """Returns `value` as JSON, cut to 80 characters for an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def request_error(error: ValidationError, model: type[BaseModel], body: Json) -> RequestError:
    """Returns the first of pydantic's errors as one sentence. A RequestError of a validator is returned as it is."""
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    steps = [step for step in first["loc"] if not (isinstance(step, str) and step.startswith("<"))]
    if isinstance(context.get("error"), RequestError):
        return context["error"]
    if kind == "missing":
        return _missing(model, body, steps)
    if "tag" in context:
        steps, value = [*steps, context["tag"]], value.get(context["tag"])
    path = _path(steps)
    if kind == "unsupported":
        return RequestError(f"{path}={short(value)} is not supported: the model reads text only", param=path)
    return RequestError(f"{path} must be {_expected(kind, context)}, not {short(value)}", param=path)


def _missing(model: type[BaseModel], body: Json, steps: list[int | str]) -> RequestError:
    """Returns the error for a missing field. Validating a non-JSON value in its place yields what is expected."""
    *outer, name = steps
    place: Any = body
    for step in outer:
        place = place[step]
    before = {**place}
    place[name] = object()
    try:
        model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    finally:
        place.clear()
        place.update(before)
    path = _path(steps)
    return RequestError(f"{path} is required: {_expected(first['type'], first.get('ctx', {}))}", param=path)


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    return context["expected"] if "expected" in context else _EXPECTED[kind]


def _path(steps: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
