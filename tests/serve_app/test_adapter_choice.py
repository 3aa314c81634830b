"""Adapters chosen by a request's model, in every API that generates: a real engine in this process."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import CheckpointError, ConfigError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.responses.request import parse_responses
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.cli.options import add_settings, given_settings
from serve_app.launch.model_check import check_model
from serve_app.replica.request_handler import RequestHandler
from serve_app.settings import BUNDLED_NAME, read_service_config
from tests.adapters import ATTENTION, write_adapter

MESSAGES = [{"role": "user", "content": "Tell me a story."}]
APIS: dict[str, tuple[Callable[[bytes], GenerationRequest], dict[str, Any]]] = {
    "chat": (parse_chat, {"messages": MESSAGES, "max_tokens": 8}),
    "completions": (parse_completion, {"prompt": "the sea", "max_tokens": 8}),
    "messages": (parse_messages, {"messages": MESSAGES, "max_tokens": 8}),
    "responses": (parse_responses, {"input": MESSAGES, "max_output_tokens": 8}),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), bundled_path(), ATTENTION)


@pytest.fixture(scope="module")
def handler(adapter: Path) -> Iterator[RequestHandler]:
    config = EngineConfig(device="cpu", dtype="float32", num_blocks=256, lora=f"mine={adapter}")  # type: ignore[arg-type]
    engine = AsyncEngine(config)
    yield RequestHandler(engine, "base", {"temperature": 0})
    engine.shutdown()


def asked(api: str, **fields: Any) -> GenerationRequest:
    parse, body = APIS[api]
    return parse(json.dumps({**body, **fields}).encode())


@pytest.mark.parametrize("api", APIS)
def test_a_requests_model_chooses_the_adapter(handler: RequestHandler, api: str) -> None:
    base, mine, default = (
        answered(handler, api, **fields) for fields in ({"model": "base"}, {"model": "mine"}, {})
    )
    assert (base["model"], mine["model"], default["model"]) == ("base", "mine", "base")
    assert said(default) == said(base) != said(mine)


def answered(handler: RequestHandler, api: str, **fields: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(asyncio.run(handler.respond(asked(api, **fields))))
    return whole


def said(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What an answer of any API holds, without the ids of its parts."""
    parts = next(answer[name] for name in ("choices", "content", "output") if name in answer)
    return [{key: value for key, value in part.items() if key != "id"} for part in parts]


@pytest.mark.parametrize("api", APIS)
def test_a_stream_names_the_adapter(handler: RequestHandler, api: str) -> None:
    async def collect(stream: AsyncGenerator[bytes, None]) -> bytes:
        return b"".join([item async for item in stream])

    stream = asyncio.run(collect(handler.stream(asked(api, model="mine", stream=True))))
    assert b'"model":"mine"' in stream.replace(b" ", b"") and b'"base"' not in stream


@pytest.mark.parametrize("api", APIS)
def test_a_model_that_is_no_adapter_is_404_and_the_engine_goes_on(handler: RequestHandler, api: str) -> None:
    with pytest.raises(
        RequestError, match="'other' is not a LoRA adapter here; the adapters are mine"
    ) as refusal:
        asyncio.run(handler.respond(asked(api, model="other")))
    assert (refusal.value.param, refusal.value.status) == ("model", 404)
    assert asyncio.run(handler.respond(asked(api, model="mine")))


def test_an_adapter_cannot_have_the_models_name(adapter: Path) -> None:
    with pytest.raises(ConfigError, match=f"lora names {BUNDLED_NAME}, which the model itself"):
        read_service_config({"lora": {BUNDLED_NAME: str(adapter)}})
    assert (
        read_service_config({"lora": {BUNDLED_NAME: str(adapter)}, "model_name": "m"}).models[0].name == "m"
    )


def test_an_adapter_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, adapter: Path
) -> None:
    check_model(read_service_config({"lora": {"mine": str(adapter)}}).models[0])
    with pytest.raises(CheckpointError, match="the adapter mine cannot be used"):
        check_model(read_service_config({"lora": {"mine": str(tmp_path)}}).models[0])


def test_the_command_line_takes_an_adapter_at_a_time_or_several() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, "engine", EngineConfig)
    assert "--lora NAME=PATH" in parser.format_help()
    given = given_settings(parser.parse_args(["--lora", "a=x", "--lora", "b=y,c=z"]), EngineConfig)
    assert read_service_config(given).models[0].replica.engine.lora.names == ["a", "b", "c"]
    nothing = given_settings(parser.parse_args([]), EngineConfig)
    assert read_service_config(nothing).models[0].replica.engine.lora.names == []
