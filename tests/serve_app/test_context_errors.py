"""A conversation too long for the context is refused in the words by which clients of each API know it."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import ContextLengthError, RequestError
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.messages.answer import message_error
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.responses.request import parse_responses
from serve_app.apis.shared.errors import error_object
from serve_app.replica.request_handler import RequestHandler

LONG = "word " * 6000
TURN = {"role": "user", "content": LONG}
HOLDS = "This model's maximum context length is 4096 tokens. However, "


@pytest.fixture(scope="module")
def handler() -> Iterator[RequestHandler]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield RequestHandler(engine, "m", {})
    engine.shutdown()


def refused(handler: RequestHandler, parse: Callable[[bytes], Any], **body: Any) -> dict[str, Any]:
    """The body of the error that the request is answered with."""
    request = parse(json.dumps({"model": "m", **body}).encode())
    with pytest.raises(RequestError) as error:
        asyncio.run(handler.respond(request))
    assert error.value.status == 400
    told: dict[str, Any] = request.error_body(error.value)["error"]
    return told


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_chat, {"messages": [TURN]}, "messages"),
        (parse_responses, {"input": LONG}, "input"),
        (parse_responses, {"input": [TURN], "stream": True}, "input"),
        (parse_completion, {"prompt": LONG}, "prompt"),
        (parse_completion, {"prompt": [5] * 4096}, "prompt"),
        (parse_embedding, {"input": LONG}, "input"),
        (parse_chat, {"messages": [{"role": "user", "content": "x" * 3 * 10**6}]}, "messages"),
    ],
)
def test_openais_clients_see_its_code_and_sentence_and_a_field_of_their_body(
    handler: RequestHandler, parse: Any, body: dict[str, Any], param: str
) -> None:
    error = refused(handler, parse, **body)
    assert (error["code"], error["type"], error["param"]) == (
        "context_length_exceeded",
        "invalid_request_error",
        param,
    )
    assert error["message"].startswith(f"{HOLDS}your {param} resulted in ")


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_chat, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}, "max_tokens"),
        (parse_responses, {"input": "hi", "max_output_tokens": 5000}, "max_output_tokens"),
        (parse_completion, {"prompt": "hi", "max_tokens": 5000}, "max_tokens"),
    ],
)
def test_an_output_without_room_is_told_beside_the_prompt(
    handler: RequestHandler, parse: Any, body: dict[str, Any], param: str
) -> None:
    error = refused(handler, parse, **body)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert (
        error["message"].startswith(f"{HOLDS}you requested 50")
        and "5000 in the completion" in error["message"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LONG, r"prompt is too long: 12\d\d\d tokens > 4096 maximum"),
        ("x" * 3 * 10**6, r"prompt is too long: at least \d+ tokens > 4096 maximum"),
    ],
)
def test_anthropics_clients_see_its_sentence(handler: RequestHandler, content: str, words: str) -> None:
    error = refused(handler, parse_messages, max_tokens=5, messages=[{"role": "user", "content": content}])
    assert error["type"] == "invalid_request_error"
    assert re.fullmatch(words, error["message"])


def test_a_prompt_that_fills_the_context_leaves_no_room_for_an_answer() -> None:
    error = ContextLengthError("x", "messages", 4096, 4096, output_tokens=1)
    assert "4096 tokens and the answer needs at least one more" in error_object(error)["error"]["message"]
    assert message_error(error)["error"]["message"] == "prompt is too long: 4096 tokens > 4095 maximum"


def test_an_error_keeps_its_lengths_on_its_way_between_processes() -> None:
    error = ContextLengthError("x", "input", 5000, 4096, at_least=True)
    arrived = pickle.loads(pickle.dumps(error))
    assert vars(arrived) == vars(error) and error_object(arrived) == error_object(error)
