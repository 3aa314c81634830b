"""Pooling requests: one vector for each prompt, computed by the engine beside its other requests."""

from __future__ import annotations

import asyncio
from array import array

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from serve_app.apis.shared.pooling import PoolingRequest, PoolingResult
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.replica.record import RequestRecord


async def pool(
    engine: AsyncEngine,
    renderer: PromptRenderer,
    request: PoolingRequest,
    model: str,
    lora: str | None,
    record: RequestRecord,
) -> PoolingResult:
    """The vectors of all prompts. The first that fails, or a cancellation, aborts the others.

    Raises RequestError or EngineDeadError.
    """
    pooling = request.pooling(renderer)
    prompts = await asyncio.to_thread(request.prompts, renderer)

    async def vector_of(index: int) -> array[float]:
        try:
            arguments = (prompts[index].token_ids, pooling, record.engine_id(), request.terms, lora)
            delta = await engine.pool(*arguments, record.wait)
        except RequestError as error:
            raise request.with_error_path(error, index) from None
        assert delta.vector is not None
        return delta.vector

    tasks = [asyncio.ensure_future(vector_of(index)) for index in range(len(prompts))]
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return PoolingResult(model, sum(len(prompt.token_ids) for prompt in prompts), vectors)
