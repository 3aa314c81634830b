"""Weights that change while requests run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM
from qwen3_dist.errors import CheckpointError, EngineDeadError, QwenDistError
from qwen3_dist.weights_version import WeightsVersion
from qwen3_dist.worker.background import Background
from tests.checkpoints import write_checkpoint
from tests.swapping import (
    PROMPT,
    SHORT,
    Tokens,
    ask,
    begin,
    continued,
    of,
    started,
)

pytestmark = pytest.mark.usefixtures("nursery")


@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "dp=2,ep=2", "tp=2,pp=2"])
def test_requests_wait_and_go_on_with_the_new_weights(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], layout: str
) -> None:
    async def check() -> Tokens:
        with started(versions, layout, block_size=4) as engine:
            assert await ask(engine) == tokens_of["base"][:6]
            running = [await begin(engine) for _ in range(2)]
            loaded = await engine.use_weights(of(versions, "one"))
            assert loaded.bytes_read > 0 and loaded.seconds > 0
            assert engine.config.weights.version == "one"
            assert await ask(engine) == tokens_of["one"][:6]  # no prefix of the old weights is found
            got = [await rest() for rest in running]
            assert [len(each) for each in got] == [200, 200]
            await engine.use_weights(of(versions, "two"))
            assert await ask(engine) == tokens_of["two"][:6]
            await engine.use_weights(WeightsVersion())
            assert await ask(engine) == tokens_of["base"][:6]
            engine._engine.check_integrity()
            return got[0]

    tokens = asyncio.run(check())
    changed_at = next(i for i, (a, b) in enumerate(zip(tokens, tokens_of["base"], strict=True)) if a != b)
    assert 0 < changed_at < 200
    # The new weights computed the KV of the tokens before anew, or what follows would be another text.
    assert tokens[changed_at:] == continued(versions["one"], tokens, changed_at)


def test_kept_kv_is_that_of_the_old_weights_and_nobody_else_finds_it(
    versions: dict[str, Path], tokens_of: dict[str, Tokens]
) -> None:
    async def check() -> None:
        with started(versions, "tp=2", block_size=4) as engine:
            kept = await begin(engine)
            await engine.use_weights(of(versions, "one"), keep_cache=True)
            preemptions = engine.stats().preemptions
            assert await ask(engine) == tokens_of["one"][:6]
            tokens = await kept()
            assert preemptions == engine.stats().preemptions == 0
            changed_at = next(
                i for i, (a, b) in enumerate(zip(tokens, tokens_of["base"], strict=True)) if a != b
            )
            assert tokens[changed_at:] != continued(versions["one"], tokens, changed_at)
            # Its blocks are not found by prompts that are as its tokens are: the first has those before them cached.
            whole, new = PROMPT + tokens[:100], continued(versions["one"], tokens[:106], 100)
            assert [await ask(engine, whole), await ask(engine, whole)] == [new, new]
            engine._engine.check_integrity()

    asyncio.run(check())


def _without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _with_config(**fields: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def _cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_with_config(rms_norm_eps=1e-3), "has rms_norm_eps 0.001 where the model has 1e-06"),
        (_with_config(num_hidden_layers=3), "has n_layers 3 where the model has 4"),
        (
            _with_config(
                quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
            ),
            "has quantization",
        ),
        (_without("model.layers.2.mlp.gate.weight"), r"lacks 1 tensor \(model.layers.2.mlp.gate.weight\)"),
        (_cut, "model.safetensors"),
        (shutil.rmtree, "there is no directory"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    versions: dict[str, Path],
    tokens_of: dict[str, Tokens],
    tmp_path: Path,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    bad = shutil.copytree(versions["one"], tmp_path / "bad")
    damage(bad)

    async def check() -> None:
        with started(versions, "tp=2") as engine:
            running = await begin(engine)
            with pytest.raises(CheckpointError, match=reason):
                await engine.use_weights(WeightsVersion(str(bad), "bad"))
            assert engine.config.weights == WeightsVersion()
            assert await running() == tokens_of["base"]
            assert engine.stats().preemptions == 0

    asyncio.run(check())


def test_a_rank_that_fails_while_it_loads_has_all_load_the_old_weights_again(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], tmp_path: Path
) -> None:
    """A file of the last layers is gone when other weights have been replaced already."""
    split = write_checkpoint(
        tmp_path / "split",
        moe=True,
        seed=1,
        mlp_only_layers=[1],
        intermediate_size=99,
        max_shard_size="200KB",
    )
    places = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    of_last = {file for name, file in places.items() if name.startswith("model.layers.3.")}
    gone = split / min(of_last - {file for name, file in places.items() if ".layers.3." not in name})

    async def check() -> None:
        with started(versions, "tp=2") as engine:
            running = await begin(engine)
            changes = engine._engine.changes.weights
            call = changes._executor.call

            def planted(method: str, *arguments: Any) -> list[Any]:
                if method == "load_weights":
                    gone.unlink(missing_ok=True)
                return call(method, *arguments)

            changes._executor.call = planted  # type: ignore[method-assign]
            with pytest.raises(CheckpointError):
                await engine.use_weights(WeightsVersion(str(split), "split"))
            assert engine.config.weights == WeightsVersion()
            assert await ask(engine) == tokens_of["base"][:6]
            assert await running() == tokens_of["base"]

    asyncio.run(check())


@pytest.mark.parametrize(("layout", "lost"), [("tp=2", 1), ("dp=2,ep=2", 0)])
def test_a_rank_that_is_replaced_has_the_weights_of_now(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], layout: str, lost: int
) -> None:
    async def check() -> None:
        with started(versions, layout) as engine:
            await engine.use_weights(of(versions, "one"))
            assert await ask(engine) == tokens_of["one"][:6]
            os.kill(engine.ranks[lost].pid, signal.SIGKILL)
            while not engine.recoveries:
                await asyncio.sleep(0.02)
            await engine.recovered()
            for _ in range(2):  # both groups of dp=2 answer
                assert await asyncio.gather(*(ask(engine) for _ in range(4))) == [tokens_of["one"][:6]] * 4

    asyncio.run(check())


def test_files_that_changed_since_are_not_mixed_with_those_that_other_ranks_have(
    versions: dict[str, Path], tokens_of: dict[str, Tokens], tmp_path: Path
) -> None:
    place = shutil.copytree(versions["one"], tmp_path / "place")

    async def check() -> None:
        with started(versions, "tp=2") as engine:
            await engine.use_weights(WeightsVersion(str(place), "one"))
            shutil.copytree(versions["two"], place, dirs_exist_ok=True)
            os.kill(engine.ranks[1].pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                while True:
                    await ask(engine)
                    await engine.recovered()
            with pytest.raises(EngineDeadError):
                await engine.recovered()

    asyncio.run(check())


def test_a_rank_that_is_lost_during_a_change_leaves_all_with_the_old_weights(
    versions: dict[str, Path], tokens_of: dict[str, Tokens]
) -> None:
    async def check() -> None:
        with started(versions, "tp=2") as engine:
            changes = engine._engine.changes.weights
            call = changes._executor.call

            def planted(method: str, *arguments: Any) -> list[Any]:
                if method == "finish_weights":  # all ranks have the new ones
                    os.kill(engine.ranks[0].pid, signal.SIGKILL)
                return call(method, *arguments)

            changes._executor.call = planted  # type: ignore[method-assign]
            with pytest.raises(EngineDeadError):
                await engine.use_weights(of(versions, "one"))
            await engine.recovered()
            assert engine.config.weights == WeightsVersion()
            assert await ask(engine) == tokens_of["base"][:6]

    asyncio.run(check())


@pytest.mark.parametrize("kind", [CheckpointError, MemoryError])
def test_work_that_failed_keeps_no_memory(kind: type[Exception]) -> None:
    class Tensors:
        pass

    held: list[weakref.ref[Tensors]] = []

    def load(given: Tensors) -> None:
        loaded = Tensors()
        held.extend((weakref.ref(given), weakref.ref(loaded)))
        raise kind("no room") from OSError("the disk")

    work = Background("the weights", partial(load, Tensors()), None)
    work.start()
    work.join()
    assert isinstance(work.arrived, QwenDistError) and "no room" in str(work.arrived)
    assert [each() for each in held] == [None, None]


def test_a_random_model_takes_weights_and_int8_ones_are_made_anew(
    versions: dict[str, Path],
) -> None:
    settings: dict[str, Any] = {"quantize": "int8", "use_tqdm": False}
    with LLM(str(versions["one"]), **settings) as llm:
        [expected] = llm.generate(PROMPT, SHORT, use_tqdm=False)
    with LLM(str(versions["base"]), load_format="random", **settings) as llm:
        [before] = llm.generate(PROMPT, SHORT, use_tqdm=False)
        llm.sleep(2)
        llm.wake_up()
        assert llm.generate(PROMPT, SHORT, use_tqdm=False) == [before]
        llm.update_weights(str(versions["one"]))
        assert llm.generate(PROMPT, SHORT, use_tqdm=False)[0].outputs == expected.outputs != before.outputs
