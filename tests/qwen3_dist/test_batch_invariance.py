"""What a sequence gets depends on nothing around it: chunks, cached prefixes, preemption, neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.reference import load_reference
from tests.checkpoints import write_checkpoint

SHARED = list(range(20, 46))
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(6)] + [SHARED[:9], [7, 8], list(range(100, 150))]
LENGTH = 14
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=LENGTH, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
# Chunks of at most 16 tokens, and a cache that holds two of the longer sequences.
TIGHT: dict[str, Any] = {
    "block_size": 4,
    "num_blocks": 24,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 6,
    "use_tqdm": False,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "dense": write_checkpoint(tmp_path_factory.mktemp("dense"), moe=False),
        "moe": write_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, mlp_only_layers=[1]),
    }


@pytest.mark.parametrize(
    ("kind", "layout", "overlap"),
    [
        ("dense", "tp=1", True),
        ("dense", "tp=2", True),
        ("moe", "tp=1", True),
        ("moe", "tp=2,ep=2", True),
        ("moe", "tp=2,ep=2", False),
    ],
)
def test_neither_chunks_caching_preemption_nor_neighbours_change_a_token(
    checkpoints: dict[str, Path], kind: str, layout: str, overlap: bool
) -> None:
    reference = load_reference(checkpoints[kind])
    expected = [reference.generate_greedy(prompt, LENGTH) for prompt in PROMPTS]
    form = "in_process" if layout == "tp=1" else "processes"
    with LLM(str(checkpoints[kind]), layout=layout, executor=form, overlap=overlap, **TIGHT) as llm:
        first = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        stats = llm._engine.stats()
        assert stats.preemptions > 0 and stats.prefix_hit_rate > 0
        again = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)[::-1]
        drawn = llm.generate(PROMPTS, DRAWN, use_tqdm=False)
        alone = [llm.generate([prompt], DRAWN, use_tqdm=False)[0] for prompt in PROMPTS]
        llm._engine.check_integrity()
        stats = llm._engine.stats()
    assert [output.token_ids for output in first] == expected
    assert [output.token_ids for output in again] == expected
    assert any(output.num_cached_tokens for output in again)
    assert [output.token_ids for output in drawn] == [output.token_ids for output in alone]
    assert stats.free_blocks == stats.total_blocks


def test_without_prefix_caching_nothing_is_found(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["dense"]), prefix_caching=False, **TIGHT) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
            assert [output.num_cached_tokens for output in outputs] == [0, 0]
        assert llm._engine.stats().cached_blocks == 0
