"""Histories that strict chat templates would refuse are put so that they take them; others are left as they are."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from qwen3_dist.text.chat_template import ChatTemplate

STRICT = """
{%- for m in messages -%}
{%- if m.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning.') }}
{%- endif -%}
[{{ m.role }}: {{ m.content }}
{%- for c in m.tool_calls or [] %} {{ c.function.name }}(
{%- for name, value in c.function.arguments | items %}{{ name }}={{ value }}{% endfor %}){% endfor %}]
{%- endfor -%}
"""
LENIENT = """
{%- for m in messages -%}
[{{ m.role }}: {{ m.content }}
{%- for c in m.tool_calls or [] %} {{ c.function.name }}({{ c.function.arguments if c.function.arguments is string
else c.function.arguments | tojson }}){% endfor %}]
{%- endfor -%}
"""
DEAF = """
{%- for m in messages -%}
{%- if m.role != 'system' or loop.first -%}[{{ m.role }}: {{ m.content }}]{%- endif -%}
{%- endfor -%}
"""


def rendered(source: str, *messages: dict[str, Any]) -> str:
    return ChatTemplate({"default": source}, {}).render(list(messages))


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("source", [STRICT, DEAF])
def test_system_messages_are_one_at_the_front_for_a_template_that_does_not_show_late_ones(
    source: str,
) -> None:
    late = (said("user", "Hi"), said("system", "Be brief."), said("user", "Well?"))
    assert rendered(source, *late) == "[system: Be brief.][user: Hi][user: Well?]"
    two = (said("system", "A"), said("system", "B"), said("user", "Hi"), said("system", "C"))
    assert rendered(source, *two) == "[system: A\n\nB\n\nC][user: Hi]"


def test_system_messages_stay_in_their_places_for_a_template_that_shows_them() -> None:
    late = (said("system", "A"), said("user", "Hi"), said("system", "B"))
    assert rendered(LENIENT, *late) == "[system: A][user: Hi][system: B]"


@pytest.mark.parametrize("arguments", ['"Beijing"', '["a"]', '{"x": "cut', "5", "plain words"])
def test_arguments_that_are_no_object_are_shown_by_every_template(arguments: str) -> None:
    assert rendered(LENIENT, called(arguments)) == f"[assistant:  f({arguments})]"
    assert rendered(STRICT, called(arguments)) == f"[assistant:  f(arguments={arguments})]"


def test_arguments_that_are_an_object_are_left_as_they_are() -> None:
    assert rendered(STRICT, called({"a": 1}), called({})) == "[assistant:  f(a=1)][assistant:  f()]"


def test_a_template_that_refuses_a_conversation_for_another_reason_still_does() -> None:
    with pytest.raises(RequestError, match="no users"):
        rendered("{{ raise_exception('no users') }}", said("user", "Hi"), said("system", "A"))
