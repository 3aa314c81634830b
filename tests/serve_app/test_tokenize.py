"""Text to token ids and back, as vLLM's clients ask for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.tokens import TextRequest, parse_detokenize, parse_tokenize
from serve_app.replica.request_handler import RequestHandler

MESSAGES = [{"role": "user", "content": "Hello! 🌊"}]
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def handler() -> Iterator[RequestHandler]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield RequestHandler(engine, "m", {})
    engine.shutdown()


def ask(handler: RequestHandler, parse: Callable[[bytes], TextRequest], **body: Any) -> Any:
    return json.loads(asyncio.run(handler.respond(parse(json.dumps(body).encode()))))


def test_text_comes_back_from_its_token_ids(handler: RequestHandler) -> None:
    text = "<|im_start|>user\nThe sea 海 🌊<|im_end|>"
    answer = ask(handler, parse_tokenize, model="m", prompt=text)
    assert answer["count"] == len(answer["tokens"]) > 0 and answer["max_model_len"] == 4096
    assert answer["token_strs"] is None
    assert ask(handler, parse_detokenize, tokens=answer["tokens"]) == {"prompt": text}
    assert ask(handler, parse_tokenize, prompt="")["tokens"] == []
    assert ask(handler, parse_detokenize, tokens=[]) == {"prompt": ""}


def test_each_tokens_text_is_given_where_it_is_asked_for(handler: RequestHandler) -> None:
    answer = ask(handler, parse_tokenize, prompt="The sea", return_token_strs=True)
    assert "".join(answer["token_strs"]) == "The sea" and len(answer["token_strs"]) == answer["count"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False},
    ],
)
def test_a_conversation_has_the_tokens_of_its_prompt(handler: RequestHandler, fields: dict[str, Any]) -> None:
    request = parse_chat(json.dumps({"messages": MESSAGES, "max_tokens": 1, **fields}).encode())
    usage = json.loads(asyncio.run(handler.respond(request)))["usage"]
    assert ask(handler, parse_tokenize, messages=MESSAGES, **fields)["count"] == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_tokenize, {}, "prompt"),
        (parse_tokenize, {"prompt": "a", "messages": MESSAGES}, "prompt"),
        (parse_tokenize, {"prompt": 5}, "prompt"),
        (parse_tokenize, {"messages": []}, "messages"),
        (parse_tokenize, {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        (parse_detokenize, {}, "tokens"),
        (parse_detokenize, {"tokens": [-1]}, "tokens[0]"),
        (parse_detokenize, {"tokens": [2**31]}, "tokens[0]"),
        (parse_detokenize, {"tokens": [5] * 5000}, "tokens"),
    ],
)
def test_a_bad_field_is_named(
    handler: RequestHandler, parse: Callable[[bytes], TextRequest], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as error:
        ask(handler, parse, **body)
    assert error.value.param == param
