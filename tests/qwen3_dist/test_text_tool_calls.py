"""Tool calls in Qwen3's JSON form: told from content as they come, whatever is in them, and never lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.parsed import OutputParser, Parsed, ToolCallDelta
from qwen3_dist.text.reasoning import Reasoning
from qwen3_dist.text.tool_calls.stream import ToolCalls, new_call_id
from qwen3_dist.text.tool_calls.tags import ToolCallForm, tool_call_form
from tests.splits import however_cut, parsed, pieces_of

BUNDLED = Path(__file__).resolve().parents[2] / "qwen3_dist" / "bundled"
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NASTY = '}{"]\\ \n\t é 👩‍👩‍👧 </tool_call>\n<tool_call> </parameter> </function> \u2028 \x00'


def reader(form: ToolCallForm = "json", tools: list[dict[str, Any]] | None = None) -> ToolCalls:
    numbers = itertools.count()
    return ToolCalls(form, tools or [], lambda: f"call_{next(numbers)}")


class Cut:
    """A parser whose text is cut off by the token limit."""

    def __init__(self, parser: OutputParser) -> None:
        self.push = parser.push
        self._parser = parser

    def finish(self, cut: bool = True) -> Parsed:
        return self._parser.finish(cut)


def cut_off(new_parser: Callable[[], OutputParser]) -> Callable[[], OutputParser]:
    return lambda: Cut(new_parser())


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def call(name: str, arguments: Any, **dumps: Any) -> str:
    return tagged(json.dumps({"name": name, "arguments": arguments}, **dumps))


def calls_in(text: str) -> list[tuple[str | None, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in however_cut(reader, text).tool_calls]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"a": 1}, {"a": True}, {"a": {"b": {}}}, {"a": [[], [1.5e-3]]}, {"a": NASTY[:12]}, {"a": None}],
)
def test_arguments_arrive_as_they_were_written(
    arguments: dict[str, Any], indent: int | None, ensure_ascii: bool
) -> None:
    text = call("f", arguments, indent=indent, ensure_ascii=ensure_ascii)
    assert calls_in(text) == [("f", arguments)]
    assert parsed(reader(), [text]).content == ""


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.dictionaries(st.text(max_size=5), JSON_VALUES | st.just(NASTY), max_size=3),
    sizes=st.lists(st.integers(1, 9), max_size=6),
    ensure_ascii=st.booleans(),
    twice=st.booleans(),
)
def test_any_arguments_arrive_however_they_are_split(
    arguments: dict[str, Any], sizes: list[int], ensure_ascii: bool, twice: bool
) -> None:
    given_as = json.dumps(arguments, ensure_ascii=ensure_ascii) if twice else arguments
    if twice:
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return
    text = call("f", given_as, ensure_ascii=ensure_ascii)
    found = parsed(reader(), pieces_of(text, sizes))
    assert [json.loads(c.arguments) for c in found.tool_calls] == [arguments]
    assert found.content == ""


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\"}"}', {"a": "\n"}),
        ('{"name": "f", "arguments": ""}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f"}', {}),
        ('{"id": [1, {"name": "g"}], "name": "f", "arguments": {"name": "h"}, "x": 1.5}', {"name": "h"}),
        ('{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}, "name": "g"}', {"a": 1}),
        ('{"name": "f", "arguments": {"a": "two\nlines\t\x01"}}', {"a": "two\nlines\t\x01"}),
        (r'{"name": "f", "arguments": {"a": "\d+ \u12 \\"}}', {"a": "\\d+ \\u12 \\"}),
        ('{ "name" :\n"f" ,\n"arguments" : { } }', {}),
    ],
)
def test_members_have_any_order_and_form(body: str, arguments: Any) -> None:
    assert calls_in(tagged(body)) == [("f", arguments)]


def test_the_name_comes_first_and_arguments_as_they_are_generated() -> None:
    calls = reader()
    pieces = ["<tool_call>", "\n", '{"na', 'me": "get', '_it"', ', "arguments": ', '{"a', '": "b', "c"]
    pieces += ["\\", 'n"', ', "d"', ": 1", "2", "}", "}", "\n", "</tool_call>"]
    shown = [part for piece in pieces for part in calls.push(piece).tool_calls]
    assert shown[0] == ToolCallDelta(0, "call_0", "get_it", "")
    assert [part.arguments for part in shown[1:]] == ['{"a": "b', "c", "\\n", '", "d": 12', "}"]
    assert calls.finish() == Parsed()


def test_text_stands_before_between_and_after_calls() -> None:
    f, g = call("f", {}), call("g", {"a": 1})
    found = however_cut(reader, f"Wait.\n{f}\n{g}\n\n And {f}\n")
    assert [c.name for c in found.tool_calls] == ["f", "g", "f"]
    assert [c.id for c in found.tool_calls] == ["call_0", "call_1", "call_2"]
    assert found.content == "Wait.\nAnd"
    assert however_cut(reader, f"\n\n{f}\n{g}\n").content == ""


def test_space_at_the_end_is_content_where_no_call_came() -> None:
    assert however_cut(reader, "\n a \n <tool") == Parsed("\n a \n <tool")
    assert however_cut(reader, " \n") == Parsed(" \n")


@pytest.mark.parametrize(
    "text",
    [
        tagged("not JSON"),
        tagged("[1]"),
        tagged('{"arguments": {"a": 1}}'),
        tagged('{"name": 1, "arguments": {}}'),
        tagged('{"name": "", "arguments": {}}'),
        tagged('{"name": "\\ud800"}'),
        tagged('{"arguments": [1], "name": "f"}'),
        tagged('{"arguments": {"a": 01}, "name": "f"}'),
        tagged('{"arguments": "[1]", "name": "f"}'),
        tagged('{"arguments": "{} {}", "name": "f"}'),
        tagged('{"arguments": "{\\"a\\": \\"1", "name": "f"}'),
        tagged('{"name": "f", "arguments": 5}'),
        tagged('{"name": "f", "arguments": "5"}'),
        tagged('{"name": "f", "arguments": {"a": tru}}'),
        tagged('{"name": "f", "a": 1}'),
        tagged('{"name": "f", "arguments": {}, "a": 1}'),
        tagged('{"name": "f", "args": {"a": 1}}'),
        tagged('{"arguments": {"a": [1}}, "name": "f"}'),
        '<tool_call>\n{"name": "get',
        '<tool_call>\n{"arguments": {"a": 1}, ',
        "<tool_call>\n",
        "a </tool_call> b",
    ],
)
def test_a_malformed_call_comes_back_as_content(text: str) -> None:
    assert however_cut(reader, text) == Parsed(text)


def test_a_call_after_a_malformed_one_is_a_call() -> None:
    found = however_cut(reader, f"<tool_call>\nhm\n{call('f', {})}")
    assert (found.content, [c.name for c in found.tool_calls]) == ("<tool_call>\nhm", ["f"])


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ('{"name": "f", "arguments": {"a": "b', '{"a": "b'),
        ('{"name": "f", "arguments": {"a": "b}} \\u00', '{"a": "b'),
        ('{"name": "f", "arguments": {"a": [1, {"b": 2', '{"a": [1'),
        ('{"name": "f", "arguments": {"a": 1, "b', '{"a": 1'),
        ('{"name": "f", "arguments": {"a": 1, "b": True, "c', '{"a": 1'),
    ],
)
def test_a_call_that_the_limit_cuts_off_is_left_as_it_was_shown(body: str, shown: str) -> None:
    found = however_cut(cut_off(reader), "<tool_call>\n" + body)
    assert [(c.name, c.arguments) for c in found.tool_calls] == [("f", shown)]
    assert found.content == ""


@pytest.mark.parametrize(
    "body", ["", '{"na', '{"name": "f"', '{"name": "f", "arguments": {"a', "{'name': 'f'"]
)
def test_a_call_that_is_cut_off_before_its_first_value_is_content_unless_all_is_calls(body: str) -> None:
    text = "<tool_call>\n" + body
    assert however_cut(cut_off(reader), text) == Parsed(text)
    assert however_cut(cut_off(lambda: ToolCalls("json", [], only_calls=True)), text) == Parsed()


@pytest.mark.parametrize("end", ["}}", "}}\n", "}}\n</tool_c", "}"])
def test_a_call_whose_arguments_are_whole_is_a_call_though_the_limit_cut_its_end(end: str) -> None:
    found = however_cut(cut_off(reader), '<tool_call>\n{"name": "f", "arguments": {"a": "b"' + end)
    assert (found.content, [c.arguments for c in found.tool_calls]) == ("", ['{"a": "b"}'])


def test_the_closing_tag_may_be_missing_or_late() -> None:
    body = '<tool_call>\n{"name": "f", "arguments": {}}'
    for rest, content in [("", ""), ("\n", ""), ("\n</tool", ""), ("} </tool_call>", ""), ("x", "x")]:
        found = however_cut(reader, body + rest)
        assert (found.content, len(found.tool_calls)) == (content, 1)


def test_deep_nesting_is_read_like_any_other() -> None:
    depth = 10_000
    arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
    found = parsed(reader(), [tagged(f'{{"name": "f", "arguments": {arguments}}}')])
    assert [c.arguments for c in found.tool_calls] == [arguments]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "\n", " ", "{", "}", '"', "[", "]", ",", ":", "\\", "1", "true", "null"),
    *('"name"', '"arguments"', '{"name": "f"', ', "arguments": {', "<function=", "f>", "</function>"),
    *("<parameter=", "a>", "</parameter>", "<", "</", "é"),
]


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=2), max_size=20).map("".join),
    sizes=st.lists(st.integers(1, 7), max_size=6),
)
def test_any_text_is_read_however_it_is_split_and_loses_nothing(
    form: ToolCallForm, text: str, sizes: list[int]
) -> None:
    whole = parsed(reader(form), [text])
    assert parsed(reader(form), pieces_of(text, sizes)) == whole
    if not whole.tool_calls:
        assert whole == Parsed(text)


def test_the_template_tells_the_form() -> None:
    assert tool_call_form((BUNDLED / "chat_template.jinja").read_text()) == "json"
    assert tool_call_form("<tool_call>\n<function=example>\n<parameter=a>") == "xml"
    assert tool_call_form("{{ messages }}") is None


def test_ids_differ() -> None:
    first, second = new_call_id(), new_call_id()
    assert first != second and first.startswith("call_") and int(first[5:], 16) >= 0


def test_an_answer_has_thoughts_text_and_calls() -> None:
    f = call("f", {"a": NASTY[:8]})
    text = f"<think>\n{call('not', {})}\n</think>\n\nWait.\n{f}"
    found = however_cut(lambda: AnswerParser(Reasoning("optional"), reader()), text)
    assert (found.reasoning, found.content) == (call("not", {}), "Wait.")
    assert [c.name for c in found.tool_calls] == ["f"]
    without = however_cut(lambda: AnswerParser(Reasoning("optional"), None), text)
    assert without == Parsed(f"Wait.\n{f}", call("not", {}))
