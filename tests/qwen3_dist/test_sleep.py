"""Engines that sleep and wake while requests wait."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import CheckpointError, RequestError, ResourceError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.weights_version import WeightsVersion
from qwen3_dist.worker.shard import held_bytes
from tests import failing_ranks
from tests.checkpoints import write_checkpoint
from tests.swapping import (
    PROMPT,
    SHORT,
    Tokens,
    ask,
    begin,
    of,
    started,
)

pytestmark = pytest.mark.usefixtures("nursery")


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2", "tp=2,pp=2"])
def test_an_engine_that_slept_goes_on_with_the_same_tokens(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], layout: str, level: int
) -> None:
    async def check() -> None:
        with started(versions, layout) as engine:
            running = await begin(engine)
            await engine.sleep(level)
            steps = engine.stats().steps
            waiting = asyncio.create_task(ask(engine))
            await asyncio.sleep(0.3)
            assert engine.stats().steps == steps and not waiting.done()
            await engine.wake()
            assert await running() == tokens_of["base"]
            assert await waiting == tokens_of["base"][:6]
            await engine.sleep(level)
            await engine.use_weights(of(versions, "one"))
            await engine.wake()
            assert await ask(engine) == tokens_of["one"][:6]

    asyncio.run(check())


@pytest.mark.parametrize("level", [1, 2])
def test_a_rank_that_is_replaced_sleeps_as_the_others_do(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], level: int
) -> None:
    async def check() -> None:
        with started(versions, "tp=2") as engine:
            await engine.use_weights(of(versions, "one"))
            await engine.sleep(level)
            os.kill(engine.ranks[1].pid, signal.SIGKILL)
            while not engine.recoveries:
                await asyncio.sleep(0.02)
            await engine.recovered()
            waiting = asyncio.create_task(ask(engine))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await engine.wake()
            assert await waiting == tokens_of["one"][:6]

    asyncio.run(check())


def test_weights_that_cannot_be_loaded_again_leave_the_engine_asleep(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], tmp_path: Path
) -> None:
    place = shutil.copytree(versions["one"], tmp_path / "place")

    async def check() -> None:
        with started(versions, "tp=2") as engine:
            await engine.use_weights(WeightsVersion(str(place), "one"))
            await engine.sleep(2)
            shutil.rmtree(place)
            for _ in range(2):
                with pytest.raises(CheckpointError, match="there is no directory"):
                    await engine.wake()
            await engine.use_weights(of(versions, "two"))
            await engine.wake()
            assert await ask(engine) == tokens_of["two"][:6]

    asyncio.run(check())


def test_an_engine_that_lacks_memory_to_wake_sleeps_on_in_all_ranks(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = staticmethod(failing_ranks.rank_1_lacks_memory_every_other_time_it_wakes)
    monkeypatch.setattr(Launcher, "main", main)

    async def check() -> None:
        with started(versions, "tp=2") as engine:
            running = await begin(engine)
            for level in (1, 2):
                await engine.sleep(level)
                with pytest.raises(ResourceError, match=r"^rank 1 cannot wake: it needs 3.00 GiB$"):
                    await engine.wake()
                assert engine.asleep == level
                await engine.wake()
            await engine.sleep(1)
            with pytest.raises(
                ResourceError, match="rank 1 cannot wake"
            ):  # to give up the weights that it keeps
                await engine.use_weights(WeightsVersion(str(next(iter(versions.values()))), "v2"))
            assert engine.asleep == 1
            await engine.wake()
            assert await running() == tokens_of["base"] and not engine.recoveries

    asyncio.run(check())


def test_a_rank_that_lacks_memory_gives_back_what_it_took_and_tells_how_much_is_missing(
    versions: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU. There is none here, so its calls are noted."""
    sizes: dict[int, int] = {}  # of storages, by address
    room = 2

    def resize(storage: torch.UntypedStorage, size: int) -> None:
        if size and sum(map(bool, sizes.values())) == room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes[storage.data_ptr()] = size

    with LLM(str(versions["base"]), use_tqdm=False, device="cpu") as llm:
        [before] = llm.generate(PROMPT, SHORT, use_tqdm=False)
        llm.sleep()
        executor: Any = llm._engine._executor
        memory = executor._runner._asleep
        memory._on_gpu = True
        needed = sum(memory._sizes) / 2**30
        monkeypatch.setattr(torch.UntypedStorage, "resize_", resize)
        for name in ("empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**40))
        told = f"rank 0 cannot wake: it needs {needed:.2f} GiB of its card, which has 0.00 GiB free; "
        with pytest.raises(ResourceError, match=f"^{told}free {needed:.2f} GiB more and wake it again$"):
            llm.wake_up()
        assert len(sizes) == len(memory._sizes) and not any(sizes.values())
        room = len(sizes)
        llm.wake_up()
        assert llm.generate(PROMPT, SHORT, use_tqdm=False)[0].outputs == before.outputs


def test_llm_sleeps_and_changes_its_weights(versions: dict[str, Path], tokens_of: dict[str, Tokens]) -> None:
    with LLM(str(versions["base"]), use_tqdm=False) as llm:

        def tokens() -> Tokens:
            [output] = llm.generate(PROMPT, SHORT, use_tqdm=False)
            return list(output.outputs[0].token_ids)

        assert tokens() == tokens_of["base"][:6]
        assert llm.update_weights(str(versions["one"])).bytes_read > 0
        assert tokens() == tokens_of["one"][:6]
        for level in (1, 2):
            llm.sleep(level)
            with pytest.raises(RequestError, match="call wake_up"):
                tokens()
            llm.wake_up()
            assert tokens() == tokens_of["one"][:6]
        with pytest.raises(CheckpointError):
            llm.update_weights(str(versions["one"]) + "x")
        assert tokens() == tokens_of["one"][:6]


def test_an_engine_that_sleeps_gives_its_memory_back(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_key_value_heads": 8, "head_dim": 64}
    path = write_checkpoint(tmp_path / "wide", moe=False, **shape)
    with LLM(str(path), use_tqdm=False, num_blocks=512, device="cpu") as llm:
        prompts = [[3 + i] * 400 for i in range(20)]  # they fill most blocks
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        executor: Any = llm._engine._executor
        cache, device = executor._runner._cache, executor._runner.model.device
        kv = sum(each.keys.nbytes + each.values.nbytes for each in cache)
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert kv == 2**27 and weights > 2**26
        held = [held_bytes(device)]
        for level in (1, 2):
            llm.sleep(level)
            held.append(held_bytes(device))
        assert held[0] - held[1] > 0.9 * kv
        assert held[1] - held[2] > 0.9 * weights
