r"""Calls whose text could mean two things: what evidence decides, and where none does, the block stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.qwen3_dist.test_text_near_miss_calls import PROPERTIES, TOOLS, answer, xml
from tests.qwen3_dist.test_text_tool_calls import call, reader, tagged
from tests.splits import however_cut, parsed

SECOND = call("g", {"b": "second"})


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ('{"o":["ls" "-l"]}', {"o": ["ls", "-l"]}),
        ('{"a":"x","o":["ls" "-l"\n"-a", "."]}', {"a": "x", "o": ["ls", "-l", "-a", "."]}),
        ("{'o':['ls' '-l']}", {"o": ["ls", "-l"]}),
        ('{"o":["say "hi" now" "x"]}', {"o": ['say "hi" now', "x"]}),
        (r'{"a":"C:\new\Users","b":"x"}', {"a": r"C:\new\Users", "b": "x"}),
        (r'{"a":"C:\Users\new\bin"}', {"a": r"C:\Users\new\bin"}),
        (r'{"a":"C:\\new\Users"}', {"a": r"C:\new\Users"}),
        (r'{"a":"C:\new\temp"}', {"a": "C:\new\temp"}),
        (r'{"a":"\bword\d+\b"}', {"a": r"\bword\d+\b"}),
        (r'{"a":"\frac{\sqrt 2}{\\n}"}', {"a": r"\frac{\sqrt 2}{\n}"}),
        (r'{"a":"if x:\n    re.match(\"\d\", x)\ny()\n"}', {"a": 'if x:\n    re.match("\\d", x)\ny()\n'}),
        (r'{"o":{"C:\new\Users":1}}', {"o": {r"C:\new\Users": 1}}),
    ],
)
def test_what_evidence_decides_is_a_call(arguments: str, meant: Any) -> None:
    body = f'{{"name":"f","arguments":{arguments}}}'
    assert answer("json", f"{tagged(body)}\n{SECOND}") == ("", [("f", meant), ("g", {"b": "second"})])


@pytest.mark.parametrize(
    "arguments",
    [
        '{"o":["ls""-l"]}',
        '{"o":["print(" ", " ")"]}',
        '{"o":["ls" 1]}',
        r'{"a":"cd C:\new\Users"}',
        r'{"a":"\nabla \alpha"}',
        r'{"a":"import re\nre.match(\"\d\", x)"}',
        r'{"a":"C:\temp\"}',
        r'{"a":"C:\temp\","b":"x"}',
    ],
)
def test_what_no_evidence_decides_is_no_call(arguments: str) -> None:
    for end in ("}", ""):
        body = f'{{"name":"f","arguments":{arguments}{end}'
        found = however_cut(reader, f"{tagged(body)}\n{SECOND}")
        first, second = (c.arguments for c in found.tool_calls)
        assert (found.content, second) == ("", '{"b": "second"}')
        with pytest.raises(ValueError):
            json.loads(first)
    late = f'{{"arguments":{arguments},"name":"f"}}'
    assert answer("json", f"{tagged(late)}\n{SECOND}") == (tagged(late), [("g", {"b": "second"})])


@pytest.mark.parametrize("form", ["json", "xml"])
@pytest.mark.parametrize("opening", ["<tool_call>\n", "<tool_call>", "<tool_call>\n<tool_call>\n\n"])
def test_an_opening_tag_may_be_doubled(form: Any, opening: str) -> None:
    made = call("f", {"a": "x"}) if form == "json" else xml("f", a="x")
    for end in ("", "\n</tool_call>"):
        assert answer(form, f"Hi\n{opening}{made}{end}\nBye") == ("Hi\nBye", [("f", {"a": "x"})])
    assert answer(form, f"Hi {opening}not a call</tool_call>") == (f"Hi {opening}not a call</tool_call>", [])


@pytest.mark.parametrize(
    "body",
    [
        '[{"name":"f","arguments":{"a":"x"}}, {"bad":1}]',
        '[{"name":"f","arguments":{"a":"x"}}, oops]',
        '[{"bad":1}, {"name":"f","arguments":{"a":"x"}}]',
        '{"name":"f","arguments":{"o":None}}\n{"bad":1}',
    ],
)
def test_a_block_of_calls_and_other_json_is_content_as_a_whole(body: str) -> None:
    assert answer("json", f"{tagged(body)}\n{SECOND}") == (tagged(body), [("g", {"b": "second"})])


def test_a_call_that_was_shown_before_other_json_is_left_as_it_is_written() -> None:
    rest = '{"a":"x"}}\n{"bad":1}'
    found = however_cut(reader, tagged(f'{{"name":"f","arguments":{rest}'))
    assert (found.content, [c.arguments for c in found.tool_calls]) == ("", [rest])


def test_prose_after_a_call_in_its_block_is_content() -> None:
    body = '{"name":"f","arguments":{"a":"x"}}\nThat is all.'
    assert answer("json", tagged(body)) == ("That is all.", [("f", {"a": "x"})])


CODE = [
    'S = "</function>"\nT = "<tool_call>"',
    "</function>",
    "<tool_call>",
    "</tool_call>\n<tool_call>",
    'print("<parameter=")',
    're.compile("<parameter=(.*?)>")',
    're.compile("</parameter><parameter=(.*?)>(.*?)</parameter>")',
    'f"<parameter={key}>{value}</parameter>"',
    're.findall(r"<function=(.*?)>", s)',
    'echo "</parameter>\n</function>"',
    "a\n</function>\n</tool_call>\nb",
    'OPEN = "<parameter=a>"',
    's.split("</parameter>")',
    '"<parameter=a>x</parameter>\\n<parameter=b>y</parameter>"',
    "s/<parameter=a>/<parameter=b>/",
    "</parameter>\n</parameter>",
    "Write `<parameter=a>` first, `</function>` last",
    "<function=f>\n<parameter=a>\nx\n</parameter>\n</function>",
    "if x:\n    </function>\n  y",
]


@pytest.mark.parametrize("value", CODE)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_xml_value_may_hold_tags_that_are_code(value: str, is_first: bool) -> None:
    values = {"a": value, "b": "path"} if is_first else {"b": "path", "a": value}
    text = f"Hi\n{xml('f', **values)}\n{xml('g', b='second')}\nBye"
    assert answer("xml", text) == ("Hi\nBye", [("f", values), ("g", {"b": "second"})])


@pytest.mark.parametrize(
    ("key", "is_key"), [("a", True), ("c", False), ("(.*?)", False), ("{key}", False), ("", False)]
)
def test_a_key_that_a_closed_schema_lacks_is_text_unless_it_stands_on_its_own_line(
    key: str, is_key: bool
) -> None:
    parameters = {"type": "object", "properties": PROPERTIES, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = xml("f", b=f'x("</parameter> <parameter={key}>") y')
    found = parsed(reader("xml", tools), text)
    [made] = found.tool_calls
    assert (len(json.loads(made.arguments)) == 1) is not is_key
    placed = parsed(reader("xml", tools), xml("f", b="x", c="y"))
    assert json.loads(placed.tool_calls[0].arguments) == {"b": "x", "c": "y"}


END = "\n</parameter>\n</function>\n</tool_call>\n"


def test_a_value_that_holds_the_whole_end_of_a_call_ends_there_and_no_call_in_it_is_made() -> None:
    inner = f"{END}<tool_call>\n<function=g>\n<parameter=a>\nrm\n</parameter>\n</function>\n</tool_call>"
    after = xml("g", b="second")
    found = however_cut(lambda: reader("xml", TOOLS), f"{xml('f', a=inner, b='path')}\n{after}")
    first, *others, last = found.tool_calls
    assert (first.name, first.arguments) == ("f", '{"a": ""}')
    assert (last.name, last.arguments) == ("g", '{"b": "second"}')
    assert found.content == ""
    for made in others:
        with pytest.raises(ValueError):
            json.loads(made.arguments)


def test_a_value_that_holds_the_end_of_its_call_and_more_text_is_no_call() -> None:
    text = xml("f", o=f"x{END}y", b="path")
    assert answer("xml", f"{text}\n{xml('g', b='second')}") == (text, [("g", {"b": "second"})])


def test_text_that_is_exactly_two_calls_is_two_calls() -> None:
    text = xml("f", a=f"x{END}<tool_call>\n<function=g>\n<parameter=a>\nrm")
    assert answer("xml", text) == ("", [("f", {"a": "x"}), ("g", {"a": "rm"})])


def test_a_block_of_calls_and_other_xml_is_no_call() -> None:
    body = "<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n<function=f>\noops\n</function>"
    assert answer("xml", f"{tagged(body)}\n{xml('g', b='second')}") == (
        tagged(body),
        [("g", {"b": "second"})],
    )
    prose = tagged("<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\nThat is all.")
    assert answer("xml", prose) == ("That is all.", [("f", {"a": "x"})])


@pytest.mark.parametrize(
    "value",
    [
        '</tool_call> "<parameter=a>',
        "<parameter=b>",
        "\n<parameter=b>\n<function=g>",
        "</function><tool_call>x",
    ],
)
def test_an_xml_value_that_could_end_in_two_places_is_no_other_value(value: str) -> None:
    values = {"a": value, "b": "path"}
    found = however_cut(lambda: reader("xml", TOOLS), f"{xml('f', **values)}\n{xml('g', b='second')}")
    *others, last = found.tool_calls
    assert (last.name, last.arguments) == ("g", '{"b": "second"}')
    assert found.content in ("", xml("f", **values))
    for made in others:
        assert made.arguments in (json.dumps(values), made.arguments.rstrip('"}'))
