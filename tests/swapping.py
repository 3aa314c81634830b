"""Engines whose weights change, and what each version of them generates."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import bundled_path
from qwen3_dist.weights_version import WeightsVersion
from tests.checkpoints import write_checkpoint

PROMPT = list(range(3, 40))
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
Tokens = list[int]
_ids = map(str, itertools.count())


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one architecture with different weights, by name."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        name: write_checkpoint(folder / name, moe=True, seed=seed, mlp_only_layers=[1], intermediate_size=99)
        for seed, name in enumerate(("base", "one", "two"))
    }


@pytest.fixture(scope="session")
def tokens_of(versions: dict[str, Path]) -> dict[str, Tokens]:
    """What each of the checkpoints answers to PROMPT."""
    found = {}
    for name, path in versions.items():
        with LLM(str(path), use_tqdm=False) as llm:
            [output] = llm.generate(PROMPT, LONG, use_tqdm=False)
        found[name] = list(output.outputs[0].token_ids)
    assert len({str(tokens[:6]) for tokens in found.values()}) == 3
    return found


def of(versions: dict[str, Path], name: str) -> WeightsVersion:
    return WeightsVersion(str(versions[name]), name)


@contextmanager
def started(versions: dict[str, Path], layout: str, **settings: Any) -> Iterator[AsyncEngine]:
    config = EngineConfig(model=str(versions["base"]), layout=layout, executor="processes", **settings)
    engine = AsyncEngine(config)
    try:
        yield engine
    finally:
        engine.shutdown()


async def ask(engine: AsyncEngine, prompt: Tokens = PROMPT, params: SamplingParams = SHORT) -> Tokens:
    steps = engine.generate(prompt, params, next(_ids))
    return [token for step in [step async for step in steps] for delta in step for token in delta.token_ids]


async def begin(engine: AsyncEngine) -> Callable[[], Coroutine[Any, Any, Tokens]]:
    """Starts a long request and waits for its first token. Returns what waits for all of its tokens."""
    steps = engine.generate(PROMPT, LONG, next(_ids))
    first = [token for delta in await anext(steps) for token in delta.token_ids]

    async def rest() -> Tokens:
        return first + [
            t for step in [step async for step in steps] for delta in step for t in delta.token_ids
        ]

    return rest


def continued(path: Path, tokens: Tokens, changed_at: int) -> Tokens:
    """What the weights at `path` generate after the first tokens, which others generated."""
    with LLM(str(path), use_tqdm=False) as llm:
        params = SamplingParams(max_tokens=len(tokens) - changed_at, temperature=0, ignore_eos=True)
        [output] = llm.generate(PROMPT + tokens[:changed_at], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def write_other_weights(path: Path) -> Path:
    """The bundled model with other weights in its dense layers."""
    shutil.copytree(bundled_path(), path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in (each for each in tensors if ".mlp.down_proj." in each):
        tensors[name] = -tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return path
