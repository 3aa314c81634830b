"""A stream of several prompts in one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from tests.serve_app.test_handlers import completion, handler, started


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = started()
    yield engine
    engine.shutdown()


def test_a_prompt_that_fails_after_another_has_begun_ends_the_stream_with_an_error_event(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_began = asyncio.Event()
    generate = engine.generate

    async def fail_on_7(prompt: list[int], *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        if prompt == [7]:
            await first_began.wait()
            raise RequestError("the adapter is gone")
        async with aclosing(generate(prompt, *args, **options)) as steps:
            async for step in steps:
                yield step

    async def read() -> list[bytes]:
        monkeypatch.setattr(engine, "generate", fail_on_7)
        items = []
        async for item in handler(engine).stream(
            completion(prompt=[[5, 6], [7]], max_tokens=4000, stream=True)
        ):
            items.append(item)
            first_began.set()
        return items

    assert b"the adapter is gone" in asyncio.run(read())[-1]
