"""A request that may wait only so long: what a replica answers, and when it says that it has taken the request."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Iterator

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import QueueTimeoutError
from qwen3_dist.request_terms import RequestTerms
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from serve_app.apis.completions import CompletionRequest, parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.replica.request_handler import RequestHandler


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=64, max_num_seqs=1))
    yield engine
    engine.shutdown()


async def occupied(engine: AsyncEngine) -> AsyncGenerator[object, None]:
    """A request that has the only slot until it is closed."""
    running = engine.generate([5, 6], SamplingParams(max_tokens=900, ignore_eos=True), "occupies")
    await anext(running)
    return running


def asked(timeout_s: float, stream: bool = True, prompts: int = 1) -> CompletionRequest:
    tokens = [
        [5, 6 + p] for p in range(prompts)
    ]  # a drawn token may be half a character, whose part is empty
    body = {"prompt": tokens, "max_tokens": 2, "temperature": 0, "stream": stream}
    request = parse_completion(json.dumps(body).encode())
    return dataclasses.replace(request, terms=RequestTerms(queue_timeout_s=timeout_s))


def test_who_has_waited_too_long_is_refused_streamed_or_not_and_so_is_a_pooling_request(
    engine: AsyncEngine,
) -> None:
    async def run() -> None:
        handler = RequestHandler(engine, "m", {})
        running = await occupied(engine)
        with pytest.raises(QueueTimeoutError):
            await anext(handler.stream(asked(0.01)))
        with pytest.raises(QueueTimeoutError):
            await handler.respond(asked(0.01, stream=False, prompts=2))
        embedding = parse_embedding(b'{"input": [5, 6]}')
        with pytest.raises(QueueTimeoutError):
            await handler.respond(dataclasses.replace(embedding, terms=RequestTerms(queue_timeout_s=0.01)))
        assert engine.load().queued_tokens == 0
        await running.aclose()

    asyncio.run(run())


def test_a_stream_that_may_wait_only_so_long_is_accepted_once_it_runs(engine: AsyncEngine) -> None:
    async def run(timeout_s: float) -> tuple[bool, list[bytes]]:
        running = await occupied(engine)
        stream = RequestHandler(engine, "m", {}).stream(asked(timeout_s, prompts=2))
        first = asyncio.ensure_future(anext(stream))
        for _ in range(20):
            await anext(running)
        accepted = first.done()
        await running.aclose()
        return accepted, [await first, *[item async for item in stream]]

    for timeout_s, accepted in ((0.0, True), (600.0, False)):
        at_once, items = asyncio.run(run(timeout_s))
        assert at_once == accepted
        assert items[0] == b"" and all(items[1:]) and items[-1].endswith(b"data: [DONE]\n\n")
