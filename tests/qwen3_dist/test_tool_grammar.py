"""Forced tool calls: what the masks allow is a call of an offered tool in the model's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qwen3_dist.errors import RequestError
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import tool_call_grammar
from tests.walks import BUNDLED, DIRECTORIES, walker_of

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
    grammar = compile_grammar(tool_call_grammar(TOOLS))
    for seed in range(8):
        for text in walker_of(directory).walk(grammar, seed).split("</tool_call>")[:-1]:
            call = json.loads(text.strip().removeprefix("<tool_call>"))
            assert list(call) == ["name", "arguments"]
            if call["name"] == "now":
                assert call["arguments"] == {}
            else:
                Draft202012Validator(WEATHER).validate(call["arguments"])


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("named", "parallel", "text", "allowed"),
    [
        (None, True, PARIS, True),
        (None, True, f"{PARIS}\n{NOW}", True),
        (None, False, NOW, True),
        (None, False, f"{PARIS}\n{NOW}", False),
        ("get_weather", True, PARIS, True),
        ("get_weather", True, f"{PARIS}\n{PARIS}", False),
        ("get_weather", True, NOW, False),
        ("now", True, NOW, True),
        (None, True, "It is sunny.", False),
        (None, True, PARIS.replace("3", '"3"'), False),
        ("now", True, NOW.replace("{}", '{"a": 1}'), False),
    ],
)
def test_json_calls(directory: Path, named: str | None, parallel: bool, text: str, allowed: bool) -> None:
    grammar = compile_grammar(tool_call_grammar(TOOLS, named, parallel))
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
    grammar = compile_grammar(tool_call_grammar(TOOLS, form="xml"))
    assert walker_of(directory).admits(grammar, text) == allowed


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("schema", "value", "allowed"),
    [
        ({"type": "string", "enum": ["red", "blue"]}, "red", True),
        ({"type": "string", "enum": ["red", "blue"]}, "green", False),
        ({"enum": ["red", 3, None]}, "3", True),
        ({"enum": ["red", 3, None]}, "null", True),
        ({"const": 'a "b"'}, 'a "b"', True),
        ({"const": 'a "b"'}, "b", False),
        ({"type": ["string", "integer"]}, "anything", True),
        ({"type": ["string", "integer"], "enum": ["5", "auto"]}, "5", True),  # read as text
        ({"type": ["string", "integer"], "enum": ["5", 3]}, "3", True),
        ({"type": ["string", "integer"], "enum": ["5", 3]}, "5", False),  # would be read as a number
        ({"type": "string", "enum": ["red", None]}, "red", True),
        ({"type": "string", "enum": ["a", "</parameter>\n</function>"]}, "a", True),
    ],
)
def test_xml_values_are_held_to_enum_and_const(
    directory: Path, schema: dict[str, Any], value: str, allowed: bool
) -> None:
    parameters = {"type": "object", "properties": {"city": schema}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    grammar = compile_grammar(tool_call_grammar([tool], form="xml"))
    assert walker_of(directory).admits(grammar, CALL.format(PARAMETER.format("city", value))) == allowed


@pytest.mark.parametrize("key", ["a>b", "a<b", "a\nb", " a ", "", "<think>", "</parameter>"])
def test_a_name_that_xml_cannot_hold_is_refused_or_left_out_where_it_may(key: str) -> None:
    parameters: dict[str, Any] = {"type": "object", "properties": {key: {"type": "string"}}}
    function = {"name": "now", "parameters": parameters}
    for insisting in ({"strict": True}, {"parameters": {**parameters, "required": [key]}}):
        tool = {"type": "function", "function": {**function, **insisting}}
        assert tool_call_grammar([tool], form="json")
        with pytest.raises(
            RequestError, match="'now': the XML format of calls (cannot contain|does not support)"
        ) as refused:
            tool_call_grammar([tool], form="xml")
        assert refused.value.param == "tools" and repr(key) in str(refused.value)
    grammar = compile_grammar(tool_call_grammar([{"type": "function", "function": function}], form="xml"))
    assert walker_of(BUNDLED).admits(grammar, NOW_IN_XML)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_name_beyond_ascii_is_written_as_it_is(directory: Path) -> None:
    grammar = compile_grammar(tool_call_grammar([{"type": "function", "function": {"name": "hé"}}]))
    text = '<tool_call>\n{"name": "hé", "arguments": {}}\n</tool_call>'
    assert walker_of(directory).admits(grammar, text)


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("It is <b>sunny</b>.", True),
        (PARIS, True),
        (f"I look it up.\n\n{PARIS}\n{NOW}", True),
        ("I look it up. " + PARIS.replace("3", '"3"'), False),
        ("What is a <tool_call>?", False),
    ],
)
def test_text_may_stand_ahead_of_calls_or_alone(directory: Path, text: str, allowed: bool) -> None:
    grammar = compile_grammar(tool_call_grammar(TOOLS, text=True))
    assert walker_of(directory).admits(grammar, text) == allowed


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize(
    ("text", "allowed"),
    [(PARIS, True), ('{"sky": "blue"}', True), ('{"sky": 3}', False), (f'{{"sky": "blue"}}{NOW}', False)],
)
def test_json_may_come_in_place_of_calls(directory: Path, text: str, allowed: bool) -> None:
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
    grammar = compile_grammar(tool_call_grammar(TOOLS, otherwise=schema))
    assert walker_of(directory).admits(grammar, text) == allowed
