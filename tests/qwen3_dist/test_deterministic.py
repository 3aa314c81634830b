"""Deterministic mode, whole models in bf16 and fp32: every answer is the same bits for every layout and batch.

What one rank answers in large steps is compared with what layouts answer whose settings are drawn at random: chunks of
prompts beside decodes, preemption, cached prefixes, drafts, other dispatchers and another order of requests.
"""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.outputs import RequestOutput
from qwen3_dist.settings import EngineConfig
from tests.adapters import EVERYTHING, write_adapter
from tests.checkpoints import TIGHT, write_checkpoint

pytestmark = pytest.mark.usefixtures("nursery")
# Nothing divides evenly: 99 dense columns, 10 experts of 45 columns, 199 tokens, 66 numbers of a hidden state.
ODD: dict[str, Any] = {"intermediate_size": 99, "hidden_size": 66, "num_hidden_layers": 3}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 45, "num_experts": 10, "num_experts_per_tok": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"moe": False, **ODD, "attention_bias": True},
    "dense int8": {
        "moe": False,
        **ODD,
        "tie_word_embeddings": True,
        "sliding_window": 9,
        "use_sliding_window": True,
    },
    "moe": {"moe": True, **ODD, **EXPERTS, "mlp_only_layers": [1]},
    "moe fp8 cache": {"moe": True, **ODD, **EXPERTS, "mlp_only_layers": [1]},
    "moe fp32": {"moe": True, **ODD, **EXPERTS, "num_attention_heads": 6, "num_key_value_heads": 3},
}
CASES = [
    ("dense", "tp=1"),
    ("dense", "tp=2"),
    ("dense", "tp=4"),  # more ranks than KV groups
    ("dense int8", "tp=2,pp=2"),
    ("moe", "tp=1"),
    ("moe", "tp=2,ep=2"),
    ("moe", "dp=2"),  # an expert's columns are split over dp groups
    ("moe", "tp=2,dp=2,ep=2"),
    ("moe fp8 cache", "tp=4"),
    ("moe fp8 cache", "dp=2,pp=2,ep=2"),
    ("moe fp32", "tp=3"),
    ("moe fp32", "dp=2,pp=2,ep=2"),
]
SHARED = [5, 9, 2, 7] * 5
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(3)] + [[7], [8, 1, 198, 0], list(range(100, 145))]
# greedy, with log-probabilities; drawn from all tokens; from some
PARAMS = [
    SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=1),
    SamplingParams(max_tokens=10, temperature=0.9, seed=5, ignore_eos=True, logprobs=0),
    SamplingParams(max_tokens=10, temperature=1.1, top_p=0.8, seed=6, ignore_eos=True, logprobs=1, n=2),
]
JOBS = [
    (prompt, params, (None, "adapter")[(row + column) % 2])
    for row, prompt in enumerate(PROMPTS)
    for column, params in enumerate(PARAMS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deterministic")


@functools.cache
def checkpoint(folder: Path, kind: str) -> Path:
    path = write_checkpoint(folder / kind, **SHAPES[kind])
    targets = (*EVERYTHING, "gate") if SHAPES[kind]["moe"] else EVERYTHING
    write_adapter(path / "adapter", path, targets, experts=True)
    return path


def answers(
    folder: Path, kind: str, jobs: list[Any], layout: str = "tp=1", **settings: Any
) -> list[RequestOutput]:
    path = checkpoint(folder, kind)
    with LLM(
        str(path),
        deterministic=True,
        dtype="float32" if "fp32" in kind else "bfloat16",
        quantize="int8" if "int8" in kind else "none",
        kv_cache_dtype="fp8" if "fp8 cache" in kind else "auto",
        layout=layout,
        executor="in_process" if Layout.parse(layout).world == 1 else "processes",
        lora=f"adapter={path / 'adapter'}",
        **{"use_tqdm": False, **settings},
    ) as llm:
        prompts, params, adapters = zip(*jobs, strict=True)
        return llm.generate([*prompts], [*params], use_tqdm=False, lora=[*adapters])


@functools.cache
def answers_of_one_rank(folder: Path, kind: str) -> list[RequestOutput]:
    return answers(folder, kind, JOBS, threads_per_rank=2)


def first_difference(got: RequestOutput, expected: RequestOutput) -> str | None:
    """Where two answers part: in the prompt or an output, at which token."""
    parts = [("prompt", got.prompt_logprobs or [], expected.prompt_logprobs or [])]
    for choice, (ours, theirs) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        parts.append((f"output {choice}", ours.logprobs or [], theirs.logprobs or []))
    for name, ours, theirs in parts:
        for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                return f"{name} of {len(expected.prompt_token_ids)} tokens at {at}: {one} and not {other}"
    same = [each.token_ids for each in got.outputs] == [each.token_ids for each in expected.outputs]
    return None if same else "tokens"


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_layout_and_batch_gives_the_same_bits(folder: Path, kind: str, layout: str) -> None:
    random = Random(f"{kind} {layout}")
    places = random.sample(range(len(JOBS)), len(JOBS))
    settings = {
        "max_num_batched_tokens": random.choice([13, 16, 32]),
        "moe_dispatch": random.choice(["all_gather", "all_to_all"]),
        "speculative": random.choice([None, "ngram,k=3"]),
        "overlap": random.random() < 0.5,
        "threads_per_rank": random.choice([1, 3]),
    }
    got = answers(folder, kind, [JOBS[place] for place in places], layout, **{**TIGHT, **settings})
    expected = answers_of_one_rank(folder, kind)
    parted = [first_difference(each, expected[place]) for place, each in zip(places, got, strict=True)]
    assert not any(parted), (settings, [part for part in parted if part])


def test_the_cases_hold_every_way_to_split() -> None:
    layouts = [Layout.parse(layout) for _, layout in CASES]
    assert any(layout.etp > 1 and layout.ep > 1 and layout.dp > 1 for layout in layouts)
    assert any(layout.pp > 1 and layout.tp > 1 for layout in layouts)


def test_what_cannot_be_deterministic_is_refused() -> None:
    with pytest.raises(ConfigError, match="deterministic needs dispatch_dtype=auto"):
        EngineConfig(deterministic=True, dispatch_dtype="fp8")
