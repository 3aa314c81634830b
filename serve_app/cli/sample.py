"""The sample of `serve --sample`: a greeting, a sum with thinking and a tool call, asked through the OpenAI client."""

from __future__ import annotations

import json
import shlex
import ssl
from collections.abc import Iterator
from typing import Any, TextIO

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# (question, thinking, tools)
_QUESTIONS: tuple[tuple[str, bool, list[dict[str, Any]] | None], ...] = (
    ("Hello!", False, None),
    ("What is 47 + 38?", True, None),
    ("What is the weather in Paris?", False, [_WEATHER]),
)
_MAX_TOKENS = 160
# Parts of an answer, and the text printed before each.
_HEADINGS = {"thought": "[thinks] ", "answer": "\n[says] ", "name": "\n[calls] ", "arguments": " with "}


def show_sample(
    out: TextIO, as_json: bool, url: str, model: str, api_key: str, tls: ssl.SSLContext | None = None
) -> None:
    """Asks the endpoint at `url` three questions and prints the answers as they stream in.

    Ends with a `curl` command that repeats the first. With `as_json` each answer is one JSON object. `tls` is for an
    https URL; None is the default.
    """
    for question, thinking, tools in _QUESTIONS:
        if not as_json:
            offered = f"   [{tools[0]['function']['name']} is offered]" if tools else ""
            print(f"\n> {question}{offered}", file=out, flush=True)
        parts = dict.fromkeys(_HEADINGS, "")
        for part, text in _ask(url, api_key, model, question, thinking, tools, tls):
            if text and not as_json:
                heading = "" if parts[part] else _HEADINGS[part]
                print(
                    (heading if any(parts.values()) else heading.lstrip()) + text,
                    end="",
                    file=out,
                    flush=True,
                )
            parts[part] += text
        call = {"name": parts["name"], "arguments": json.loads(parts["arguments"])} if parts["name"] else None
        if as_json:
            answer = {"thought": parts["thought"], "answer": parts["answer"], "tool_call": call}
            print(json.dumps({"event": "sample", "question": question, **answer}), file=out, flush=True)
        else:
            print(file=out, flush=True)
    body = _body(model, *_QUESTIONS[0])
    curl = f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' "
    if api_key:
        curl += "-H 'Authorization: Bearer KEY' "
    curl += f"-d {shlex.quote(json.dumps(body))}"
    if as_json:
        print(json.dumps({"event": "repeat", "curl": curl}), file=out, flush=True)
    else:
        print(f"\nTo repeat the first:\n  {curl}", file=out, flush=True)


def _body(model: str, question: str, thinking: bool, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    return {**body, "tools": tools} if tools else body


def _ask(
    url: str,
    api_key: str,
    model: str,
    question: str,
    thinking: bool,
    tools: list[dict[str, Any]] | None,
    tls: ssl.SSLContext | None,
) -> Iterator[tuple[str, str]]:
    """Streams the answer as pairs of part, a key of _HEADINGS, and text."""
    from openai import DefaultHttpxClient, OpenAI

    body = _body(model, question, thinking, tools)
    extra = {"chat_template_kwargs": body.pop("chat_template_kwargs")}
    http_client = DefaultHttpxClient(verify=tls) if tls else None
    with OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", http_client=http_client) as client:
        for chunk in client.chat.completions.create(**body, extra_body=extra):
            for choice in chunk.choices:
                yield "thought", getattr(choice.delta, "reasoning", None) or ""
                yield "answer", choice.delta.content or ""
                for call in choice.delta.tool_calls or []:
                    yield "name", call.function.name or ""
                    yield "arguments", call.function.arguments or ""
