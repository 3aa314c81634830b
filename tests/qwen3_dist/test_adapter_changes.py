"""LoRA adapters that come and go while an engine runs."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import CheckpointError, EngineDeadError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.settings import EngineConfig
from tests.adapters import ATTENTION, write_adapter
from tests.checkpoints import write_checkpoint

PROMPT = list(range(3, 40))
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
Tokens = list[int]
_ids = map(str, itertools.count())
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("changing")
    found = {"base": write_checkpoint(folder / "base", moe=True, mlp_only_layers=[1], intermediate_size=99)}
    for seed, (name, rank) in enumerate((("one", 6), ("two", 3), ("three", 9))):
        found[name] = write_adapter(folder / name, found["base"], ATTENTION, r=rank, seed=seed, strength=0.3)
    return found


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path]) -> dict[str | None, Tokens]:
    """What an engine generates that was started with all adapters."""
    lora = {name: str(path) for name, path in paths.items() if name != "base"}
    with LLM(str(paths["base"]), lora=lora, use_tqdm=False) as llm:
        names = [None, *lora]
        outputs = llm.generate([PROMPT] * len(names), LONG, use_tqdm=False, lora=names)
    found = {name: list(output.token_ids) for name, output in zip(names, outputs, strict=True)}
    assert len({str(tokens[:6]) for tokens in found.values()}) == 4
    return found


@contextmanager
def started(paths: dict[str, Path], layout: str, *names: str, **settings: Any) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(
        EngineConfig(
            model=str(paths["base"]), layout=layout, executor="processes", lora=of(paths, *names), **settings
        )
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def of(paths: dict[str, Path], *names: str) -> LoraAdapters:
    return LoraAdapters(tuple((name, str(paths[name])) for name in names))


async def ask(engine: AsyncEngine, lora: str | None, params: SamplingParams = SHORT) -> Tokens:
    steps = engine.generate(PROMPT, params, next(_ids), lora=lora)
    return [token for step in [step async for step in steps] for delta in step for token in delta.token_ids]


async def begin(engine: AsyncEngine, lora: str | None) -> Callable[[], Coroutine[Any, Any, Tokens]]:
    """Starts a long request and waits for its first token. Returns what waits for all of its tokens."""
    steps = engine.generate(PROMPT, LONG, next(_ids), lora=lora)
    first = [token for delta in await anext(steps) for token in delta.token_ids]

    async def rest() -> Tokens:
        return first + [
            t for step in [step async for step in steps] for delta in step for t in delta.token_ids
        ]

    return rest


@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "dp=2,ep=2", "tp=2,pp=2"])
def test_adapters_come_and_go_while_others_are_used(
    paths: dict[str, Path], expected: dict[str | None, Tokens], layout: str
) -> None:
    async def check() -> None:
        with started(paths, layout) as engine:
            with pytest.raises(RequestError, match="there are no adapters"):
                await ask(engine, "one")
            plain = await begin(engine, None)
            await engine.use_adapters(of(paths, "one", "two"))
            one, two = await begin(engine, "one"), await begin(engine, "two")
            await engine.use_adapters(of(paths, "three"))  # both others leave as they are used
            assert engine.adapters_in_use()[0] == ["one", "two"]
            for gone in ("one", "two"):
                with pytest.raises(RequestError, match="the adapters are three") as refused:
                    await ask(engine, gone)
                assert refused.value.status == 404
            await engine.use_adapters(of(paths, "two", "three"))
            three, again = await begin(engine, "three"), await ask(engine, "two")
            assert await plain() == expected[None]
            assert [await one(), await two(), await three()] == [
                expected[name] for name in ("one", "two", "three")
            ]
            assert again == expected["two"][:6]
            while len(held(engine)) > 2:  # what is not used any more is dropped
                await asyncio.sleep(0.01)
            assert held(engine) == ["two", "three"]
            assert await ask(engine, "three") == expected["three"][:6]
            await engine.use_adapters(LoraAdapters())
            assert held(engine) == [] and engine.config.lora == LoraAdapters()
            assert await ask(engine, None) == expected[None][:6]
            engine._engine.check_integrity()

    asyncio.run(check())


def held(engine: AsyncEngine) -> list[str]:
    """The adapters in the ranks' memory."""
    return engine._engine.changes.adapters.names


def test_an_adapter_that_cannot_be_loaded_changes_nothing(
    paths: dict[str, Path],
    expected: dict[str | None, Tokens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = shutil.copytree(paths["two"], tmp_path / "bad")

    async def check() -> None:
        with started(paths, "tp=2", "one") as engine:
            running = await begin(engine, "one")
            before = engine.config.lora
            for wanted in (
                LoraAdapters((("two", str(paths["two"])), ("gone", str(tmp_path / "gone")))),
                LoraAdapters((("one", str(paths["two"])), ("base", str(paths["base"])))),
            ):
                with pytest.raises(CheckpointError, match="the adapter (gone|base) cannot be used"):
                    await engine.use_adapters(wanted)
            # The engine has seen it, the ranks have it no more.
            module = "qwen3_dist.engine.rank_questions.with_digests"
            monkeypatch.setattr(module, lambda adapters, *_: LoraAdapters(adapters.pairs, ("1", "2")))
            shutil.rmtree(bad)
            with pytest.raises(CheckpointError, match="the adapter bad cannot be used"):
                await engine.use_adapters(LoraAdapters((("two", str(paths["two"])), ("bad", str(bad)))))
            monkeypatch.undo()
            assert engine.config.lora == before and held(engine) == ["one"]
            assert await running() == expected["one"]
            await engine.use_adapters(of(paths, "two"))
            assert await ask(engine, "two") == expected["two"][:6]

    asyncio.run(check())


@pytest.mark.parametrize(("layout", "lost"), [("tp=2", 1), ("dp=2,ep=2", 0)])
def test_a_rank_that_is_replaced_has_the_adapters_of_now(
    paths: dict[str, Path], expected: dict[str | None, Tokens], layout: str, lost: int
) -> None:
    async def check() -> None:
        with started(paths, layout, "one") as engine:
            assert await ask(engine, "one") == expected["one"][:6]
            await engine.use_adapters(of(paths, "three", "two"))
            assert await ask(engine, "two") == expected["two"][:6]
            os.kill(engine.ranks[lost].pid, signal.SIGKILL)
            while not engine.recoveries:
                await asyncio.sleep(0.02)
            await engine.recovered()
            for name in ("two", "three"):
                for _ in range(2):  # both groups of dp=2 answer
                    assert (
                        await asyncio.gather(*(ask(engine, name) for _ in range(4)))
                        == [expected[name][:6]] * 4
                    )
            with pytest.raises(RequestError, match="the adapters are three, two"):
                await ask(engine, "one")
            await engine.use_adapters(of(paths, "one", "two"))
            assert [await ask(engine, name) for name in ("one", "two")] == [
                expected[name][:6] for name in ("one", "two")
            ]

    asyncio.run(check())


def test_a_rank_that_is_lost_during_a_change_leaves_all_with_the_same_adapters(
    paths: dict[str, Path], expected: dict[str | None, Tokens]
) -> None:
    async def check() -> None:
        with started(paths, "tp=2", "one") as engine:
            await ask(engine, "one")
            os.kill(engine.ranks[0].pid, signal.SIGSTOP)
            changing = asyncio.create_task(engine.use_adapters(of(paths, "two")))
            await asyncio.sleep(0.2)
            os.kill(engine.ranks[0].pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                await changing
            await engine.recovered()
            [name] = engine.config.lora.names
            assert await ask(engine, name) == expected[name][:6]

    asyncio.run(check())


def test_cached_blocks_belong_to_the_contents_of_an_adapter(
    paths: dict[str, Path], expected: dict[str | None, Tokens], tmp_path: Path
) -> None:
    changing = shutil.copytree(paths["one"], tmp_path / "changing")

    async def check() -> None:
        with started(paths, "tp=1", block_size=4) as engine:

            async def cached(name: str, like: str) -> int:
                steps = [step async for step in engine.generate(PROMPT, SHORT, next(_ids), lora=name)]
                tokens = [token for step in steps for delta in step for token in delta.token_ids]
                assert tokens == expected[like][:6]
                return steps[0][0].num_cached_tokens

            await engine.use_adapters(LoraAdapters((("a", str(changing)),)))
            assert [await cached("a", "one"), await cached("a", "one")] == [0, 36]
            shutil.copytree(paths["two"], changing, dirs_exist_ok=True)
            await engine.use_adapters(engine.config.lora)  # without a look at the files
            assert await cached("a", "one") == 36
            await engine.use_adapters(engine.config.lora, again=["a"])
            assert [await cached("a", "two"), await cached("a", "two")] == [0, 36]
            await engine.use_adapters(LoraAdapters((("b", str(paths["one"])), ("a", str(changing)))))
            assert [await cached("b", "one"), await cached("a", "two")] == [36, 36]  # of equal weights

    asyncio.run(check())


@pytest.mark.parametrize("layout", ["tp=1", "tp=2"])
def test_in_deterministic_mode_adapters_that_come_later_change_no_bit(
    paths: dict[str, Path], layout: str
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)

    async def numbers(engine: AsyncEngine) -> list[Any]:
        steps = [step async for step in engine.generate(PROMPT, params, next(_ids), lora="two")]
        return [delta.logprobs for step in steps for delta in step]

    async def check() -> None:
        settings = {"deterministic": True, "dtype": "bfloat16", "prefix_caching": False}
        with started(paths, layout, "two", **settings) as engine:
            alone = await numbers(engine)
        with started(paths, layout, **settings) as engine:
            await engine.use_adapters(of(paths, "three", "two"))
            assert await numbers(engine) == alone

    asyncio.run(check())
