"""What a request may ask of an engine beside its output: an own part of the prefix cache, and a limit to its wait."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import QueueTimeoutError
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.request_terms import RequestTerms
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig

CONFIG = EngineConfig(device="cpu", dtype="float32", num_blocks=64, block_size=16, max_num_seqs=1)
PROMPT = [*range(100, 150)]
LONG = SamplingParams(max_tokens=900, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(CONFIG)
    yield engine
    engine.shutdown()


def test_prompts_share_cached_blocks_only_under_the_same_salt(engine: AsyncEngine) -> None:
    def ask(request_id: str, salt: str) -> tuple[int, list[int]]:
        """The prompt tokens found in the cache, and the output."""

        async def run() -> list[TokenDelta]:
            terms = RequestTerms(cache_salt=salt)
            parts = [part async for part in engine.generate(PROMPT, SHORT, request_id, terms)]
            return [delta for part in parts for delta in part]

        deltas = asyncio.run(run())
        return deltas[0].num_cached_tokens, [token for delta in deltas for token in delta.token_ids]

    first, again = ask("1", ""), ask("2", "")
    assert (first[0], again[0]) == (0, 48)
    salted, salted_again, other = ask("3", "a"), ask("4", "a"), ask("5", "b")
    assert (salted[0], salted_again[0], other[0]) == (0, 48, 0)
    assert ask("6", "")[0] == 48
    assert first[1] == again[1] == salted[1] == salted_again[1] == other[1]


def test_each_pair_of_a_salt_and_an_adapter_has_blocks_of_its_own() -> None:
    pairs = [(salt, lora) for salt in ("", "a", "a'") for lora in ("", "a", "a'")]
    assert len({RequestTerms(cache_salt=salt).salt(lora) for salt, lora in pairs}) == len(pairs)


def test_a_request_that_waits_too_long_is_refused_and_leaves_nothing(engine: AsyncEngine) -> None:
    async def run() -> int:
        running = engine.generate(PROMPT, LONG, "running")
        await anext(running)
        late = engine.generate(PROMPT, SHORT, "late", RequestTerms(queue_timeout_s=0.001), announce=True)
        assert await anext(late) == []
        with pytest.raises(QueueTimeoutError, match="the request waited 0.001 s for its turn") as refused:
            await anext(late)
        assert refused.value.status == 429 and engine.load().queued_tokens == 0
        return sum([len(delta.token_ids) async for part in running for delta in part])

    assert asyncio.run(run()) > 0
    assert str(pickle.loads(pickle.dumps(QueueTimeoutError(5.0)))) == str(QueueTimeoutError(5.0))


def test_a_caller_is_told_that_its_request_waits_and_when_it_begins(engine: AsyncEngine) -> None:
    told: dict[str, list[bool]] = {"running": [], "late": []}

    async def run() -> None:
        waits = asyncio.Event()

        def tell(is_waiting: bool) -> None:
            told["late"].append(is_waiting)
            waits.set()

        running = engine.generate(PROMPT, LONG, "running", on_wait=told["running"].append)
        await anext(running)
        late = engine.generate(PROMPT, SHORT, "late", announce=True, on_wait=tell)
        assert await anext(late) == []
        await waits.wait()
        assert told == {"running": [], "late": [True]}
        await running.aclose()
        await anext(late)
        assert told == {"running": [], "late": [True, False]}
        await late.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_request_begins_with_its_first_choice() -> None:
    engine, begun = Engine(CONFIG), []
    two = SamplingParams(max_tokens=2, n=2, ignore_eos=True)
    try:
        engine.add_request("two choices", PROMPT, two, on_begin=lambda: begun.append("two choices"))
        engine.add_request("waits", PROMPT, SHORT, on_begin=lambda: begun.append("waits"))
        assert not begun
        ended: list[int] = []
        while not ended:
            deltas = engine.step().get("two choices", [])
            ended = [delta.index for delta in deltas if delta.finish_reason]
            assert "two choices" in begun and "waits" not in begun
        assert engine.abort("waits") and not engine.abort("waits") and not engine.abort("unknown")
        while engine.has_work:
            engine.step()
        engine.check_integrity()
    finally:
        engine.shutdown()
