"""Log-probabilities of a response's text, streamed and not, without those of thoughts and marks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from serve_app.apis.responses.request import ResponsesRequest, parse_responses
from serve_app.replica.request_handler import RequestHandler
from tests.serve_app.support import server_events

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ASKED = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.fixture(scope="module")
def handler() -> Iterator[RequestHandler]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield RequestHandler(engine, "m", {})
    engine.shutdown()


def parsed(**fields: Any) -> ResponsesRequest:
    body = {"input": "Hello!", "temperature": 0, "reasoning": {"effort": "none"}, **fields}
    return parse_responses(json.dumps(body).encode())


def whole(handler: RequestHandler, **fields: Any) -> Response:
    return Response.model_validate(json.loads(asyncio.run(handler.respond(parsed(**fields)))))


def text_part(response: Response) -> Any:
    (part,) = response.output[-1].content
    return part


def joined(tokens: list[Any]) -> str:
    return b"".join(bytes(token.bytes) for token in tokens).decode()


@pytest.mark.parametrize(
    "fields", [{}, {"max_output_tokens": 5}, {"input": "What is 47 + 38?", "reasoning": {"effort": "high"}}]
)
def test_each_token_of_the_text_has_its_log_probability(handler: RequestHandler, fields: Any) -> None:
    part = text_part(whole(handler, **ASKED, **fields))
    assert part.text and joined(part.logprobs) == part.text
    for token in part.logprobs:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token  # the likeliest, at temperature 0


def test_a_stream_gives_what_the_whole_response_gives(handler: RequestHandler) -> None:
    async def stream() -> bytes:
        return b"".join([item async for item in handler.stream(parsed(stream=True, **ASKED))])

    events = server_events(asyncio.run(stream()))
    shown = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all(EVENT.validate_python(event) for event in shown)
    parts = [token["token"] for event in shown for token in event["logprobs"]]
    expected = text_part(whole(handler, **ASKED)).logprobs
    assert parts == [token.token for token in expected]
    last = text_part(Response.model_validate(events[-1]["response"]))
    assert joined(last.logprobs) == last.text


@pytest.mark.parametrize("fields", [{}, {"include": ["reasoning.encrypted_content"]}, {"top_logprobs": 0}])
def test_there_are_none_unless_they_are_asked_for(handler: RequestHandler, fields: Any) -> None:
    assert text_part(whole(handler, **fields)).logprobs == []
