"""Tool loops of real clients, as `recorded/` has their requests (long texts and most tools are left out of them).

`tests/clients` runs the clients themselves. Here their bodies go through parsers, engine and answers, and what comes
back must be what the vendors' own types accept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.responses.recorder import ResponseRecorder
from serve_app.apis.responses.store import ResponseStore
from serve_app.replica.request_handler import RequestHandler
from tests.clients.scripted import CALL, long_checkpoint, scripted

RECORDED = Path(__file__).parent / "recorded"
CLIENTS = sorted(path.stem for path in RECORDED.glob("*.json"))
Told = tuple[list[tuple[str, Any]], str, str]  # calls, text, why it ended
Read = Callable[[list[Any]], Told]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    model = str(long_checkpoint(tmp_path_factory.mktemp("models") / "long"))
    engine = AsyncEngine(EngineConfig(model=model, device="cpu", dtype="float32", num_blocks=8192))
    yield engine
    engine.shutdown()


def answered(engine: AsyncEngine, kept: ResponseRecorder, path: str, turn: dict[str, Any]) -> list[Any]:
    """The answer's only object, or the data of its events."""
    parse = {
        "/v1/chat/completions": parse_chat,
        "/v1/messages": parse_messages,
        "/v1/responses": kept.parse,
    }[path]
    request: Any = scripted(parse(json.dumps(turn).encode()))
    handler = RequestHandler(engine, turn["model"], {})

    async def items() -> AsyncGenerator[Any, None]:
        if not request.stream:
            yield 200, await handler.respond(request)
            return
        stream = handler.stream(request)
        yield 200, await anext(stream)
        async for item in stream:
            yield item

    async def collect() -> bytes:
        heard = kept.record(items()) if path == "/v1/responses" else items()
        return b"".join([item[1] if isinstance(item, tuple) else item async for item in heard])

    whole = asyncio.run(collect()).decode()
    if not request.stream:
        return [json.loads(whole)]
    lines = (line.removeprefix("data: ") for line in whole.split("\n") if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]


def read_chat(parts: list[Any]) -> Told:
    if parts[0]["object"] == "chat.completion":
        whole = ChatCompletion.model_validate(parts[0])
    else:
        state: Any = ChatCompletionStreamState()
        for part in parts:
            state.handle_chunk(ChatCompletionChunk.model_validate(part))
        whole = state.get_final_completion()
    [choice] = whole.choices
    calls = [
        (call.function.name, json.loads(call.function.arguments))  # type: ignore[union-attr]
        for call in choice.message.tool_calls or []
    ]
    return calls, choice.message.content or "", choice.finish_reason


def read_message(parts: list[Any]) -> Told:
    message: Any = None
    if parts[0]["type"] == "message":
        message = Message.model_validate(parts[0])
    else:
        events: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
        texts: dict[int, Any] = {}
        for part in parts:
            message = accumulate_event(
                event=events.validate_python(part), current_snapshot=message, json_bufs=texts
            )
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    text = "".join(block.text for block in message.content if block.type == "text")
    return calls, text, message.stop_reason


def read_response(parts: list[Any]) -> Told:
    events: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for part in parts[:-1]:
        events.validate_python(part)
    response = Response.model_validate(parts[-1].get("response", parts[-1]))
    calls = [(i.name, json.loads(i.arguments)) for i in response.output if i.type == "function_call"]
    return calls, response.output_text, str(response.status)


READ: dict[str, tuple[Read, tuple[str, str]]] = {
    "/v1/chat/completions": (read_chat, ("tool_calls", "stop")),
    "/v1/messages": (read_message, ("tool_use", "end_turn")),
    "/v1/responses": (read_response, ("completed", "completed")),
}


def referring(turn: dict[str, Any], answer: list[Any]) -> dict[str, Any]:
    """`turn`, where references to items of the recorded answer are to those of `answer`, by their kinds."""
    output = answer[-1].get("response", answer[-1]).get("output", [])
    ids = {item["id"].partition("_")[0]: item["id"] for item in output}

    def known(item: Any) -> Any:
        reference = isinstance(item, dict) and item.get("type") == "item_reference"
        return {**item, "id": ids[item["id"].partition("_")[0]]} if reference else item

    return {**turn, "input": [known(item) for item in turn["input"]]} if "input" in turn else turn


@pytest.mark.parametrize("client", CLIENTS)
def test_a_recorded_client_goes_through_its_tool_loop(engine: AsyncEngine, client: str) -> None:
    recorded = json.loads((RECORDED / f"{client}.json").read_text())
    path = recorded["path"]
    read, (called, ended) = READ[path]
    store = ResponseStore(2**20, 100)
    first = answered(engine, ResponseRecorder(store), path, recorded["turns"][0])
    [(name, arguments)], text, reason = read(first)
    asked = CALL.search(json.dumps(recorded["turns"][0]).replace('\\"', '"').replace("\\\\", ""))
    assert asked is not None and name in asked.group() and "secret.txt" in json.dumps(arguments)
    assert (text, reason) == ("", called)
    second = answered(engine, ResponseRecorder(store), path, referring(recorded["turns"][1], first))
    assert read(second) == ([], "The file says pelican-4711.", ended)


def test_the_recorded_clients_are_those_that_we_name() -> None:
    agents = {"claude_code", "codex", "opencode", "qwen_code"}
    routes = {"ai_sdk_anthropic", "ai_sdk_chat", "ai_sdk_compatible", "ai_sdk_responses"}
    assert set(CLIENTS) == agents | routes | {"litellm_anthropic", "litellm_openai"}
