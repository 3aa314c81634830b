"""Engines that lose ranks, and requests that go on afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import EngineConfig, Layout, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.engine import Outputs
from qwen3_dist.errors import EngineDeadError

NUM_TOKENS = 24
DRAWN = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=7, ignore_eos=True)
PROMPT = (5, 6, 7, 8)


def config(checkpoint: Path, layout: str, **settings: Any) -> EngineConfig:
    placed: dict[str, Any] = {"executor": "processes", "num_blocks": 64, "dtype": "float32", **settings}
    return EngineConfig(str(checkpoint), layout=Layout.parse(layout), **placed)


@contextlib.contextmanager
def started(settings: EngineConfig, on_death: Callable[[], None] | None = None) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(settings, on_death=on_death)
    try:
        yield engine
    finally:
        engine.shutdown()


async def until_it_serves(engine: AsyncEngine) -> None:
    async with asyncio.timeout(120.0):
        while True:
            try:
                return engine.check_health()
            except EngineDeadError:
                await asyncio.sleep(0.01)


async def tokens_of(
    engine: AsyncEngine, resume: list[int] | None = None, prompt: tuple[int, ...] = PROMPT
) -> AsyncIterator[int]:
    resumed = None if resume is None else {0: resume}
    async for deltas in engine.generate([*prompt], DRAWN, str(prompt), resume=resumed):
        for delta in deltas:
            for token in delta.token_ids:
                yield token


async def undisturbed(engine: AsyncEngine, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    return [token async for token in tokens_of(engine, prompt=prompt)]


def before_step(engine: AsyncEngine, number: int, act: Callable[[], None]) -> None:
    """Has the engine's thread call `act` before it runs its step `number` from now."""
    step, numbers = engine._engine.step, itertools.count(1)

    def counted() -> Outputs:
        if next(numbers) == number:
            act()
        return step()

    engine._engine.step = counted  # type: ignore[method-assign]


async def across_a_loss(engine: AsyncEngine, lose: Callable[[], None]) -> list[int]:
    """The tokens of a request in the middle of which `lose` is called, and which goes on after the recovery."""
    tokens: list[int] = []
    before_step(engine, 10, lose)
    with pytest.raises(EngineDeadError):
        async for token in tokens_of(engine):
            tokens.append(token)
    assert 5 < len(tokens) < NUM_TOKENS - 5
    await until_it_serves(engine)
    return tokens + [token async for token in tokens_of(engine, resume=tokens)]


async def whole_tokens(engine: AsyncEngine, prompt: tuple[int, ...]) -> tuple[list[int], int]:
    """The tokens of a request that goes on whenever the engine's ranks have changed, and how often it did."""
    tokens: list[int] = []
    for cuts in itertools.count():
        try:
            async for token in tokens_of(engine, tokens or None, prompt):
                tokens.append(token)
        except EngineDeadError:
            await until_it_serves(engine)
        else:
            return tokens, cuts
    raise AssertionError
