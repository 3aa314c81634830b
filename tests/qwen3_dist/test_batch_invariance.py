"""What a sequence gets depends on nothing around it: chunks, cached prefixes, preemption, neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.model.reference import load_reference
from tests.checkpoints import TIGHT

SHARED = list(range(20, 46))
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(6)] + [SHARED[:9], [7, 8], list(range(100, 150))]
LENGTH = 14
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=LENGTH, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The reference's greedy tokens after each prompt, for each checkpoint."""
    references = {kind: load_reference(path) for kind, path in checkpoints.items()}
    return {
        kind: [reference.generate_greedy(prompt, LENGTH) for prompt in PROMPTS]
        for kind, reference in references.items()
    }


@pytest.mark.parametrize(
    ("kind", "layout", "overlap", "blocks"),
    [
        ("dense", "tp=1", True, 24),
        ("dense", "tp=2", True, 24),
        ("dense", "pp=2", True, 24),
        ("moe", "tp=1", True, 24),
        ("moe", "tp=2,ep=2", True, 24),
        ("moe", "tp=2,ep=2", False, 24),
        ("moe", "dp=2,ep=2", True, 17),  # of each group, which has half the sequences
        ("moe", "dp=2,pp=2,ep=2", True, 17),
    ],
)
def test_neither_chunks_caching_preemption_nor_neighbours_change_a_token(
    checkpoints: dict[str, Path],
    expected: dict[str, list[list[int]]],
    kind: str,
    layout: str,
    overlap: bool,
    blocks: int,
) -> None:
    form = "in_process" if layout == "tp=1" else "processes"
    tight = {**TIGHT, "num_blocks": blocks}
    with LLM(str(checkpoints[kind]), layout=layout, executor=form, overlap=overlap, **tight) as llm:
        first = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        stats = llm._engine.stats()
        assert stats.preemptions > 0 and stats.prefix_hit_rate > 0
        again = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)[::-1]
        drawn = llm.generate(PROMPTS, DRAWN, use_tqdm=False)
        alone = [llm.generate([prompt], DRAWN, use_tqdm=False)[0] for prompt in PROMPTS]
        llm._engine.check_integrity()
        stats = llm._engine.stats()
    assert [output.token_ids for output in first] == expected[kind]
    assert [output.token_ids for output in again] == expected[kind]
    assert any(output.num_cached_tokens for output in again)
    assert [output.token_ids for output in drawn] == [output.token_ids for output in alone]
    assert stats.free_blocks == stats.total_blocks


def test_without_prefix_caching_nothing_is_found(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["dense"]), prefix_caching=False, **TIGHT) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
            assert [output.num_cached_tokens for output in outputs] == [0, 0]
        assert llm._engine.stats().cached_blocks == 0


def test_requests_go_to_the_group_with_fewest_tokens_or_with_their_prefix(
    checkpoints: dict[str, Path],
) -> None:
    with LLM(
        str(checkpoints["moe"]), layout="dp=2,ep=2", executor="processes", block_size=4, use_tqdm=False
    ) as llm:
        engine = llm._engine

        def add(name: str, prompt: list[int], n: int = 1) -> list[int]:
            """Sequences that wait in each group then."""
            engine.add_request(name, prompt, replace(GREEDY, n=n))
            return [len(group.waiting) for group in engine._groups]

        def finish() -> None:
            while engine.has_work:
                engine.step()

        assert add("a", SHARED) == [1, 0]
        assert add("b", [7, 8]) == [1, 1]
        assert add("c", [9], n=3) == [1, 4]  # 2 tokens ahead there, 26 here; choices share their prompt
        assert add("d", list(range(100, 140))) == [1, 5]
        assert add("e", [11]) == [2, 5]
        finish()
        assert add("f", list(range(100, 139))) == [0, 1]  # where its prefix was computed
        assert add("g", [*SHARED, 3]) == [1, 1]
        finish()
        assert engine.stats().cached_prompt_tokens == 36 + 24
