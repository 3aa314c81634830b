"""Calls as models write them when they miss the form: all arguments of a call, or its whole block as content."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.reasoning import Reasoning
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from tests.qwen3_dist.test_text_tool_calls import call, cut_off, reader, tagged
from tests.splits import cuts, however_cut, parsed

PROPERTIES: dict[str, Any] = {
    "a": {"type": "string"},
    "b": {"type": "string"},
    "n": {"type": "integer"},
    "o": {"type": ["object", "array", "null", "boolean"]},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}},
    }
    for name in ("f", "g")
]
TAG = re.compile("</?tool_call>|<function=|<parameter=|</function>|</parameter>")
Calls = list[tuple[str, Any]]


def answer(form: ToolCallForm, text: str) -> tuple[str, Calls]:
    """Content and calls, which do not depend on how the text is cut."""
    found = however_cut(lambda: reader(form, TOOLS), text)
    return found.content, [(str(c.name), json.loads(c.arguments)) for c in found.tool_calls]


def xml(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return tagged(f"<function={name}>\n{parameters}</function>")


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name":"f","parameters":{"a":"x"}}', {"a": "x"}),
        ('{"name": "f", "arguments": {"a": True, "o": None}}', {"a": True, "o": None}),
        ('{"name": "f", "arguments": {"a": "x", "o": FALSE}}', {"a": "x", "o": False}),
        (
            '{"name": "f", "arguments": {"a": NaN, "n": -Infinity, "o": inf}}',
            {"a": "NaN", "n": "-Infinity", "o": "inf"},
        ),
        ("{'name': 'f', 'arguments': {'a': 'it\\'s', 'b': \"say 'x'\"}}", {"a": "it's", "b": "say 'x'"}),
        ('{name: "f", arguments: {a: "x"}}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x"}}}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x"}}]}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x"}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x"', {"a": "x"}),
        ('{"name":"f","arguments":{"o":{"k":[1,{"c":2}', {"o": {"k": [1, {"c": 2}]}}),
        ('{"name":"f","arguments":{"o":[1,{"c":2}}}', {"o": [1, {"c": 2}]}),
        ('{"name":"f","arguments":{"o":{"x":1}},"b":"y"}}', {"o": {"x": 1}, "b": "y"}),
        ('{"name":"f","arguments":{"o":["x"},"a":"y"}}', {"o": ["x"], "a": "y"}),
        ('{"name":" f ","arguments":{"a":"x"}}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x",}}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"x",,"o":[1,],},}', {"a": "x", "o": [1]}),
        ('{"name":"f","arguments":{"a":"x" "b":"y"}}', {"a": "x", "b": "y"}),
        ('{"name":"f","arguments":{"a":"x\n}}', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"say "hi" now","b":"y"}}', {"a": 'say "hi" now', "b": "y"}),
        ('{"arguments":{"a":True},"name":"f"}', {"a": True}),
        ('{"name":"f","arguments":"{\'a\': \'x\'}"}', {"a": "x"}),
        ('{"type":"function","function":{"name":"f","arguments":{"a":"x"}}}', {"a": "x"}),
        ('{"name": "f", "arguments": {}', {}),
        ('{"name":"f","arguments":{"a":"x"}}</tool_call>', {"a": "x"}),
        ('{"name":"f","arguments":{"a":"</tool_call>","b":True}}', {"a": "</tool_call>", "b": True}),
        ("<function=f>\n<parameter=a>\nx\n</parameter>\n</function>", {"a": "x"}),
    ],
)
def test_json_that_can_be_meant_in_one_way_is_a_call(body: str, arguments: Any) -> None:
    after = call("g", {"b": "second"})
    assert answer("json", f"Hi\n{tagged(body)}\n{after}\nBye") == (
        "Hi\nBye",
        [("f", arguments), ("g", {"b": "second"})],
    )


@pytest.mark.parametrize(
    "body",
    [
        '{"name":"f","arguments":{"a":"x"}}\n{"name":"g","arguments":{"n":1}}',
        '{"name":"f","arguments":{"a":"x"}},\n{"name":"g","arguments":{"n":1}}',
        '{"name":"f","arguments":{"a":"x"}}}\n{"name":"g","arguments":{"n":1}',
        '[{"name":"f","arguments":{"a":"x"}}, {"name":"g","arguments":{"n":1}}]',
        "[{'name':'f','arguments':{'a':'x'}}, {'name':'g','arguments':{'n':1}}]",
    ],
)
def test_a_block_may_hold_several_calls(body: str) -> None:
    assert answer("json", tagged(body)) == ("", [("f", {"a": "x"}), ("g", {"n": 1})])


@pytest.mark.parametrize(
    "body",
    [
        '{"name":"f","a":"x"}',
        '{"name":"f","arguments":{"a" "x"}}',
        '{"name":"f","arguments":{"n":oops}}',
        '{"name":"f","arguments":{oops}}',
        '{"name":"f","arguments":["x"]}',
        '{"name":"f","parameters":"Paris"}',
        '{"arguments":{"a":"x"}}',
    ],
)
def test_what_may_mean_anything_is_content_and_no_call_after_it_is_lost(body: str) -> None:
    after = call("g", {"b": "second"})
    assert answer("json", f"{tagged(body)}\n{after}") == (tagged(body), [("g", {"b": "second"})])


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name":"f","arguments":{"a":"x", oops}}', '{"a":"x", oops}}'),
        ('{"name":"f","arguments":{"a":"x","b":"y, "n":1}}', '{"a":"x","b":"y, "n":1}}'),
        ('{"name":"f","arguments":{"o":["x"},"a":"y"}', '{"o":["x"},"a":"y"}'),
        ('{"name":"f","arguments":{"a":"x","n":tru', '{"a":"x","n":tru'),
    ],
)
def test_what_cannot_be_mended_after_a_part_was_shown_follows_as_it_is(body: str, arguments: str) -> None:
    found = however_cut(reader, f"{tagged(body)}\n{call('g', {'b': 'second'})}")
    assert [(c.name, c.arguments) for c in found.tool_calls] == [("f", arguments), ("g", '{"b": "second"}')]
    assert found.content == ""


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("<function=f>\n<parameter=a>\nhello\n</function>", {"a": "hello"}),
        ("<function=f>\n<parameter=a>\nhello\n<parameter=b>\nworld\n</parameter>\n</function>", None),
        ("<function=f>\n<parameter=a>\nhello\n<parameter=b>\nworld\n</function>", None),
        ("<function=f>\n<parameter=a>\nhello\n</parameter>\n<parameter=b>\nworld\n</parameter>", None),
        ("<function=f>\n<parameter=a>\nhello\n<parameter=b>\nworld", None),
        (
            "<function=f>\n<parameter=a>\nhello\n</parameter>\n<parameter=b>\nworld\n</parameter\n</function",
            None,
        ),
        ("<function=f>\n<parameter=a\nhello\n</parameter>\n</function>", {"a": "hello"}),
        ("<function=f\n<parameter=a>\nhello\n</parameter>\n</function>", {"a": "hello"}),
        ("< function = f >\n< parameter = a >\nhello\n</ parameter >\n</ function >", {"a": "hello"}),
        ("<function=f>\n<parameter=a>\nhello\n</parameter>\nand\n<parameter=b>\nworld\n</function>", None),
        (
            "<function=f>\n<parameter=n>\n'1'\n<parameter=o>\n{'k': True}\n</function>",
            {"n": 1, "o": {"k": True}},
        ),
        ('<function=f>\n{"a": "hello"}\n</function>', {"a": "hello"}),
        ("<function=f></function></function>", {}),
        ('{"name": "f", "arguments": {"a": "hello"}}', {"a": "hello"}),
    ],
)
def test_xml_without_all_tags_is_a_call(body: str, arguments: Any) -> None:
    expected = {"a": "hello", "b": "world"} if arguments is None else arguments
    assert answer("xml", f"Hi\n{tagged(body)}\n{xml('g', b='second')}\nBye") == (
        "Hi\nBye",
        [("f", expected), ("g", {"b": "second"})],
    )


def test_a_function_without_the_outer_tag_may_lack_tags_too() -> None:
    bare = "<function=f>\n<parameter=a>\nhello\n</function>\nBye"
    assert answer("xml", bare) == ("Bye", [("f", {"a": "hello"})])


@pytest.mark.parametrize(
    "body",
    [
        "<function=f>\noops\n</function>",
        "<function=f>\noops\n<parameter=a>\nx\n</parameter>\n</function>",
        "<function=f>\n<parameter=>\nx\n</parameter>\n</function>",
        "<function={{ name }}>\n</function>",
        '{"name": "unknown", "arguments": {}}',
        "<parameter=a>\nx\n</parameter>",
    ],
)
def test_xml_that_is_no_call_is_content(body: str) -> None:
    after = xml("g", b="second")
    assert answer("xml", f"{tagged(body)}\n{after}") == (tagged(body), [("g", {"b": "second"})])


def test_a_value_may_hold_whole_calls() -> None:
    inner = xml("f", a="x", b="y")
    assert answer("xml", xml("f", a=f"Write\n{inner}\nthere", b="z")) == (
        "",
        [("f", {"a": f"Write\n{inner}\nthere", "b": "z"})],
    )


@pytest.mark.parametrize("form", ["json", "xml"])
def test_a_call_in_thoughts_that_never_end_is_a_call(form: ToolCallForm) -> None:
    made = call("f", {"a": "x"}) if form == "json" else xml("f", a="x")
    found = however_cut(thinker(form), f"Let me.\n\n{made}\n")
    assert (found.reasoning, found.content) == ("Let me.", "")
    assert [(c.name, json.loads(c.arguments)) for c in found.tool_calls] == [("f", {"a": "x"})]


@pytest.mark.parametrize("form", ["json", "xml"])
@pytest.mark.parametrize("end", ["", "\n</think>\n\nNo."])
def test_thoughts_that_end_or_are_cut_off_keep_their_drafts(form: ToolCallForm, end: str) -> None:
    draft = call("f", {"a": "x"}) if form == "json" else xml("f", a="x")
    text = f"Let me.\n\n{draft}\nOr <tool_call> not"
    new_parser = thinker(form) if end else cut_off(thinker(form))
    assert however_cut(new_parser, text + end) == Parsed("No." if end else "", text)


def test_thoughts_that_only_mention_a_call_are_shown_as_they_come() -> None:
    parser = AnswerParser(Reasoning("open"), reader())
    pieces = ["I could <tool_", "call> it", ' or <tool_call>\n{"na', "me", "\n</think>\n\nNo"]
    shown = [parser.push(piece).reasoning for piece in pieces]
    assert shown == ["I could ", "<tool_call> it", " or ", "", '<tool_call>\n{"name']


def thinker(form: ToolCallForm) -> Any:
    return lambda: AnswerParser(Reasoning("open"), reader(form, TOOLS))


# What a model may make of a call, and the arguments that it still means.
WORDS = st.sampled_from(["x", "two\nlines", "f({x: [1]})", "it's", "<b>", "\\d+", "é", ""])
ARGUMENTS = st.fixed_dictionaries(
    {"a": WORDS},
    optional={
        "b": WORDS,
        "n": st.integers(-3, 3),
        "o": st.sampled_from([None, True, {"k": [1, None]}, [False, {"c": "d"}]]),
    },
)


@st.composite
def near_json(draw: st.DrawFn) -> tuple[str, Calls]:
    """One block of near-JSON calls that can be meant in one way, and what they are."""
    meant = draw(st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), min_size=1, max_size=2))
    written = []
    for name, arguments in meant:
        key = draw(st.sampled_from(["arguments", "parameters"]))
        object_ = {"name": name, key: arguments}
        if draw(st.booleans()):
            object_ = {key: arguments, "name": name}
        python = draw(st.booleans())
        text = repr(object_) if python else json.dumps(object_, indent=draw(st.sampled_from([None, 1])))
        if draw(st.booleans()):
            text = text[:-1] + draw(st.sampled_from([",}", " }", "}}", "}]"]))
        written.append(text)
    body = draw(st.sampled_from(["\n", ", ", ",\n", ""])).join(written)
    if draw(st.booleans()):
        body = f"[{body}]"
    elif draw(st.booleans()) and body.endswith("}"):
        body = body[:-1]
    return tagged(body), meant


@st.composite
def near_xml(draw: st.DrawFn) -> tuple[str, Calls]:
    """One block of a near-XML call that can be meant in one way, and what it is."""
    name, arguments = draw(st.tuples(st.sampled_from("fg"), ARGUMENTS))
    body = f"<function={name}{draw(st.sampled_from(['>', '']))}\n"
    for key, value in arguments.items():
        spelled = repr(value) if draw(st.booleans()) else json.dumps(value)
        spelled = value if isinstance(value, str) else spelled
        end = draw(st.sampled_from(["\n</parameter>", "\n</parameter>", "", "\n</parameter", "</parameter>"]))
        body += f"<parameter={key}{draw(st.sampled_from(['>', '>', '']))}\n{spelled}{end}\n"
    end = draw(st.sampled_from(["</function>", "", "</function", "</function>\n</function>"]))
    return tagged(body.rstrip("\n") + f"\n{end}" * bool(end)), [(name, arguments)]


@pytest.mark.parametrize(("form", "blocks"), [("json", near_json()), ("xml", near_xml())])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_near_misses_keep_all_arguments_however_they_are_split(
    form: ToolCallForm, blocks: st.SearchStrategy[tuple[str, Calls]], data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(blocks, min_size=1, max_size=2))
    text = "Hi\n" + "\n".join(block for block, _ in drawn)
    found = parsed(reader(form, TOOLS), [text])
    assert found.content == "Hi"
    calls = [(c.name, json.loads(c.arguments)) for c in found.tool_calls]
    assert calls == [meant for _, of_block in drawn for meant in of_block]
    holds_over_every_split(form, text, found)


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_misspelling_gives_arguments_or_content_however_it_is_split(
    form: ToolCallForm, data: st.DataObject
) -> None:
    arguments = data.draw(ARGUMENTS)
    good = call("f", arguments) if form == "json" else xml("f", **{k: _text(v) for k, v in arguments.items()})
    at = data.draw(st.integers(len("<tool_call>"), len(good) - len("</tool_call>")))
    added = data.draw(st.sampled_from([*"{}[]\",:'<>/ \n\\x", ""]))
    written = good[:at] + added + good[at + (not added) :]
    text = written + "\n" + (call("g", {"b": "y"}) if form == "json" else xml("g", b="y"))
    found = parsed(reader(form, TOOLS), [text])
    *others, last = [(c.name, c.arguments) for c in found.tool_calls]
    assert last == ("g", '{"b": "y"}')
    assert len(others) <= 1 and all(arguments != "{}" for _, arguments in others)
    assert not TAG.search(found.content) if others else found.content == written
    assert not any("tool_call>" in arguments for _, arguments in others)
    holds_over_every_split(form, text, found)


def holds_over_every_split(form: ToolCallForm, text: str, expected: Parsed) -> None:
    for pieces in (text, *cuts(text)):
        assert parsed(reader(form, TOOLS), pieces) == expected, pieces


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
