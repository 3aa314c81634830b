"""Forced tool calls: what the masks allow is a call of an offered tool in the model's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qwen3_dist.engine.grammar import compile_grammar
from qwen3_dist.engine.tool_grammar import tool_call_grammar
from qwen3_dist.errors import RequestError
from tests.walks import DIRECTORIES, walker_of

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
PARAMETER = "<parameter={}>\n{}\n</parameter>\n"
CALL = "<tool_call>\n<function=get_weather>\n{}</function>\n</tool_call>"
NOW_IN_XML = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_walks_are_calls_whose_arguments_follow_the_schema(directory: Path) -> None:
    grammar = compile_grammar(tool_call_grammar(TOOLS, "required"))
    for seed in range(8):
        for text in walker_of(directory).walk(grammar, seed).split("</tool_call>")[:-1]:
            call = json.loads(text.strip().removeprefix("<tool_call>"))
            assert list(call) == ["name", "arguments"]
            schema = WEATHER if call["name"] == "get_weather" else {"type": "object"}
            Draft202012Validator(schema).validate(call["arguments"])


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("choice", "parallel", "text", "allowed"),
    [
        ("required", True, PARIS, True),
        ("required", True, f"{PARIS}\n{NOW}", True),
        ("required", False, NOW, True),
        ("required", False, f"{PARIS}\n{NOW}", False),
        ("get_weather", True, PARIS, True),
        ("get_weather", True, NOW, False),
        ("now", True, NOW, True),
        ("required", True, "It is sunny.", False),
        ("required", True, PARIS.replace("3", '"3"'), False),
    ],
)
def test_json_calls(directory: Path, choice: str, parallel: bool, text: str, allowed: bool) -> None:
    grammar = compile_grammar(tool_call_grammar(TOOLS, choice, parallel))
    assert walker_of(directory).admits(grammar, text) == allowed


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (CALL.format(PARAMETER.format("city", "Paris")), True),
        (CALL.format(PARAMETER.format("city", 'a <b> {} "q"\n\n</c>\n')), True),
        (CALL.format(PARAMETER.format("city", "Paris") + PARAMETER.format("days", "3")), True),
        (CALL.format(PARAMETER.format("city", "x") + PARAMETER.format("place", '{"x": 1.5}')), True),
        (CALL.format(PARAMETER.format("city", "Paris") + PARAMETER.format("days", "three")), False),
        (CALL.format(PARAMETER.format("days", "3")), False),
        (CALL.format(""), False),
        (NOW_IN_XML, True),
        (f"{CALL.format(PARAMETER.format('city', 'Paris'))}\n{NOW_IN_XML}", True),
        (NOW, False),
    ],
)
def test_xml_calls(directory: Path, text: str, allowed: bool) -> None:
    grammar = compile_grammar(tool_call_grammar(TOOLS, "required", form="xml"))
    assert walker_of(directory).admits(grammar, text) == allowed


def test_a_tool_whose_schema_is_beyond_the_library_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "sausage"}}}
    with pytest.raises(RequestError, match="sausage"):
        compile_grammar(tool_call_grammar([tool], "required"))
