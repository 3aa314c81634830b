"""A JSON body's fields, read by name, kind and default.

A null counts as absent, an unknown field is ignored, a known field of the wrong type or range is a
RequestError that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError

# Fields of OpenAI's interface (and its usual extensions) that would change the answer but are not
# built: the values that ask for nothing, by name.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "prompt_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
}


class Fields:
    """A JSON object whose fields are read by name, kind and default; null is absent."""

    @classmethod
    def of_body(cls, body: bytes) -> Fields:
        """The fields of a JSON body. Raises RequestError where it is no JSON object."""
        try:
            raw = pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RequestError(f"the request body is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise RequestError("the request body must be a JSON object")
        return cls(raw)

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = {name: value for name, value in raw.items() if value is not None}
        for name, neutral in NOT_BUILT.items():
            if name in self._raw and self._raw[name] not in neutral:
                raise RequestError(
                    f"{name}={short(self._raw[name])} is not supported yet; leave it out", param=name
                )

    def has(self, name: str) -> bool:
        return name in self._raw

    def read(self, name: str, ok: Callable[[Any], bool], expected: str, *default: Any) -> Any:
        """Field `name`, or the default. Raises RequestError if it is not `ok`, or absent without a default."""
        if name not in self._raw and default:
            return default[0]
        if name not in self._raw:
            raise RequestError(f"{name} is required: {expected}", param=name)
        value = self._raw[name]
        if not ok(value):
            raise RequestError(f"{name} must be {expected}, not {short(value)}", param=name)
        return value

    def present(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: self._raw[name] for name in names if name in self._raw}


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(kind: type) -> Callable[[Any], bool]:
    ok = is_int if kind is int else is_a(kind)
    return lambda value: isinstance(value, list) and bool(value) and all(map(ok, value))


def is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)
