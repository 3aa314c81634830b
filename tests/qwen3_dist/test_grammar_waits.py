"""A grammar is built beside the steps: its sequence waits, the others go on."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError
from qwen3_dist.launch import processes
from qwen3_dist.layout import Layout
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import bundled_path
from qwen3_dist.worker.sampling.grammar_matcher import Grammars
from tests import planted_ranks
from tests.ranks import by_name

pytestmark = pytest.mark.usefixtures("nursery")
ENDLESS = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
FORMED = SamplingParams(max_tokens=20, temperature=0, structured_outputs=StructuredOutputs(regex="[0-9]{6}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(bundled_path(), tmp_path / "model")
    return tmp_path


def slow_to_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncEngine:
    monkeypatch.setattr(processes.ProcessLauncher, "main", by_name(planted_ranks.rank_that_builds_when_told))
    return AsyncEngine(EngineConfig(str(folder / "model"), layout=Layout(tp=2, dp=2), executor="processes"))


async def tokens_of(engine: AsyncEngine, params: SamplingParams, name: str) -> list[int]:
    steps = engine.generate([1, 2, 3], params, name)
    return [token async for deltas in steps for delta in deltas for token in delta.token_ids]


async def wait_for(file: Path) -> None:
    while not file.exists():
        await asyncio.sleep(0.01)


def test_others_go_on_while_a_grammar_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slow_to_build(folder, monkeypatch)

    async def scenario() -> str:
        other = engine.generate([5, 6], ENDLESS, "other")
        await anext(other)
        formed = asyncio.create_task(tokens_of(engine, FORMED, "formed"))
        for rank in (0, 2):  # those that draw for their dp groups
            await wait_for(folder / f"building-{rank}")
        for _ in range(20):
            await anext(other)
        assert not formed.done()
        assert engine.stats().num_waiting == 0  # it does not even stand in line
        (folder / "go").touch()
        tokens = await formed
        await other.aclose()
        assert await tokens_of(engine, FORMED, "again") == tokens
        assert engine.tokenizer is not None
        return engine.tokenizer.decode(tokens)

    assert re.fullmatch("[0-9]{6}.*", asyncio.run(scenario()))
    engine.shutdown()


def test_a_request_whose_grammar_is_being_built_can_be_left_and_ends_with_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = slow_to_build(folder, monkeypatch)

    async def scenario() -> None:
        left = asyncio.create_task(tokens_of(engine, FORMED, "left"))
        await wait_for(folder / "building-0")
        left.cancel()
        stays = asyncio.create_task(tokens_of(engine, FORMED, "stays"))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(EngineDeadError):
            await stays

    asyncio.run(scenario())


def test_what_all_grammars_need_is_built_before_a_service_takes_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []
    build = Grammars._build_tokenizer

    def noting(self: Grammars) -> None:
        if self._tokenizer is None:
            built.append("trie")
        build(self)

    monkeypatch.setattr(Grammars, "_build_tokenizer", noting)
    engine = AsyncEngine(EngineConfig(device="cpu", num_blocks=256))
    assert built == ["trie"]
    asyncio.run(tokens_of(engine, FORMED, "a"))
    assert built == ["trie"]
    engine.shutdown()
    with LLM(device="cpu", num_blocks=256, use_tqdm=False) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
        assert built == ["trie"]  # offline only when it is asked for
