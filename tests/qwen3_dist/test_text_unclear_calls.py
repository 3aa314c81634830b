r"""Calls whose text could mean two things: what evidence decides, and where none does, the block stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.qwen3_dist.test_text_near_miss_calls import answer, xml
from tests.qwen3_dist.test_text_tool_calls import call, reader, tagged
from tests.splits import however_cut

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
