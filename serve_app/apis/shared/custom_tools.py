"""OpenAI's custom tools, whose input is plain text: the model sees each as a function with one string parameter."""

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
    type: Required[Annotated[Filled, ignored("the presence of a grammar decides.")]]
    grammar: Annotated[
        _Grammar,
        Must("an object with syntax and definition"),
        about("The grammar, in the format of /v1/chat/completions."),
    ]


class _CustomCall(TypedDict, total=False):
    name: Required[Filled]
    input: str


CustomFormat = Annotated[
    _CustomFormat,
    Must("an object with type"),
    about("The model sees it in the description; it is not enforced."),
]
CustomCall = Annotated[_CustomCall, Must("an object with name and input")]


def as_function(tool: Mapping[str, Any]) -> Json:
    """Returns the function (`name`, `description`, `parameters`) that represents the custom tool `tool`."""
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
    """Returns the function's arguments for a custom tool called with input `text`."""
    return {_INPUT: text}


class CustomInput:
    """Extracts the input of one custom tool call from its streamed JSON arguments. `text` is the input so far."""

    def __init__(self) -> None:
        self._arguments = ""
        self.text = ""

    def push(self, arguments: str) -> str:
        """Adds a part of the arguments' JSON. Returns what it adds to the input."""
        self._arguments += arguments
        return self._extend_to(_parse_partial(self._arguments).get(_INPUT))

    def finish(self) -> str:
        """Returns the input that only the end of the arguments settles.

        Without an `input` in the arguments, their only value is the input, or all of their text.
        """
        arguments = _parse_partial(self._arguments)
        if isinstance(arguments.get(_INPUT), str):
            return ""
        values = list(arguments.values())
        return self._extend_to(values[0] if len(values) == 1 else self._arguments)

    def _extend_to(self, text: Any) -> str:
        if not isinstance(text, str):
            return ""
        added, self.text = text[len(self.text) :], text
        return added


def _parse_partial(text: str) -> Json:
    """Parses a JSON object that may be cut off; {} for anything else."""
    try:
        value = pydantic_core.from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
