"""OpenAI's custom tools, whose input is plain text: the model sees each as a function with one string."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Required

import pydantic_core
from typing_extensions import TypedDict

from serve_app.apis.shared.body import Filled, Json, Must, about, ignored

_INPUT = "input"


class _Grammar(TypedDict, total=False):
    syntax: Annotated[str, about("lark or regex.")]
    definition: Annotated[str, about("The grammar.")]


class _CustomFormat(_Grammar, total=False):
    type: Required[Annotated[Filled, ignored("there is a grammar or there is none.")]]
    grammar: Annotated[_Grammar, Must("an object with syntax and definition"), about("As chat has it.")]


class _CustomCall(TypedDict, total=False):
    name: Required[Filled]
    input: str


CustomFormat = Annotated[
    _CustomFormat,
    Must("an object with type"),
    about("Told to the model with the description; nothing enforces it."),
]
CustomCall = Annotated[_CustomCall, Must("an object with name and input")]


def as_function(tool: Mapping[str, Any]) -> Json:
    """The function (`name`, `description`, `parameters`) that stands for custom tool `tool`."""
    form = tool.get("format", {})
    grammar = form.get("grammar", form)
    texts = [tool.get("description")]
    if definition := grammar.get("definition"):
        texts.append(f"The input follows this {grammar.get('syntax', '')} grammar:\n{definition}")
    return {
        "name": tool["name"],
        "description": "\n\n".join(filter(None, texts)),
        "parameters": {
            "type": "object",
            "properties": {_INPUT: {"type": "string", "description": "The whole input, as plain text."}},
            "required": [_INPUT],
        },
    }


def as_arguments(text: str) -> Json:
    """The arguments of the function that stands for a custom tool called with `text`."""
    return {_INPUT: text}


class CustomInput:
    """The input of one call of a custom tool, out of its arguments as they come."""

    def __init__(self) -> None:
        self._arguments = ""
        self.text = ""

    def push(self, arguments: str) -> str:
        """Takes a part of the arguments' JSON; what it adds to the input."""
        self._arguments += arguments
        return self._upto(_object(self._arguments).get(_INPUT))

    def finish(self) -> str:
        """What the end adds: of a model that gave its text no or another name, all of it."""
        given = _object(self._arguments)
        if isinstance(given.get(_INPUT), str):
            return ""
        values = list(given.values())
        return self._upto(values[0] if len(values) == 1 else self._arguments)

    def _upto(self, text: Any) -> str:
        if not isinstance(text, str):
            return ""
        added, self.text = text[len(self.text) :], text
        return added


def _object(text: str) -> Json:
    """The JSON object that `text` is, or begins."""
    try:
        value = pydantic_core.from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
