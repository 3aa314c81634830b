"""What `benchmarks.chaos` asks for, and how it reads and compares the answers."""

from __future__ import annotations

import json
import math
import os
from typing import Any

MODEL = "m"
STORY = [{"role": "user", "content": "Tell me a long story about a fox and the sea."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 40}, "day": {"type": "string", "minLength": 40}},
    "required": ["city", "day"],
}
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 70}
DRAWN = {"temperature": 1.0, "seed": 7}
GREEDY = {"temperature": 0}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TOOL = {"name": "weather", "parameters": WEATHER}
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    (
        "tools",
        CHAT,
        {
            "messages": STORY,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "required",
            "max_tokens": 300,
            **DRAWN,
        },
    ),
    (
        "schema",
        CHAT,
        {
            "messages": STORY,
            "response_format": {"type": "json_schema", "json_schema": {"name": "l", "schema": LIST}},
            "max_tokens": 400,
            **GREEDY,
        },
    ),
    (
        "choices",
        CHAT,
        {"messages": STORY, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 150, **DRAWN},
    ),
    ("thinking", CHAT, {"messages": STORY, "chat_template_kwargs": {"enable_thinking": True}, **DRAWN}),
    (
        "penalties",
        CHAT,
        {"messages": STORY, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "max_tokens": 250, **DRAWN},
    ),
    (
        "prompts",
        COMPLETIONS,
        {
            "prompt": ["the sea", "a fox", "one two three"],
            "stop": [" ship", "zz"],
            "max_tokens": 200,
            **DRAWN,
        },
    ),
    ("response", RESPONSES, {"input": STORY, "max_output_tokens": 250, "temperature": 0}),
    ("message", MESSAGES, {"messages": STORY, "max_tokens": 250, "temperature": 0}),
]
LONG = {"ignore_eos": True}  # of those without a grammar, so that faults find them running


def requests() -> list[tuple[str, str, dict[str, Any]]]:
    """Names, paths and bodies of all requests."""
    found = []
    for name, path, fields in ASKED:
        body = {"model": MODEL, **fields}
        if path in (CHAT, COMPLETIONS) and name not in ("tools", "schema"):
            body |= LONG | {"max_tokens": body.get("max_tokens", 250)}
        for stream in (True, False):
            usage = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETIONS) else {}
            found.append(
                (
                    f"{name}{'' if stream else ' whole'}",
                    path,
                    body | ({"stream": True, **usage} if stream else {}),
                )
            )
    return found


class LostError(Exception):
    """An answer that ended by an error, or did not end."""


def merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta of a stream: strings and lists are appended, objects with an index are merged by it."""
    for key, value in delta.items():
        if key in ("id", "created", "object", "model", "system_fingerprint", "item_id", "call_id"):
            continue
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
            for item in value:
                merge(into.setdefault(key, {}).setdefault(item["index"], {}), {**item, "index": None})
        elif isinstance(value, str | list) and value:
            into[key] = into[key] + value if into.get(key) else value
        elif value is not None and value != []:
            into[key] = value


def without_ids(value: Any) -> Any:
    """JSON without what differs between two answers to one request."""
    if isinstance(value, dict):
        dropped = {"id", "created", "created_at", "completed_at", "system_fingerprint", "call_id", "item_id"}
        return {key: without_ids(item) for key, item in value.items() if key not in dropped}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def read_stream(path: str, data: bytes) -> Any:
    """What the events of a whole stream add up to. Raises LostError."""
    pings = (":", "event: ping")  # they come while a stream waits
    blocks = [block for block in data.decode().split("\n\n") if block and not block.startswith(pings)]
    lines = [line for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    for block in blocks:
        if block.startswith("event: error"):
            raise LostError(block)
    found: dict[str, Any] = {}
    if path in (CHAT, COMPLETIONS):
        if not lines or lines.pop() != "data: [DONE]":
            raise LostError("no [DONE] at the end")
        for line in lines:
            event = json.loads(line.removeprefix("data: "))
            merge(found, {"choices": event["choices"], "usage": event.get("usage")})
        return found
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    last = "response.completed response.incomplete" if path == RESPONSES else "message_stop"
    if not events or events[-1]["type"] not in last:
        raise LostError(f"the last event is {events[-1:]}")
    for number, event in enumerate(events):
        if path == RESPONSES and event["sequence_number"] != number:
            found["gap"] = (number, event["sequence_number"])
        kind = event["type"]
        key = f"{kind} {event.get('output_index', event.get('index', ''))}"
        found.setdefault("order", {}).setdefault(key, len(found.get("order", ())))
        if kind.endswith("delta") and isinstance(event["delta"], str):
            found[key] = found.get(key, "") + event["delta"]
        elif kind.endswith("delta"):
            merge(found.setdefault(key, {}), event["delta"] | {"usage": event.get("usage")})
        elif kind in ("response.created", "response.in_progress"):
            found[key] = found.get(key, 0) + 1
        else:
            found.setdefault(key, []).append(without_ids({**event, "sequence_number": 0}))
            if kind == "message_start":  # has the tokens of the first part, whose number depends on the load
                found[key][-1]["message"]["usage"]["output_tokens"] = 0
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, log-probabilities but for their last digits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def difference(one: Any, other: Any) -> str:
    """Where two answers first differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if not same(one.get(key), other.get(key)):
                return f"{key}: {difference(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(difference(a, b) for a, b in zip(one, other, strict=True) if not same(a, b))
    if isinstance(one, str) and isinstance(other, str):
        at = len(os.path.commonprefix([one, other]))
        return f"at {at}: {one[at : at + 80]!r} became {other[at : at + 80]!r}"
    return f"{str(one)[:150]} became {str(other)[:150]}"
