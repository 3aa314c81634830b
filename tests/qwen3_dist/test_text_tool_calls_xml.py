"""Tool calls in Qwen3-Coder's XML form: values get the types that the tools' schemas give them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.text.parsed import Parsed, ToolCallDelta
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_schemas import ToolSchemas
from tests.qwen3_dist.test_text_tool_calls import JSON_VALUES, NASTY, cut_off, reader
from tests.splits import however_cut, parsed, pieces_of

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "flag": {"type": "boolean"},
    "thing": {"type": "object"},
    "items": {"type": "array"},
    "either_thing": {"anyOf": [{"type": "object"}, {"type": "string"}]},
    "nothing": {"type": "null"},
    "either": {"type": ["integer", "string"]},
    "colour": {"enum": ["red", "1"]},
    "size": {"type": ["string", "integer", "null"], "enum": ["5", "auto"]},
    "referred": {"$ref": "#/$defs/count"},
    "free": {},
    "both": {"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]},
    "nullable": {"type": "integer", "nullable": True},
    "loop": {"$ref": "#/properties/loop"},
    "odd": 3,
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "$defs": {"count": {"type": "integer"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}


def coder() -> ToolCalls:
    return reader("xml", [TOOL, {"type": "function", "function": {"name": "bare"}}])


def function(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<function={name}>\n{parameters}</function>"


def call(name: str, **values: str) -> str:
    return f"<tool_call>\n{function(name, **values)}\n</tool_call>"


def arguments_of(text: str) -> Any:
    [found] = however_cut(coder, text).tool_calls
    return json.loads(found.arguments)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("text", "", ""),
        ("text", "\n two\n\n", "\n two\n\n"),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "nullify", "nullify"),
        ("maybe", "Non", "Non"),
        ("maybe", "", ""),
        ("count", "5", 5),
        ("count", " 5 ", 5),
        ("count", "5.0", 5),
        ("count", "5.5", "5.5"),
        ("count", '"5"', 5),
        ("count", "+07", 7),
        ("count", "+9007199254740993.0", 9007199254740993),
        ("count", "9007199254740993.", 9007199254740993),
        ("count", "9007199254740993.5", "9007199254740993.5"),
        ("count", "null", None),
        ("count", "None", None),
        ("count", "five", "five"),
        ("share", "1", 1),
        ("share", "1e-3", 0.001),
        ("share", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "TRUE", True),
        ("flag", "1", True),
        ("flag", "'false'", False),
        ("flag", "yes", "yes"),
        ("thing", '{\n"a": [1, "\\n"]\n}', {"a": [1, "\n"]}),
        ("thing", "{oops", "{oops"),
        ("thing", "{'a': (1)}", "{'a': (1)}"),
        ("thing", "{'a': [True, None]}", {"a": [True, None]}),
        ("thing", '{"a": 1}}', {"a": 1}),
        ("thing", "\"{'a': 1}\"", {"a": 1}),
        ("either_thing", "{'a': True}", {"a": True}),
        ("either_thing", "True", "True"),
        ("items", "['a', 1,]", ["a", 1]),
        ("items", "[]", []),
        ("nothing", "null", None),
        ("either", "5", 5),
        ("either", '"5"', '"5"'),
        ("either", "a", "a"),
        ("colour", "1", "1"),
        ("size", "5", "5"),
        ("referred", "5", 5),
        ("free", "[1]", [1]),
        ("free", "5", 5),
        ("free", "a b", "a b"),
        ("free", '"a"', '"a"'),
        ("both", "5", 5),
        ("nullable", "None", None),
        ("loop", "5", 5),
        ("odd", "5", 5),
        ("unknown", "5", "5"),
    ],
)
def test_values_have_the_types_of_the_schema(key: str, text: str, value: Any) -> None:
    found = arguments_of(call("f", **{key: text}))
    assert found == {key: value} and type(found[key]) is type(value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/o", "$defs": {"o": PARAMETERS}},
        {"$ref": "#/x~1y/0", "x/y": [PARAMETERS]},
        {"allOf": [{"$ref": "#/$defs/o"}], "$defs": {"o": {"$ref": "#/$defs/p"}, "p": PARAMETERS}},
        {"anyOf": [PARAMETERS, {"properties": {"other": {}}}], "properties": {"other": {"type": "string"}}},
        {"oneOf": [PARAMETERS, {"properties": {"count": {"type": "boolean"}}}]},
        {"allOf": [{"$ref": "#"}, PARAMETERS]},
    ],
)
def test_values_have_the_types_of_schemas_that_stand_elsewhere(parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found = however_cut(lambda: reader("xml", [tool]), call("f", count="5", text="5", other="5", flag="1"))
    assert json.loads(found.tool_calls[0].arguments) == {"count": 5, "text": "5", "other": "5", "flag": True}


def test_schemas_that_refer_to_each_other_often_are_read_at_once() -> None:
    refs = [{"$ref": f"#/$defs/{i}"} for i in range(60)]
    deep = {str(i): {"anyOf": refs, "allOf": refs} for i in range(60)}
    parameters = {"$defs": deep, "allOf": refs, "properties": {"a": {"allOf": refs}, "b": {"anyOf": refs}}}
    schemas = ToolSchemas([{"name": "f", "parameters": parameters}])
    assert schemas.types("f", "a") is None and schemas.types("f", "b") is None
    assert schemas.choices("f", "b") == [] and schemas.arguments("f").required == frozenset()


@settings(max_examples=200, deadline=None)
@given(
    text=st.text() | st.just(NASTY.replace("</function>", "")),
    thing=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
    number=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    sizes=st.lists(st.integers(1, 9), max_size=6),
)
def test_any_arguments_arrive_however_they_are_split(
    text: str, thing: dict[str, Any], number: float, sizes: list[int]
) -> None:
    written = call("f", text=text, thing=json.dumps(thing), share=json.dumps(number))
    found = parsed(coder(), pieces_of(written, sizes))
    [made] = found.tool_calls
    assert json.loads(made.arguments) == {"text": text, "thing": thing, "share": number}
    assert found.content == ""


def test_text_is_shown_as_it_is_generated_and_other_values_whole() -> None:
    calls = coder()
    pieces = ["<tool_call>", "\n<function=", "f", ">", "\n", "<parameter=text>", "\n", "a", '"b', "\n", "c"]
    pieces += ["\n</para", "meter>", "\n<parameter=count>", "\n", "1", "2", "\n</parameter>", "\n</function>"]
    shown = [part for piece in pieces for part in calls.push(piece).tool_calls]
    assert (shown[0].id, shown[0].name, shown[0].arguments) == ("call_0", "f", "")
    assert [part.arguments for part in shown[1:]] == ['{"text": "a', '\\"b', "\\nc", '"']
    # The end of a call may be text of its value, until something else follows.
    assert calls.push("\n</tool_call>") == Parsed()
    assert calls.finish() == Parsed(tool_calls=(ToolCallDelta(0, arguments=', "count": 12}'),))


def test_a_value_may_hold_its_own_end_tag() -> None:
    text = "a</parameter>b\n</parameter>\n\nc</function>"
    assert arguments_of(call("f", text=text, count="1")) == {"text": text, "count": 1}


def test_several_calls_and_text_around_them() -> None:
    two_in_one = f"<tool_call>{function('g')}{function('f', count='1')}</tool_call>"
    found = however_cut(coder, f"Now:\n{call('f', text='a')}\n{call('bare')}\n{two_in_one}\nSo.")
    assert [(c.name, c.arguments) for c in found.tool_calls] == [
        ("f", '{"text": "a"}'),
        ("bare", "{}"),
        ("g", "{}"),
        ("f", '{"count": 1}'),
    ]
    assert found.content == "Now:\nSo."


def test_the_outer_tag_may_be_missing_where_the_name_is_a_tools() -> None:
    found = however_cut(coder, f"{function('f', text='a')}\n</tool_call>")
    assert (found.content, [c.name for c in found.tool_calls]) == ("", ["f"])
    prose = "Write <function=name> there, " + function("other", a="1")
    assert however_cut(coder, prose) == Parsed(prose)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot a call\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=a<b>",
        "<tool_call>\n<function=f",
        "<tool_call>\n<func",
        "<tool_call>" + "\n" * 20,
    ],
)
def test_a_malformed_call_comes_back_as_content(text: str) -> None:
    assert however_cut(coder, text) == Parsed(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<parameter=text>\nab\n</par", '{"text": "ab'),
        ("<parameter=text>\na\n</parameter>\n<parameter=count>\n1", '{"text": "a"'),
        ("<parameter=text>\na\n</parameter>\n<param", '{"text": "a'),
    ],
)
def test_a_call_that_the_limit_cuts_off_is_left_as_it_was_shown(text: str, shown: str) -> None:
    found = however_cut(cut_off(coder), "<tool_call>\n<function=f>\n" + text)
    assert [(c.name, c.arguments) for c in found.tool_calls] == [("f", shown)]
    assert found.content == ""


@pytest.mark.parametrize("text", ["", "<param", "<parameter=text>\n", "<parameter=count>\n1"])
def test_a_call_that_is_cut_off_before_its_first_value_is_content(text: str) -> None:
    text = "<tool_call>\n<function=f>\n" + text
    assert however_cut(cut_off(coder), text) == Parsed(text)


def test_a_tool_without_a_usable_schema_takes_text() -> None:
    assert arguments_of(call("bare", a="5")) == {"a": "5"}
