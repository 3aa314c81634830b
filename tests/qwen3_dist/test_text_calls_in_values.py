"""Values that hold calls, as files about tool calling do: none of those is made."""

from __future__ import annotations

import json

import pytest

from qwen3_dist.text.parsed import Parsed
from tests.qwen3_dist.test_text_near_miss_calls import TOOLS, Calls, answer, xml
from tests.qwen3_dist.test_text_tool_calls import call, reader, tagged
from tests.splits import however_cut, parsed

RAW = '<tool_call>\n{"name": "g", "arguments": {"a": "rm"}}\n</tool_call>'


@pytest.mark.parametrize(
    "value",
    [
        f"Use this:\n{RAW}\nDone.",
        f'print("{RAW}")',
        f"{RAW}{RAW}",
        f'Say "hi", "ho":\n{RAW}\n or {{"x": 1}}\n{RAW}',
        "\n".join([RAW] * 6),
        f"<tool_call> is {RAW}</tool_call>",
    ],
)
@pytest.mark.parametrize("before", ["", '"o":True,'])
def test_calls_in_a_string_whose_quotes_are_not_escaped_are_not_made(value: str, before: str) -> None:
    shown = f'{{{before}"b":"y","a":"{value}"}}}}'
    body = f'{{"name":"f","arguments":{shown}'
    found = however_cut(lambda: reader("json", TOOLS), f"{tagged(body)}\n{call('g', {'b': 'second'})}")
    made = [(c.name, c.arguments) for c in found.tool_calls]
    assert made[-1] == ("g", '{"b": "second"}')
    if before:
        assert (found.content, made[:-1]) == (tagged(body), [])
    else:
        assert (found.content, made[:-1]) == ("", [("f", shown)])


def test_a_string_may_hold_any_number_of_calls_in_json() -> None:
    arguments = {"a": "\n".join([RAW] * 12), "b": "<tool_call> alone"}
    found = parsed(reader("json", TOOLS), [f"{call('f', arguments)}\n{call('g', {'b': 'second'})}"])
    assert [json.loads(c.arguments) for c in found.tool_calls] == [arguments, {"b": "second"}]


@pytest.mark.parametrize("inner", [RAW, xml("g", a="rm")])
def test_a_value_may_hold_any_number_of_calls_in_xml(inner: str) -> None:
    value = "\n".join(["Examples:", *[inner] * 12, "Done"])
    text = f"{xml('f', a=value, b='y')}\n{xml('g', b='second')}"
    found = parsed(reader("xml", TOOLS), text)
    assert found == parsed(reader("xml", TOOLS), [text])
    assert [json.loads(c.arguments) for c in found.tool_calls] == [{"a": value, "b": "y"}, {"b": "second"}]


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('{"name":"f","arguments":{"a":"x"}}', [("f", {"a": "x"})]),
        ('{"name":"f","arguments":{"a":"x"', [("f", {"a": "x"})]),
        (
            '{"name":"f","arguments":{"a":"the <tool_call> tag","o":True}}',
            [("f", {"a": "the <tool_call> tag", "o": True})],
        ),
    ],
)
def test_a_call_without_its_closing_tag_takes_in_no_call_after_it(body: str, calls: Calls) -> None:
    after = call("g", {"b": "second"})
    assert answer("json", f"<tool_call>\n{body}\n{after}") == ("", [*calls, ("g", {"b": "second"})])


def test_an_xml_value_may_hold_thousands_of_tags() -> None:
    value = "</parameter> x\n" * 2000
    found = parsed(reader("xml", TOOLS), [xml("f", a=value, b="y")])
    assert [json.loads(c.arguments) for c in found.tool_calls] == [{"a": value, "b": "y"}]


def test_a_block_with_too_many_tags_to_look_at_is_content() -> None:
    text = tagged("<function=f>\n" + "<parameter=a>\n" * 30_000 + "</function>")
    assert parsed(reader("xml", TOOLS), [text]) == Parsed(text)


def test_an_integer_is_read_exactly_though_it_is_written_with_a_point() -> None:
    assert answer("xml", xml("f", n="9007199254740993.0")) == ("", [("f", {"n": 9007199254740993})])
