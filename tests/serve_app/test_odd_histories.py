"""Bodies of any JSON are read or refused with a sentence, never failed on: agents send what nobody foresaw."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from qwen3_dist.text.chat_template import ChatTemplate
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.responses.request import ResponsesBody, parse_responses
from serve_app.apis.shared.schema import schema_of
from tests.serve_app.field_walk import listed_tags

STRICT = ChatTemplate(
    {
        "default": "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}"
        "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}"
        "{{ k }}{% endfor %}{% endfor %}{% endfor %}"
    },
    {},
)
ITEM = schema_of(ResponsesBody)["properties"]["input"]["anyOf"][1]["items"]
TYPES = [
    *sorted(listed_tags(ITEM)), "user", "assistant", "system", "text", "image",
    "input_text", "refusal", "tool_use", "tool_result", "thinking",
    "server_tool_use", "web_search_tool_result", "document", "search_result", "tool_reference", "base64", "function",
    "custom", "namespace", "allowed_tools", "web_search", "bash_20250124", "grammar", "x", 5, None,
]  # fmt: skip
FIELDS = [
    "content", "name", "namespace", "arguments", "input", "output", "outputs", "error", "action", "code", "summary",
    "tools", "text", "refusal", "thinking", "source", "title", "data", "description", "parameters", "format", "mode",
    "definition", "grammar", "input_schema", "function", "custom", "tool_calls", "function_call", "tool_call_id",
]  # fmt: skip
PLAIN = [None, "", " ", "f", "null", "{}", '{"a": 1}', "[1]", 5, 0, True, [], {}]
ROLES = ["user", "assistant", "system", "developer", "tool", "function"]


def value(chance: random.Random, depth: int) -> Any:
    kind = chance.random() if depth else 0
    if kind < 0.3:
        return chance.choice(PLAIN)
    if kind < 0.55:
        return [value(chance, depth - 1) for _ in range(chance.randint(0, 2))]
    return record(chance, depth)


def record(chance: random.Random, depth: int) -> dict[str, Any]:
    """An object that often has what its readers require."""
    likely = {
        "type": chance.choice(TYPES),
        "role": chance.choice(ROLES),
        "name": "f",
        "id": "i",
        "call_id": "c",
        "tool_use_id": "t",
        "content": chance.choice(["x", [{"type": "text", "text": "x"}], [value(chance, depth - 1)]]),
    }
    kept = {name: given for name, given in likely.items() if chance.random() < 0.7}
    return {name: value(chance, depth - 1) for name in chance.sample(FIELDS, chance.randint(0, 5))} | kept


def messages(chance: random.Random) -> dict[str, Any]:
    turns = [{"role": chance.choice(ROLES[:3]), "content": [record(chance, 2)]}, record(chance, 3)]
    return {"max_tokens": 5, "messages": chance.sample(turns, 1), "tools": [record(chance, 2)]}


def chat(chance: random.Random) -> dict[str, Any]:
    return {
        "messages": [record(chance, 3)],
        "tools": [{"type": chance.choice(TYPES), "custom": record(chance, 2)}],
    }


def responses(chance: random.Random) -> dict[str, Any]:
    given = {"input": [record(chance, 3)], "tools": [record(chance, 3)], "tool_choice": record(chance, 1)}
    return {name: field for name, field in given.items() if name == "input" or chance.random() < 0.3}


@pytest.mark.parametrize(
    ("parse", "body"), [(parse_chat, chat), (parse_messages, messages), (parse_responses, responses)]
)
def test_any_body_is_read_or_refused(
    parse: Callable[[bytes], Any], body: Callable[[random.Random], Any]
) -> None:
    chance, read = random.Random(7), 0
    for _ in range(3000):
        given = body(chance)
        try:
            request = parse(json.dumps(given).encode())
            STRICT.render(request.messages, request.tools or None)
            read += 1
        except RequestError:
            pass
        except Exception as error:
            raise AssertionError(f"{given} made {error!r}") from error
    assert read > 100
